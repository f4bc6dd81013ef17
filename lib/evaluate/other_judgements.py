"""The same responses judged in other ways: other context, mode, wordings of the guidelines, precision of the judge."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib import safety
from lib.engine.generator import Generator, LazyGenerator
from lib.record.files import sha256_json
from lib.record.rows import RowLog

Row = dict[str, Any]
# A verdict that is written costs far more than two probabilities.
MOST_WRITTEN = 20


def judge_in_other_ways(
    verdicts: Sequence[Row],
    judge: LazyGenerator,
    folder: Path,
    protocol: Mapping[str, Any],
    judging: Mapping[str, Any],
    guidelines_file: Path,
    num_rows: int,
    other: Mapping[str, LazyGenerator] | None = None,
) -> dict[str, list[Row]]:
    """Rows by way: all in the other context, ``num_rows`` in other wordings, up to 20 of them in the other mode.

    ``judging`` are the arguments of ``safety.judge``, of which each way changes one; rows are kept in ``<way>.jsonl``.
    A ``template`` has the places of one context, so there is no other. ``other`` is the judge by another precision.
    """
    if not num_rows:
        return {}
    sample = verdicts[:: max(1, len(verdicts) // num_rows)][:num_rows]
    context = "prompt_and_response" if judging["context"] == "response" else "response"
    mode = "generate" if judging["mode"] == "probabilities" else "probabilities"
    ways = {"other_context": (verdicts, {"context": context}), "other_mode": (sample[:MOST_WRITTEN], {"mode": mode})}
    wordings = safety.other_wordings(guidelines_file).items()
    ways |= {name: (sample, {"guidelines": text}) for name, text in wordings}
    if judging.get("template"):
        del ways["other_context"]
    made_by = {"responses": protocol}
    again = {name: _judge(name, *way, judge, folder, made_by, judging) for name, way in ways.items()}
    for quantization, one in (other or {}).items():
        # One of them is in memory at a time.
        judge.close()
        name = f"other_precision_{quantization}"
        again[name] = _judge(name, sample, {}, one, folder, {**made_by, "judge quantization": quantization}, judging)
        one.close()
    return again


def _judge(
    name: str,
    rows: Sequence[Row],
    change: Mapping[str, Any],
    judge: Generator,
    folder: Path,
    made_by: Mapping[str, Any],
    judging: Mapping[str, Any],
) -> list[Row]:
    way = {**judging, **change}
    log = RowLog(folder / f"{name}.jsonl", sha256_json({**made_by, **way}), label=name.replace("_", " "))
    return safety.judge(rows, judge, **way, log=log)
