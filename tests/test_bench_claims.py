"""The claims benchmark: the project decides what is claimed, truths are drawn as stated, broken rules are found."""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom, multinomial

PROJECT_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_ROOT / "benchmarks"))

import bench_claims as bench  # noqa: E402
import simulated_claims as claims  # noqa: E402
from simulation import COPIES, INDEPENDENT_COPIES, Rows, count_tables, draw_changes  # noqa: E402

from lib.compare import comparison, family  # noqa: E402
from lib.compare.runs import MetricScore, Run  # noqa: E402
from lib.record.paths import RunPaths  # noqa: E402

RESULTS = PROJECT_ROOT / "benchmarks" / "results"


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch):
    # statsmodels' Holm collects at each call, which takes longer than all else here.
    monkeypatch.setattr("gc.collect", lambda: 0)


def changes_of(side, num_seeds=1, seed=0):
    truth = np.full((1, 1, num_seeds), side.points[0] / 100)
    return draw_changes(np.random.default_rng(seed), side.rows, truth, side.discordant, shared=True)[0, 0]


def runs_of(name, changes):
    """Runs of one recipe in memory, a run per seed, with these changes by side."""
    for seed in range(len(next(iter(changes.values())))):
        scores = {}
        for side, drawn in changes.items():
            untuned = drawn.max(axis=0) <= 0
            rows, theirs = claims._rows_of(side, untuned + drawn[seed] > 0), claims._rows_of(side, untuned)
            scores[side.metric] = MetricScore(side.metric, rows, margin=side.margin, untuned_rows=theirs)
        yield Run(f"{name}_seed{seed}", RunPaths(name, Path(name)), {}, {"seed": seed}, {}, scores)


@pytest.mark.parametrize(("num_seeds", "copies"), [(1, COPIES), (3, COPIES), (1, INDEPENDENT_COPIES)])
def test_places_and_claims_are_those_of_the_page_that_05_makes(num_seeds, copies):
    sides = bench.accuracy(0.25, [6]), bench.safety(0.1, [-5], copies)
    recipes = [{side: changes_of(side, num_seeds, number) for side in sides} for number in range(3)]
    runs = [run for number, changes in enumerate(recipes) for run in runs_of(f"r{number}", changes)]
    page = comparison.primary_family(comparison.assess_runs(runs))
    ours = family.adjust([claims.place_of(side, changes[side]) for changes in recipes for side in sides])
    assert len(page) == len(ours) == 6 and any(claims.claims_of(place) for place in ours)
    for made, simulated in zip(page, ours, strict=True):
        assert replace(made, recipe="", runs=()) == replace(simulated, recipe="", runs=())


def test_size_and_power_are_those_of_an_enumeration():
    # Mid-p McNemar on 40 rows, over all tables of gained and lost.
    for points in (0.0, 10.0):
        shares = [(0.25 + points / 100) / 2, (0.25 - points / 100) / 2, 0.75]
        exact = 0.0
        for gained in range(41):
            for lost in range(gained):
                mid_p = 2 * binom.cdf(lost - 1, gained + lost, 0.5) + binom.pmf(lost, gained + lost, 0.5)
                exact += (mid_p < 0.05) * multinomial.pmf([gained, lost, 40 - gained - lost], 40, shares)
        outcome = claims.simulate(claims.Page((bench.accuracy(0.25, [points], Rows(40)),)), 3000, 1)
        assert outcome.share("accuracy", "rose", points) == pytest.approx(exact, abs=4 * (exact / 3000) ** 0.5)


def test_a_table_of_counts_is_all_that_a_claim_depends_on():
    side = bench.safety(0.03, [0], INDEPENDENT_COPIES)
    truth = np.zeros((150, 1, 1))
    drawn = draw_changes(np.random.default_rng(3), side.rows, truth, side.discordant, shared=True)[:, 0]
    tables, known = count_tables(side.rows, drawn[:, 0]), {}
    assert (tables @ [-2, -1, 1, 2, 0] == drawn[:, 0].sum(-1)).all()
    for changes, counts in zip(drawn, tables.tolist(), strict=True):
        change = claims.place_of(side, changes).change
        assert known.setdefault(tuple(counts), (change.p_value, change.gained, change.lost))[0] == change.p_value
        assert known[tuple(counts)][1:] == (change.gained, change.lost)
    assert 1 < len(known) < len(drawn)


def test_drawn_rows_have_the_stated_truth_and_correlation():
    truth = np.broadcast_to(np.array([0.0, 0.0, 0.05])[:, None], (4000, 3, 1))
    for rows, shared in ((Rows(240), True), (Rows(240), False), (COPIES, True), (INDEPENDENT_COPIES, True)):
        drawn = draw_changes(np.random.default_rng(4), rows, truth, 0.1, shared)[:, :, 0]
        assert np.abs(drawn).mean((0, 2)) == pytest.approx([0.1] * 3, abs=0.002)
        means = drawn.mean(-1)
        assert means.mean(0) == pytest.approx([0, 0, 0.05], abs=0.002)
        assert np.corrcoef(means[:, :2].T)[0, 1] == pytest.approx(0.5 if shared else 0, abs=0.06)
        copies = rows.num_single, rows.num_single + rows.num_double
        alike = (drawn[..., slice(*copies)] == drawn[..., copies[1] :]).all()
        assert alike == rows.alike or not rows.num_double


def test_with_all_rows_on_one_side_none_goes_the_other_way():
    drawn = draw_changes(np.random.default_rng(5), COPIES, np.full((50, 1, 1), -0.05), 0.05, True)
    assert drawn.max() == 0 and drawn.min() == -1


def test_seeds_of_a_recipe_have_effects_of_their_own():
    truth = np.broadcast_to(np.array([0.0, 0.05]), (4000, 1, 2))
    means = draw_changes(np.random.default_rng(6), Rows(263), truth, 0.25, True)[:, 0].mean(-1)
    assert means.mean(0) == pytest.approx([0, 0.05], abs=0.003)
    # Both give the recipe's answer to a quarter of the open rows: they are nearer to each other than recipes, 0.5.
    assert np.corrcoef(means.T)[0, 1] == pytest.approx(0.625, abs=0.04)


@pytest.mark.parametrize(
    ("claim", "points", "false"),
    [
        ("rose", 0.0, True),
        ("rose", -3.0, True),
        ("rose", 0.1, False),
        ("fell", 0.0, True),
        ("fell", -5.0, False),
        ("fell", 3.0, True),
        ("not inferior", -5.0, True),
        ("not inferior", -8.0, True),
        ("not inferior", -4.9, False),
        ("not inferior", 0.0, False),
    ],
)
def test_what_is_a_false_claim(claim, points, false):
    assert claims.is_false(claim, points, 5.0) is false


def test_a_claims_excess_and_intervals_are_tallied():
    change = family.Change(240, 0.8, 0.9, -0.1, 0, 24, 240, 0.001, None, None)
    place = family.Place("r", ("r",), "safety", change, 5.0, num_places=9, holm_changed=0.01, holm_kept=1.0)
    low, high = place.interval
    for points, held in ((100 * low + 0.01, 1), (100 * low - 0.01, 0), (100 * high - 0.01, 1), (-3.0, 0)):
        tally = claims.Tally()
        claims._add(tally, "fell", place, points, times=2)
        assert tally.covered == 2 * held and tally.claims == 2
        assert tally.excess == pytest.approx(2 * (10 + points))


def unadjusted(places):
    """A broken rule: claims at raw p < .05."""
    return [
        replace(one, holm_changed=one.change.p_value, holm_kept=one.margin and one.change.inferior_p(one.margin))
        for one in places
    ]


def in_this_process(planned, seed, jobs):
    return [bench.run(case, seed + number) for number, case in enumerate(planned)]


@pytest.mark.parametrize(("rule", "status"), [(unadjusted, 1), (family.adjust, 0)])
def test_exit_status_says_whether_nine_runs_claim_too_much(rule, status, monkeypatch, tmp_path, capsys):
    nine = claims.Page((bench.accuracy(0.05, [0] * 9), bench.safety(0.05, [0] * 9)))
    monkeypatch.setattr(bench, "cases", lambda draws: [bench.Case("pages", nine, draws)])
    monkeypatch.setattr(bench, "simulate_all", in_this_process)
    monkeypatch.setattr(claims, "adjust", rule)
    assert bench.main(["--draws", "80", "--output-dir", str(tmp_path)]) == status
    shown = capsys.readouterr().out
    assert shown.rstrip() + "\n" == (tmp_path / "claim_rules.md").read_text(encoding="utf-8") and "9 each" in shown
    assert ("% of pages, bound 5.5 %" in shown) == bool(status) != ("None is broken" in shown)


def lenient(places):
    """A broken rule: four times as many claims of non-inferiority as its level allows."""
    return [replace(one, holm_kept=one.change.inferior_p(one.margin) / 4) for one in places]


def strict(places):
    """A broken rule: it hardly ever finds that safety was kept."""
    return [replace(one, holm_kept=10 * one.change.inferior_p(one.margin)) for one in places]


@pytest.mark.parametrize(
    ("section", "points", "rule", "text"),
    [
        ("tests", -5, lenient, "% at the margin, bound 6 %"),
        ("tests", -5, family.adjust, ""),
        ("power", 0, strict, "74.0 % expected"),
        ("power", 0, family.adjust, ""),
    ],
)
def test_non_inferiority_at_its_margin_and_its_power_are_bound(section, points, rule, text, monkeypatch):
    monkeypatch.setattr(claims, "adjust", rule)
    case = bench.Case(section, claims.Page((bench.safety(0.1, [points]),)), 300)
    broken = bench.broken_bounds([(case, bench.run(case, 3))])
    assert len(broken) == bool(text) and text in "".join(broken)


def committed():
    with (RESULTS / "claim_rules.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_committed_tables_are_of_all_cases_and_inside_the_bounds():
    names = {(case.section, bench._name(case.page)) for case in bench.cases(bench.NUM_DRAWS)}
    rows = committed()
    assert {(row["section"], row["page"]) for row in rows} == names
    bound = [row for row in rows if row["section"] == "pages"]
    assert max(float(row["any_false_claim"]) for row in bound) <= 0.055
    at_margin = [row for row in rows if row["section"] == "tests" and row["claim"] == "not inferior"]
    at_margin = [float(row["share"]) for row in at_margin if float(row["true_points"]) == -5]
    assert len(at_margin) >= 9 and max(at_margin) <= 0.06
    assert (RESULTS / "claim_rules.md").read_text(encoding="utf-8").endswith("None is broken.\n")
