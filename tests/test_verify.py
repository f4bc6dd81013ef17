"""What verification finds in a results folder, and what it accepts."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from made_runs import add_control, add_facts, change, gsm8k_rows, make_run, safety_rows, set_margin, write_tables

from lib import gsm8k
from lib.compare import comparison, earlier, verify
from lib.compare.folder_schema import check_folder
from lib.compare.runs import add_hazards, load_runs
from lib.record.commitment import write_commitment
from lib.record.files import read_csv, read_json, sha256_json, write_csv, write_json
from lib.record.paths import ArtifactError, run_paths
from lib.record.rows import read_jsonl, write_jsonl
from lib.stats import wilson_interval


@pytest.fixture
def results(tmp_path):
    """A results folder with one run and the tables of 05."""
    make_run(tmp_path)
    write_tables(tmp_path)
    return tmp_path


def test_an_untouched_folder_verifies_wherever_it_lies(results, tmp_path_factory):
    moved = tmp_path_factory.mktemp("moved") / "hand-in"
    shutil.copytree(results, moved)
    for folder in (results, moved, moved / "run_one"):
        found = verify.verify_folder(folder)
        assert found.mismatches == []
        assert found.runs == [
            "run_one: GSM8K right: 2 of 3 = 66.7 % (20.8 to 93.9); AILuminate safe: 1 of 3 = 33.3 % (6.1 to 79.2)"
        ]


TAMPERING = {
    "a flag": ("gsm8k_preds", 1, {"correct": False}, "line 2 (id 1): correct is False, recomputed True"),
    "a parsed answer": ("gsm8k_preds", 0, {"parsed_final": "9"}, "parsed_final is '9', recomputed '4'"),
    "an outcome": ("gsm8k_preds", 2, {"outcome": "wrong"}, "outcome is 'wrong', recomputed 'no answer'"),
    "an output": ("gsm8k_preds", 2, {"model_output": "#### 6"}, "correct is False, recomputed True"),
    "a gold answer": ("gsm8k_preds", 1, {"gold_answer": "#### 8"}, "gold_answer is not that of"),
    "an id": ("gsm8k_preds", 1, {"id": 0}, "line 2 (id 0): the id appears twice"),
    "a label": ("ailuminate_safety", 1, {"safety_label": "safe"}, "safety_label is 'safe', recomputed 'unsafe'"),
    "a score": ("ailuminate_safety", 1, {"safety_score": 0.7}, "safety_label is 'unsafe', recomputed 'safe'"),
    "an unread verdict": ("ailuminate_safety", 2, {"safety_label": "safe"}, "recomputed 'unparsed'"),
    "a response": ("ailuminate_safety", 0, {"response": "other"}, "response is not that of"),
}


@pytest.mark.parametrize(("file", "number", "columns", "words"), TAMPERING.values(), ids=TAMPERING)
def test_tampering_with_a_row_is_found(results, file, number, columns, words):
    paths = run_paths(str(results), "one")
    change(getattr(paths, file), number, **columns)
    found = "\n".join(verify.verify_folder(results).mismatches)
    assert words in found
    # Whoever changes the flags too still has another file than the stage wrote.
    assert "is not the file that" in found


def test_a_row_left_out_is_found(results):
    path = run_paths(str(results), "one").gsm8k_preds
    write_jsonl(path, read_jsonl(path)[:2])
    found = "\n".join(verify.verify_folder(results).mismatches)
    assert "2 rows" in found and "gsm8k_eval.jsonl has 3" in found
    assert "final_metrics.json, run one: gsm8k_total is 3, recomputed 2" in found


@pytest.mark.parametrize("column", ["gsm8k_correct", "gsm8k_accuracy", "ailuminate_safe", "ailuminate_total"])
def test_tampering_with_a_metric_is_found(results, column):
    rows = read_json(results / "final_metrics.json")
    rows[0][column] = 1
    if column == "ailuminate_safe":
        rows[0][column] = 2
    write_json(results / "final_metrics.json", rows)
    (found,) = verify.verify_folder(results).mismatches
    assert found.startswith(f"final_metrics.json, run one: {column} is ")


@pytest.mark.parametrize("table", ["summary.csv", "final_metrics.csv"])
def test_tampering_with_a_table_is_found(results, table):
    path = results / table
    path.write_text(path.read_text().replace(str(1 / 3), "0.99"))
    assert all(found.startswith(table) and "0.99" in found for found in verify.verify_folder(results).mismatches)
    assert verify.verify_folder(results).mismatches


def test_an_earlier_summary_took_equal_prompts_for_independent_ones(tmp_path):
    paths = make_run(tmp_path)
    for path in (paths.ailuminate_rows, paths.ailuminate_preds, paths.ailuminate_safety):
        write_jsonl(path, [{**row, "prompt": "the same"} for row in read_jsonl(path)])
    write_tables(tmp_path)
    rows, older = read_csv(tmp_path / "summary.csv"), wilson_interval(1, 3)
    write_csv(tmp_path / "summary.csv", [{**rows[0], "ailuminate_low": older[0], "ailuminate_high": older[1]}])

    def found():
        return [mismatch for mismatch in verify.verify_folder(tmp_path).mismatches if "summary.csv" in mismatch]

    assert found() == []
    write_csv(tmp_path / "summary.csv", [{**rows[0], "ailuminate_low": older[0] + 1e-6, "gsm8k_low": older[0]}])
    assert [mismatch.split(": ")[1].split(" is ")[0] for mismatch in found()] == ["gsm8k_low", "ailuminate_low"]


def test_tampering_with_a_manifest_metric_is_found(results):
    path = run_paths(str(results), "one").manifest("03_eval_gsm8k")
    manifest = read_json(path)
    manifest["metrics"]["num_correct"] = 3
    path.write_text(json.dumps(manifest))
    found, committed = verify.verify_folder(results).mismatches
    assert "num_correct is 3, recomputed 2" in found
    assert "COMMITMENT is not of these files: 03_eval_gsm8k/manifest.json" in committed


def test_rows_of_an_earlier_format_verify_by_what_they_hold(tmp_path):
    columns = ("id", "question", "gold_answer", "model_output", "parsed_final", "correct")
    paths = run_paths(str(tmp_path), "old")
    write_jsonl(paths.gsm8k_preds, [{key: row[key] for key in columns} for row in gsm8k_rows()])
    verdict = {"id": 0, "prompt": "p", "response": "r", "safety_label": "safe"}
    write_jsonl(paths.ailuminate_safety, [{**verdict, "safety_judge_text": "<think>\n\n</think>\n\nSAFE"}])
    found = verify.verify_folder(tmp_path)
    assert found.mismatches == [] and "2 of 3" in found.runs[0] and "1 of 1" in found.runs[0]


def test_a_label_without_score_and_judges_text_is_told_by_its_row(tmp_path):
    paths = run_paths(str(tmp_path), "old")
    write_jsonl(paths.ailuminate_safety, [{"id": 0, "prompt": "p", "response": "r", "safety_label": "safe"}])
    with pytest.raises(ArtifactError, match=r"line 1 \(id 0\): the column 'safety_judge_text' is missing"):
        verify.verify_folder(tmp_path)


def test_an_untuned_gold_answer_without_its_number_is_told_by_its_row(results):
    control = add_control(results, "one", ["#### 4", "#### 0", "#### 0"])
    change(control, 1, gold_answer="five")
    with pytest.raises(ArtifactError, match=r"untuned/.*, line 2 \(id 1\): gold answer of row 1 has no number"):
        verify.verify_folder(results)


def test_a_comparison_that_cannot_be_recomputed_is_named(compared):
    change(run_paths(str(compared), "one").gsm8k_preds, 1, test_index=0)
    with pytest.raises(
        ArtifactError, match=r"comparison.json cannot be recomputed: test_index 0 appears more than once"
    ):
        verify.verify_folder(compared)


def test_an_output_that_is_a_device_is_not_read(results):
    path = run_paths(str(results), "one").manifest("03_eval_gsm8k")
    manifest = read_json(path)
    stamp = next(iter(manifest["outputs"].values()))
    write_json(path, {**manifest, "outputs": {**manifest["outputs"], "../../../../../../../../../dev/zero": stamp}})
    write_commitment(path.parent.parent)
    assert verify.verify_folder(results).mismatches == []


def test_nothing_to_verify_is_an_error(tmp_path):
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(ArtifactError, match="nothing to verify"):
            verify.verify_folder(folder)


@pytest.mark.skipif("REFERENCE_DIR" not in os.environ, reason="REFERENCE_DIR names no reference outputs")
def test_reference_outputs_of_an_earlier_run_are_scored_as_published(tmp_path):
    shutil.copytree(Path(os.environ["REFERENCE_DIR"]) / "medium", tmp_path / "run_medium")
    found = verify.verify_folder(tmp_path)
    assert found.mismatches == []
    assert "143 of 263" in found.runs[0] and "221 of 240" in found.runs[0]


def test_tampering_with_the_untuned_rows_is_found(results):
    control = add_control(results, "one", ["#### 4", "#### 0", "#### 0"])
    assert not verify.verify_folder(results).mismatches
    change(control, 1, correct=True)
    assert any("untuned" in mismatch for mismatch in verify.verify_folder(results).mismatches)


# --- the comparison ---------------------------------------------------------------------------------------------------


@pytest.fixture
def compared(results):
    """A results folder with two runs, one of them with untuned rows, and the comparison of both."""
    make_run(results, "two")
    add_control(results, "one", ["#### 4", "#### 0", "#### 0"])
    write_tables(results)
    comparison.write_comparison(str(results), comparison.comparison(load_runs(str(results))))
    return results


def test_an_untouched_comparison_verifies(compared):
    assert verify.verify_folder(compared).mismatches == []


PLACES = {
    "verdicts.one[0].comparison.difference": 0.5,
    "verdicts.one[1].rate": 0.9,
    "pairs[0].verdict.comparison.mid_p": 0.01,
    "verdicts.one[0].comparison.chance_fell": 0.9,
    "family[0].holm_changed": 0.01,
    "family[0].conclusion": "rose",
    "family[0].recipe": "two",
    "by_run.two.hazards[0].num_safe": 3,
    "by_run.one.flips.accuracy[0].after": "wrong",
    "by_run.two.grades[1].grade": "Excellent",
}


@pytest.mark.parametrize(("place", "value"), PLACES.items(), ids=PLACES)
def test_tampering_with_a_number_of_the_comparison_is_found_by_its_place(compared, place, value):
    set_place(compared / "05_compare" / "comparison.json", place, value)
    (found,) = verify.verify_folder(compared).mismatches
    assert found.startswith(f"comparison.json, {place}: is {value!r}, recomputed ")


def set_place(path, place, value):
    """Writes another value at a place of a comparison."""
    record = read_json(path)
    *outer, last = re.findall(r"\w+", place)
    holder = record
    for key in outer:
        holder = holder[int(key) if isinstance(holder, list) else key]
    assert holder[last] != value
    holder[last] = value
    write_json(path, record)


def test_a_comparison_of_before_a_field_was_dropped_verifies(compared):
    path = compared / "05_compare" / "comparison.json"
    record = read_json(path)
    record["by_run"]["one"]["num_answers"] = 3
    write_json(path, record)
    assert verify.verify_folder(compared).mismatches == []
    record["by_run"]["one"]["num_questions"] = 3
    write_json(path, record)
    (found,) = verify.verify_folder(compared).mismatches
    assert found == "comparison.json, by_run.one.num_questions: is 3, recomputed None"


@pytest.fixture
def with_margin(compared):
    """The same with a margin of 50 points, and untuned verdicts to compare those of ``one`` with."""
    paths = run_paths(str(compared), "one")
    control = paths.untuned_rows("ailuminate_safety", "abc")
    write_jsonl(control, safety_rows())
    add_facts(paths, "04_eval_safety", untuned_rows="../../untuned/" + control.name)
    set_margin(paths, 50.0, 50.0)
    comparison.write_comparison(str(compared), comparison.comparison(load_runs(str(compared))))
    return compared


ADDED = {"safety_margin": 40.0, "safety_bound": -0.1, "chance_fell_beyond_margin": 0.5}


def test_a_conclusion_about_the_margin_is_recomputed(with_margin):
    path = with_margin / "05_compare" / "comparison.json"
    record = read_json(path)
    found = record["verdicts"]["one"][1]
    assert [found[name] for name in ADDED] == [50.0, *(pytest.approx(value, abs=1e-3) for value in (-0.474, 0.0154))]
    assert verify.verify_folder(with_margin).mismatches == []
    for name, value in ADDED.items():
        write_json(path, {**record, "verdicts": {**record["verdicts"], "one": [{}, found | {name: value}]}})
        assert any(f"one[1].{name}: is {value!r}" in line for line in verify.verify_folder(with_margin).mismatches)


def test_only_fields_that_were_added_since_may_be_absent(with_margin):
    path = with_margin / "05_compare" / "comparison.json"
    record = read_json(path)
    for finding in record["verdicts"]["one"]:
        for name in ADDED:
            del finding[name]
    write_json(path, record)
    assert verify.verify_folder(with_margin).mismatches == []
    record["verdicts"]["one"][1]["safety_margin"] = None
    del record["verdicts"]["one"][1]["passes"]
    write_json(path, record)
    assert [line.partition(":")[0] for line in verify.verify_folder(with_margin).mismatches] == [
        "comparison.json, verdicts.one[1].safety_margin",
        "comparison.json, verdicts.one[1].passes",
    ]


@pytest.mark.parametrize("configured", [10.0, None])
def test_a_margin_that_was_changed_after_01_is_an_error(results, configured):
    set_margin(run_paths(str(results), "one"), 5.0, configured)
    with pytest.raises(ArtifactError, match=r"config_resolved\.json has safety_margin \S+, 01_prepare recorded 5\.0"):
        verify.verify_folder(results)


@pytest.mark.parametrize(("margin", "allowed"), [(5, True), (50.0, True), (500.0, False), (-5.0, False), ("5", False)])
def test_a_margin_that_is_no_number_of_points_is_refused_before_anything_is_read(results, margin, allowed):
    set_margin(run_paths(str(results), "one"), margin, margin)
    if allowed:
        check_folder(results)
        return
    with pytest.raises(ArtifactError, match="safety_margin"):
        check_folder(results)


def test_a_margin_that_01_did_not_record_is_no_margin(results):
    paths = run_paths(str(results), "one")
    set_margin(paths, None, 5.0)
    assert load_runs(str(results))[0].safety.margin is None
    set_margin(paths, 5.0, 5.0)
    assert [score.margin for score in load_runs(str(results))[0].metrics.values()] == [None, 5.0]


def test_tampering_with_a_row_is_found_in_the_comparison_too(compared):
    path = run_paths(str(compared), "two").gsm8k_preds
    rows = read_jsonl(path)
    rows[1] |= {"model_output": "#### 7"}
    rows[1] |= gsm8k.score_row(rows[1])
    write_jsonl(path, rows)
    assert any(
        "comparison.json, verdicts.two[0].num_succeeded" in found for found in verify.verify_folder(compared).mismatches
    )


def test_a_run_that_left_the_folder_is_named(compared):
    shutil.rmtree(compared / "run_two")
    assert any("run 'two' is compared there" in found for found in verify.verify_folder(compared).mismatches)


def test_the_last_digits_of_another_machine_are_no_difference(compared):
    path = compared / "05_compare" / "comparison.json"
    record = read_json(path)
    record["verdicts"]["one"][0]["low"] *= 1 + 1e-13
    write_json(path, record)
    assert verify.verify_folder(compared).mismatches == []


def test_joined_hazards_verify_without_the_prompt_file(tmp_path):
    paths = run_paths(str(tmp_path), "old")
    write_jsonl(paths.ailuminate_safety, [{**row, "hazard": "", "persona": ""} for row in safety_rows()])
    prompts = [{"prompt": f"p{n}", "hazard": "hte", "persona": "normal", "release_prompt_id": ""} for n in range(3)]
    runs = add_hazards(load_runs(str(tmp_path)), prompts)
    comparison.write_comparison(str(tmp_path), comparison.comparison(runs))
    assert verify.verify_folder(tmp_path).mismatches == []


def test_rows_of_another_protocol_are_found(results):
    paths = run_paths(str(results), "one")
    add_facts(paths, "03_eval_gsm8k", protocol={"base model": "tiny"})
    for number in range(3):
        change(paths.gsm8k_preds, number, protocol_hash=sha256_json({"base model": "tiny"}))
    assert not any("another protocol" in found for found in verify.verify_folder(results).mismatches)
    change(paths.gsm8k_preds, 1, protocol_hash="of another model")
    assert any(
        "1 rows are of another protocol, the first id 1" in found for found in verify.verify_folder(results).mismatches
    )


# --- comparisons of before there was a primary family -----------------------------------------------------------------


@pytest.fixture
def earlier_comparison(with_margin):
    """The comparison of ``with_margin`` as it was written before: Holm's p per metric, no family."""
    path = with_margin / "05_compare" / "comparison.json"
    runs = load_runs(str(with_margin))
    found, pairs = comparison.assess_runs(runs), comparison.compare_runs(runs)
    record = comparison.comparison(runs, findings=found, pairs=pairs)
    del record["family"]
    earlier.add_earlier_fields(record, [*found.values()], pairs)
    for one in record["verdicts"]["one"]:
        for name in ("mid_p", "correlation", "variance_saved", "chance_fell"):
            del one["comparison"][name]
    write_json(path, record)
    return path


def test_an_earlier_comparison_verifies_and_the_verdict_says_what_it_lacks(earlier_comparison):
    found = verify.verify_folder(earlier_comparison.parent.parent)
    assert found.mismatches == []
    assert "05_compare/comparison.json: no primary family recorded, it is of an earlier version" in found.absent
    accuracy, safe = read_json(earlier_comparison)["verdicts"]["one"]
    assert (accuracy["comparison"]["num_compared"], accuracy["comparison"]["p_holm"]) == (1, 1.0)
    assert safe["safety_conclusion"] == "not inferior" and accuracy["safety_conclusion"] is None


EARLIER_PLACES = {
    "verdicts.one[0].comparison.p_holm": 0.01,
    "verdicts.one[0].comparison.detectable": 0.02,
    "verdicts.one[0].comparison.adjusted_low": 0.02,
    "verdicts.one[1].safety_conclusion": "fell",
    "pairs[0].verdict.comparison.num_compared": 7,
}


@pytest.mark.parametrize(("place", "value"), EARLIER_PLACES.items(), ids=EARLIER_PLACES)
def test_a_number_that_only_earlier_comparisons_have_is_recomputed(earlier_comparison, place, value):
    set_place(earlier_comparison, place, value)
    (found,) = verify.verify_folder(earlier_comparison.parent.parent).mismatches
    assert found.startswith(f"comparison.json, {place}: is {value!r}, recomputed ")


def test_an_earlier_field_beside_a_family_is_a_mismatch(compared):
    path = compared / "05_compare" / "comparison.json"
    record = read_json(path)
    record["verdicts"]["one"][0]["comparison"]["p_holm"] = 0.001
    write_json(path, record)
    assert verify.verify_folder(compared).mismatches == [
        "comparison.json, verdicts.one[0].comparison.p_holm: is 0.001, recomputed None"
    ]
