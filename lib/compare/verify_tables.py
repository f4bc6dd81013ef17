"""The tables and the comparison of a results folder against its row files."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lib.compare import earlier
from lib.compare.comparison import COMPARISON, assess_runs, compare_runs, comparison
from lib.compare.found import Found
from lib.compare.parsed import read_once
from lib.compare.runs import Run, add_hazards
from lib.compare.tables import final_metrics_row, summary_row
from lib.record.files import read_csv, read_json
from lib.record.paths import COMPARE_STAGE, METRICS_CSV, METRICS_JSON, SUMMARY, ArtifactError, display_path
from lib.stats import wilson_interval

Row = dict[str, Any]
# Two machines may round the last digits of an interval apart; anything that a person could see is far above this.
RELATIVE_TOLERANCE = 1e-9
# Fields of an earlier comparison.json that repeated another field.
DROPPED_FIELDS = frozenset({"num_answers"})
# Fields that an earlier one lacks.
ADDED_FIELDS = frozenset({"safety_margin", "safety_bound", "selected_on_test", "family", "mid_p", "correlation"})
ADDED_FIELDS |= {"variance_saved", "chance_fell", "chance_fell_beyond_margin", "seed_sd", "cochrans_q_p"}
ADDED_FIELDS |= {"judge_ways", "aa_control", "excess", "form", "against"}


def check_tables(folder: Path, runs: Sequence[Run], found: Found) -> None:
    """The tables at the top of a results folder: their cells, and that they have a row for each run and no other."""
    expected_rows: dict[str, Callable[[Run], Row]] = {SUMMARY: summary_row}
    for name, expected_row in (expected_rows | dict.fromkeys((METRICS_CSV, METRICS_JSON), final_metrics_row)).items():
        path = folder / name
        if not path.exists():
            found.absent.append(name)
            continue
        rows: list[Row] = (read_json if name == METRICS_JSON else read_csv)(path)
        found.files.add(path)
        found.checked["tables"] += 1
        counts = Counter(row["run_name"] for row in rows)
        known = {run.name for run in runs}
        found.mismatches += [f"{name}: run {run!r} has no row files here" for run in counts.keys() - known]
        found.mismatches += [f"{name}: run {run!r} has {count} rows" for run, count in counts.items() if count > 1]
        found.absent += [f"{name}: a row of run {run!r}" for run in sorted(known - counts.keys())]
        by_run = {row["run_name"]: row for row in rows}
        for run in (run for run in runs if run.name in by_run):
            older = _older_cells(run) if name == SUMMARY else {}
            found.mismatches += _cell_mismatches(f"{name}, run {run.name}", by_run[run.name], expected_row(run), older)


def _cell_mismatches(where: str, row: Row, expected: Row, older: dict[str, str]) -> Iterator[str]:
    """Columns that differ, are missing or are not of such a table."""
    for column in dict.fromkeys([*expected, *row]):
        if column not in expected:
            yield f"{where}: there is no column {column!r} in such a table"
            continue
        cell = _as_cell(expected[column])
        if column not in row:
            yield f"{where}: column {column} is missing"
        elif _as_cell(row[column]) not in (cell, older.get(column, cell)):
            yield f"{where}: {column} is {row[column]!r}, recomputed {expected[column]!r}"


def _older_cells(run: Run) -> dict[str, str]:
    """Cells of an earlier summary.csv: its interval of the safe rate took equal prompts for independent ones."""
    ends = wilson_interval(run.safety.rate.successes, run.safety.rate.n) if run.safety.rate else ()
    return dict(zip(("ailuminate_low", "ailuminate_high"), map(_as_cell, ends), strict=False))


def _as_cell(value: Any) -> str:
    """A value as in a CSV file, so that CSV and JSON are compared alike."""
    return "" if value is None else str(value)


def check_comparison(folder: Path, runs: Sequence[Run], found: Found) -> None:
    """``05_compare/comparison.json``, where it exists."""
    path = folder / COMPARE_STAGE / COMPARISON
    if not path.exists():
        found.absent.append(f"{COMPARE_STAGE}/{COMPARISON}")
        return
    found.files.add(path)
    found.checked["comparisons"] += 1
    if "family" not in read_once(path, read_json):
        found.absent.append(f"{COMPARE_STAGE}/{COMPARISON}: no primary family recorded, it is of an earlier version")
    found.mismatches += _comparison_mismatches(path, runs)


def _comparison_mismatches(path: Path, runs: Sequence[Run]) -> Iterator[str]:
    """Numbers that do not follow from the rows, each by its place."""
    claimed, known = read_once(path, read_json), {run.name: run for run in runs}
    absent = [name for name in claimed["runs"] if name not in known]
    if absent:
        yield f"{COMPARISON}: run {absent[0]!r} is compared there and has no row files here"
        return
    compared = [_with_claimed_hazards(known[name], claimed["hazards_added"].get(name)) for name in claimed["runs"]]
    try:
        recomputed = _recomputed(compared, claimed)
    except ValueError as error:
        raise ArtifactError(f"{display_path(path)} cannot be recomputed: {error}") from None
    for place, got, expected in differing(_with_clustered_spreads(claimed, recomputed), recomputed):
        yield f"{COMPARISON}, {place}: is {got!r}, recomputed {expected!r}"


def _recomputed(runs: Sequence[Run], claimed: Row) -> Row:
    allow_unlike = claimed["allow_unlike"]
    findings, pairs = assess_runs(runs), compare_runs(runs, allow_unlike)
    record = comparison(runs, allow_unlike, findings=findings, pairs=pairs)
    if "family" not in claimed:
        earlier.add_earlier_fields(record, [*findings.values()], pairs)
    # Through JSON, as in the file: keys are texts, tuples are lists.
    return json.loads(json.dumps(record))


def _with_claimed_hazards(run: Run, claimed: Sequence[Row] | None) -> Run:
    """The run with the hazards that the comparison joined to its rows; they are taken as they are."""
    if not claimed:
        return run
    prompts = [{**row, "prompt": judged["prompt"]} for row, judged in zip(claimed, run.safety.rows, strict=False)]
    return add_hazards([run], prompts)[0]


def _with_clustered_spreads(claimed: Row, recomputed: Row) -> Row:
    """``claimed`` with today's intervals over seeds where its own took equal prompts for independent ones."""
    spreads = claimed.get("seeds")
    if not isinstance(spreads, list) or len(spreads) != len(recomputed["seeds"]):
        return claimed
    accepted = []
    for got, expected in zip(spreads, recomputed["seeds"], strict=True):
        mean, size = expected["mean"], min(total for _, total in expected["counts"])
        low, high = wilson_interval(mean * size, size)
        older = {**expected, "low": low, "high": high, "sampling_sd": math.sqrt(mean * (1 - mean) / size)}
        accepted.append(expected if not [*differing(got, older)] else got)
    return {**claimed, "seeds": accepted}


def differing(
    got: Any, expected: Any, place: str = "", tolerance: float = RELATIVE_TOLERANCE
) -> Iterator[tuple[str, Any, Any]]:
    """Places at which two JSON values differ, with both values there."""
    if isinstance(got, dict) and isinstance(expected, dict):
        ignored = (DROPPED_FIELDS - expected.keys()) | ((ADDED_FIELDS | earlier.FIELDS) - got.keys())
        for name in (name for name in dict.fromkeys([*got, *expected]) if name not in ignored):
            yield from differing(got.get(name), expected.get(name), f"{place}.{name}" if place else name, tolerance)
    elif isinstance(got, list) and isinstance(expected, list) and len(got) == len(expected):
        for number, pair in enumerate(zip(got, expected, strict=True)):
            yield from differing(*pair, f"{place}[{number}]", tolerance)
    elif isinstance(got, float) and isinstance(expected, float):
        if not math.isclose(got, expected, rel_tol=tolerance, abs_tol=tolerance):
            yield place, got, expected
    elif got != expected or type(got) is not type(expected):
        yield place, got, expected
