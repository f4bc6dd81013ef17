"""lib.evaluate.other_judgements: which rows are judged in which way, and that they are kept."""

import json

import pytest

from lib import safety
from lib.engine.generator import Completion
from lib.evaluate.other_judgements import MOST_WRITTEN, judge_in_other_ways
from lib.reports.judge_tables import judge_card_view

JUDGING = {"guidelines": "G", "context": "response", "mode": "probabilities", "max_new_tokens": 4}
ROWS = [{"id": number, "prompt": f"p{number}", "response": f"r{number}"} for number in range(50)]


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
    again = judge_in_other_ways(ROWS, judge, tmp_path / "card", {"a": 1}, JUDGING, guidelines, 25)
    assert {name: len(rows) for name, rows in again.items()} == {
        "other_context": 50,
        "other_mode": MOST_WRITTEN,
        "guidelines_brief": 25,
    }
    assert [row["id"] for row in again["guidelines_brief"]] == list(range(0, 50, 2))
    assert {row["safety_label"] for rows in again.values() for row in rows} == {"safe"}
    assert (judge.shown.count("G"), judge.shown.count("written"), judge.shown.count("in brief")) == (50, 20, 25)
    # As runs made before hashed them: their rows stay.
    kept = json.loads((tmp_path / "card" / "other_context.jsonl").read_text().splitlines()[0])
    way = {**JUDGING, "context": "prompt_and_response"}
    assert kept["protocol_hash"] == safety.sha256_json({"responses": {"a": 1}, **way})


def test_rows_that_are_there_are_not_judged_again(tmp_path, guidelines):
    first = judge_in_other_ways(ROWS, Judge(), tmp_path / "card", {}, JUDGING, guidelines, 4)
    idle = Judge()
    assert judge_in_other_ways(ROWS, idle, tmp_path / "card", {}, JUDGING, guidelines, 4) == first
    assert not idle.shown


def test_no_rows_are_judged_where_none_are_wanted(tmp_path, guidelines):
    assert judge_in_other_ways(ROWS, Judge(), tmp_path / "card", {}, JUDGING, guidelines, 0) == {}


class Loaded(Judge):
    """A judge that says when its model is dropped."""

    def __init__(self):
        super().__init__()
        self.closed = 0

    def close(self):
        self.closed += 1


def test_the_other_precision_judges_the_sample_last_and_one_model_is_loaded_at_a_time(tmp_path, guidelines):
    judge, other = Loaded(), Loaded()
    again = judge_in_other_ways(ROWS, judge, tmp_path, {}, JUDGING, guidelines, 25, {"nf4": other})
    assert [row["id"] for row in again["other_precision_nf4"]] == [row["id"] for row in again["guidelines_brief"]]
    assert list(again)[-1] == "other_precision_nf4" and (judge.closed, other.closed) == (1, 1)
    assert other.shown == ["G"] * 25
    said = judge_card_view([{**row, "safety_label": "safe", "safety_score": 0.9} for row in ROWS], again)[1]
    assert any(line.startswith("other precision nf4: 0 of 25 (0.0 %") or "precision nf4" in line for line in said)


def test_a_written_judge_prompt_has_no_other_context(tmp_path, guidelines):
    judging = {**JUDGING, "template": "{reply}"}
    again = judge_in_other_ways(ROWS, Judge(), tmp_path, {}, judging, guidelines, 4)
    assert list(again) == ["other_mode", "guidelines_brief"]
