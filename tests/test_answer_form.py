"""lib.compare.answer_form: whether a gain is in the form of answers, tested on (strict - flexible) itself."""

import pytest

from lib import gsm8k
from lib.compare.answer_form import form_change, form_sentence

# Right in form, right number in another form, wrong.
OUTPUTS = {"r": "#### 1", "f": "It is 1.", "w": "#### 2"}


def answers(letters):
    rows = [
        {"id": at, "question": f"q{at}", "gold_answer": "#### 1", "model_output": OUTPUTS[one]}
        for at, one in enumerate(letters)
    ]
    return [row | gsm8k.score_row(row) for row in rows]


# Untuned and tuned answers to the same questions, the change of (strict - flexible) in rows, and what is said.
CASES = {
    "format alone": ("f" * 12 + "w" * 8, "r" * 12 + "w" * 8, 12, "tuning improved the form"),
    "reasoning alone": ("r" * 8 + "w" * 12, "r" * 20, 0, "no change of form is shown"),
    # Strict gains 6 and flexible 5: only one may be significant, and the form has hardly changed.
    "both": ("w" * 5 + "f" + "w" * 14, "r" * 6 + "w" * 14, 1, "no change of form is shown"),
    "form lost": ("r" * 12 + "w" * 8, "f" * 12 + "w" * 8, -12, "tuning made the form worse"),
    # As many lost as gained: strict is the same, and so is the form.
    "both ways": ("rf" * 10, "fr" * 10, 0, "no change of form is shown"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_change_of_strict_less_flexible_is_tested_itself(name):
    untuned, tuned, moved, words = CASES[name]
    found = form_change(answers(tuned), answers(untuned))
    sides = [gsm8k.summarize(answers(letters)) for letters in (tuned, untuned)]
    gaps = [side["num_correct"] - side["num_correct_flexible"] for side in sides]
    assert gaps[0] - gaps[1] == moved and found.test.difference == pytest.approx(moved / len(tuned))
    assert found.test.low <= found.test.difference <= found.test.high
    assert (found.num_lost, found.num_lost_untuned) == (-gaps[0], -gaps[1])
    assert f"): {words}. The right number" in form_sentence(found)
    assert found.record()["p_value"] == found.test.p_value


def test_few_changes_are_no_finding_and_nothing_shared_is_nothing():
    found = form_change(answers("r" * 4 + "w" * 60), answers("f" * 4 + "w" * 60))
    assert found.test.difference > 0 and "no change of form is shown" in form_sentence(found)
    assert form_change(answers("rrr"), []) is None
