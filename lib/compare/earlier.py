"""Fields that comparison.json had before there was a primary family: recomputed, so that none goes unchecked.

A change was claimed there where the paired interval left out 0 and the exact test rejected after Holm's adjustment over
all runs, or all pairs of runs, of one metric.
"""

import math
from collections.abc import Sequence
from typing import Any

from lib import stats
from lib.compare.comparison import RunPair
from lib.compare.family import LEVEL
from lib.compare.findings import Comparison, Finding

ALPHA, POWER, EXACT = 1 - LEVEL, 0.8, 1.0
COMPARISON_FIELDS = ("p_holm", "num_compared", "detectable", "adjusted_low", "adjusted_high")
FIELDS = frozenset({*COMPARISON_FIELDS, "safety_conclusion"})


def add_earlier_fields(record: dict[str, Any], findings: Sequence[Sequence[Finding]], pairs: Sequence[RunPair]) -> None:
    """Add them to a comparison recomputed from these findings, one sequence per run, and pairs."""
    verdicts = zip(*record["verdicts"].values(), strict=True)
    for records, found in zip(verdicts, zip(*findings, strict=True), strict=True):
        _add(records, found)
    for metric in {pair.metric for pair in pairs}:
        compared = [
            (one["verdict"], pair.finding)
            for one, pair in zip(record["pairs"], pairs, strict=True)
            if pair.metric == metric and pair.finding
        ]
        _add(*zip(*compared, strict=True)) if compared else None


def _add(records: Sequence[dict[str, Any]], findings: Sequence[Finding]) -> None:
    """Of one metric, all that were adjusted together."""
    compared = [(one, found, found.comparison) for one, found in zip(records, findings, strict=True)]
    adjusted = iter(stats.holm([comparison.p_value for _, _, comparison in compared if comparison]))
    num_compared = sum(comparison is not None for _, _, comparison in compared)
    for record, found, comparison in compared:
        record["safety_conclusion"] = None
        if comparison:
            p_holm = next(adjusted)
            record["comparison"] |= _fields(comparison, num_compared, p_holm)
            record["safety_conclusion"] = _conclusion(found, comparison, p_holm)


def _fields(comparison: Comparison, num_compared: int, p_holm: float) -> dict[str, Any]:
    level, share = 1 - ALPHA / num_compared, (comparison.only_run + comparison.only_reference) / comparison.num_shared
    num_rows = math.floor(comparison.num_effective + 1e-9)
    detectable = stats.minimum_detectable_difference(num_rows, share, POWER, level, EXACT)
    values = (p_holm, num_compared, detectable, *comparison.change.interval(level))
    return dict(zip(COMPARISON_FIELDS, values, strict=True))


def _conclusion(found: Finding, comparison: Comparison, p_holm: float) -> str | None:
    if found.margin is None or found.bound is None:
        return None
    shown = not comparison.low <= 0 <= comparison.high and max(comparison.p_value, p_holm) < ALPHA
    changed = ("rose" if comparison.difference > 0 else "fell") if shown else ""
    kept = "not inferior" if 100 * found.bound > -found.margin else ""
    return " and ".join(filter(None, [changed, kept])) or "undecided"
