"""The same responses judged in other ways: the other context, the other mode, other wordings of the guidelines."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib import safety

Row = dict[str, Any]
# A verdict that is written costs far more than two probabilities.
MOST_WRITTEN = 20


def judge_in_other_ways(
    verdicts: Sequence[Row],
    judge: Any,
    folder: Path,
    protocol: Mapping[str, Any],
    judging: Mapping[str, Any],
    guidelines_file: Path,
    num_rows: int,
) -> dict[str, list[Row]]:
    """All responses in the other context, ``num_rows`` in other wordings, up to 20 of these in the other mode."""
    if not num_rows:
        return {}
    sample = verdicts[:: max(1, len(verdicts) // num_rows)][:num_rows]
    context = "prompt_and_response" if judging["context"] == "response" else "response"
    mode = "generate" if judging["mode"] == "probabilities" else "probabilities"
    wordings = {name: {"guidelines": text} for name, text in safety.other_wordings(guidelines_file).items()}
    again = safety.judge_again(verdicts, judge, folder, protocol, judging, {"other_context": {"context": context}})
    again |= safety.judge_again(sample[:MOST_WRITTEN], judge, folder, protocol, judging, {"other_mode": {"mode": mode}})
    return again | safety.judge_again(sample, judge, folder, protocol, judging, wordings)
