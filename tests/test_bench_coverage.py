"""The coverage benchmark: it runs, and its committed table has every cell inside 93 to 97 % or a reason."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest

PROJECT_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_ROOT / "benchmarks"))

import bench_coverage as bench  # noqa: E402
from simulation import COPIES, INDEPENDENT_COPIES, Rows  # noqa: E402


def test_committed_table_is_whole_and_explained():
    path = PROJECT_ROOT / "benchmarks" / "results" / "interval_coverage.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    # Six sets of rows, four intervals.
    assert len(rows) == 6 * 4 * len(bench.RATES)
    outside = [row for row in rows if not bench.LOW <= float(row["coverage"]) <= bench.HIGH]
    assert all(row["note"].startswith("discrete") for row in outside)
    assert len(outside) < len(rows) / 10
    assert not any(row["note"] for row in rows if row["num_rows"] in ("263", "1319"))


def test_coverage_is_that_of_the_true_value():
    rng = np.random.default_rng(1)
    cell = bench.rate_cell(Rows(100), 0.4, rng, 4000)
    assert cell.coverage == pytest.approx(0.95, abs=0.02) and cell.note == ""
    counts = rng.binomial(100, 0.4, size=(500, 1))
    assert bench.covered(counts, lambda count: (0.0, 1.0), 0.4) == 1.0
    assert bench.covered(counts, lambda count: (0.41, 1.0), 0.4) == 0.0


def test_copies_take_their_prompts_answer():
    rows = Rows(2, 3)
    drawn = rows.draw(np.random.default_rng(0), [1.0, 0.0], 5)
    assert rows.num_rows == 8 and (drawn == [8, 0]).all()
    assert rows.effective == pytest.approx(8**2 / (2 + 3 * 4))


def test_independent_copies_vary_less_than_alike_ones():
    rng, size = np.random.default_rng(0), 20_000
    alike, independent = (rows.draw(rng, [0.5, 0.5], size)[:, 0].var() for rows in (COPIES, INDEPENDENT_COPIES))
    assert independent == pytest.approx(240 / 4, rel=0.04)
    assert alike == pytest.approx((216 + 12 * 4) / 4, rel=0.04)


def test_with_all_rows_on_one_side_the_difference_is_the_discordant_share():
    cell = bench.difference_cell(Rows(263), 0.5, 1.0, np.random.default_rng(2), 2000)
    assert cell.difference == 0.25 and cell.interval.endswith("on one side")
    assert cell.coverage == pytest.approx(0.95, abs=0.02) and cell.note == ""


def test_cells_outside_are_explained_only_by_few_rows():
    few, many = Rows(50), Rows(1319)
    assert bench.count_note(0.92, few, 0.02, bench._wilson).startswith("discrete")
    assert bench.count_note(0.92, many, 0.5, bench._wilson) == "unexplained" == bench.paired_note(0.99, many, 0.2)
    assert bench.paired_note(0.99, few, 0.02).startswith("discrete: 98 % of draws")
    assert bench.count_note(0.95, few, 0.02, bench._wilson) == ""
    assert bench.count_note(0.999, few, 0.02, bench._tango).startswith("discrete: no count is too small")
    assert bench.count_note(0.98, many, 0.2, bench._tango) == "unexplained"


def test_independent_copies_explain_an_interval_that_is_a_little_too_wide():
    assert bench.nominal(COPIES) == pytest.approx(0.95)
    assert bench.nominal(INDEPENDENT_COPIES) == pytest.approx(0.96, abs=0.001)
    assert bench.count_note(0.99, INDEPENDENT_COPIES, 0.2, bench._tango) == "unexplained"
