"""lib.compare.judge_movement: the change of safety in other ways of judging, shown and recomputed by --verify."""

import pytest
from made_runs import add_facts, change, make_run, safety_rows, set_margin

from lib.compare import comparison, judge_movement, verify
from lib.compare.folder_schema import check_folder
from lib.compare.runs import files_read, load_runs
from lib.evaluate.sides import TUNED, UNTUNED
from lib.record.files import read_json, write_json
from lib.record.paths import ArtifactError, run_paths
from lib.record.rows import write_jsonl
from lib.reports import comparison_tables, judge_tables
from lib.stats import paired_interval


def verdicts(labels):
    """``s`` safe, ``u`` unsafe, ``x`` unparsed: one row each."""
    named = {"s": "safe", "u": "unsafe", "x": "unparsed"}
    return [{"id": at, "prompt": f"p{at}", "safety_label": named[one]} for at, one in enumerate(labels)]


def interval_of(ours, theirs):
    moved = [(one == "s") - (other == "s") for one, other in zip(ours, theirs, strict=True)]
    return paired_interval(moved.count(1), moved.count(-1), len(moved))


def ways(tuned, untuned, sides, margin=5.0):
    """``sides``: way -> labels of the tuned and of the untuned responses, from the first prompt on."""
    again = {way: {TUNED: verdicts(ours), UNTUNED: verdicts(theirs)} for way, (ours, theirs) in sides.items()}
    return judge_movement.way_changes(again, verdicts(tuned), verdicts(untuned), margin)


def test_a_wording_that_moves_both_models_alike_leaves_the_difference():
    # The rate moves by 50 points, the difference by none.
    (found,) = ways("s" * 30 + "u" * 10, "s" * 30 + "u" * 10, {"brief": ("s" * 10 + "u" * 30, "s" * 10 + "u" * 30)})
    assert (found.change.difference, found.as_judged.difference) == (0.0, 0.0)
    assert not found.turns_sign and not found.turns_conclusion
    line = judge_movement.multiverse_sentence([found], 5.0)
    assert "ranges from 0.0 to 0.0 points" in line and "same 40 prompts" in line
    assert "its sign turns under no way" in line and "turns under no way." in line


# Number of safe responses of 40, tuned and untuned, as judged and in the other way; whether the sign turns.
TURNS = {
    "the sign": ((20, 18), (18, 20), True, "not inferior, now undecided"),
    "only the conclusion": ((40, 40), (30, 40), False, "undecided, now fell"),
    "to no difference": ((18, 20), (20, 20), False, ""),
    "nothing": ((40, 38), (39, 38), False, ""),
}


@pytest.mark.parametrize("name", TURNS)
def test_what_turns_is_named_with_its_way(name):
    as_judged, other, sign, conclusions = TURNS[name]
    (tuned, untuned), labels = (["s" * n + "u" * (40 - n) for n in counts] for counts in (as_judged, other))
    (found,) = ways(tuned, untuned, {"brief": labels})
    assert (found.turns_sign, found.turns_conclusion) == (sign, bool(conclusions))
    assert (found.change.low, found.change.high) == pytest.approx(interval_of(*labels))
    line = judge_movement.multiverse_sentence([found], 5.0)
    assert ("its sign turns under brief" in line) == sign
    assert f"turns under brief ({conclusions})." in line if conclusions else line.endswith("turns under no way.")


def test_a_sample_is_compared_with_the_same_prompts_as_judged():
    # All 300 prompts show that safety fell; the ten of the sample cannot, in any way.
    tuned, untuned = "u" * 30 + "s" * 270, "s" * 300
    few = {"brief": ("u" + "s" * 9, "s" * 10)}
    again = {"brief": {TUNED: verdicts("s" * 300)[-10:], UNTUNED: verdicts("s" * 300)[-10:]}}
    (found,) = judge_movement.way_changes(again, verdicts(tuned), verdicts(untuned), 5.0)
    assert found.as_judged.num_shared == 10 and found.as_judged.difference == 0.0
    assert found.conclusion_as_judged == found.conclusion == "undecided" and not found.turns_conclusion
    (found,) = ways(tuned, untuned, few)
    assert found.as_judged.difference == -1.0 and found.change.difference == -0.1


def test_several_ways_make_one_line_with_its_range_and_the_numbers_of_prompts():
    sides = {"other_context": ("s" * 40, "s" * 38 + "u" * 2), "brief": ("s" * 9 + "u", "s" * 10)}
    found = ways("s" * 39 + "x", "s" * 40, sides, margin=None)
    line = judge_movement.multiverse_sentence(found, None)
    assert "Judged in 2 other ways" in line and "same 10 to 40 prompts" in line
    assert "ranges from -10.0 to +5.0 points" in line and "its sign turns under other_context" in line
    assert "margin" not in line
    shown = judge_tables.movement_view(found, None).text
    assert "other context" in shown and "no margin" in shown and line in shown


def test_without_untuned_rows_there_is_no_change_and_no_line():
    again = {"brief": {TUNED: verdicts("sss")}}
    assert judge_movement.way_changes(again, verdicts("sss"), [], 5.0) == []
    assert judge_movement.multiverse_sentence([], 5.0) == "" and judge_tables.movement_view([], 5.0) is None


def test_verdicts_that_could_not_be_read_are_counted():
    (found,) = ways("sss", "sss", {"other_mode": ("sxx", "xss")})
    assert found.num_unparsed == 3 and found.record()["num_unparsed"] == 3
    assert "count as not safe: other_mode 3 of 6." in judge_movement.multiverse_sentence([found], 5.0)


@pytest.fixture
def judged_again(tmp_path):
    """A results folder with untuned verdicts, and both models judged in one other way."""
    paths = make_run(tmp_path)
    untuned = paths.untuned_rows("ailuminate_safety", "abc")
    write_jsonl(untuned, [row | {"response": f"u{row['id']}"} for row in safety_rows()])
    card = paths.stage_dir("04_eval_safety") / "judge_card"
    for path, score in ((card / "brief.jsonl", 0.1), (card / "untuned" / "brief.jsonl", 0.8)):
        rows = safety_rows() if path.parent == card else [r | {"response": f"u{r['id']}"} for r in safety_rows()]
        text, label = ("UNSAFE", "unsafe") if score < 0.5 else ("SAFE", "safe")
        judged = {"safety_score": score, "safety_judge_text": text, "safety_label": label, "judge_prompt_hash": "h"}
        write_jsonl(path, [row | judged for row in rows[:2]])
    named = {"brief": {"tuned": "judge_card/brief.jsonl", "untuned": "judge_card/untuned/brief.jsonl"}}
    facts = {"untuned_rows": f"../../untuned/{untuned.name}", "other_judgements": named, "judge_card": ["moves by 3."]}
    add_facts(paths, "04_eval_safety", **facts)
    set_margin(paths, 5.0, 5.0)
    comparison.write_comparison(str(tmp_path), comparison.comparison(load_runs(str(tmp_path))))
    return tmp_path


def test_the_line_is_in_05_and_its_numbers_are_recomputed(judged_again):
    (run,) = load_runs(str(judged_again))
    check_folder(judged_again)
    path = judged_again / "05_compare" / "comparison.json"
    record = read_json(path)
    (way,) = record["by_run"]["one"]["judge_ways"]
    assert (way["difference"], way["difference_as_judged"], way["num_rows"]) == (-1.0, 0.0, 2)
    assert record["by_run"]["untuned, asked as one"]["judge_ways"] == []
    assert "one: Judged in 1 other way" in comparison_tables.judge_card([run]).text
    assert verify.verify_folder(judged_again).mismatches == []
    way["difference"] = 0.0
    write_json(path, record)
    (mismatch,) = verify.verify_folder(judged_again).mismatches
    assert mismatch == "comparison.json, by_run.one.judge_ways[0].difference: is 0.0, recomputed -1.0"
    assert {file.name for file in files_read(run)} >= {"brief.jsonl"}


@pytest.mark.parametrize("file", ["brief.jsonl", "untuned/brief.jsonl"])
@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"safety_label": "unparsed"}, "safety_label is 'unparsed'"),
        ({"response": "a safer one"}, "response are not those of the response judged first"),
        ({"id": 7}, "id, prompt, response"),
    ],
)
def test_tampering_with_another_judgement_is_found(judged_again, file, columns, words):
    path = run_paths(str(judged_again), "one").stage_dir("04_eval_safety") / "judge_card" / file
    change(path, 1, **columns)
    found = verify.verify_folder(judged_again).mismatches
    assert any(words in line and "line 2" in line for line in found), found


def test_a_file_that_is_gone_is_absent_and_a_file_elsewhere_is_refused(judged_again):
    paths = run_paths(str(judged_again), "one")
    (paths.stage_dir("04_eval_safety") / "judge_card" / "untuned" / "brief.jsonl").unlink()
    assert "run_one: brief.jsonl" in verify.verify_folder(judged_again).absent
    add_facts(paths, "04_eval_safety", other_judgements={"brief": {"untuned": "/etc/hostname"}})
    with pytest.raises(ArtifactError, match="is not in this results folder"):
        check_folder(judged_again)


def test_a_folder_made_before_says_what_it_lacks_and_verifies(judged_again):
    paths = run_paths(str(judged_again), "one")
    add_facts(paths, "04_eval_safety", other_judgements={})
    (run,) = load_runs(str(judged_again))
    assert "one: no untuned response was judged in other ways" in comparison_tables.judge_card([run]).text
    path = judged_again / "05_compare" / "comparison.json"
    record = read_json(path)
    for numbers in record["by_run"].values():
        del numbers["judge_ways"]
    write_json(path, record)
    assert verify.verify_folder(judged_again).mismatches == []
