"""How far a judge can be trusted: thresholds, contexts, wordings, a person's labels; no model."""

import re

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from lib import stats
from lib.evaluate import judge_reliability
from lib.evaluate.judge_reliability import LabelsError, Rate


def judged(labels, scores=None):
    scores = scores or [None] * len(labels)
    return [
        {"id": n, "prompt": f"Question {n}?", "response": f"Answer {n}.", "safety_label": label, "safety_score": score}
        for n, (label, score) in enumerate(zip(labels, scores, strict=True))
    ]


def scored(scores):
    return judged(["safe" if score > 0.5 else "unsafe" for score in scores], scores)


def rate(num_of, num_rows):
    return Rate.of_counts(num_of, num_rows)


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


# --- labels ---------------------------------------------------------------------------------------------------------


def write(tmp_path, text):
    path = tmp_path / "judge_labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_labels_are_read_by_id(tmp_path):
    path = write(tmp_path, "\ufeffid,label,note\n3, Safe ,fine\n0,UNSAFE,\n")
    assert judge_reliability.read_labels(path) == {3: "safe", 0: "unsafe"}


def test_labels_of_several_runs_are_kept_apart(tmp_path):
    path = write(tmp_path, "run_name,id,label\nsimple,0,safe\nstrong,0,unsafe\nstrong,1,safe\n")
    assert judge_reliability.read_labels(path, "strong") == {0: "unsafe", 1: "safe"}
    assert judge_reliability.read_labels(path, "medium") == {}


@pytest.mark.parametrize("text", ["id;label;note\n0;safe;a, b\n", "id\tlabel\n0\tsafe\n", "ID, Label \r\n0,safe\r\n"])
def test_labels_of_any_spreadsheet_are_read(tmp_path, text):
    assert judge_reliability.read_labels(write(tmp_path, text)) == {0: "safe"}


@pytest.mark.parametrize(
    ("encoding", "place"), [("cp1252", "line 3: byte 31 of the file is 0xE9"), ("utf-16", "it is UTF-16")]
)
def test_labels_in_another_encoding_are_refused_with_place_and_remedy(tmp_path, encoding, place):
    path = tmp_path / "judge_labels.csv"
    path.write_bytes("id,label,note\n0,safe,fine\n1,café,\n".encode(encoding))
    with pytest.raises(LabelsError, match=rf"judge_labels\.csv is not UTF-8 text \({place}\): save it as UTF-8"):
        judge_reliability.read_labels(path)


BAD_LABELS = [
    ("id label\n0 safe\n", "columns are id label; allowed: id,label"),
    ('id,label,note\n0,safe,"open\n1,unsafe,\n', "after line 1: not CSV (unexpected end of data)"),
    ("", "columns are none; allowed: id,label"),
    ("id,label\n0,safe\n1,maybe\n", "line 3: label is 'maybe'; allowed: safe, unsafe"),
    ("id,label\nx,safe\n-1,safe\n", "line 2: id is 'x'; allowed: a row's number, from 0; line 3: id is '-1'"),
    ("id,label\n4,safe\n4,unsafe\n", "line 3: id 4 stands twice"),
    ('id,label,note\n4,safe,"two\nlines"\n5\n', "line 4: label is ''"),
]


@pytest.mark.parametrize(("text", "message"), BAD_LABELS)
def test_bad_labels_are_refused_with_their_line(tmp_path, text, message):
    with pytest.raises(LabelsError, match=re.escape(message)):
        judge_reliability.read_labels(write(tmp_path, text))


def test_missing_labels_say_what_to_write(tmp_path):
    with pytest.raises(LabelsError, match="is missing: write a CSV with the columns id,label"):
        judge_reliability.read_labels(tmp_path / "judge_labels.csv")


def test_labels_of_other_rows_are_refused():
    rows = judged(["safe"])
    with pytest.raises(LabelsError, match=r"ids \[7\] are not among the 1 rows"):
        judge_reliability.agreement(rows, {0: "safe", 7: "safe"})
    with pytest.raises(LabelsError, match="the file holds no label"):
        judge_reliability.agreement(rows, {})


# --- agreement ------------------------------------------------------------------------------------------------------


def test_agreement_with_a_person():
    # person unsafe: judge finds 8 of 10; person safe: judge calls 25 of 30 safe, 1 of the others unparsed.
    rows = judged(["unsafe"] * 8 + ["safe"] * 2 + ["safe"] * 25 + ["unsafe"] * 4 + ["unparsed"] + ["safe"] * 60)
    labels = {n: "unsafe" if n < 10 else "safe" for n in range(40)}
    found = judge_reliability.agreement(rows, labels)
    assert (found.num_labelled, found.agreeing.successes) == (40, 33)
    assert found.counts[("safe", "unparsed")] == 1
    assert (found.sensitivity.successes, found.sensitivity.n) == (8, 10)
    assert (found.specificity.successes, found.specificity.n) == (25, 30)
    assert (found.sensitivity.low, found.sensitivity.high) == pytest.approx(stats.wilson_interval(8, 10))
    # By hand: 33 of 40 agree, 30·27 + 10·13 of 40² would by chance.
    by_chance = (30 * 27 + 10 * 13) / 40**2
    assert found.kappa == pytest.approx((33 / 40 - by_chance) / (1 - by_chance), abs=1e-12)
    assert found.kappa_low < found.kappa < found.kappa_high
    # Rogan-Gladen by hand: 13 of 100 found.
    assert found.corrected.rate == pytest.approx(1 - max(0, (0.13 + 25 / 30 - 1) / (0.8 + 25 / 30 - 1)))
    assert found.corrected.low <= found.corrected.rate <= found.corrected.high


def test_labels_of_every_row_correct_the_rate_to_the_persons_own():
    rng = np.random.default_rng(11)
    truth = rng.random(200) < 0.3
    verdicts = np.where(rng.random(200) < 0.85, truth, ~truth)
    rows = judged(["unsafe" if verdict else "safe" for verdict in verdicts])
    found = judge_reliability.agreement(rows, {n: "unsafe" if label else "safe" for n, label in enumerate(truth)})
    assert found.corrected.rate == pytest.approx(1 - truth.mean())


def test_one_sided_labels_correct_nothing():
    found = judge_reliability.agreement(judged(["safe", "safe"]), {0: "safe", 1: "safe"})
    assert (found.kappa, found.sensitivity, found.specificity.share) == (None, None, 1.0)
    assert (found.corrected, found.uncorrected) == (None, "no response is labelled unsafe")


def test_judge_that_says_the_opposite_is_refused():
    found = judge_reliability.agreement(
        judged(["safe", "unsafe"] * 5), {n: ("unsafe", "safe")[n % 2] for n in range(10)}
    )
    assert found.corrected is None and "sum to 1 or less" in found.uncorrected
    assert found.kappa == pytest.approx(-1)


# --- the corrected rate ---------------------------------------------------------------------------------------------


def test_perfect_and_well_known_judge_gives_agresti_and_coulls_interval():
    # 10^9 labels: the judge's doubt is gone, what is left is the interval of the rows.
    found = judge_reliability.corrected_safe_rate(70, 100, rate(10**9, 10**9), rate(10**9, 10**9))
    assert found.rate == pytest.approx(0.7)
    assert (found.low, found.high) == pytest.approx(proportion_confint(70, 100, method="agresti_coull"), abs=1e-6)


def test_corrected_rate_stays_within_0_and_1():
    high = judge_reliability.corrected_safe_rate(100, 100, rate(9, 10), rate(9, 10))
    assert (high.rate, high.high) == (1.0, 1.0) and 0 < high.low < 1
    low = judge_reliability.corrected_safe_rate(0, 100, rate(9, 10), rate(9, 10))
    assert (low.rate, low.low) == (0.0, 0.0) and 0 < low.high < 1


@pytest.mark.parametrize(("sensitivity", "specificity"), [((5, 10), (5, 10)), ((0, 9), (9, 9)), ((36, 100), (2, 3))])
def test_uninformative_judge_is_refused(sensitivity, specificity):
    # The last sums to 1.03 as measured, and to under 1 with the pseudo-counts of the interval.
    with pytest.raises(judge_reliability.UninformativeJudge, match="no more often than safe ones"):
        judge_reliability.corrected_safe_rate(50, 100, rate(*sensitivity), rate(*specificity))


@pytest.mark.parametrize(("unsafe_share", "sensitivity", "specificity"), [(0.08, 0.85, 0.95), (0.3, 0.7, 0.9)])
def test_corrected_interval_covers_the_truth(unsafe_share, sensitivity, specificity):
    rng = np.random.default_rng(17)
    found_share = unsafe_share * sensitivity + (1 - unsafe_share) * (1 - specificity)
    draws = zip(
        rng.binomial(240, found_share, 1000),
        rng.binomial(60, sensitivity, 1000),
        rng.binomial(60, specificity, 1000),
        strict=True,
    )
    intervals = [
        judge_reliability.corrected_safe_rate(240 - k, 240, bare_rate(se), bare_rate(sp)) for k, se, sp in draws
    ]
    coverage = np.mean([each.low <= 1 - unsafe_share <= each.high for each in intervals])
    assert 0.93 <= coverage <= 0.99


def bare_rate(num_of, num_rows=60):
    return Rate(int(num_of), num_rows, 0.0, 1.0)
