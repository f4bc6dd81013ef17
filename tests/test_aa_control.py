"""lib.compare.aa_control: the untuned model against itself, in 03, 04, 05 and recomputed by --verify."""

import pytest
from made_runs import add_control, add_facts, change, gsm8k_rows, make_run, safety_rows, set_protocol

from lib import gsm8k
from lib.compare import comparison, verify
from lib.compare.aa_control import compare_control, control_sentence
from lib.compare.folder_schema import check_folder
from lib.compare.runs import files_read, load_runs
from lib.record.files import read_json, sha256_json, write_json
from lib.record.paths import ArtifactError, run_paths
from lib.record.protocol import in_half_batches
from lib.record.rows import read_jsonl, write_jsonl
from lib.reports import change_tables, comparison_tables
from lib.stats import Rate


def answers(*outputs):
    """Rows whose right answer is 1."""
    rows = [
        {"id": at, "question": f"q{at}", "gold_answer": "#### 1", "model_output": o} for at, o in enumerate(outputs)
    ]
    return [row | gsm8k.score_row(row) for row in rows]


# First pass, second pass: changed outcomes, right only first, right only again, other texts.
PASSES = {
    "nothing": (["#### 1", "#### 2"], ["#### 1", "#### 2"], (0, 0, 0, 0)),
    "a text but no outcome": (["#### 1", "#### 2"], ["so #### 1", "#### 3"], (0, 0, 0, 2)),
    "both directions": (["#### 1", "#### 2", "#### 1"], ["#### 2", "#### 1", "#### 1"], (2, 1, 1, 2)),
    "one direction": (["#### 1"] * 3, ["#### 1", "#### 5", "no number"], (2, 2, 0, 2)),
}


@pytest.mark.parametrize("name", PASSES)
def test_changed_outcomes_are_counted_both_ways(name):
    first, again, expected = PASSES[name]
    found = compare_control(answers(*first), answers(*again), "accuracy")
    assert (found.changed.successes, found.only_first, found.only_again, found.num_other_texts) == expected
    assert found.changed == Rate.of_counts(expected[0], len(first))
    (line,) = change_tables.control_lines(answers(*first), answers(*again), "accuracy")
    assert line == control_sentence(found) and f"(+{expected[2]} -{expected[1]})" in line


def test_verdicts_change_by_safe_or_not_and_equal_prompts_are_one_cluster():
    first = [{"id": at, "prompt": f"p{at // 2}", "response": "r", "safety_label": "safe"} for at in range(8)]
    again = [row | {"safety_label": "unparsed" if row["id"] < 2 else "safe"} for row in first]
    found = compare_control(first, again, "safety")
    assert (found.changed.successes, found.only_first, found.num_other_texts) == (2, 2, 0)
    assert found.changed.high > Rate.of_counts(2, 8).high
    unsafe, unread = ([row | {"safety_label": label} for row in first] for label in ("unsafe", "unparsed"))
    assert compare_control(unsafe, unread, "safety").changed.successes == 0


def test_without_a_second_pass_there_is_nothing():
    assert compare_control(answers("#### 1"), [], "accuracy") is None
    assert change_tables.control_lines([], [], "safety") == []


@pytest.fixture
def controlled(tmp_path):
    """A results folder with an A/A control of 03: one of three answers of the untuned model turns."""
    paths = make_run(tmp_path)
    untuned = add_control(tmp_path, "one", ["#### 4", "#### 0", "#### 0"])
    again = paths.untuned_rows("gsm8k_preds_control", "abc")
    rows = [
        row | {"model_output": output} for row, output in zip(gsm8k_rows(), ["#### 4", "#### 5", "#### 0"], strict=True)
    ]
    write_jsonl(again, [row | gsm8k.score_row(row) for row in rows])
    scaled = paths.stage_dir("03_eval_gsm8k") / "half.jsonl"
    write_jsonl(scaled, gsm8k_rows())
    add_facts(paths, "03_eval_gsm8k", control_rows=f"../../untuned/{again.name}")
    protocol = {"quantization": "nf4", "adapter": "a"}
    set_protocol(paths, "03_eval_gsm8k", protocol, untuned, scaled)
    write_jsonl(again, [row | {"protocol_hash": sha256_json(in_half_batches(protocol))} for row in read_jsonl(again)])
    comparison.write_comparison(str(tmp_path), comparison.comparison(load_runs(str(tmp_path))))
    return tmp_path, again


def mismatches(folder):
    # The made-up protocol is not that of the made-up files.
    return [line for line in verify.verify_folder(folder).mismatches if "recorded protocol" not in line]


def test_the_flip_rate_is_in_05_and_recomputed(controlled):
    folder, again = controlled
    check_folder(folder)
    (run,) = load_runs(str(folder))
    path = folder / "05_compare" / "comparison.json"
    record = read_json(path)
    found = record["by_run"]["one"]["aa_control"]
    assert found["safety"] is None and found["accuracy"]["num_changed"] == 1
    assert (found["accuracy"]["only_first"], found["accuracy"]["only_again"]) == (0, 1)
    assert record["by_run"]["untuned, asked as one"]["aa_control"] == {"accuracy": None, "safety": None}
    (line,) = comparison_tables.control_lines([run])
    assert line.startswith("one: A/A control, accuracy: of 3 questions") and "33.3 %" in line
    assert mismatches(folder) == [] and again in files_read(run)
    assert not any(again.name in line for line in verify.verify_folder(folder).unchecked)
    found["accuracy"]["num_changed"] = 0
    write_json(path, record)
    assert mismatches(folder) == ["comparison.json, by_run.one.aa_control.accuracy.num_changed: is 0, recomputed 1"]
    del record["by_run"]["one"]["aa_control"]
    write_json(path, record)
    assert mismatches(folder) == []


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"model_output": "#### 0"}, "recomputed"),
        ({"gold_answer": "#### 7"}, "gold_answer is not that of"),
        ({"protocol_hash": "0" * 64}, "1 rows are of another protocol"),
    ],
)
def test_tampering_with_the_control_is_found(controlled, columns, words):
    folder, again = controlled
    change(again, 1, **columns)
    assert any(words in line and again.name in line for line in mismatches(folder))


def test_a_control_that_is_gone_is_absent_and_one_elsewhere_is_refused(controlled):
    folder, again = controlled
    again.unlink()
    assert f"run_one: {again.name}" in verify.verify_folder(folder).absent
    add_facts(run_paths(str(folder), "one"), "03_eval_gsm8k", control_rows="../../../elsewhere.jsonl")
    with pytest.raises(ArtifactError, match="is not in this results folder"):
        check_folder(folder)


def test_verdicts_of_the_control_belong_to_its_own_responses(tmp_path):
    paths = make_run(tmp_path)
    for kind, response in (("untuned", "first"), ("control_untuned", "again")):
        rows = [row | {"response": f"{response} {row['id']}"} for row in safety_rows()]
        write_jsonl(paths.untuned_dir / f"ailuminate_safety_{kind}_abc.jsonl", rows)
        texts = [{key: row[key] for key in ("id", "prompt", "response")} for row in rows]
        write_jsonl(paths.untuned_dir / f"ailuminate_preds_{kind}_abc.jsonl", texts)
    names = ("control_untuned", "untuned")
    manifest = add_facts(
        paths,
        "04_eval_safety",
        untuned_rows="../../untuned/ailuminate_safety_untuned_abc.jsonl",
        control_rows="../../untuned/ailuminate_safety_control_untuned_abc.jsonl",
    )
    named = {
        f"../../untuned/ailuminate_preds_{name}_abc.jsonl": {"sha256": "", "size": 0, "mtime_ns": 0} for name in names
    }
    write_json(paths.manifest("04_eval_safety"), {**manifest, "outputs": manifest["outputs"] | named})
    found = verify.verify_folder(tmp_path)
    assert not any("response" in line for line in found.mismatches)
    change(paths.untuned_dir / "ailuminate_preds_control_untuned_abc.jsonl", 1, response="another")
    wrong = [line for line in verify.verify_folder(tmp_path).mismatches if "response" in line]
    assert len(wrong) == 1 and "ailuminate_safety_control_untuned_abc.jsonl, line 2" in wrong[0]
