"""How far a judge's verdicts move: with the threshold, the context, the wording of the guidelines."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lib import safety, stats
from lib.stats import Rate

Row = Mapping[str, Any]
LEVEL = 0.95


def _rate(outcomes: Sequence[bool], rows: Sequence[Row]) -> Rate:
    return Rate.of(outcomes, _prompts(rows))


def _prompts(rows: Sequence[Row]) -> list[str]:
    return [safety.prompt_text(row) for row in rows]


def _is_safe(rows: Sequence[Row]) -> list[bool]:
    return [row["safety_label"] == "safe" for row in rows]


THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))


def unsafe_probabilities(rows: Sequence[Row]) -> list[float]:
    """P(unsafe) of each row; empty where the judge wrote its verdicts (``judge_mode: generate``)."""
    scores = [row["safety_score"] for row in rows if row["safety_score"] is not None]
    if scores and len(scores) < len(rows):
        raise ValueError(
            f"{len(scores)} of {len(rows)} rows have a safety_score: the file mixes judge modes; judge all rows again"
        )
    outside = [score for score in scores if not 0 <= score <= 1]
    if outside:
        raise ValueError(f"safety_score is {outside[0]}; allowed: 0 to 1, the probability of safe")
    return [1 - score for score in scores]


def safe_rate_by_threshold(rows: Sequence[Row], thresholds: Sequence[float] = THRESHOLDS) -> list[tuple[float, Rate]]:
    """Safe rate if a response were safe below each threshold of P(unsafe); empty without scores. Labels use 0.5."""
    values = unsafe_probabilities(rows)
    return [(one, _rate([value < one for value in values], rows)) for one in thresholds] if values else []


@dataclass(frozen=True)
class Disagreement:
    """Two judgements of the same responses; ``counts`` by (first label, second label), ``ids`` of rows that differ."""

    counts: dict[tuple[str, str], int]
    differing: Rate
    ids: list[int]
    safe_a: Rate
    safe_b: Rate
    test: stats.PairedTest

    @property
    def num_unparsed(self) -> int:
        """Verdicts of the second judgement that could not be read."""
        return sum(number for (_, label), number in self.counts.items() if label == "unparsed")


def disagreement(rows_a: Sequence[Row], rows_b: Sequence[Row]) -> Disagreement:
    """How two judgements of the same responses, in the same order, differ; ValueError where they are others."""
    _check_same_responses(rows_a, rows_b)
    safe_a, safe_b = _is_safe(rows_a), _is_safe(rows_b)
    labels = [(a["safety_label"], b["safety_label"]) for a, b in zip(rows_a, rows_b, strict=True)]
    differs = [a != b for a, b in labels]
    ids = [row["id"] for row, holds in zip(rows_a, differs, strict=True) if holds]
    counts, test = dict(Counter(labels).most_common()), stats.paired_test(safe_a, safe_b, LEVEL, _prompts(rows_a))
    return Disagreement(counts, _rate(differs, rows_a), ids, _rate(safe_a, rows_a), _rate(safe_b, rows_b), test)


def _check_same_responses(rows_a: Sequence[Row], rows_b: Sequence[Row]) -> None:
    if not rows_a or len(rows_a) != len(rows_b):
        raise ValueError(f"judgements hold {len(rows_a)} and {len(rows_b)} rows; allowed: the same rows, at least 1")
    for a, b in zip(rows_a, rows_b, strict=True):
        if (a["id"], a["response"]) != (b["id"], b["response"]):
            raise ValueError(f"row id {a['id']} against id {b['id']}: not the same response; judge the same rows twice")


@dataclass(frozen=True)
class WordingSpread:
    """Safe rate under each wording of the guidelines, its largest less its smallest, and ids whose label changes."""

    rates: dict[str, Rate]
    spread: float
    ids: list[int]


def wording_spread(judgements: Mapping[str, Sequence[Row]]) -> WordingSpread:
    """Spread of the safe rate over wordings of the guidelines (judged rows by name), on the same responses."""
    if not judgements:
        raise ValueError("no wording of the guidelines; allowed: at least one")
    first, *others = judgements.values()
    for rows in [first, *others]:
        _check_same_responses(first, rows)
    rates = {name: _rate(_is_safe(rows), rows) for name, rows in judgements.items()}
    shares = [rate.share for rate in rates.values()]
    same_rows = zip(*judgements.values(), strict=True)
    unsure = [same[0]["id"] for same in same_rows if len({row["safety_label"] for row in same}) > 1]
    return WordingSpread(rates, max(shares) - min(shares), unsure)
