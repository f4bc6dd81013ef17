"""Rows of one run against their own texts, the rows that 01 prepared, and what the manifest says made them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import gsm8k, safety
from lib.compare.found import Found
from lib.compare.parsed import read_once
from lib.compare.runs import METRIC_STAGES, Run, row_file
from lib.record.files import sha256_json
from lib.record.paths import ArtifactError, display_path
from lib.record.protocol import at_scale, without_adapter
from lib.record.rows import read_jsonl

Row = dict[str, Any]
QUESTION = {"question": "question", "gold_answer": "answer", "test_index": "test_index"}
PROMPT = {name: name for name in ("id", "prompt", "release_prompt_id", "hazard", "persona")}
RESPONSE = {name: name for name in ("id", "prompt", "response", "finish_reason", "num_output_tokens")}
# Every pipeline writes these; the others are compared where both files have them.
ALWAYS = frozenset({"question", "gold_answer", "test_index", "prompt", "response"})


@dataclass(frozen=True)
class Side:
    """A row file of one metric: of the tuned model, the untuned one, or a scale; ``protocol`` is {} if unrecorded."""

    metric: str
    file: Path
    protocol: Mapping[str, Any]
    responses: Path | None = None  # to which the verdicts of ``file`` belong

    @property
    def rows(self) -> list[Row]:
        # Also rows that do not count, of a stage that did not finish.
        return read_once(self.file, read_jsonl) if self.file.exists() else []


def sides(run: Run, metric: str) -> Iterator[Side]:
    """The row files of a metric that exist or that its manifest names."""
    score, paths = run.metrics[metric], run.paths
    known, judged = score.row_protocol, metric == "safety"
    yield Side(metric, row_file(paths, metric), known, paths.ailuminate_preds if judged else None)
    outputs = [paths.stage_dir(METRIC_STAGES[metric]) / name for name in run.outputs(METRIC_STAGES[metric])]
    if score.untuned_file:
        responses = next((path.resolve() for path in outputs if path.name.startswith("ailuminate_preds_untuned")), None)
        yield Side(metric, score.untuned_file, without_adapter(known) if known else {}, responses)
    for scale, path in score.scale_files.items():
        responses = path.with_name(path.name.replace("ailuminate_safety", "ailuminate_preds")) if judged else None
        yield Side(metric, path, at_scale(known, scale) if known else {}, responses)


def check_rows(run: Run, found: Found) -> None:
    """Every row file of a run."""
    for side in (side for metric in METRIC_STAGES for side in sides(run, metric)):
        if not side.rows:
            found.absent.append(f"run_{run.name}: {side.file.name}")
            continue
        found.files.add(side.file)
        found.checked["rows with their flags"] += len(side.rows)
        found.mismatches += _row_mismatches(side)
        found.mismatches += _protocol_mismatches(side, f"run_{run.name}, {side.metric}")
        prepared = run.paths.gsm8k_eval_rows if side.metric == "accuracy" else run.paths.ailuminate_rows
        _compare(side, prepared, QUESTION if side.metric == "accuracy" else PROMPT, found)
        if side.responses:
            _compare(side, side.responses, RESPONSE, found)


def _score(row: Row) -> Row:
    """The columns of a row that follow from the others."""
    if "gold_answer" in row:
        return gsm8k.score_row(row)
    # Rows of a judge that gave no score: the judge's text alone decides the label.
    score = row.get("safety_score")
    recomputed = safety.score_row({"safety_score": score, **row})
    if score is not None and "judge_prompt_hash" in row:
        # The text is the chosen label, see `safety.judge`.
        recomputed["safety_judge_text"] = safety.LABELS[0 if score > 0.5 else 1]
    return recomputed


def _row_mismatches(side: Side) -> Iterator[str]:
    """Columns of a row that do not follow from its own text, and ids and prompts that appear twice."""
    seen: set[Any] = set()
    columns = side.rows[0].keys()
    for number, row in enumerate(side.rows, start=1):
        where = f"{display_path(side.file)}, line {number} (id {row.get('id')})"
        if row.get("id") in seen:
            yield f"{where}: the id appears twice"
        seen.add(row.get("id"))
        if row.keys() != columns:
            yield f"{where}: its columns are not those of line 1: {', '.join(sorted(row.keys() ^ columns))}"
        try:
            recomputed = _score(row)
        except (KeyError, ValueError) as error:
            fault = f"the column {error} is missing" if isinstance(error, KeyError) else error
            raise ArtifactError(f"{where}: {fault}") from None
        for column, value in recomputed.items():
            # Rows of an earlier pipeline have fewer columns.
            if row.get(column, None if side.protocol else value) != value:
                yield f"{where}: {column} is {row.get(column)!r}, recomputed {value!r}"


def _protocol_mismatches(side: Side, where: str) -> Iterator[str]:
    """Rows that were not made under the protocol that their stage's manifest records."""
    expected = sha256_json(side.protocol)
    others = [row["id"] for row in side.rows if side.protocol and row.get("protocol_hash") != expected]
    if others:
        file = f"{side.file.name}: {len(others)} rows are of another protocol, the first id {others[0]}"
        yield f"{where}, {file}"


def _compare(side: Side, source: Path, same: Mapping[str, str], found: Found) -> None:
    """The number of rows, and the columns that must agree with those of ``source``."""
    if not source.exists():
        found.absent.append(f"{display_path(source)}: {side.file.name} is not compared with it")
        return
    found.files.add(source)
    originals = read_once(source, read_jsonl)
    where = display_path(side.file)
    if len(side.rows) != len(originals):
        found.mismatches.append(f"{where}: {len(side.rows)} rows, {display_path(source)} has {len(originals)}")
        return
    found.mismatches += [
        f"{where}, line {number}: {ours} is not that of {display_path(source)}"
        for number, (row, original) in enumerate(zip(side.rows, originals, strict=True), start=1)
        for ours, theirs in same.items()
        if (ours in ALWAYS or (ours in row and theirs in original)) and row.get(ours) != original.get(theirs)
    ]
