"""A person's labels: the file, which rows to label, agreement with the judge, corrected safe rates; no model."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from statsmodels.stats.inter_rater import cohens_kappa

from lib import stats
from lib.evaluate import labels
from lib.evaluate.labels import LabelsError

PROJECT_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_ROOT / "benchmarks"))

import bench_labels as bench  # noqa: E402


def judged(verdicts, prompts=None):
    prompts = prompts or [f"Question {n}?" for n in range(len(verdicts))]
    return [{"id": n, "prompt": prompts[n], "safety_label": verdict} for n, verdict in enumerate(verdicts)]


def marked(unsafe, safe):
    return {**dict.fromkeys(unsafe, "unsafe"), **dict.fromkeys(safe, "safe")}


def of_tuned(rows, given):
    return labels.agreement({"tuned": rows}, {"tuned": given}).models["tuned"]


# --- labels ---------------------------------------------------------------------------------------------------------


def write(tmp_path, text):
    path = tmp_path / "judge_labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_labels_are_read_by_id(tmp_path):
    path = write(tmp_path, "\ufeffid,label,note\n3, Safe ,fine\n0,UNSAFE,\n")
    assert labels.read_labels(path) == {"tuned": {3: "safe", 0: "unsafe"}, "untuned": {}}


def test_labels_of_several_runs_are_kept_apart(tmp_path):
    path = write(tmp_path, "run_name,id,label\nsimple,0,safe\nstrong,0,unsafe\nstrong,1,safe\n")
    assert labels.read_labels(path, "strong")["tuned"] == {0: "unsafe", 1: "safe"}
    assert labels.read_labels(path, "medium") == {"tuned": {}, "untuned": {}}


def test_labels_of_both_models_are_kept_apart(tmp_path):
    path = write(tmp_path, "id,label,Model\n4,safe,tuned\n4,unsafe, UNTUNED\n7,safe,tuned\n")
    assert labels.read_labels(path) == {"tuned": {4: "safe", 7: "safe"}, "untuned": {4: "unsafe"}}


@pytest.mark.parametrize("text", ["id;label;note\n0;safe;a, b\n", "id\tlabel\n0\tsafe\n", "ID, Label \r\n0,safe\r\n"])
def test_labels_of_any_spreadsheet_are_read(tmp_path, text):
    assert labels.read_labels(write(tmp_path, text))["tuned"] == {0: "safe"}


@pytest.mark.parametrize(
    ("encoding", "place"), [("cp1252", "line 3: byte 31 of the file is 0xE9"), ("utf-16", "it is UTF-16")]
)
def test_labels_in_another_encoding_are_refused_with_place_and_remedy(tmp_path, encoding, place):
    path = tmp_path / "judge_labels.csv"
    path.write_bytes("id,label,note\n0,safe,fine\n1,café,\n".encode(encoding))
    with pytest.raises(LabelsError, match=rf"judge_labels\.csv is not UTF-8 text \({place}\): save it as UTF-8"):
        labels.read_labels(path)


BAD_LABELS = [
    ("id label\n0 safe\n", "columns are id label; allowed: id,label (and model, run_name)"),
    ('id,label,note\n0,safe,"open\n1,unsafe,\n', "after line 1: not CSV (unexpected end of data)"),
    ("", "columns are none; allowed: id,label"),
    ("id,label\n0,safe\n1,maybe\n", "line 3: label is 'maybe'; allowed: safe, unsafe"),
    ("id,label\nx,safe\n-1,safe\n", "line 2: id is 'x'; allowed: a row's number, from 0; line 3: id is '-1'"),
    ("id,label\n4,safe\n4,unsafe\n", "line 3: id 4 stands twice"),
    ('id,label,note\n4,safe,"two\nlines"\n5\n', "line 4: label is ''"),
    ("id,label,model\n4,safe,base\n5,safe\n", "line 2: model is 'base'; allowed: tuned, untuned; line 3: model is ''"),
    ("model,id,label\nUntuned,4,safe\nuntuned,4,safe\n", "line 3: id 4 stands twice"),
]


@pytest.mark.parametrize(("text", "message"), BAD_LABELS)
def test_bad_labels_are_refused_with_their_line(tmp_path, text, message):
    with pytest.raises(LabelsError, match=re.escape(message)):
        labels.read_labels(write(tmp_path, text))


def test_missing_labels_say_what_to_write(tmp_path):
    with pytest.raises(LabelsError, match="is missing: write a CSV with the columns id,label"):
        labels.read_labels(tmp_path / "judge_labels.csv")


# --- which rows to label --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_unsafe", "drawn"), [(100, (25, 25)), (9, (41, 9)), (0, (50, 0)), (230, (10, 40)), (240, (0, 50))]
)
def test_half_of_the_rows_to_label_are_judged_safe_or_what_there_is(num_unsafe, drawn):
    rows = judged(["unsafe", "unparsed"] * (num_unsafe // 2) + ["unsafe"] * (num_unsafe % 2))
    rows += [row | {"id": row["id"] + num_unsafe} for row in judged(["safe"] * (240 - num_unsafe))]
    ids = labels.ids_to_label(rows)
    assert (len(ids["safe"]), len(ids["not safe"])) == drawn
    assert all(number >= num_unsafe for number in ids["safe"]) and all(n < num_unsafe for n in ids["not safe"])
    assert ids == labels.ids_to_label(rows[::-1]) and ids["safe"] == sorted({*ids["safe"]})


def test_few_rows_are_all_to_be_labelled():
    assert labels.ids_to_label(judged(["safe", "unsafe", "safe"])) == {"safe": [0, 2], "not safe": [1]}
    assert labels.ids_to_label([]) == {"safe": [], "not safe": []}


def test_the_draw_is_recorded_with_its_weights():
    rows = {"tuned": judged(["safe"] * 200 + ["unsafe"] * 40), "untuned": judged(["safe"] * 3)}
    kept = labels.labels_record(rows, {}, None)
    drawn = kept["to_label"]["tuned"]
    assert (drawn["safe"]["rows"], drawn["safe"]["weight"], drawn["not safe"]["weight"]) == (200, 8.0, 1.6)
    assert drawn["safe"]["ids"] == labels.ids_to_label(rows["tuned"])["safe"]
    assert kept["to_label"]["untuned"]["not safe"] == {"rows": 0, "weight": None, "ids": []}
    assert kept["labels"] == {} and kept["agreement"] is None
    given = {"tuned": marked([200], [3])}
    kept = labels.labels_record(rows, given, labels.agreement(rows, given))
    assert kept["labels"] == {"tuned": {"200": "unsafe", "3": "safe"}}
    # As a manifest has it.
    assert json.loads(json.dumps(kept)) == kept
    assert kept["agreement"]["models"]["tuned"]["strata"]["safe"] == {"rows": 200, "labelled": 1, "unsafe": 0}


# --- agreement ------------------------------------------------------------------------------------------------------


def test_labels_of_other_rows_are_refused():
    rows = {"tuned": judged(["safe"])}
    with pytest.raises(LabelsError, match=r"ids \[7\] are not among the 1 tuned rows"):
        labels.agreement(rows, {"tuned": {0: "safe", 7: "safe"}})
    with pytest.raises(LabelsError, match=r"ids \[0\] are not among the 0 untuned rows"):
        labels.agreement(rows, {"tuned": {0: "safe"}, "untuned": {0: "safe"}})
    for nothing in ({}, {"tuned": {}, "untuned": {}}):
        with pytest.raises(LabelsError, match="the file holds no label"):
            labels.agreement(rows, nothing)


# Person unsafe: the judge finds 8 of 10; person safe: it calls 25 of 30 safe, one of the others is unparsed.
FORTY = ["unsafe"] * 8 + ["safe"] * 2 + ["safe"] * 25 + ["unsafe"] * 4 + ["unparsed"]


def test_agreement_where_every_row_is_labelled_is_that_of_the_rows():
    found = of_tuned(judged(FORTY), marked(range(10), range(10, 40)))
    assert found.agreeing.value == pytest.approx(33 / 40)
    assert found.sensitivity.value == pytest.approx(8 / 10) and found.specificity.value == pytest.approx(25 / 30)
    assert found.kappa.value == pytest.approx(float(cohens_kappa(np.array([[25, 2], [5, 8]])).kappa))
    # Gwet's AC1 by hand: 10 of 40 unsafe by the person, 13 by the judge.
    mean = (10 + 13) / 80
    by_chance = 2 * mean * (1 - mean)
    assert found.ac1.value == pytest.approx((33 / 40 - by_chance) / (1 - by_chance))
    for one in (found.agreeing, found.kappa, found.ac1, found.sensitivity, found.specificity):
        assert one.low < one.value < one.high
    # A person's own rate, known; for prompts like these about Wilson's interval.
    assert (found.corrected.low, found.corrected.value, found.corrected.high) == pytest.approx((0.75,) * 3)
    ends = (found.corrected_population.low, found.corrected_population.high)
    assert ends == pytest.approx(stats.wilson_interval(30, 40), abs=0.03)


def test_labels_drawn_by_verdict_are_weighted_by_all_rows():
    # Of 200 judged safe 20 labelled, 2 unsafe: 10 %; of 40 others 20 labelled, 15 unsafe: 75 %.
    rows = judged(["safe"] * 200 + ["unsafe"] * 40)
    found = of_tuned(rows, marked([0, 1, *range(200, 215)], [*range(2, 20), *range(215, 220)]))
    assert found.corrected.value == found.corrected_population.value == pytest.approx(1 - (20 + 30) / 240)
    assert found.sensitivity.value == pytest.approx(30 / 50) and found.specificity.value == pytest.approx(180 / 190)
    assert found.agreeing.value == pytest.approx(210 / 240)
    assert found.strata["safe"] == labels.Stratum(200, 20, 2) and found.num_labels == (23, 17)


def test_labels_of_every_row_correct_the_rate_to_the_persons_own():
    rng = np.random.default_rng(11)
    truth = rng.random(200) < 0.3
    verdicts = np.where(rng.random(200) < 0.85, truth, ~truth)
    rows = judged(["unsafe" if verdict else "safe" for verdict in verdicts])
    found = of_tuned(rows, {n: "unsafe" if label else "safe" for n, label in enumerate(truth)})
    assert found.corrected.low == found.corrected.value == pytest.approx(found.corrected.high)
    assert found.corrected.value == pytest.approx(1 - truth.mean())


def test_kappa_needs_five_labels_of_either_kind_and_has_an_interval():
    rows = judged(["safe"] * 50 + ["unsafe"] * 10)
    # Ten labels, all alike: it was 1.00 (1.00 to 1.00).
    alike = of_tuned(rows, marked(range(50, 55), range(5)))
    assert alike.kappa.value == pytest.approx(1) == alike.kappa.high and 0 < alike.kappa.low < 0.8
    # The judge finds none of two: it was 0.00 (0.00 to 0.00).
    assert of_tuned(judged(["safe"] * 60), marked([0, 1], range(2, 50))).kappa is None
    assert of_tuned(rows, marked(range(50, 54), range(9))).kappa is None
    assert of_tuned(rows, marked(range(50, 59), range(4))).kappa is None
    one_sided = of_tuned(judged(["safe", "safe"]), marked([], [0, 1]))
    assert (one_sided.kappa, one_sided.sensitivity) == (None, None)
    assert one_sided.specificity.value == one_sided.ac1.value == 1 and one_sided.ac1.low < 0.5


def test_a_judge_that_says_the_opposite_is_corrected_to_what_the_person_says():
    found = of_tuned(judged(["safe", "unsafe"] * 20), marked(range(0, 20, 2), range(1, 20, 2)))
    assert found.kappa.value == found.ac1.value == pytest.approx(-1) and found.kappa.high < 0
    assert found.corrected.value == pytest.approx(0.5)


# --- corrected rates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_found", "right", "flagged", "num_rows"),
    [(9, 3, 5, 240), (6, 1, 4, 240), (3, 3, 0, 240), (40, 20, 10, 1200), (12, 0, 12, 240)],
)
def test_no_interval_contradicts_what_a_person_found(num_found, right, flagged, num_rows):
    rows = judged(["unsafe"] * num_found + ["safe"] * (num_rows - num_found))
    num_safe = 50 - right - flagged
    given = marked(range(right), [*range(right, right + flagged), *range(num_found, num_found + num_safe)])
    found = of_tuned(rows, given)
    most, least = 1 - right / num_rows, (num_safe + flagged) / num_rows
    assert least <= found.corrected.low < found.corrected.value <= found.corrected.high <= most + 1e-12
    assert found.corrected.high - found.corrected.low > 0.005
    assert found.corrected_population.low < found.corrected.value <= found.corrected_population.high


@pytest.mark.parametrize("labelled", [[0, 1, 2], [200, 201, 202]])
def test_a_stratum_without_labels_widens_the_interval_and_refuses_nothing(labelled):
    rows = judged(["safe"] * 200 + ["unsafe"] * 40)
    found = of_tuned(rows, marked([], labelled))
    assert found.corrected.high - found.corrected.low > (0.8 if labelled[0] else 0.15)
    assert 0 <= found.corrected_population.low < found.corrected_population.high <= 1


def test_more_labels_narrow_the_interval():
    rows = judged(["safe"] * 200 + ["unsafe"] * 40)
    widths = []
    for number in (5, 20, 40):
        found = of_tuned(rows, marked(range(200, 200 + number), range(number))).corrected
        widths.append(found.high - found.low)
    assert widths == sorted(widths, reverse=True) and widths[-1] < widths[0] / 3


def test_equal_prompts_count_as_one():
    verdicts, given = ["safe"] * 60 + ["unsafe"] * 20, marked([0, 60, 61, 62], [*range(1, 10), 63])
    alone = of_tuned(judged(verdicts), given)
    copied = of_tuned(judged(verdicts, [f"q{n // 2}" for n in range(80)]), given)
    assert copied.corrected.value == alone.corrected.value and copied.kappa is alone.kappa is None
    for name in ("corrected", "corrected_population", "ac1"):
        ours, theirs = getattr(copied, name), getattr(alone, name)
        assert ours.high - ours.low > 1.2 * (theirs.high - theirs.low)


def test_the_change_is_corrected_for_a_judge_that_errs_on_one_model_alone():
    # The judge sees no difference; a person finds 10 of 50 unsafe responses that it missed, of the tuned model alone.
    rows = {model: judged(["safe"] * 216 + ["unsafe"] * 24) for model in ("tuned", "untuned")}
    given = {
        "tuned": marked([*range(10), *range(216, 226)], range(10, 50)),
        "untuned": marked(range(216, 226), range(50)),
    }
    found = labels.agreement(rows, given)
    tuned, untuned = found.models["tuned"].corrected.value, found.models["untuned"].corrected.value
    assert found.change.value == found.change_population.value == pytest.approx(tuned - untuned)
    assert found.change.value == pytest.approx(-216 * 0.2 / 240) and found.change.high < -0.05
    assert found.change_population.low < found.change.low and found.change.high < found.change_population.high
    alone = labels.agreement(rows, {"tuned": given["tuned"], "untuned": {}})
    assert alone.change is None and alone.models.keys() == {"tuned"}
    assert alone.models["tuned"] == found.models["tuned"]


def test_prompts_that_both_models_share_narrow_the_change_and_not_the_rates():
    same, other = ["safe"] * 120 + ["unsafe"] * 120, ["unsafe"] * 120 + ["safe"] * 120
    given = {"tuned": marked(range(120, 240), range(120)), "untuned": marked(range(120, 240), range(120))}
    paired = labels.agreement({"tuned": judged(same), "untuned": judged(same)}, given)
    given["untuned"] = marked(range(120), range(120, 240))
    crossed = labels.agreement({"tuned": judged(same), "untuned": judged(other)}, given)
    widths = [one.change_population.high - one.change_population.low for one in (paired, crossed)]
    assert widths[0] < widths[1] / 4
    rates = [one.models["untuned"].corrected_population for one in (paired, crossed)]
    assert rates[0].low == pytest.approx(rates[1].low, abs=0.002)


def test_shown_digits_do_not_depend_on_the_number_of_points(monkeypatch):
    rows = {"tuned": judged(["safe"] * 200 + ["unsafe"] * 40), "untuned": judged(["safe"] * 210 + ["unsafe"] * 30)}
    given = {"tuned": marked([0, *range(200, 220)], [*range(1, 25), *range(220, 225)])}
    given["untuned"] = marked(range(210, 228), [*range(25), *range(228, 230)])
    ours = labels.agreement(rows, given)
    assert ours == labels.agreement(rows, given)
    monkeypatch.setattr(labels, "LOG2_POINTS", 16)
    finer = labels.agreement(rows, given)
    for name in ("change", "change_population"):
        ends = [(getattr(one, name).low, getattr(one, name).high) for one in (ours, finer)]
        assert ends[0] == pytest.approx(ends[1], abs=0.001)
    for name in ("corrected", "corrected_population", "agreeing"):
        one, other = (getattr(found.models["tuned"], name) for found in (ours, finer))
        assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=0.001)


# --- coverage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unsafe_share", "draw"), [(0.05, "by verdict"), (0.1, "from all"), (0.5, "from all")])
def test_intervals_hold_the_truth_and_are_about_as_wide_as_the_best_known(unsafe_share, draw, monkeypatch):
    # `bench_labels.py` has all cells, a thousand studies and more points; of 120 studies 90 % hold it at the least.
    monkeypatch.setattr(labels, "LOG2_POINTS", 10)
    found = bench.cell(unsafe_share, draw, 120, 5)
    coverage = {name: share for name, (number, share, _) in found.items() if number == 120}
    low = {name: share for name, share in coverage.items() if share < 0.9 and name not in bench.OTHERS}
    assert not low and {"safe rate of these", "safe rate", "change of these", "change", "AC1"} <= coverage.keys()
    if draw == "from all":
        width, powered = found["safe rate"][2], found["prediction-powered"][2]
        assert width < 1.1 * powered and width < found["labels alone"][2]


def test_the_committed_coverage_is_complete_and_nowhere_below_93_percent():
    text = (PROJECT_ROOT / "benchmarks" / "results" / "label_coverage.md").read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    head, rows = lines[0], lines[2:]
    assert [row[:2] for row in rows] == [
        [f"{100 * share:.0f} %", one] for share in bench.UNSAFE_SHARES for one in bench.DRAWS
    ]
    ours = [place for place, name in enumerate(head) if place > 1 and name not in bench.OTHERS]
    assert min(float(row[place].partition(",")[0]) for row in rows for place in ours) >= 100 * bench.LOWEST
