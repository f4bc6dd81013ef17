"""Tables about the judge: other contexts, modes and wordings, and a person's labels."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lib import wording
from lib.compare.judge_movement import WayChange, multiverse_sentence
from lib.evaluate.judge_reliability import Disagreement, disagreement, wording_spread
from lib.evaluate.labels import FEWEST_OF_A_KIND, MODELS, STRATA, AgainstPerson, Estimate, ModelAgreement
from lib.reports.html import Html, sentences, stack
from lib.reports.tables import full_table, rates_table
from lib.stats import Rate
from lib.wording import percent


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
    rows = [
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
        for one in changes
    ]
    return full_table(rows, caption)


def movement_view(changes: Sequence[WayChange], margin: float | None) -> Html | None:
    """``ways_table`` and its one line."""
    return stack([ways_table(changes), sentences([multiverse_sentence(changes, margin)])]) if changes else None


def threshold_words(curve: Sequence[tuple[float, Rate]]) -> str:
    """How far the safe rate moves from the strictest to the most lenient threshold."""
    (strict, low), (lenient, high) = curve[0], curve[-1]
    return f"The safe rate is {percent(low.share)} at a threshold of {strict} and {percent(high.share)} at {lenient}."


def agreement_view(found: AgainstPerson) -> Html | None:
    """A judge against a person, a column for each model: labels by verdict, agreement, the corrected safe rate."""
    rows: dict[str, dict[str, str]] = {}
    for model, one in found.models.items():
        for what, cell in _agreement_cells(one).items():
            rows.setdefault(what, {"what": what})[model] = cell
    return full_table([*rows.values()], "The judge against a person, with 95 % intervals")


def _agreement_cells(found: ModelAgreement) -> dict[str, str]:
    safe, unsafe = found.num_labels
    too_few = f"not given: {unsafe} labels unsafe, {safe} safe; it needs {FEWEST_OF_A_KIND} of each"
    called_safe, called_other = (found.strata[name] for name in STRATA)
    return {
        "responses labelled by a person": wording.count(safe + unsafe, called_safe.rows + called_other.rows),
        "unsafe of those judged safe": wording.count(called_safe.unsafe, called_safe.labelled),
        "unsafe of those judged not safe": wording.count(called_other.unsafe, called_other.labelled),
        "same label": _share(found.agreeing),
        "Cohen's kappa": _number(found.kappa, too_few),
        "Gwet's AC1": _number(found.ac1),
        "unsafe responses found (sensitivity)": _share(found.sensitivity),
        "safe responses called safe (specificity)": _share(found.specificity),
        "safe rate of these responses, corrected": _share(found.corrected),
        "safe rate for prompts like these, corrected": _share(found.corrected_population),
    }


def _share(found: Estimate | None) -> str:
    if found is None:
        return "no such response was labelled"
    return f"{percent(found.value)} ({wording.interval(found.low, found.high)})"


def _number(found: Estimate | None, absent: str = "") -> str:
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})" if found else absent


def agreement_words(found: AgainstPerson) -> list[str]:
    """The corrected safe rate of each model and its change, in a sentence each; nothing is claimed."""
    lines = [line for model, one in found.models.items() for line in _corrected_words(model, one)]
    if found.change is None or found.change_population is None:
        absent = " and ".join(model for model in MODELS if model not in found.models)
        return [*lines, f"No {absent} response is labelled, so the change is not corrected."]
    points, intervals = wording.signed_points(found.change.value), _intervals(found.change, found.change_population)
    return [*lines, f"Corrected change: {points} points ({intervals}). This run alone; nothing is claimed."]


def _corrected_words(model: str, found: ModelAgreement) -> Iterator[str]:
    rows, labelled = sum(one.rows for one in found.strata.values()), sum(found.num_labels)
    rate = f"{percent(found.corrected.value)} ({_intervals(found.corrected, found.corrected_population)})"
    yield f"Safe rate of the {rows:,} {model} responses, corrected by a person's labels of {labelled:,}: {rate}."
    bare = [name for name, one in found.strata.items() if one.rows and not one.labelled]
    if bare:
        yield f"No {model} response judged {' or '.join(bare)} is labelled: those could all be safe or all unsafe."


def _intervals(here: Estimate, population: Estimate) -> str:
    between = wording.interval(here.low, here.high)
    return f"95 % interval {between}; for prompts like these {wording.interval(population.low, population.high)}"
