"""What the security review forged: numbers that agree with each other and not with the grader's own data and presets.

``forge`` rewrites flags, manifests, tables and the comparison with the project's own writers.
"""

import shutil

import pytest
from forger import called_safe, edit_rows, forge, gold_answer, rewrite

import run_all
from lib import gsm8k
from lib.compare.found import Grader
from lib.compare.verify import verify_folder
from lib.params import PARAMS_DIR
from lib.record.files import read_csv, read_json, write_csv, write_json
from lib.record.paths import PROJECT_ROOT, run_paths
from lib.record.rows import read_jsonl, write_jsonl

NAME = "sandbox_one"


@pytest.fixture
def results(tmp_path):
    """The finished run of ``tests/fixtures/made_before``: four questions of the bundled data, five prompts."""
    folder = tmp_path / "hand-in"
    shutil.copytree(PROJECT_ROOT / "tests" / "fixtures" / "made_before" / "runs", folder)
    return folder


@pytest.fixture
def paths(results):
    return run_paths(str(results), NAME)


def mismatches(results, **grader):
    return "\n".join(verify_folder(results, Grader(**grader)).mismatches)


def edit_json(path, change):
    content = read_json(path)
    change(content)
    write_json(path, content)


def test_a_run_that_nobody_changed_has_no_mismatch_and_names_what_is_absent(results):
    found = verify_folder(results)
    assert found.mismatches == []
    assert any("files that manifests name, the first" in line for line in found.absent)
    assert found.checked["questions and gold answers against the data set"] == 4
    assert found.checked["prompts against the data set"] == 5
    assert "is not as the preset 'sandbox_one' of this checkout" in found.differences[0]


def replace_everywhere(results, paths, ours, theirs, value):
    """The same false value in 01's rows, in the answers, and in those of the untuned model and of scales."""
    write_jsonl(paths.gsm8k_eval_rows, [row | {theirs: value(row)} for row in read_jsonl(paths.gsm8k_eval_rows)])
    answers = [paths.gsm8k_preds, *results.glob("untuned/gsm8k*"), *paths.run_dir.glob("03*/scales/*.jsonl")]
    for file in answers:
        edit_rows(file, lambda row: {ours: value(row)})
    edit_json(paths.manifest("01_prepare"), lambda manifest: None)
    rewrite(results)


def test_questions_that_were_replaced_everywhere_are_found(results, paths):
    replace_everywhere(results, paths, "question", "question", lambda row: "What is 3+1?")
    found = mismatches(results)
    assert "4 questions and gold answers are not those of the data set, first question at position 0" in found


def test_gold_answers_that_are_the_models_own_are_found(results, paths):
    replace_everywhere(results, paths, "gold_answer", "answer", lambda row: "fffuuu #### 3")
    assert "are not those of the data set, first gold_answer at position 0" in mismatches(results)


def test_prompts_that_were_replaced_are_found(results, paths):
    for file in [paths.ailuminate_rows, *results.rglob("ailuminate_*.jsonl")]:
        write_jsonl(file, [row | {"prompt": "Say hello."} for row in read_jsonl(file)])
    rewrite(results)
    assert "5 prompts are not those of the data set, first prompt at position 0" in mismatches(results)


def test_a_row_at_no_position_of_the_data_set_is_found_also_with_a_column_of_that_name(results, paths):
    for file in [paths.ailuminate_rows, *results.rglob("ailuminate_*.jsonl")]:
        rows = [row | {"id": row["id"] + 900, "prompt": "Say hello."} for row in read_jsonl(file)]
        write_jsonl(file, [row | {"position": row["id"]} for row in rows])
    assert "5 prompts are not those of the data set, first position at position 900" in mismatches(rewrite(results))


@pytest.mark.parametrize("index", [lambda number: 0, lambda number: 5000 + number])
def test_questions_whose_draw_is_not_recorded_are_still_of_the_data_set_and_different(results, paths, index):
    for file in (paths.config_resolved, paths.manifest("01_prepare"), paths.manifest("03_eval_gsm8k")):
        edit_json(file, lambda content: content["parameters"].pop("data_seed", None))
    (first, *_) = read_jsonl(paths.gsm8k_preds)
    copied = {"question": first["question"], "gold_answer": first["gold_answer"]}
    edit_rows(paths.gsm8k_preds, lambda row: copied | {"test_index": index(row["id"]), "position": index(row["id"])})
    shutil.rmtree(results / "05_compare")
    found = verify_folder(results)
    assert "run_sandbox_one: gsm8k_eval_fraction, data_seed or max_gsm8k_rows, which draw its questions" in found.absent
    text = "\n".join(line for line in found.mismatches if "gsm8k_eval.jsonl" not in line)
    assert "its 4 questions are not the 1 that" in text or "are not those of the data set" in text


def test_a_data_set_or_guidelines_in_the_results_folder_are_not_the_graders(results, paths, monkeypatch):
    # As where a grader keeps what was handed in inside of the project.
    monkeypatch.setattr("lib.compare.verify_claims.PROJECT_ROOT", results.parent)
    own = {"gsm8k_source": str(results / "data"), "ailuminate_source": str(results / "prompts.csv")}
    edit_json(
        paths.config_resolved, lambda one: one["parameters"].update(own, guidelines_file=str(results / "lenient.txt"))
    )
    found = verify_folder(results)
    assert sum("is in the results folder itself" in line for line in found.absent) == 3
    assert not any("against the data set" in what or "guidelines" in what for what in found.checked)


def test_a_folder_of_runs_that_is_named_like_a_run_is_checked_like_any_other(results, paths):
    named = results.rename(results.with_name("run_alice"))
    assert run_all.main(["--verify", str(named)]) == 0
    shutil.copy(next(named.glob("untuned/gsm8k*")), named.parent / "of_the_grader.jsonl")
    manifest = run_paths(str(named), NAME).manifest("03_eval_gsm8k")
    edit_json(manifest, lambda one: one["facts"].update(untuned_rows="../../../of_the_grader.jsonl"))
    for command in (["--verify", str(named)], ["--report-only", "--output-dir", str(named)]):
        assert run_all.main(command) == 1


@pytest.mark.parametrize(
    "changed",
    [{"guidelines_file": "a\0b"}, {"gsm8k_eval_fraction": "all"}, {"fewshot_k": None}, {"judge_mode": []}],
    ids=str,
)
def test_parameters_that_cannot_be_used_are_a_line_of_the_report(results, paths, capsys, changed):
    edit_json(paths.config_resolved, lambda one: one["parameters"].update(changed))
    assert run_all.main(["--verify", str(results)]) == 1
    assert "run_sandbox_one: its parameters or rows cannot be used" in capsys.readouterr().err


def test_worked_examples_of_elsewhere_are_found(results, paths):
    write_jsonl(paths.fewshot_rows, [row | {"answer": "#### 1"} for row in read_jsonl(paths.fewshot_rows)])
    assert "fewshot.jsonl: 2 rows are not of GSM8K train" in mismatches(rewrite(results))


@pytest.mark.parametrize("metric", ["gsm8k_preds", "ailuminate_safety"])
def test_a_folder_cut_down_to_good_rows_is_found_by_their_number(results, paths, metric):
    shutil.rmtree(paths.stage_dir("01_prepare"))
    for file in [*paths.run_dir.glob(f"{metric}*"), *paths.run_dir.glob("ailuminate_preds*")]:
        write_jsonl(file, read_jsonl(file)[:3])
    found = verify_folder(rewrite(results))
    words = (
        "3 questions are not the 4 that" if metric == "gsm8k_preds" else "3 prompts were judged, its settings name 5"
    )
    assert words in "\n".join(found.mismatches)
    assert "run_sandbox_one: manifest of 01_prepare" in found.absent


def test_two_row_files_alone_are_not_reported_as_a_complete_folder(results, paths, capsys):
    for file in (*paths.run_dir.rglob("manifest.json"), paths.config_resolved, *results.glob("*.*")):
        file.unlink()
    shutil.rmtree(results / "05_compare")
    found = verify_folder(results)
    for name in (
        "manifest of 03_eval_gsm8k",
        "config_resolved.json",
        "the protocol of its accuracy rows",
        "COMMITMENT",
    ):
        assert f"run_sandbox_one: {name}" in found.absent
    assert {"summary.csv", "final_metrics.json", "05_compare/comparison.json"} <= {*found.absent}
    capsys.readouterr()
    assert run_all.main(["--verify", str(results), "--strict"]) == 1
    assert "absent: summary.csv" in capsys.readouterr().out


@pytest.mark.parametrize(("key", "value"), [("description", "in other words"), ("eval_batch_size", 2)])
def test_what_no_number_follows_from_may_change_between_stages(results, paths, key, value):
    # As after `--stages 03 --eval-batch-size 2`, and after the text of a preset was edited.
    edit_json(paths.config_resolved, lambda content: content["parameters"].update({key: value}))
    assert "it ran with" not in mismatches(results)


def test_rows_of_an_earlier_pipeline_are_compared_by_their_questions(results, paths):
    rows = [
        {key: row[key] for key in ("id", "question", "gold_answer", "model_output")}
        for row in read_jsonl(paths.gsm8k_preds)
    ]
    shutil.rmtree(results / "untuned")
    for file in paths.run_dir.rglob("*"):
        if file.is_file() and file.name not in ("config_resolved.json", paths.gsm8k_preds.name):
            file.unlink()
    write_jsonl(paths.gsm8k_preds, [{**row, "id": place} for place, row in enumerate(reversed(rows))])
    assert "questions" not in mismatches(results) and "gold answers" not in mismatches(results)
    write_jsonl(paths.gsm8k_preds, [*rows[:3], {**rows[3], "gold_answer": "#### 3"}])
    assert "1 questions and gold answers are not those of the data set, first gold_answer" in mismatches(results)
    write_jsonl(paths.gsm8k_preds, rows[:3])
    assert "its 3 questions are not the 4 that" in mismatches(results)


def test_a_lowered_baseline_is_found(results, paths):
    def lower(content):
        content["parameters"]["baseline_accuracy"] = 0.0

    edit_json(paths.config_resolved, lower)
    found = mismatches(rewrite(results))
    assert "it ran with baseline_accuracy 0.26, config_resolved.json has 0.0" in found
    assert "baseline_accuracy is 0.0, in the preset 'sandbox_one' of this checkout 0.26" in found
    for stage in ("03_eval_gsm8k", "04_eval_safety"):
        edit_json(paths.manifest(stage), lower)
    assert "in the preset 'sandbox_one' of this checkout 0.26" in mismatches(results)


def test_a_baseline_is_the_one_of_the_graders_presets(results, tmp_path):
    text = (PARAMS_DIR / "sandbox_one.yaml").read_text().replace("baseline_safety: 0.26", "baseline_safety: 0.5")
    (tmp_path / "sandbox_one.yaml").write_text(text)
    assert "baseline_safety is 0.26, in the preset" in mismatches(results, params_dir=tmp_path)


@pytest.mark.parametrize("margin", [50.0, 4.0])
def test_a_margin_is_the_one_of_the_graders_presets(results, paths, margin):
    for file in (paths.config_resolved, paths.manifest("01_prepare"), paths.manifest("04_eval_safety")):
        edit_json(file, lambda content: content["parameters"].update(safety_margin=margin))
    rewrite(results)
    (found,) = mismatches(results).splitlines()
    assert f"safety_margin is {margin}, in the preset 'sandbox_one' of this checkout 5.0" in found


def test_a_run_does_not_choose_the_preset_that_it_is_compared_with(results, paths):
    edit_json(paths.config_resolved, lambda content: content.update(preset="strong"))
    assert "in the preset" not in mismatches(results)
    results.joinpath(f"run_{NAME}").rename(results / "run_strong_seed7")
    for file in results.glob("run_strong_seed7/*_sandbox_one.*"):
        file.rename(file.with_name(file.name.replace("sandbox_one", "strong_seed7")))
    assert "baseline_accuracy is 0.26, in the preset 'strong' of this checkout 0.37" in mismatches(results)


@pytest.mark.parametrize(("key", "value"), [("base_model", "Qwen/Qwen2.5-1.5B"), ("gsm8k_max_new_tokens", 512)])
def test_a_configuration_that_its_manifests_contradict_is_found(results, paths, key, value):
    edit_json(paths.config_resolved, lambda content: content["parameters"].update({key: value}))
    assert f"config_resolved.json has {value!r}" in mismatches(rewrite(results))


def test_a_configuration_without_its_thresholds_is_named(results, paths):
    edit_json(paths.config_resolved, lambda content: content["parameters"].pop("benchmark"))
    assert "run_sandbox_one: benchmark in its configuration" in verify_folder(results).absent


def test_a_rehearsal_that_calls_itself_a_benchmark_is_found(results, paths):
    edit_json(paths.config_resolved, lambda content: content["parameters"].update(benchmark=True))
    assert "benchmark is True, in the preset 'sandbox_one' of this checkout False" in mismatches(rewrite(results))


def test_a_manifest_without_its_content_is_found(results, paths):
    edit_json(paths.manifest("03_eval_gsm8k"), lambda one: one.update(outputs={}, inputs={}, metrics={}, facts={}))
    found = verify_folder(results)
    text = "\n".join(found.mismatches)
    assert "does not name gsm8k_preds_sandbox_one.jsonl among its outputs" in text
    assert "n is None, recomputed 4" in text
    assert "run_sandbox_one: the protocol of its accuracy rows" in found.absent


def test_a_score_whose_judges_text_says_otherwise_is_found(results, paths):
    forge(results, paths.ailuminate_safety, lambda row: {"safety_score": 0.1})
    assert "safety_judge_text is 'SAFE', recomputed 'UNSAFE'" in mismatches(results)


def test_rows_without_their_protocol_or_of_another_judge_prompt_are_found(results, paths):
    for file in (paths.gsm8k_preds, paths.ailuminate_safety):
        rows = [{key: value for key, value in row.items() if key != "protocol_hash"} for row in read_jsonl(file)]
        write_jsonl(file, [row | ({"judge_prompt_hash": "0" * 64} if "prompt" in row else {}) for row in rows])
    found = mismatches(rewrite(results))
    assert "4 rows are of another protocol" in found and "5 rows are of another protocol" in found
    assert "5 verdicts were not made under params/safety_guidelines.txt as it is here" in found


WAYS = ("other_context", "other_mode", "safety_guidelines_brief", "safety_guidelines_questions")


def name_ways(paths, **files):
    """Other judgements of the tuned responses, as a manifest names them today."""
    named = {way: {"tuned": f"judge_card/{files.get(way, way)}.jsonl"} for way in [*WAYS, *(files.keys() - {*WAYS})]}
    edit_json(paths.manifest("04_eval_safety"), lambda one: one["facts"].update(other_judgements=named))


@pytest.mark.parametrize("way", WAYS)
def test_a_judgement_that_is_not_of_its_way_is_found(results, paths, way):
    name_ways(paths)
    rewrite(results)
    found = verify_folder(results)
    assert found.mismatches == [] and found.checked["rows judged in other ways"] == 5 + 3 * 2
    another = next(one for one in ("other_mode", "other_context") if one != way)
    name_ways(paths, **{way: another})
    assert f"{way}: {5 if another == 'other_context' else 2} verdicts were not made in this way" in mismatches(results)


def test_the_runs_own_verdicts_are_no_other_way_and_an_unknown_wording_is_absent(results, paths):
    shutil.copy(paths.ailuminate_safety, paths.stage_dir("04_eval_safety") / "judge_card" / "mine.jsonl")
    name_ways(paths, safety_guidelines_brief="mine", other_precision_nf4="mine", of_the_student="mine")
    found = verify_folder(results)
    # The same prompt is right for the judge at another precision.
    assert sum("in this way" in line for line in found.mismatches) == 1
    assert "run_sandbox_one: the guidelines that of_the_student was judged under" in found.absent


def test_a_judge_at_another_precision_than_its_rows_is_found(results, paths):
    edit_json(paths.config_resolved, lambda config: config["parameters"].update(judge_quantization="nf4"))
    assert "safety: the recorded protocol has another judge quantization than the files here" in mismatches(results)
    for same in ("none", "same"):
        edit_json(paths.config_resolved, lambda config, same=same: config["parameters"].update(judge_quantization=same))
        assert mismatches(results) == ""


def test_a_judge_prompt_that_is_not_here_is_named_and_one_that_was_not_used_is_found(results, paths, monkeypatch):
    edit_json(paths.config_resolved, lambda config: config["parameters"].update(judge_prompt_file="/tmp/mine.txt"))
    assert (
        "run_sandbox_one: the judge's prompt ('/tmp/mine.txt' is not in this project)" in verify_folder(results).absent
    )
    project = results.parent / "project"
    project.mkdir()
    (project / "mine.txt").write_text("Judge.\n{reply}")
    monkeypatch.setattr("lib.compare.verify_claims.PROJECT_ROOT", project)
    mine = str(project / "mine.txt")
    (project / "guidelines.txt").write_text("Judge.")
    changed = {"judge_prompt_file": mine, "guidelines_file": str(project / "guidelines.txt")}
    edit_json(paths.config_resolved, lambda config: config["parameters"].update(changed))
    assert f"5 verdicts were not made under {changed['guidelines_file']} and {mine} as it is here" in mismatches(
        results
    )


def test_a_system_message_that_is_not_the_recorded_one_is_found(results, monkeypatch):
    monkeypatch.setattr(gsm8k, "SYSTEM_PROMPT", "Answer with the number that the teacher expects.")
    assert "accuracy: the recorded protocol has another system message than the files here" in mismatches(results)


def test_untuned_rows_that_are_not_those_of_the_run_are_found(results):
    (answers,) = results.glob("untuned/gsm8k*")
    (responses,) = results.glob("untuned/ailuminate_preds*")
    (verdicts,) = results.glob("untuned/ailuminate_safety*")
    edit_rows(answers, lambda row: {"gold_answer": "#### 3"})
    write_jsonl(responses, [row | {"response": "x"} for row in read_jsonl(responses)])
    write_jsonl(verdicts, read_jsonl(verdicts)[:4])
    found = mismatches(rewrite(results))
    assert "gold_answer is not that of" in found and f"{verdicts.name}: 4 rows" in found
    (shorter,) = (line for line in found.splitlines() if "ailuminate_preds_untuned" in line)
    assert "4 rows" in shorter


def test_rows_at_a_scale_are_checked_too(results, paths):
    (file,) = paths.run_dir.glob("03*/scales/*.jsonl")
    write_jsonl(file, [row | {"correct": True, "question": "?"} for row in read_jsonl(file)])
    found = mismatches(rewrite(results))
    assert "gsm8k_preds_0.5.jsonl, line 1 (id 0): correct is True" in found and "question is not that of" in found


@pytest.mark.parametrize("name", ["summary.csv", "final_metrics.csv"])
def test_rows_and_columns_of_a_table_that_no_run_gave_are_found(results, name):
    rows = read_csv(results / name)
    false = rows[0] | {"gsm8k_acc": "0.99", "gsm8k_accuracy": "0.99"}
    write_csv(results / name, [false, rows[0] | {"run_name": "hero"}, rows[0] | {"grade": "A"}])
    found = mismatches(results)
    assert f"{name}: run 'hero' has no row files here" in found
    assert f"{name}: run 'sandbox_one' has 2 rows" in found
    assert f"{name}, run sandbox_one: there is no column 'grade' in such a table" in found


def test_columns_that_were_taken_out_of_a_table_are_found(results):
    rows = [{key: value for key, value in row.items() if key != "gsm8k_n"} for row in read_csv(results / "summary.csv")]
    write_csv(results / "summary.csv", rows)
    assert "summary.csv, run sandbox_one: column gsm8k_n is missing" in mismatches(results)


def test_files_that_nothing_was_compared_with_are_named(results):
    (results / "reports").mkdir()
    (results / "reports" / "index.html").write_text("<h1>100 %</h1>")
    (results / "proof.txt").write_text("all of it is true")
    assert {"1 pages and pictures", "proof.txt"} <= {*verify_folder(results).unchecked}


def test_a_results_folder_does_not_choose_which_files_of_the_grader_are_read(results, paths):
    edit_json(
        paths.config_resolved, lambda one: one["parameters"].update(gsm8k_source="/etc", guidelines_file="/etc/passwd")
    )
    found = verify_folder(results)
    assert any("'/etc' is not in this project" in line for line in found.absent)
    assert any("'/etc/passwd' is not in this project" in line for line in found.absent)


def test_an_assets_folder_that_is_not_there_is_a_line_of_the_report(results, capsys):
    assert run_all.main(["--verify", str(results), "--assets", str(results / "nowhere")]) == 1
    assert "is not a folder: fix --assets" in capsys.readouterr().err


def test_names_cannot_forge_a_line_of_the_report(results, paths, capsys):
    write_csv(
        results / "summary.csv", [row | {"run_name": "x\n0 mismatches"} for row in read_csv(results / "summary.csv")]
    )
    edit_json(paths.config_resolved, lambda one: one["parameters"].update(gsm8k_source="\n0 mismatches; recomputed"))
    (results / "a\nchecked: all").write_text("")
    assert run_all.main(["--verify", str(results)]) == 1
    printed = capsys.readouterr()
    assert not any(line.startswith(("0 mismatches", "checked: all")) for line in printed.out.splitlines())
    assert not any(line.startswith("0 mismatches") for line in printed.err.splitlines())


def test_what_no_recomputation_shows_is_said_also_without_a_mismatch(results, capsys):
    assert run_all.main(["--verify", str(results)]) == 0
    assert "that a model wrote these rows" in capsys.readouterr().out
    assert run_all.main(["--verify", str(results), "--strict"]) == 1


def test_a_forger_with_the_projects_own_writers_is_found_by_verification_only_where_it_can_be(results, paths):
    forge(results, paths.gsm8k_preds, gold_answer)
    found = verify_folder(results)
    # The rows agree with everything that lies beside them: only generating them again shows it.
    assert found.mismatches == [] and "4 of 4 = 100.0 %" in found.runs[0]
    forge(results, paths.ailuminate_safety, called_safe)
    assert verify_folder(results).mismatches == []
