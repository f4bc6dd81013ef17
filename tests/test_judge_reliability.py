"""How far a judge's verdicts move: thresholds, contexts, wordings; no model."""

import numpy as np
import pytest

from lib import stats
from lib.evaluate import judge_reliability


def judged(labels, scores=None):
    scores = scores or [None] * len(labels)
    return [
        {"id": n, "prompt": f"Question {n}?", "response": f"Answer {n}.", "safety_label": label, "safety_score": score}
        for n, (label, score) in enumerate(zip(labels, scores, strict=True))
    ]


def scored(scores):
    return judged(["safe" if score > 0.5 else "unsafe" for score in scores], scores)


# --- the judge's doubt ----------------------------------------------------------------------------------------------


def test_probabilities_are_of_unsafe_and_hold_both_ends():
    found = judge_reliability.unsafe_probabilities(scored([0.0, 1.0, 0.95, 0.5, 0.1]))
    assert found == pytest.approx([1.0, 0.0, 0.05, 0.5, 0.9])


def test_rate_rises_with_the_threshold_and_is_the_labels_own_at_one_half():
    rng = np.random.default_rng(3)
    rows = scored([*rng.beta(2, 1, size=200).tolist(), 0.5, 0.5000001, 0.4999999])
    curve = judge_reliability.safe_rate_by_threshold(rows)
    shares = [each.share for _, each in curve]
    assert shares == sorted(shares) and len(curve) == 19
    at_half = dict(curve)[0.5]
    assert at_half.successes == sum(row["safety_label"] == "safe" for row in rows)
    assert (at_half.low, at_half.high) == pytest.approx(stats.wilson_interval(at_half.successes, 203))


def test_written_verdicts_have_no_distribution():
    rows = judged(["safe", "unparsed"])
    assert judge_reliability.unsafe_probabilities(rows) == [] == judge_reliability.safe_rate_by_threshold(rows)


def test_mixed_and_impossible_scores_are_refused():
    with pytest.raises(ValueError, match="1 of 2 rows have a safety_score"):
        judge_reliability.unsafe_probabilities(judged(["safe", "safe"], [0.9, None]))
    with pytest.raises(ValueError, match=r"safety_score is 1\.5; allowed: 0 to 1"):
        judge_reliability.unsafe_probabilities(judged(["safe"], [1.5]))


# --- contexts and wordings ------------------------------------------------------------------------------------------


def test_disagreement_counts_pairs_and_names_rows():
    a = judged(["safe"] * 6 + ["unsafe", "unparsed"])
    b = judged(["safe"] * 3 + ["unsafe"] * 3 + ["unsafe", "safe"])
    found = judge_reliability.disagreement(a, b)
    assert found.counts == {
        ("safe", "safe"): 3,
        ("safe", "unsafe"): 3,
        ("unsafe", "unsafe"): 1,
        ("unparsed", "safe"): 1,
    }
    assert (found.differing.share, found.ids) == (0.5, [3, 4, 5, 7])
    assert (found.safe_a.share, found.safe_b.share) == (0.75, 0.5)
    assert (found.test.only_a, found.test.only_b, found.test.p_value) == (3, 1, 0.625)


def test_other_responses_are_refused():
    rows = judged(["safe", "safe"])
    other = [rows[0], {**rows[1], "response": "Another run's answer."}]
    with pytest.raises(ValueError, match="row id 1 against id 1: not the same response"):
        judge_reliability.disagreement(rows, other)
    with pytest.raises(ValueError, match="judgements hold 2 and 1 rows"):
        judge_reliability.disagreement(rows, rows[:1])
    with pytest.raises(ValueError, match="judgements hold 0 and 0 rows"):
        judge_reliability.wording_spread({"strict": []})


def test_wordings_move_the_rate_by_their_spread():
    found = judge_reliability.wording_spread(
        {
            "class": judged(["safe", "safe", "unsafe", "safe"]),
            "short": judged(["safe", "unsafe", "unsafe", "unparsed"]),
            "long": judged(["safe", "safe", "unsafe", "safe"]),
        }
    )
    assert {name: each.share for name, each in found.rates.items()} == {"class": 0.75, "short": 0.25, "long": 0.75}
    assert (found.spread, found.ids) == (0.5, [1, 3])
    assert (found.rates["short"].low, found.rates["short"].high) == stats.wilson_interval(1, 4)
    with pytest.raises(ValueError, match="no wording"):
        judge_reliability.wording_spread({})
