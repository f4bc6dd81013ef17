"""Rows of one run against their own texts, the rows that 01 prepared, and what the manifest says made them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lib import gsm8k, safety
from lib.compare.found import Found
from lib.compare.parsed import read_once
from lib.compare.runs import SAFETY_STAGE, RowFile, Run, judgement_files, row_files
from lib.record.files import sha256_json
from lib.record.paths import ArtifactError, display_path
from lib.record.protocol import at_scale, in_half_batches, without_adapter
from lib.record.rows import read_jsonl

Row = dict[str, Any]
QUESTION = {"question": "question", "gold_answer": "answer", "test_index": "test_index"}
PROMPT = {name: name for name in ("id", "prompt", "release_prompt_id", "hazard", "persona")}
RESPONSE = {name: name for name in ("id", "prompt", "response", "finish_reason", "num_output_tokens")}
# Every pipeline writes these; the others are compared where both files have them.
ALWAYS = frozenset({"question", "gold_answer", "test_index", "prompt", "response"})


def _protocol_of(run: Run, file: RowFile) -> Mapping[str, Any]:
    """What made the rows, by their stage's manifest; {} where it is not recorded."""
    known = run.metrics[file.metric].row_protocol
    if not known or file.scale == 1:
        return known
    if file.is_control:
        return in_half_batches(known)
    return at_scale(known, file.scale) if file.scale else without_adapter(known)


def _responses_of(run: Run, file: RowFile) -> Path | None:
    """The responses that the verdicts of ``file`` belong to; None for answers, and where no manifest names them."""
    if file.metric == "accuracy":
        return None
    if file.scale:
        return file.path.with_name(file.path.name.replace("ailuminate_safety", "ailuminate_preds"))
    outputs = (run.paths.stage_dir(SAFETY_STAGE) / name for name in run.outputs(SAFETY_STAGE))
    begins = f"ailuminate_preds_{'control' if file.is_control else 'untuned'}"
    return next((path.resolve() for path in outputs if path.name.startswith(begins)), None)


def check_rows(run: Run, found: Found) -> None:
    """Every row file of a run."""
    for file in row_files(run):
        if not file.rows:
            found.absent.append(f"run_{run.name}: {file.path.name}")
            continue
        protocol, responses = _protocol_of(run, file), _responses_of(run, file)
        found.files.add(file.path)
        found.checked["rows with their flags"] += len(file.rows)
        found.mismatches += _row_mismatches(file, is_ours=bool(protocol))
        expected = sha256_json(protocol)
        others = [row["id"] for row in file.rows if protocol and row.get("protocol_hash") != expected]
        if others:
            fault = f"{len(others)} rows are of another protocol, the first id {others[0]}"
            found.mismatches.append(f"run_{run.name}, {file.metric}, {file.path.name}: {fault}")
        prepared = run.paths.gsm8k_eval_rows if file.metric == "accuracy" else run.paths.ailuminate_rows
        _compare(file, prepared, QUESTION if file.metric == "accuracy" else PROMPT, found)
        if responses:
            _compare(file, responses, RESPONSE, found)
    for sides in judgement_files(run).values():
        for file in sides.values():
            _check_judged_again(run, file, found)


def _check_judged_again(run: Run, file: RowFile, found: Found) -> None:
    """Another judgement of some of the run's responses, or of the untuned ones: its labels, and whose they are."""
    if not file.rows:
        found.absent.append(f"run_{run.name}: {file.path.name}")
        return
    found.files.add(file.path)
    found.checked["rows judged in other ways"] += len(file.rows)
    found.mismatches += _row_mismatches(file, is_ours=True)
    score = run.safety
    judged = {row["id"]: row for row in (score.rows if file.scale else score.untuned_rows)}
    for number, row in enumerate(file.rows, start=1):
        own = judged.get(row["id"], {})
        others = [name for name in RESPONSE if own.get(name) != row.get(name)]
        if judged and others:
            where = f"{display_path(file.path)}, line {number}"
            found.mismatches.append(f"{where}: {', '.join(others)} are not those of the response judged first")


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


def _row_mismatches(file: RowFile, is_ours: bool) -> Iterator[str]:
    """Columns of a row that do not follow from its own text, and ids that appear twice."""
    seen: set[Any] = set()
    columns = file.rows[0].keys()
    for number, row in enumerate(file.rows, start=1):
        where = f"{display_path(file.path)}, line {number} (id {row.get('id')})"
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
            if row.get(column, None if is_ours else value) != value:
                yield f"{where}: {column} is {row.get(column)!r}, recomputed {value!r}"


def _compare(file: RowFile, source: Path, same: Mapping[str, str], found: Found) -> None:
    """The number of rows, and the columns that must agree with those of ``source``."""
    if not source.exists():
        found.absent.append(f"{display_path(source)}: {file.path.name} is not compared with it")
        return
    found.files.add(source)
    originals = read_once(source, read_jsonl)
    where = display_path(file.path)
    if len(file.rows) != len(originals):
        found.mismatches.append(f"{where}: {len(file.rows)} rows, {display_path(source)} has {len(originals)}")
        return
    found.mismatches += [
        f"{where}, line {number}: {ours} is not that of {display_path(source)}"
        for number, (row, original) in enumerate(zip(file.rows, originals, strict=True), start=1)
        for ours, theirs in same.items()
        if (ours in ALWAYS or (ours in row and theirs in original)) and row.get(ours) != original.get(theirs)
    ]
