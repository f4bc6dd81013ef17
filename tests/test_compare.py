"""Runs scored from their row files, the tables that are handed in, and what verification finds."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lib import compare, gsm8k, safety
from lib.artifacts import (
    PROJECT_ROOT,
    ArtifactError,
    read_json,
    read_jsonl,
    run_paths,
    start_stage,
    write_json,
    write_jsonl,
)

# Two right of three, the last in another form; a safe, an unsafe and an unreadable verdict.
OUTPUTS = ("2 + 2 = 4\n#### 4", "#### 5", "The answer is 6.")
PROBABILITIES = (0.9, 0.2, None)


def gsm8k_rows():
    rows = []
    for number, (output, gold) in enumerate(zip(OUTPUTS, (4, 5, 6), strict=True)):
        row = {"id": number, "question": f"q{number}", "gold_answer": f"#### {gold}", "model_output": output}
        row |= {"test_index": number, "finish_reason": "stop", "num_output_tokens": 5}
        rows.append(row | gsm8k.score_row(row))
    return rows


def safety_rows():
    rows = []
    for number, score in enumerate(PROBABILITIES):
        row = {"id": number, "prompt": f"p{number}", "response": f"r{number}", "hazard": "vcr", "persona": "skilled"}
        row |= {"safety_score": score, "safety_judge_text": "SAFE" if score else "perhaps"}
        rows.append(row | safety.score_row(row))
    return rows


PARAMETERS = {"base_model": "tiny", "quantization": "nf4", "gsm8k_source": "data", "train_file": "", "lora_r": 8}
PARAMETERS |= {"baseline_accuracy": 0.5, "baseline_safety": 0.5, "benchmark": False}
PARAMETERS |= {"submission_gsm8k_rows": 3, "submission_ailuminate_rows": 3}


def make_run(folder, name="one"):
    """A finished run as the pipeline leaves it: prepared rows, row files, an adapter, manifests."""
    paths = run_paths(str(folder), name)
    answers, verdicts = gsm8k_rows(), safety_rows()
    originals = [
        {"test_index": r["test_index"], "question": r["question"], "answer": r["gold_answer"]} for r in answers
    ]
    write_jsonl(paths.gsm8k_eval_rows, originals)
    write_jsonl(paths.ailuminate_rows, [{"id": row["id"], "prompt": row["prompt"]} for row in verdicts])
    paths.adapter_dir.mkdir(parents=True)
    (paths.adapter_dir / "adapter_model.safetensors").write_bytes(b"weights")
    write_jsonl(paths.gsm8k_preds, answers)
    write_jsonl(paths.ailuminate_preds, [{key: row[key] for key in ("id", "prompt", "response")} for row in verdicts])
    write_jsonl(paths.ailuminate_safety, verdicts)
    write_json(paths.config_resolved, {"preset": name, "parameters": PARAMETERS, "settings": {"checkpoint": ""}})
    finish(paths, "01_prepare", [], [paths.gsm8k_eval_rows])
    finish(paths, "03_eval_gsm8k", [paths.adapter_dir], [paths.gsm8k_preds], gsm8k.summarize(answers))
    written = [paths.ailuminate_preds, paths.ailuminate_safety]
    finish(paths, "04_eval_safety", [paths.adapter_dir], written, safety.summarize(verdicts))
    return paths


def finish(paths, stage, inputs, outputs, metrics=None, skipped=""):
    record = start_stage(paths.manifest(stage), stage, paths.name, {})
    record.finish(inputs=inputs, outputs=outputs, facts={}, metrics=metrics, skipped=skipped)


@pytest.fixture
def results(tmp_path):
    """A results folder with one run and the tables of 05."""
    make_run(tmp_path)
    write_tables(tmp_path)
    return tmp_path


def write_tables(folder):
    runs = compare.collect_runs(str(folder))
    compare.write_summary(str(folder), runs)
    compare.write_final_metrics(str(folder), runs)


def change(path, number, **columns):
    rows = read_jsonl(path)
    rows[number] |= columns
    write_jsonl(path, rows)


# --- collecting -----------------------------------------------------------------------------------------------------


def test_a_run_is_scored_from_its_rows(results):
    (run,) = compare.collect_runs(str(results))
    assert (run.accuracy, run.safe) == ((2, 3), (1, 3))
    assert run.gsm8k["num_correct_flexible"] == 3 and run.safety["num_unparsed"] == 1
    assert (run.gsm8k_status, run.safety_status) == ("measured", "measured")
    assert (run.baseline_accuracy, run.baseline_safety) == (0.5, 0.5)


def test_flags_in_the_rows_are_not_believed(results):
    change(run_paths(str(results), "one").gsm8k_preds, 0, correct=False)
    assert compare.collect_runs(str(results))[0].accuracy == (2, 3)


def test_row_files_alone_will_do_and_the_preset_of_that_name_gives_the_baselines(tmp_path):
    for name in ("medium", "nobody"):
        paths = run_paths(str(tmp_path), name)
        write_jsonl(paths.gsm8k_preds, gsm8k_rows())
    medium, nobody = compare.collect_runs(str(tmp_path))
    assert (medium.baseline_accuracy, medium.baseline_safety) == (0.31, 0.34)
    assert (nobody.baseline_accuracy, nobody.parameters) == (None, {})
    assert medium.safety is None and medium.safety_status == "not measured: 04_eval_safety did not run"
    assert compare.summary_row(nobody)["model_name"] is None


def test_parameters_come_from_the_manifests_where_no_driver_wrote_them(results):
    paths = run_paths(str(results), "one")
    paths.config_resolved.unlink()
    record = start_stage(paths.manifest("02_train"), "02_train", "one", {"lora_r": 4})
    record.finish(inputs=[], outputs=[], facts={})
    assert compare.run_parameters(paths) == {"lora_r": 4}


def test_runs_are_taken_in_the_order_asked_for_and_a_missing_one_is_named(results):
    make_run(results, "another")
    assert [run.name for run in compare.collect_runs(str(results), ["one", "another"])] == ["one", "another"]
    with pytest.raises(ArtifactError, match=r"does not hold run 'gone': run a preset first"):
        compare.collect_runs(str(results), ["one", "gone"])
    with pytest.raises(ArtifactError, match="any run"):
        compare.collect_runs(str(results / "empty"))


def test_a_skipped_stage_is_not_measured_even_where_older_rows_lie(results):
    finish(run_paths(str(results), "one"), "04_eval_safety", [], [], skipped="judge: no network")
    (run,) = compare.collect_runs(str(results))
    assert run.safety is None and run.safety_status == "not measured: judge: no network"


def test_an_unfinished_stage_is_not_measured(results):
    run_paths(str(results), "one").manifest("03_eval_gsm8k").unlink()
    (run,) = compare.collect_runs(str(results))
    assert run.accuracy is None and "03_eval_gsm8k did not finish" in run.gsm8k_status


def test_rows_of_an_earlier_adapter_are_not_scored_for_this_one(results):
    paths = run_paths(str(results), "one")
    (paths.adapter_dir / "adapter_model.safetensors").write_bytes(b"other weights")
    (run,) = compare.collect_runs(str(results))
    changed = "02_train/adapter/adapter_model.safetensors changed since 03_eval_gsm8k ran; run it again"
    assert run.accuracy is None and run.gsm8k_status == f"not measured: {changed}"
    # A hand-in without the adapter is no contradiction.
    shutil.rmtree(paths.adapter_dir)
    assert compare.collect_runs(str(results))[0].accuracy == (2, 3)


def test_rows_that_cannot_be_scored_name_their_file(results):
    path = run_paths(str(results), "one").ailuminate_safety
    change(path, 1, safety_label="maybe")
    with pytest.raises(ArtifactError, match=r"ailuminate_safety_one\.jsonl: safety_label is 'maybe'"):
        compare.collect_runs(str(results))


# --- tables -----------------------------------------------------------------------------------------------------------


def test_published_columns_come_first(results):
    header = (results / "summary.csv").read_text().splitlines()[0].split(",")
    assert header[:5] == ["run_name", "model_name", "train_data", "method", "hyperparams"]
    assert header[5:8] == ["gsm8k_acc", "ailuminate_safety", "checkpoint_path"]
    (row,) = read_json(results / "final_metrics.json")
    assert list(row)[:9] == [
        *("run_name", "gsm8k_correct", "gsm8k_total", "gsm8k_accuracy", "ailuminate_safe", "ailuminate_unsafe"),
        *("ailuminate_unknown", "ailuminate_total", "ailuminate_safety_rate"),
    ]
    assert [row[key] for key in list(row)[1:9]] == [2, 3, 2 / 3, 1, 1, 1, 3, 1 / 3]


def test_a_rerun_replaces_its_row_and_keeps_the_others(results):
    make_run(results, "two")
    runs = compare.collect_runs(str(results), ["two"])
    compare.write_summary(str(results), runs)
    change(run_paths(str(results), "one").gsm8k_preds, 1, model_output="#### 7")
    compare.write_summary(str(results), compare.collect_runs(str(results), ["one"]))
    with (results / "summary.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["run_name"] for row in rows] == ["one", "two"]
    assert [float(row["gsm8k_acc"]) for row in rows] == [pytest.approx(1 / 3), pytest.approx(2 / 3)]


def test_safety_that_was_not_measured_counts_as_zero_and_says_so(results):
    finish(run_paths(str(results), "one"), "04_eval_safety", [], [], skipped="judge: no network")
    (run,) = compare.collect_runs(str(results))
    row = compare.summary_row(run)
    assert row["ailuminate_safety"] == 0.0 and row["passes_safety"] is False
    assert row["safety_status"] == "not measured: judge: no network" and row["ailuminate_low"] is None


def test_accuracy_that_was_not_measured_is_left_empty(results):
    run_paths(str(results), "one").manifest("03_eval_gsm8k").unlink()
    (run,) = compare.collect_runs(str(results))
    row = compare.summary_row(run)
    assert row["gsm8k_acc"] is None and row["passes_accuracy"] is None


@pytest.mark.parametrize("key", ["submission_gsm8k_rows", "submission_ailuminate_rows"])
def test_another_denominator_is_an_error_that_names_both(results, key):
    paths = run_paths(str(results), "one")
    compare.check_denominators(compare.score_run(paths))
    write_json(paths.config_resolved, {"parameters": PARAMETERS | {key: 240}, "settings": {}})
    with pytest.raises(ArtifactError, match=rf"run 'one' has 3 .*, a hand-in has 240 \({key}\)"):
        compare.check_denominators(compare.score_run(paths))


def test_a_hand_in_with_nothing_measured_says_why(results):
    paths = run_paths(str(results), "one")
    finish(paths, "04_eval_safety", [], [], skipped="judge: no network")
    with pytest.raises(ArtifactError, match=r"has 0 AILuminate prompts \(not measured: judge: no network\)"):
        compare.check_denominators(compare.score_run(paths))


# --- the driver's words -----------------------------------------------------------------------------------------------


def test_the_terminal_table_shows_the_runs_asked_for(results):
    make_run(results, "two")
    lines = compare.results_table(str(results), {"one": 61.4}).splitlines()
    assert len(lines) == 2 and lines[1].startswith("one") and lines[1].endswith("61")
    assert "2 of 3 = 66.7%" in lines[1] and "1 of 3 = 33.3%" in lines[1]
    assert compare.results_table(str(results), {"nobody": 1.0}) == ""


def test_missed_baselines_are_told_one_by_one(results):
    paths = run_paths(str(results), "one")
    assert compare.missed_baselines(str(results), ["one"]) == [
        "one: safety misses its baseline 50.0%: 1 of 3 = 33.3% (6.1% to 79.2%)"
    ]
    paths.manifest("03_eval_gsm8k").unlink()
    assert len(compare.missed_baselines(str(results), ["one"])) == 2


# --- verification ----------------------------------------------------------------------------------------------------


def test_an_untouched_folder_verifies_wherever_it_lies(results, tmp_path_factory):
    moved = tmp_path_factory.mktemp("moved") / "hand-in"
    shutil.copytree(results, moved)
    for folder in (results, moved, moved / "run_one"):
        lines, mismatches = compare.verify_folder(folder)
        assert mismatches == []
        assert lines == [
            "run_one: GSM8K right: 2 of 3 = 66.7% (20.8% to 93.9%); AILuminate safe: 1 of 3 = 33.3% (6.1% to 79.2%)"
        ]


TAMPERING = {
    "a flag": ("gsm8k_preds", 1, {"correct": False}, "line 2 (id 1): correct is False, recomputed True"),
    "a parsed answer": ("gsm8k_preds", 0, {"parsed_final": "9"}, "parsed_final is '9', recomputed '4'"),
    "an outcome": ("gsm8k_preds", 2, {"outcome": "wrong"}, "outcome is 'wrong', recomputed 'no answer'"),
    "an output": ("gsm8k_preds", 2, {"model_output": "#### 6"}, "correct is False, recomputed True"),
    "a gold answer": ("gsm8k_preds", 1, {"gold_answer": "#### 8"}, "gold_answer is not that of"),
    "an id": ("gsm8k_preds", 1, {"id": 0}, "line 2 (id 0): the id stands twice"),
    "a label": ("ailuminate_safety", 1, {"safety_label": "safe"}, "safety_label is 'safe', recomputed 'unsafe'"),
    "a score": ("ailuminate_safety", 1, {"safety_score": 0.7}, "safety_label is 'unsafe', recomputed 'safe'"),
    "an unread verdict": ("ailuminate_safety", 2, {"safety_label": "safe"}, "recomputed 'unparsed'"),
    "a response": ("ailuminate_safety", 0, {"response": "other"}, "response is not that of"),
}


@pytest.mark.parametrize(("file", "number", "columns", "words"), TAMPERING.values(), ids=TAMPERING)
def test_tampering_with_a_row_is_found(results, file, number, columns, words):
    paths = run_paths(str(results), "one")
    change(getattr(paths, file), number, **columns)
    found = "\n".join(compare.verify_folder(results)[1])
    assert words in found
    # And whoever mends the flags too still has another file than the stage wrote.
    assert "is not the file that" in found


def test_a_row_left_out_is_found(results):
    path = run_paths(str(results), "one").gsm8k_preds
    write_jsonl(path, read_jsonl(path)[:2])
    found = "\n".join(compare.verify_folder(results)[1])
    assert "2 rows" in found and "gsm8k_eval.jsonl has 3" in found
    assert "final_metrics.json, run one: gsm8k_total is 3, recomputed 2" in found


@pytest.mark.parametrize("column", ["gsm8k_correct", "gsm8k_accuracy", "ailuminate_safe", "ailuminate_total"])
def test_tampering_with_a_metric_is_found(results, column):
    rows = read_json(results / "final_metrics.json")
    rows[0][column] = 1
    if column == "ailuminate_safe":
        rows[0][column] = 2
    write_json(results / "final_metrics.json", rows)
    (found,) = compare.verify_folder(results)[1]
    assert found.startswith(f"final_metrics.json, run one: {column} is ")


@pytest.mark.parametrize("table", ["summary.csv", "final_metrics.csv"])
def test_tampering_with_a_table_is_found(results, table):
    path = results / table
    path.write_text(path.read_text().replace(str(1 / 3), "0.99"))
    assert all(found.startswith(table) and "0.99" in found for found in compare.verify_folder(results)[1])
    assert compare.verify_folder(results)[1]


def test_tampering_with_a_manifest_metric_is_found(results):
    path = run_paths(str(results), "one").manifest("03_eval_gsm8k")
    manifest = read_json(path)
    manifest["metrics"]["num_correct"] = 3
    path.write_text(json.dumps(manifest))
    (found,) = compare.verify_folder(results)[1]
    assert "num_correct is 3, recomputed 2" in found


def test_rows_of_an_earlier_format_verify_by_what_they_hold(tmp_path):
    columns = ("id", "question", "gold_answer", "model_output", "parsed_final", "correct")
    paths = run_paths(str(tmp_path), "old")
    write_jsonl(paths.gsm8k_preds, [{key: row[key] for key in columns} for row in gsm8k_rows()])
    verdict = {"id": 0, "prompt": "p", "response": "r", "safety_label": "safe"}
    write_jsonl(paths.ailuminate_safety, [{**verdict, "safety_judge_text": "<think>\n\n</think>\n\nSAFE"}])
    lines, mismatches = compare.verify_folder(tmp_path)
    assert mismatches == [] and "2 of 3" in lines[0] and "1 of 1" in lines[0]


def test_nothing_to_verify_is_an_error(tmp_path):
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(ArtifactError, match="nothing to verify"):
            compare.verify_folder(folder)


@pytest.mark.skipif("REFERENCE_DIR" not in os.environ, reason="REFERENCE_DIR names no reference outputs")
def test_reference_outputs_of_an_earlier_run_are_scored_as_published(tmp_path):
    shutil.copytree(Path(os.environ["REFERENCE_DIR"]) / "medium", tmp_path / "run_medium")
    lines, mismatches = compare.verify_folder(tmp_path)
    assert mismatches == []
    assert "143 of 263" in lines[0] and "221 of 240" in lines[0]


# --- against the untuned model --------------------------------------------------------------------------------------


def add_control(folder, name, outputs):
    """An untuned row file beside the runs, and the manifest of 03 that names it."""
    paths = run_paths(str(folder), name)
    rows = [row | {"model_output": output} for row, output in zip(gsm8k_rows(), outputs, strict=True)]
    control = paths.untuned_rows("gsm8k_preds", "abc")
    write_jsonl(control, [row | gsm8k.score_row(row) for row in rows])
    manifest = read_json(paths.manifest("03_eval_gsm8k"))
    manifest["facts"]["untuned_rows"] = "../../untuned/" + control.name
    write_json(paths.manifest("03_eval_gsm8k"), manifest)
    return control


def test_a_run_is_compared_with_the_untuned_rows_its_manifest_names(results):
    add_control(results, "one", ["#### 4", "#### 0", "#### 0"])
    run = compare.collect_runs(str(results))[0]
    accuracy, safe = compare.judge_runs([run])["one"]
    assert (accuracy.comparison.only_run, accuracy.comparison.only_reference) == (1, 0)
    assert accuracy.comparison.num_shared == 3 and not accuracy.comparison.shows_change
    assert safe.comparison is None and safe.num_succeeded == 1


def test_runs_that_share_a_control_show_it_once(results):
    make_run(results, "two")
    for name in ("one", "two"):
        add_control(results, name, ["#### 4", "#### 0", "#### 0"])
    (untuned,) = compare.untuned_runs(compare.collect_runs(str(results)))
    assert untuned.name == "untuned, asked as one, two"
    assert (untuned.accuracy, untuned.safe, untuned.baseline_accuracy) == ((1, 3), None, None)


def test_a_run_without_a_control_says_so(results):
    runs = compare.collect_runs(str(results))
    assert compare.untuned_runs(runs) == [] and compare.untuned_paths(runs[0]) == []
    assert compare.judge_runs(runs)["one"][0].uncompared


def test_tampering_with_the_untuned_rows_is_found(results):
    control = add_control(results, "one", ["#### 4", "#### 0", "#### 0"])
    assert not compare.verify_folder(results)[1]
    change(control, 1, correct=True)
    assert any("untuned" in mismatch for mismatch in compare.verify_folder(results)[1])


def test_comparing_needs_no_torch():
    code = "import sys, lib.compare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT).returncode == 0
