"""Tables of 01_prepare: the model's own answers."""

from types import SimpleNamespace

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
