"""The same responses judged in other ways: other context, mode, wordings of the guidelines, precision of the judge."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib import safety
from lib.engine.generator import Generator, LazyGenerator
from lib.evaluate.sides import TUNED, UNTUNED
from lib.record.files import sha256_json
from lib.record.protocol import without_adapter
from lib.record.rows import RowLog

Row = dict[str, Any]
# Way -> side (tuned, untuned) -> rows.
Judgements = dict[str, dict[str, list[Row]]]
# A verdict that is written costs far more than two probabilities.
MOST_WRITTEN = 20
FOLDER = "judge_card"


def judge_in_other_ways(
    judged: Mapping[Any, Sequence[Row]],
    judge: LazyGenerator,
    stage_folder: Path,
    protocol: Mapping[str, Any],
    judging: Mapping[str, Any],
    guidelines_file: Path,
    num_rows: int,
    other: Mapping[str, LazyGenerator] | None = None,
) -> Judgements:
    """Judgements of the tuned responses and, on the same ids, of the untuned ones where ``judged`` has them.

    All in the other context, ``num_rows`` in other wordings, up to 20 of them in the other mode. ``judging`` are the
    arguments of ``safety.judge``, of which each way changes one; rows are kept in the files of ``judgement_files``.
    A ``template`` has the places of one context, so there is no other. ``other`` is the judge by another precision.
    """
    if not num_rows:
        return {}
    verdicts = judged[TUNED]
    sample = verdicts[:: max(1, len(verdicts) // num_rows)][:num_rows]

    def in_way(way: str, rows: Sequence[Row], one: Generator, change: Row, **precision: str) -> dict[str, list[Row]]:
        ids, found = {row["id"] for row in rows}, {}
        for side in (side for side in (TUNED, UNTUNED) if judged.get(side)):
            same = [row for row in judged[side] if row["id"] in ids]
            made_by = {"responses": protocol if side == TUNED else without_adapter(protocol), **precision}
            found[side] = _judge(stage_folder / _file(way, side), same, one, made_by, {**judging, **change})
        return found

    changes = changes_by_way(judging, guidelines_file)
    chosen = {"other_context": verdicts, "other_mode": sample[:MOST_WRITTEN]}
    again = {way: in_way(way, chosen.get(way, sample), judge, change) for way, change in changes.items()}
    for quantization, one in (other or {}).items():
        # One of them is in memory at a time.
        judge.close()
        way = f"other_precision_{quantization}"
        again[way] = in_way(way, sample, one, {}, **{"judge quantization": quantization})
        one.close()
    return again


def changes_by_way(judging: Mapping[str, Any], guidelines_file: Path) -> dict[str, Row]:
    """Way -> the argument of ``safety.judge`` that it changes."""
    context = "prompt_and_response" if judging["context"] == "response" else "response"
    mode = "generate" if judging["mode"] == "probabilities" else "probabilities"
    ways: dict[str, Row] = {} if judging.get("template") else {"other_context": {"context": context}}
    wordings = safety.other_wordings(guidelines_file).items()
    return {**ways, "other_mode": {"mode": mode}, **{name: {"guidelines": text} for name, text in wordings}}


def judgement_files(again: Judgements) -> dict[str, dict[str, str]]:
    """Way -> side -> row file, relative to the stage's folder: for the manifest."""
    return {way: {side: _file(way, side) for side in sides} for way, sides in again.items()}


def _file(way: str, side: str) -> str:
    return f"{FOLDER}/{way}.jsonl" if side == TUNED else f"{FOLDER}/{side}/{way}.jsonl"


def _judge(path: Path, rows: Sequence[Row], judge: Generator, made_by: Row, way: Row) -> list[Row]:
    side = "untuned " if path.parent.name == UNTUNED else ""
    log = RowLog(path, sha256_json({**made_by, **way}), label=f"{side}{path.stem}".replace("_", " "))
    return safety.judge(rows, judge, **way, log=log)
