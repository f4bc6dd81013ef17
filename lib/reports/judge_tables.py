"""Tables about the judge: other contexts, modes and wordings, and a person's labels."""

from collections.abc import Mapping, Sequence
from typing import Any

from lib import wording
from lib.evaluate import hazards
from lib.evaluate.judge_reliability import (
    Agreement,
    CorrectedRate,
    Disagreement,
    Rate,
    WordingSpread,
    disagreement,
    wording_spread,
)
from lib.reports.html import Html, sentences, stack, table
from lib.wording import percent


def rate_words(rate: Rate | CorrectedRate) -> str:
    """A rate with its interval, as ``54.4 % (95 % interval 48.3 to 60.3)``."""
    return f"{percent(rate.rate)} (95 % interval {wording.interval(rate.low, rate.high)})"


def interval_cell(rate: hazards.GroupRate | Rate) -> str:
    return f"{wording.interval(rate.low, rate.high)} %"


def disagreement_words(name: str, found: Disagreement) -> str:
    """How another way of judging the same responses differs, in one sentence."""
    change = wording.signed_points(found.safe_b.rate - found.safe_a.rate)
    total = found.differing.num_rows
    # A rate that falls because nothing could be read says nothing about the responses.
    unread = f", {wording.count(found.num_unparsed, total)} could not be read" if found.num_unparsed else ""
    return (
        f"{name}: {wording.count(found.differing.num_of, total)} labels differ{unread}; the safe rate is "
        f"{percent(found.safe_b.rate)} in place of {percent(found.safe_a.rate)} ({change} points, exact p = "
        f"{found.test.p_value:.3g})."
    )


def disagreement_table(name: str, found: Disagreement) -> Html:
    """Labels of each pair of judgements."""
    rows = [{"as judged": one, name: other, "responses": count} for (one, other), count in found.counts.items()]
    return table(rows, f"Labels as judged and with {name}", max_rows=len(rows))


def judge_card_view(
    verdicts: Sequence[Mapping[str, Any]], again: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[Html, list[str]]:
    """The same responses judged in other ways: tables of what differs, and a sentence for each way.

    Args:
        verdicts: judged rows.
        again: as ``lib.safety.judge_again`` gives it; ``other_context`` and ``other_mode`` are those, every other name
            is a wording of the guidelines. Each holds all rows of ``verdicts`` or some of them.
    """
    by_id = {row["id"]: row for row in verdicts}
    tables, card, wordings = [], [], {}
    for name, rows in again.items():
        as_judged = [by_id[row["id"]] for row in rows]
        if name.startswith("other_"):
            found, label = disagreement(as_judged, rows), name.replace("_", " ")
            tables.append(disagreement_table(label, found))
            card.append(disagreement_words(label, found))
        else:
            wordings |= {"as used": as_judged, name: rows}
    if wordings:
        spread = wording_spread(wordings)
        tables.append(wordings_table(spread))
        card.append(
            f"{len(spread.rates)} wordings of the guidelines on {len(wordings['as used'])} responses: the safe rate "
            f"moves by {wording.points(spread.spread)} points, {len(spread.ids)} labels are not the same under all."
        )
    return stack([*tables, sentences(card)]), card


def threshold_words(curve: Sequence[tuple[float, Rate]]) -> str:
    """How far the safe rate moves from the strictest to the most lenient threshold."""
    (strict, low), (lenient, high) = curve[0], curve[-1]
    return f"The safe rate is {percent(low.rate)} at a threshold of {strict} and {percent(high.rate)} at {lenient}."


def wordings_table(found: WordingSpread) -> Html:
    """Safe rate under each wording of the guidelines, on the same responses."""
    rows = [
        {
            "wording": name,
            "safe": percent(rate.rate),
            "95 % interval": interval_cell(rate),
            "rows": f"{rate.num_of} of {rate.num_rows}",
        }
        for name, rate in found.rates.items()
    ]
    return table(rows, "The same responses under each wording of the guidelines", max_rows=len(rows))


def agreement_view(found: Agreement) -> Html:
    """A judge against a person: agreement, kappa, sensitivity, specificity, and the safe rate corrected by them."""
    kappa = "not defined (one label only)"
    if found.kappa is not None:
        kappa = f"{found.kappa:.2f} (95 % interval {found.kappa_low:.2f} to {found.kappa_high:.2f})"
    named = {
        "responses labelled by a person": str(found.num_labelled),
        "same label": rate_words(found.agreeing),
        "Cohen's kappa": kappa,
        "unsafe responses found (sensitivity)": _share_words(found.sensitivity),
        "safe responses let be (specificity)": _share_words(found.specificity),
        "safe rate, corrected (Rogan-Gladen)": rate_words(found.corrected) if found.corrected else found.uncorrected,
    }
    return table([{"what": what, "value": value} for what, value in named.items()], "The judge against a person")


def _share_words(rate: Rate | None) -> str:
    return "no such response was labelled" if rate is None else f"{rate_words(rate)}, n = {rate.num_rows}"
