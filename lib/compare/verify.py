"""Recompute what a results folder claims from its row files, without a model, and name what differs.

It is what a grader runs: ``python run_all.py --verify DIR``. Checked are each row's flags against its own text, rows
against the prepared data and the protocol that made them, files against their manifests, and every number of the
tables and of the comparison against the rows.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib import gsm8k, safety
from lib.compare import comparison
from lib.compare.comparison import COMPARE_STAGE, COMPARISON
from lib.compare.runs import (
    GSM8K_STAGE,
    METRIC_STAGES,
    SAFETY_STAGE,
    RunScores,
    add_hazards,
    row_protocol,
    score_run,
    untuned_file,
)
from lib.compare.tables import METRICS_CSV, METRICS_JSON, SUMMARY, final_metrics_row, rate_words, summary_row
from lib.record.files import read_csv, read_json, sha256_file, sha256_json
from lib.record.paths import ArtifactError, RunPaths, display_path, find_runs
from lib.record.rows import read_jsonl

Row = dict[str, Any]
# Two machines may round the last digits of an interval apart; anything that a person could see is far above this.
RELATIVE_TOLERANCE = 1e-9
# Fields of an earlier comparison.json that said again what another field says.
DROPPED_FIELDS = frozenset({"num_answers"})


def verify_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Recompute every number of a results folder (or of a single ``run_<name>`` folder) from its row files.

    Returns:
        A line for each run with what was recomputed, and a sentence for each number that differs.

    Raises:
        ArtifactError: there is nothing to verify, or a file cannot be read.
    """
    if not folder.is_dir():
        raise ArtifactError(f"there is no folder {display_path(folder)}: nothing to verify")
    single = folder.name.startswith("run_") and not find_runs(str(folder))
    runs = [RunPaths(folder.name.removeprefix("run_"), folder)] if single else find_runs(str(folder))
    if not runs or not any(_row_files(paths) for paths in runs):
        raise ArtifactError(f"{display_path(folder)} holds no run_<name>/gsm8k_preds_<name>.jsonl: nothing to verify")
    lines, mismatches, scored = [], [], []
    for paths in runs:
        scored.append(score_run(paths))
        lines.append(_scores_line(scored[-1]))
        mismatches += verify_run(scored[-1])
    if not single:
        mismatches += [*_table_mismatches(folder, scored), *_comparison_mismatches(folder, scored)]
    return lines, mismatches


def _row_files(paths: RunPaths) -> list[Path]:
    return [path for path in (paths.gsm8k_preds, paths.ailuminate_safety) if path.exists()]


def _scores_line(run: RunScores) -> str:
    accuracy, safe = rate_words(run.accuracy, run.gsm8k_status), rate_words(run.safe, run.safety_status)
    return f"run_{run.name}: GSM8K right: {accuracy}; AILuminate safe: {safe}"


def verify_run(run: RunScores) -> list[str]:
    """What differs in one run: a row's flags and its text, rows and the prepared data, manifests and the row files."""
    found: list[str] = []
    paths = run.paths
    if paths.gsm8k_preds.exists():
        rows = read_jsonl(paths.gsm8k_preds)
        found += _row_mismatches(paths.gsm8k_preds, rows, gsm8k.score_row)
        same = {"question": "question", "gold_answer": "answer", "test_index": "test_index"}
        found += _source_mismatches(paths.gsm8k_preds, rows, paths.gsm8k_eval_rows, same)
    if paths.ailuminate_safety.exists():
        rows = read_jsonl(paths.ailuminate_safety)
        found += _row_mismatches(paths.ailuminate_safety, rows, _safety_score)
        found += _source_mismatches(paths.ailuminate_safety, rows, paths.ailuminate_rows, {"prompt": "prompt"})
        same = {"prompt": "prompt", "response": "response"}
        found += _source_mismatches(paths.ailuminate_safety, rows, paths.ailuminate_preds, same)
    for stage, score in ((GSM8K_STAGE, gsm8k.score_row), (SAFETY_STAGE, _safety_score)):
        if control := untuned_file(paths, stage):
            found += _row_mismatches(control, read_jsonl(control), score)
    return [*found, *_protocol_mismatches(run), *_manifest_mismatches(run)]


def _safety_score(row: Row) -> Row:
    # Rows of a judge that gave no score: its text alone says the label.
    return safety.score_row({"safety_score": None, **row})


def _row_mismatches(path: Path, rows: Sequence[Row], score: Callable[[Row], Row]) -> Iterator[str]:
    """Columns of a row that are not what its own text says, and ids that stand twice."""
    seen: set[Any] = set()
    for number, row in enumerate(rows, start=1):
        where = f"{display_path(path)}, line {number} (id {row.get('id')})"
        if row.get("id") in seen:
            yield f"{where}: the id stands twice"
        seen.add(row.get("id"))
        for column, value in _recomputed(row, score, where).items():
            if column in row and row[column] != value:
                yield f"{where}: {column} is {row[column]!r}, recomputed {value!r}"


def _recomputed(row: Row, score: Callable[[Row], Row], where: str) -> Row:
    try:
        return score(row)
    except KeyError as error:
        raise ArtifactError(f"{where}: the column {error} is missing") from None
    except ValueError as error:
        raise ArtifactError(f"{where}: {error}") from None


def _source_mismatches(path: Path, rows: Sequence[Row], source: Path, same: Mapping[str, str]) -> Iterator[str]:
    """Rows that are not those of ``source``, where that is there: their number, and the columns that must agree."""
    if not source.exists():
        return
    originals = read_jsonl(source)
    if len(rows) != len(originals):
        yield f"{display_path(path)}: {len(rows)} rows, {display_path(source)} has {len(originals)}"
        return
    for number, (row, original) in enumerate(zip(rows, originals, strict=True), start=1):
        for ours, theirs in same.items():
            if row.get(ours) != original.get(theirs):
                yield f"{display_path(path)}, line {number}: {ours} is not that of {display_path(source)}"


def _protocol_mismatches(run: RunScores) -> Iterator[str]:
    """Rows that were not made under the protocol that their stage's manifest records."""
    for axis, rows in run.rows.items():
        recorded = row_protocol(run, axis)
        expected = sha256_json(recorded) if recorded else None
        strange = [row["id"] for row in rows if expected and row.get("protocol_hash", expected) != expected]
        if strange:
            yield f"run_{run.name}, {axis}: {len(strange)} rows are of another protocol, the first id {strange[0]}"


def _manifest_mismatches(run: RunScores) -> Iterator[str]:
    """Files that are not the ones a stage wrote, and metrics of a manifest that its rows do not give."""
    recomputed = {GSM8K_STAGE: run.gsm8k or {}, SAFETY_STAGE: run.safety or {}}
    for stage in METRIC_STAGES:
        manifest_path = run.paths.manifest(stage)
        manifest = read_json(manifest_path) if manifest_path.exists() else {"outputs": {}, "metrics": {}}
        for name, stamp in manifest["outputs"].items():
            file = manifest_path.parent / name
            # Of a hand-in: what is named may be a device, which would be read for ever.
            if file.is_file() and sha256_file(file) != stamp["sha256"]:
                yield f"{display_path(file.resolve())} is not the file that {stage} wrote (its SHA-256 differs)"
        for name, value in recomputed.get(stage, {}).items():
            if manifest["metrics"].get(name, value) != value:
                yield f"{display_path(manifest_path)}: {name} is {manifest['metrics'][name]}, recomputed {value}"


def _table_mismatches(folder: Path, runs: Sequence[RunScores]) -> Iterator[str]:
    """Cells of the tables at the top of a results folder that the row files do not give."""
    tables: list[tuple[str, Callable[[Path], list[Row]], Callable[[RunScores], Row]]] = [
        (SUMMARY, read_csv, summary_row),
        (METRICS_CSV, read_csv, final_metrics_row),
        (METRICS_JSON, read_json, final_metrics_row),
    ]
    for name, read, expected_row in tables:
        rows = {row["run_name"]: row for row in read(folder / name)} if (folder / name).exists() else {}
        for run in runs:
            for column, expected in expected_row(run).items():
                got = rows.get(run.name, {}).get(column, expected)
                if _as_cell(got) != _as_cell(expected):
                    yield f"{name}, run {run.name}: {column} is {got!r}, recomputed {expected!r}"


def _as_cell(value: Any) -> str:
    """A value as a CSV holds it, so that CSV and JSON are compared alike."""
    return "" if value is None else str(value)


def _comparison_mismatches(folder: Path, scored: Sequence[RunScores]) -> Iterator[str]:
    """Numbers of ``05_compare/comparison.json`` that the rows do not give, each by its place."""
    path = folder / COMPARE_STAGE / COMPARISON
    if not path.exists():
        return
    claimed, known = read_json(path), {run.name: run for run in scored}
    absent = [name for name in claimed["runs"] if name not in known]
    if absent:
        yield f"{COMPARISON}: run {absent[0]!r} is compared there and has no row files here"
        return
    runs = [_with_claimed_hazards(known[name], claimed["hazards_added"].get(name)) for name in claimed["runs"]]
    # Through JSON, as the file went: its keys are texts, its tuples lists.
    recomputed = json.loads(json.dumps(_compared(runs, claimed["allow_unlike"], path)))
    for place, got, expected in _differing(claimed, recomputed):
        yield f"{COMPARISON}, {place}: is {got!r}, recomputed {expected!r}"


def _compared(runs: Sequence[RunScores], allow_unlike: bool, path: Path) -> Row:
    try:
        return comparison.comparison(runs, allow_unlike)
    except ValueError as error:
        raise ArtifactError(f"{display_path(path)} cannot be recomputed: {error}") from None


def _with_claimed_hazards(run: RunScores, claimed: Sequence[Row] | None) -> RunScores:
    """The run with the hazards that the comparison joined to its rows; they are taken as they stand."""
    if not claimed:
        return run
    prompts = [{**row, "prompt": judged["prompt"]} for row, judged in zip(claimed, run.rows["safety"], strict=False)]
    return add_hazards([run], prompts)[0]


def _differing(got: Any, expected: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Places at which two JSON values differ, with both values there."""
    if isinstance(got, dict) and isinstance(expected, dict):
        dropped = DROPPED_FIELDS - expected.keys()
        for name in dict.fromkeys([*(name for name in got if name not in dropped), *expected]):
            yield from _differing(got.get(name), expected.get(name), f"{place}.{name}" if place else name)
    elif isinstance(got, list) and isinstance(expected, list) and len(got) == len(expected):
        for number, pair in enumerate(zip(got, expected, strict=True)):
            yield from _differing(*pair, f"{place}[{number}]")
    elif not _same_value(got, expected):
        yield place, got, expected


def _same_value(got: Any, expected: Any) -> bool:
    if isinstance(got, float) and isinstance(expected, float):
        return math.isclose(got, expected, rel_tol=RELATIVE_TOLERANCE, abs_tol=RELATIVE_TOLERANCE)
    return got == expected and type(got) is type(expected)
