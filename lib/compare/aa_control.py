"""The A/A control (``aa_control``): the untuned model against itself with half as many rows at once.

What differs is the pipeline's own: rounding depends on the rows beside a row, and turns a token where two nearly tie.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lib import wording
from lib.compare.findings import METRICS, pair_rows
from lib.stats import Rate

Row = Mapping[str, Any]
TEXTS = {"accuracy": "model_output", "safety": "response"}


@dataclass(frozen=True)
class AAControl:
    """``changed``: rows whose outcome differs; right (or safe) in just one pass; rows with another text."""

    metric: str
    changed: Rate
    only_first: int
    only_again: int
    num_other_texts: int

    def record(self) -> dict[str, Any]:
        rate = self.changed
        shares = {"num_rows": rate.n, "num_changed": rate.successes, "rate": rate.share}
        shares |= {"low": rate.low, "high": rate.high}
        counts = {"only_first": self.only_first, "only_again": self.only_again}
        return {**shares, **counts, "num_other_texts": self.num_other_texts}


def compare_control(untuned: Sequence[Row], again: Sequence[Row], metric: str) -> AAControl | None:
    """The first pass against the second on the rows of both; None without a second. Equal prompts are one cluster."""
    pairs = pair_rows(untuned, again, metric)
    if not pairs:
        return None
    spec = METRICS[metric]
    outcomes = [tuple(map(spec.succeeded, pair)) for pair in pairs]
    texts = [spec.text(row) for row, _ in pairs] if spec.repeats else None
    changed = Rate.of([first != second for first, second in outcomes], texts)
    others = sum(one[TEXTS[metric]] != other[TEXTS[metric]] for one, other in pairs)
    return AAControl(metric, changed, outcomes.count((True, False)), outcomes.count((False, True)), others)


def control_sentence(found: AAControl) -> str:
    """The pipeline's own flip rate, with what it means for a comparison."""
    moved, rate = wording.moved(found.only_again, found.only_first), found.changed
    return (
        f"A/A control, {found.metric}: of {rate.n:,} {METRICS[found.metric].unit} put to the untuned model twice, the "
        f"second time with half as many rows at once, {wording.rate_text(rate)} changed outcome ({moved}), and "
        f"{found.num_other_texts:,} have another text. This share moves without any tuning."
    )
