"""Format or reasoning: how (strict - flexible) changed from the untuned to the tuned model, on the same questions.

That one of the two gains significantly is no comparison of them (Gelman, Stern 2006, Am. Stat. 60, 328-331).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lib import gsm8k, wording
from lib.compare.findings import pair_rows
from lib.stats import PairedTest, paired_test

Row = Mapping[str, Any]


@dataclass(frozen=True)
class FormChange:
    """``test``: the paired change of (strict - flexible); answers with the right number in another form, per model."""

    num_rows: int
    num_lost: int
    num_lost_untuned: int
    test: PairedTest

    def record(self) -> dict[str, Any]:
        counts = {"num_rows": self.num_rows, "num_lost": self.num_lost, "num_lost_untuned": self.num_lost_untuned}
        return {**counts, **asdict(self.test)}


def form_change(answers: Sequence[Row], untuned: Sequence[Row]) -> FormChange | None:
    """The change on the questions of both models; None without such questions."""
    pairs = pair_rows(answers, untuned, "accuracy")
    if not pairs:
        return None
    # Strict - flexible of an answer is -1 or 0: what is right when read strictly is right when read flexibly too.
    lost, lost_untuned = ([_is_lost(pair[side]) for pair in pairs] for side in (0, 1))
    test = paired_test([not one for one in lost], [not one for one in lost_untuned])
    return FormChange(len(pairs), sum(lost), sum(lost_untuned), test)


def _is_lost(row: Row) -> bool:
    score = gsm8k.score_row(row)
    return score["correct_flexible"] and not score["correct"]


def form_sentence(found: FormChange) -> str:
    """The change with its interval and test, and what it shows."""
    test, n = found.test, found.num_rows
    shown = "no change of form is shown"
    if test.mid_p < 0.05 and (test.low > 0 or test.high < 0):
        shown = "tuning improved the form" if test.low > 0 else "tuning made the form worse"
    interval = f"95 % interval {wording.interval(test.low, test.high)}, p = {test.mid_p:.3g}, not adjusted"
    lost, change = wording.count(found.num_lost, n), wording.signed_points(test.difference)
    return (
        f"Strict - flexible changed by {change} points with tuning ({interval}): {shown}. The right number stood in "
        f"another form in {wording.count(found.num_lost_untuned, n)} untuned answers, and in {lost} tuned ones."
    )
