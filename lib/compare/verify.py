"""Recompute what a results folder claims from its row files, without a model, and list what differs."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib import gsm8k, safety
from lib.compare.comparison import COMPARISON, comparison
from lib.compare.parsed import read_once
from lib.compare.runs import METRIC_STAGES, Run, add_hazards, load_run, row_file
from lib.compare.tables import METRICS_CSV, METRICS_JSON, SUMMARY, final_metrics_row, score_text, summary_row
from lib.record.files import read_csv, read_json, sha256_file, sha256_json
from lib.record.paths import COMPARE_STAGE, ArtifactError, RunPaths, display_path, find_runs
from lib.record.rows import read_jsonl
from lib.stats import wilson_interval

Row = dict[str, Any]
# Two machines may round the last digits of an interval apart; anything that a person could see is far above this.
RELATIVE_TOLERANCE = 1e-9
# Fields of an earlier comparison.json that repeated another field.
DROPPED_FIELDS = frozenset({"num_answers"})


def verify_folder(folder: Path) -> tuple[list[str], list[str]]:
    """A line for each run of a folder (or a ``run_<name>`` folder), and a sentence for each number that differs."""
    if not folder.is_dir():
        raise ArtifactError(f"there is no folder {display_path(folder)}: nothing to verify")
    found = find_runs(str(folder))
    single = folder.name.startswith("run_") and not found
    if single:
        alone = RunPaths(folder.name.removeprefix("run_"), folder)
        found = [alone] if any(row_file(alone, metric).exists() for metric in METRIC_STAGES) else []
    if not found:
        raise ArtifactError(f"{display_path(folder)} holds no run_<name>/gsm8k_preds_<name>.jsonl: nothing to verify")
    runs = [load_run(paths) for paths in found]
    lines = [
        f"run_{run.name}: GSM8K right: {score_text(run.accuracy)}; AILuminate safe: {score_text(run.safety)}"
        for run in runs
    ]
    mismatches = [mismatch for run in runs for mismatch in verify_run(run)]
    if not single:
        mismatches += [*_table_mismatches(folder, runs), *_comparison_mismatches(folder, runs)]
    return lines, mismatches


def verify_run(run: Run) -> Iterator[str]:
    """What differs in one run: rows and their flags, the prepared data, the protocol, and the manifests."""
    paths = run.paths
    question = {"question": "question", "gold_answer": "answer", "test_index": "test_index"}
    prompt = {"prompt": "prompt"}
    sources = {
        "accuracy": {paths.gsm8k_eval_rows: question},
        "safety": {paths.ailuminate_rows: prompt, paths.ailuminate_preds: prompt | {"response": "response"}},
    }
    for name, score in run.metrics.items():
        recompute, file = gsm8k.score_row if name == "accuracy" else _safety_score, row_file(paths, name)
        # Also rows that do not count, of a stage that did not finish.
        rows = read_once(file, read_jsonl) if file.exists() else []
        yield from _row_mismatches(file, rows, recompute)
        for source, same in sources[name].items() if rows else ():
            yield from _source_mismatches(file, rows, source, same)
        if score.untuned_file:
            yield from _row_mismatches(score.untuned_file, score.untuned_rows, recompute)
    yield from _protocol_mismatches(run)
    yield from _manifest_mismatches(run)


def _safety_score(row: Row) -> Row:
    # Rows of a judge that gave no score: the judge's text alone decides the label.
    return safety.score_row({"safety_score": None, **row})


def _row_mismatches(path: Path, rows: Sequence[Row], score: Callable[[Row], Row]) -> Iterator[str]:
    """Columns of a row that do not follow from its own text, and ids that appear twice."""
    seen: set[Any] = set()
    for number, row in enumerate(rows, start=1):
        where = f"{display_path(path)}, line {number} (id {row.get('id')})"
        if row.get("id") in seen:
            yield f"{where}: the id appears twice"
        seen.add(row.get("id"))
        try:
            recomputed = score(row)
        except (KeyError, ValueError) as error:
            fault = f"the column {error} is missing" if isinstance(error, KeyError) else error
            raise ArtifactError(f"{where}: {fault}") from None
        for column, value in recomputed.items():
            if column in row and row[column] != value:
                yield f"{where}: {column} is {row[column]!r}, recomputed {value!r}"


def _source_mismatches(path: Path, rows: Sequence[Row], source: Path, same: Mapping[str, str]) -> Iterator[str]:
    """Rows that are not those of ``source``, where it exists: their number, and the columns that must agree."""
    if not source.exists():
        return
    originals = read_once(source, read_jsonl)
    if len(rows) != len(originals):
        yield f"{display_path(path)}: {len(rows)} rows, {display_path(source)} has {len(originals)}"
        return
    for number, (row, original) in enumerate(zip(rows, originals, strict=True), start=1):
        for ours, theirs in same.items():
            if row.get(ours) != original.get(theirs):
                yield f"{display_path(path)}, line {number}: {ours} is not that of {display_path(source)}"


def _protocol_mismatches(run: Run) -> Iterator[str]:
    """Rows that were not made under the protocol that their stage's manifest records."""
    for metric, score in run.metrics.items():
        expected = sha256_json(score.row_protocol) if score.row_protocol else None
        others = [row["id"] for row in score.rows if expected and row.get("protocol_hash", expected) != expected]
        if others:
            yield f"run_{run.name}, {metric}: {len(others)} rows are of another protocol, the first id {others[0]}"


def _manifest_mismatches(run: Run) -> Iterator[str]:
    """Files that are not the ones a stage wrote, and metrics of a manifest that do not follow from its rows."""
    recomputed = {METRIC_STAGES[name]: score.summary or {} for name, score in run.metrics.items()}
    for stage, manifest in run.manifests.items():
        path = run.paths.manifest(stage)
        for name, stamp in manifest["outputs"].items():
            file = path.parent / name
            # In a hand-in, what is named may be a device, which would be read for ever.
            if file.is_file() and sha256_file(file) != stamp["sha256"]:
                yield f"{display_path(file.resolve())} is not the file that {stage} wrote (its SHA-256 differs)"
        for name, value in recomputed.get(stage, {}).items():
            if manifest["metrics"].get(name, value) != value:
                yield f"{display_path(path)}: {name} is {manifest['metrics'][name]}, recomputed {value}"


def _table_mismatches(folder: Path, runs: Sequence[Run]) -> Iterator[str]:
    """Cells of the tables at the top of a results folder that do not follow from the row files."""
    tables = {SUMMARY: summary_row, METRICS_CSV: final_metrics_row, METRICS_JSON: final_metrics_row}
    for name, expected_row in tables.items():
        read: Callable[[Path], list[Row]] = read_json if name == METRICS_JSON else read_csv
        rows = {row["run_name"]: row for row in read(folder / name)} if (folder / name).exists() else {}
        for run in runs:
            older = _older_cells(run) if name == SUMMARY else {}
            for column, expected in expected_row(run).items():
                got = rows.get(run.name, {}).get(column, expected)
                if _as_cell(got) not in (_as_cell(expected), older.get(column, _as_cell(expected))):
                    yield f"{name}, run {run.name}: {column} is {got!r}, recomputed {expected!r}"


def _older_cells(run: Run) -> dict[str, str]:
    """Cells of an earlier summary.csv: its interval of the safe rate took equal prompts for independent ones."""
    ends = wilson_interval(run.safety.rate.successes, run.safety.rate.n) if run.safety.rate else ()
    return dict(zip(("ailuminate_low", "ailuminate_high"), map(_as_cell, ends), strict=False))


def _as_cell(value: Any) -> str:
    """A value as in a CSV file, so that CSV and JSON are compared alike."""
    return "" if value is None else str(value)


def _comparison_mismatches(folder: Path, runs: Sequence[Run]) -> Iterator[str]:
    """Numbers of ``05_compare/comparison.json`` that do not follow from the rows, each by its place."""
    path = folder / COMPARE_STAGE / COMPARISON
    if not path.exists():
        return
    claimed, known = read_once(path, read_json), {run.name: run for run in runs}
    absent = [name for name in claimed["runs"] if name not in known]
    if absent:
        yield f"{COMPARISON}: run {absent[0]!r} is compared there and has no row files here"
        return
    compared = [_with_claimed_hazards(known[name], claimed["hazards_added"].get(name)) for name in claimed["runs"]]
    try:
        # Through JSON, as in the file: keys are texts, tuples are lists.
        recomputed = json.loads(json.dumps(comparison(compared, claimed["allow_unlike"])))
    except ValueError as error:
        raise ArtifactError(f"{display_path(path)} cannot be recomputed: {error}") from None
    for place, got, expected in _differing(_with_clustered_spreads(claimed, recomputed), recomputed):
        yield f"{COMPARISON}, {place}: is {got!r}, recomputed {expected!r}"


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
        accepted.append(expected if not [*_differing(got, older)] else got)
    return {**claimed, "seeds": accepted}


def _differing(got: Any, expected: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Places at which two JSON values differ, with both values there."""
    if isinstance(got, dict) and isinstance(expected, dict):
        dropped = DROPPED_FIELDS - expected.keys()
        for name in dict.fromkeys([*(name for name in got if name not in dropped), *expected]):
            yield from _differing(got.get(name), expected.get(name), f"{place}.{name}" if place else name)
    elif isinstance(got, list) and isinstance(expected, list) and len(got) == len(expected):
        for number, pair in enumerate(zip(got, expected, strict=True)):
            yield from _differing(*pair, f"{place}[{number}]")
    elif isinstance(got, float) and isinstance(expected, float):
        if not math.isclose(got, expected, rel_tol=RELATIVE_TOLERANCE, abs_tol=RELATIVE_TOLERANCE):
            yield place, got, expected
    elif got != expected or type(got) is not type(expected):
        yield place, got, expected
