"""The coverage benchmark: it runs, and its committed table has every cell inside 93 to 97 % or a reason."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest

PROJECT_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_ROOT / "benchmarks"))

import bench_coverage as bench  # noqa: E402


def test_committed_table_is_whole_and_explained():
    path = PROJECT_ROOT / "benchmarks" / "results" / "interval_coverage.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    # Five sets of rows, three intervals.
    assert len(rows) == 5 * 3 * len(bench.RATES)
    outside = [row for row in rows if not bench.LOW <= float(row["coverage"]) <= bench.HIGH]
    assert all(row["note"].startswith("discrete") for row in outside)
    assert len(outside) < len(rows) / 10
    assert not any(row["note"] for row in rows if row["num_rows"] in ("263", "1319"))


def test_coverage_is_that_of_the_true_value():
    rng = np.random.default_rng(1)
    cell = bench.rate_cell(bench.Rows(100, 0), 0.4, rng, 4000)
    assert cell.coverage == pytest.approx(0.95, abs=0.02) and cell.note == ""
    counts = rng.binomial(100, 0.4, size=(500, 1))
    assert bench.covered(counts, lambda count: (0.0, 1.0), 0.4) == 1.0
    assert bench.covered(counts, lambda count: (0.41, 1.0), 0.4) == 0.0


def test_copies_take_their_prompts_answer():
    rows = bench.Rows(2, 3)
    drawn = rows.draw(np.random.default_rng(0), [1.0, 0.0], 5)
    assert rows.num_rows == 8 and (drawn == [8, 0]).all()
    assert rows.effective == pytest.approx(8**2 / (2 + 3 * 4))


def test_cells_outside_are_explained_only_by_few_rows():
    few, many = bench.Rows(50, 0), bench.Rows(1319, 0)
    assert bench.rate_note(0.92, few, 0.02).startswith("discrete")
    assert bench.rate_note(0.92, many, 0.5) == "unexplained" == bench.paired_note(0.99, many, 0.2)
    assert bench.paired_note(0.99, few, 0.02).startswith("discrete: 98 % of draws")
    assert bench.rate_note(0.95, few, 0.02) == ""
