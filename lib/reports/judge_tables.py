"""Tables about the judge: other contexts, modes and wordings, and a person's labels."""

from collections.abc import Mapping, Sequence
from typing import Any

from lib import wording
from lib.compare.judge_movement import WayChange, multiverse_sentence
from lib.evaluate.judge_reliability import Agreement, Disagreement, disagreement, wording_spread
from lib.reports.html import Html, sentences, stack, table
from lib.reports.tables import full_table, rates_table
from lib.stats import Rate
from lib.wording import percent, rate_text


def disagreement_words(name: str, found: Disagreement) -> str:
    """How another way of judging the same responses differs, in one sentence."""
    change = wording.signed_points(found.safe_b.share - found.safe_a.share)
    # A rate that falls because nothing could be read says nothing about the responses.
    unread = f", {wording.count(found.num_unparsed, found.differing.n)} could not be read" if found.num_unparsed else ""
    return (
        f"{name}: {wording.count(found.differing.successes, found.differing.n)} labels differ{unread}; the safe rate "
        f"is {percent(found.safe_b.share)} in place of {percent(found.safe_a.share)} ({change} points, exact p = "
        f"{found.test.p_value:.3g})."
    )


def judge_card_view(
    verdicts: Sequence[Mapping[str, Any]], again: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[Html | None, list[str]]:
    """Responses judged in other ways (``other_judgements``): what differs as tables, and in a sentence per way."""
    by_id = {row["id"]: row for row in verdicts}
    shown, card, wordings = [], [], {}
    for name, rows in again.items():
        as_judged = [by_id[row["id"]] for row in rows]
        if name.startswith("other_"):
            found, label = disagreement(as_judged, rows), name.replace("_", " ")
            pairs = [{"as judged": one, label: other, "responses": n} for (one, other), n in found.counts.items()]
            shown.append(full_table(pairs, f"Labels as judged and with {label}"))
            card.append(disagreement_words(label, found))
        else:
            wordings |= {"as used": as_judged, name: rows}
    if wordings:
        spread = wording_spread(wordings)
        shown.append(rates_table(spread.rates, "wording", "The same responses under each wording of the guidelines"))
        card.append(
            f"{len(spread.rates)} wordings of the guidelines on {len(wordings['as used'])} responses: the safe rate "
            f"moves by {wording.points(spread.spread)} points, {len(spread.ids)} labels are not the same under all."
        )
    return stack([*shown, sentences(card)]), card


WAYS = "Change of safety, tuned - untuned, by way of judging, in points"


def ways_table(changes: Sequence[WayChange], caption: str = WAYS) -> Html | None:
    """What tuning changed in each other way of judging, beside the run's own way on the same prompts."""
    rows = []
    for one in changes:
        rows.append(
            {
                "way": one.way.replace("_", " "),
                "prompts": one.change.num_shared,
                "change": wording.signed_points(one.change.difference),
                "95 % interval": wording.interval(one.change.low, one.change.high),
                "conclusion": one.conclusion or "no margin",
                "as judged": wording.signed_points(one.as_judged.difference),
                "conclusion as judged": one.conclusion_as_judged or "no margin",
                "unparsed": one.num_unparsed,
            }
        )
    return full_table(rows, caption)


def movement_view(changes: Sequence[WayChange], margin: float | None) -> Html | None:
    """``ways_table`` and its one line."""
    return stack([ways_table(changes), sentences([multiverse_sentence(changes, margin)])]) if changes else None


def threshold_words(curve: Sequence[tuple[float, Rate]]) -> str:
    """How far the safe rate moves from the strictest to the most lenient threshold."""
    (strict, low), (lenient, high) = curve[0], curve[-1]
    return f"The safe rate is {percent(low.share)} at a threshold of {strict} and {percent(high.share)} at {lenient}."


def agreement_view(found: Agreement) -> Html:
    """A judge against a person: agreement, kappa, sensitivity, specificity, and the safe rate corrected by them."""
    kappa, corrected = "not defined (one label only)", found.uncorrected
    if found.kappa is not None:
        kappa = f"{found.kappa:.2f} (95 % interval {found.kappa_low:.2f} to {found.kappa_high:.2f})"
    if found.corrected:
        interval = wording.interval(found.corrected.low, found.corrected.high)
        corrected = f"{percent(found.corrected.rate)} (95 % interval {interval})"
    absent = "no such response was labelled"
    named = {
        "responses labelled by a person": str(found.num_labelled),
        "same label": rate_text(found.agreeing),
        "Cohen's kappa": kappa,
        "unsafe responses found (sensitivity)": rate_text(found.sensitivity) if found.sensitivity else absent,
        "safe responses called safe (specificity)": rate_text(found.specificity) if found.specificity else absent,
        "safe rate, corrected (Rogan-Gladen)": corrected,
    }
    return table([{"what": what, "value": value} for what, value in named.items()], "The judge against a person")
