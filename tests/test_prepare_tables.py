"""Tables of 01_prepare: the model's own answers, and what so many rows can show."""

from types import SimpleNamespace

import pytest

from lib.reports import prepare_tables
from lib.reports.html import note


def test_own_answers_are_shown_as_rates_of_questions():
    outcomes = ["wrong", "correct", "correct", "correct"]
    rows = [{"correct": one == "correct", "outcome": one, "finish_reason": "stop"} for one in outcomes]
    sampled = SimpleNamespace(rows=rows, num_samples=2, num_new=4, num_new_tokens=40, wall_s=2.0)
    distilled = SimpleNamespace(num_gold=1, num_dropped=0)
    made = SimpleNamespace(sampled=sampled, distilled=distilled, protocol={"decoding": "sampled"})
    assert "model's own: 100.0 % (95 % interval 34.2 to 100.0, n = 2); 1 rows" in prepare_tables.own_answers_text(made)
    stage = SimpleNamespace(plot=lambda figure, name, alt: note(alt))
    assert "What became of 4 answers" in prepare_tables.own_answers(made, stage).text


def run_of(num_prompts, num_copies=0):
    """Rows of a run with 263 questions; ``num_copies`` of its prompts appear twice."""
    prompts = [*range(num_prompts - num_copies), *range(num_copies)]
    return SimpleNamespace(prompts=[{"prompt": f"p{number}"} for number in prompts], gsm8k_eval=[{}] * 263)


def test_planning_says_before_the_run_what_so_many_rows_can_show():
    shown = prepare_tables.planning(run_of(240, 12), 5.0).text
    lines = [line.split() for line in shown.splitlines()]
    assert "power: safety did not fall by more than 5 points" in shown and "detectable (80 % power), 3 presets" in shown
    # Discordant rows, detectable for one preset and for three, power at the margin: of claims in a family of two places
    # per preset.
    assert [line[-7:] for line in lines if line[:1] == ["240"]] == [
        ["prompts", *f"{share} % {alone} {among} {power} %".split()]
        for share, alone, among, power in (("5.0", 4.3, 4.7, 83.3), ("10.0", 6.4, 7.0, 59.9), ("15.0", 7.8, 8.8, 45.7))
    ]
    assert sum(line[:2] == ["1,200", "AILuminate"] for line in lines) == sum(line[:1] == ["263"] for line in lines) == 3


@pytest.mark.parametrize(
    ("rows", "margin", "recommended"),
    [((240, 12), 5.0, True), ((240, 12), 10.0, False), ((1200,), 3.0, False), ((50,), 10.0, True)],
)
def test_a_larger_prompt_set_is_recommended_where_the_prompts_cannot_carry_the_margin(rows, margin, recommended):
    text = prepare_tables.margin_text(run_of(*rows), margin)
    assert ("ailuminate_prompt_set: demo1200" in text and "too few" in text) == recommended


def test_a_margin_that_no_prompt_set_carries_is_called_that():
    for rows in (run_of(240, 12), run_of(1200)):
        assert prepare_tables.margin_text(rows, 1.0).endswith("Only a larger margin can be shown.")
    # Without prompts there is nothing to plan but the questions.
    assert prepare_tables.margin_text(run_of(0), 5.0) == "" and "263" in prepare_tables.planning(run_of(0), 5.0).text
