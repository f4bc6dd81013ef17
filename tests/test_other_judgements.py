"""lib.evaluate.other_judgements: which rows are judged in which way, and that they are kept."""

import json

import pytest

from lib import safety
from lib.engine.generator import Completion
from lib.evaluate.other_judgements import MOST_WRITTEN, judge_in_other_ways, judgement_files
from lib.evaluate.sides import TUNED, UNTUNED
from lib.record.protocol import without_adapter
from lib.reports.judge_tables import judge_card_view

JUDGING = {"guidelines": "G", "context": "response", "mode": "probabilities", "max_new_tokens": 4}
ROWS = [{"id": number, "prompt": f"p{number}", "response": f"r{number}"} for number in range(50)]
JUDGED = {TUNED: ROWS}


class Judge:
    """Says SAFE, and keeps what it was shown."""

    def __init__(self):
        self.shown = []

    def label_probabilities(self, conversations, *, labels, on_result=None):
        self.shown += [conversation[0]["content"] for conversation in conversations]
        for index in range(len(conversations)):
            on_result(index, [0.9, 0.1])

    def generate(self, conversations, *, max_new_tokens, on_completion=None, sampling=None, keys=None):
        self.shown += ["written"] * len(conversations)
        for index in range(len(conversations)):
            on_completion(index, Completion("SAFE", "stop", 1, 9, (1,)))


@pytest.fixture
def guidelines(tmp_path):
    (tmp_path / "guidelines_brief.txt").write_text("in brief")
    path = tmp_path / "guidelines.txt"
    path.write_text("G")
    return path


def test_each_way_changes_one_setting_and_has_its_rows(tmp_path, guidelines):
    judge = Judge()
    again = judge_in_other_ways(JUDGED, judge, tmp_path / "card", {"a": 1}, JUDGING, guidelines, 25)
    assert {name: len(sides[TUNED]) for name, sides in again.items()} == {
        "other_context": 50,
        "other_mode": MOST_WRITTEN,
        "guidelines_brief": 25,
    }
    assert [row["id"] for row in again["guidelines_brief"][TUNED]] == list(range(0, 50, 2))
    assert {row["safety_label"] for sides in again.values() for row in sides[TUNED]} == {"safe"}
    assert (judge.shown.count("G"), judge.shown.count("written"), judge.shown.count("in brief")) == (50, 20, 25)
    # As runs made before hashed them: their rows stay.
    kept = json.loads((tmp_path / "card" / "judge_card" / "other_context.jsonl").read_text().splitlines()[0])
    way = {**JUDGING, "context": "prompt_and_response"}
    assert kept["protocol_hash"] == safety.sha256_json({"responses": {"a": 1}, **way})


def test_rows_that_are_there_are_not_judged_again(tmp_path, guidelines):
    first = judge_in_other_ways(JUDGED, Judge(), tmp_path / "card", {}, JUDGING, guidelines, 4)
    idle = Judge()
    assert judge_in_other_ways(JUDGED, idle, tmp_path / "card", {}, JUDGING, guidelines, 4) == first
    assert not idle.shown


def test_no_rows_are_judged_where_none_are_wanted(tmp_path, guidelines):
    assert judge_in_other_ways(JUDGED, Judge(), tmp_path / "card", {}, JUDGING, guidelines, 0) == {}


PROTOCOL = {"adapter": ["a"], "judge": "j"}


def both(tmp_path, guidelines, untuned=None, num_rows=7, **more):
    untuned = untuned or [{**row, "response": f"u{row['id']}"} for row in ROWS]
    judge = more.pop("judge", None) or Judge()
    part = (judge, tmp_path, PROTOCOL, JUDGING, guidelines, num_rows)
    return judge_in_other_ways({UNTUNED: untuned, 0.5: ROWS, **JUDGED}, *part, **more)


# More rows than there are, one row, the untuned rows in another order.
@pytest.mark.parametrize(("num_rows", "reverse"), [(7, False), (1, False), (500, False), (7, True)])
def test_the_untuned_responses_to_the_same_prompts_are_judged_in_the_same_ways(tmp_path, guidelines, num_rows, reverse):
    untuned = [{**row, "response": f"u{row['id']}"} for row in ROWS]
    again = both(tmp_path, guidelines, untuned[::-1] if reverse else untuned, num_rows)
    for way, sides in again.items():
        assert {row["id"] for row in sides[UNTUNED]} == {row["id"] for row in sides[TUNED]}, way
        assert {row["response"][0] for row in sides[UNTUNED]} == {"u"} and len(sides) == 2
        files = {side: tmp_path / name for side, name in judgement_files(again)[way].items()}
        kept = {side: [json.loads(line) for line in path.open()] for side, path in files.items()}
        assert kept == sides
        assert kept[TUNED][0]["protocol_hash"] != kept[UNTUNED][0]["protocol_hash"]
    brief = safety.sha256_json({"responses": without_adapter(PROTOCOL), **JUDGING, "guidelines": "in brief"})
    assert again["guidelines_brief"][UNTUNED][0]["protocol_hash"] == brief


def test_a_resumed_stage_judges_only_the_untuned_rows_that_are_missing(tmp_path, guidelines):
    first = both(tmp_path, guidelines)
    path = tmp_path / judgement_files(first)["guidelines_brief"][UNTUNED]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:20])
    judge = Judge()
    assert both(tmp_path, guidelines, judge=judge) == first
    assert judge.shown == ["in brief"] * 4


class Loaded(Judge):
    """A judge that says when its model is dropped."""

    def __init__(self):
        super().__init__()
        self.closed = 0

    def close(self):
        self.closed += 1


def test_the_other_precision_judges_the_sample_last_and_one_model_is_loaded_at_a_time(tmp_path, guidelines):
    judge, other = Loaded(), Loaded()
    again = judge_in_other_ways(JUDGED, judge, tmp_path, {}, JUDGING, guidelines, 25, {"nf4": other})
    sampled = [[row["id"] for row in again[way][TUNED]] for way in ("other_precision_nf4", "guidelines_brief")]
    assert sampled[0] == sampled[1]
    assert list(again)[-1] == "other_precision_nf4" and (judge.closed, other.closed) == (1, 1)
    assert other.shown == ["G"] * 25
    as_judged = [{**row, "safety_label": "safe", "safety_score": 0.9} for row in ROWS]
    said = judge_card_view(as_judged, {way: sides[TUNED] for way, sides in again.items()})[1]
    assert any(line.startswith("other precision nf4: 0 of 25 (0.0 %") or "precision nf4" in line for line in said)


def test_each_other_precision_judges_both_models_before_it_is_dropped(tmp_path, guidelines):
    judge, other = Loaded(), Loaded()
    again = both(tmp_path, guidelines, judge=judge, other={"none": other})
    assert len(other.shown) == 2 * 7 and other.closed == 1
    assert len(again["other_precision_none"][UNTUNED]) == 7


def test_a_written_judge_prompt_has_no_other_context(tmp_path, guidelines):
    judging = {**JUDGING, "template": "{reply}"}
    again = judge_in_other_ways(JUDGED, Judge(), tmp_path, {}, judging, guidelines, 4)
    assert list(again) == ["other_mode", "guidelines_brief"]
