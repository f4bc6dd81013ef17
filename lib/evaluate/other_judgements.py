"""The same responses judged in other ways: the other context, the other mode, other wordings of the guidelines."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib import safety
from lib.engine.generator import Generator
from lib.record.files import sha256_json
from lib.record.rows import RowLog

Row = dict[str, Any]
# A verdict that is written costs far more than two probabilities.
MOST_WRITTEN = 20


def judge_in_other_ways(
    verdicts: Sequence[Row],
    judge: Generator,
    folder: Path,
    protocol: Mapping[str, Any],
    judging: Mapping[str, Any],
    guidelines_file: Path,
    num_rows: int,
) -> dict[str, list[Row]]:
    """Rows by way: all in the other context, ``num_rows`` in other wordings, up to 20 of them in the other mode.

    ``judging`` are the arguments of ``safety.judge``, of which each way changes one; rows are kept in ``<way>.jsonl``.
    """
    if not num_rows:
        return {}
    sample = verdicts[:: max(1, len(verdicts) // num_rows)][:num_rows]
    context = "prompt_and_response" if judging["context"] == "response" else "response"
    mode = "generate" if judging["mode"] == "probabilities" else "probabilities"
    ways = {"other_context": (verdicts, {"context": context}), "other_mode": (sample[:MOST_WRITTEN], {"mode": mode})}
    wordings = safety.other_wordings(guidelines_file).items()
    ways |= {name: (sample, {"guidelines": text}) for name, text in wordings}
    again = {}
    for name, (rows, change) in ways.items():
        way = {**judging, **change}
        made_by = sha256_json({"responses": protocol, **way})
        log = RowLog(folder / f"{name}.jsonl", made_by, label=name.replace("_", " "))
        again[name] = safety.judge(rows, judge, **way, log=log)
    return again
