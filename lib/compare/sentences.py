"""Findings in sentences. Points are claimed only of a place in the primary family; all else is called exploratory."""

from collections.abc import Iterable, Sequence

from lib import wording
from lib.compare.family import Place
from lib.compare.findings import Finding, reaches
from lib.stats import Rate

ALONE = "This run alone, before adjustment; 05 adjusts"
EXPLORATORY = "exploratory, not adjusted with the family"


def finding_sentence(findings: Iterable[Finding]) -> str:
    """The findings of one run, one clause per metric, with the claim of its recipe where it has one.

    "accuracy, this adapter: +4.2 points (97.5 % interval 0.6 to 7.8, Holm's p = 0.011) over untuned with 263 questions;
    safety, this recipe, 3 seeds: did not fall by more than 5 points (one-sided 97.5 % bound -3.1, ...".
    """
    return "; ".join(f"{_subject(one)}: {_clause(one)}{_selection(one)}" for one in findings)


def _subject(finding: Finding) -> str:
    place = finding.place
    if place is None:
        return finding.metric
    recipe = f"this recipe, {len(place.runs)} seeds"
    return f"{finding.metric}, {'this adapter' if len(place.runs) == 1 else recipe}"


def _selection(finding: Finding) -> str:
    return f", {finding.selected}" if finding.selected and finding.rate else ""


def _clause(finding: Finding) -> str:
    rate, alone, place = finding.rate, finding.comparison, finding.place
    if rate is None:
        return f"not measured ({finding.skipped})"
    if alone is None:
        interval = wording.interval(rate.low, rate.high)
        shown = f"{wording.percent(rate.share)} of {rate.n:,} (95 % interval {interval})"
        return f"{shown}, not compared with {finding.reference} ({finding.uncompared})"
    if place is None:
        against = f"against {finding.reference} with {alone.num_shared:,} {finding.unit}"
        interval = f"95 % interval {wording.interval(alone.low, alone.high)}, p = {alone.mid_p:.3g}; {EXPLORATORY}"
        why = finding.no_place and f", {finding.no_place}"
        return f"{wording.signed_points(alone.difference)} points ({interval}) {against}{why}"
    claim = _change_clause(finding, place) if place.margin is None else _margin_clause(finding, place, place.margin)
    seed = f"; this seed alone: {wording.signed_points(alone.difference)} points, exploratory"
    return claim if len(place.runs) == 1 else claim + seed


def _change_clause(finding: Finding, place: Place) -> str:
    rows = f"with {place.change.num_shared:,} {finding.unit}"
    interval, p_value = _interval(place), f"Holm's p = {place.holm_changed:.3g}"
    if place.changed:
        word = "over" if place.change.difference > 0 else "against"
        points = wording.signed_points(place.change.difference)
        return f"{points} points ({interval}, {p_value}) {word} {finding.reference} {rows}"
    low, high = place.interval
    if low <= 0 <= high:
        return f"no change can be shown {rows} ({interval}; changes beyond it are excluded)"
    return f"no change that is sure {rows} ({interval}, but {p_value})"


def _margin_clause(finding: Finding, place: Place, margin: float) -> str:
    """Whether safety fell, did not fall by more than the margin, or neither can be shown."""
    change, rows = place.change, f"with {place.change.num_shared:,} {finding.unit}"
    one_sided = f"one-sided {_percent(place.level)} bound"
    kept = f"by more than {margin:g} points"
    if place.kept:
        kept += f" ({one_sided} {wording.points(place.bound)}, Holm's p = {place.holm_kept:.3g})"
    if place.changed:
        word, against = ("rose", "over") if change.difference > 0 else ("fell", "against")
        size = (
            f"{wording.points(abs(change.difference))} points ({_interval(place)}, Holm's p = {place.holm_changed:.3g})"
        )
        joint = ", and did not fall " if word == "rose" else ", but not "
        return f"{word} by {size} {against} {finding.reference} {rows}{joint + kept if place.kept else ''}"
    if place.kept:
        return f"did not fall {kept} against {finding.reference} {rows}"
    fall = f"a fall of up to {wording.points(-place.bound)} points is compatible"
    return f"undecided: {fall} {rows} ({one_sided}, margin {margin:g} points)"


def _interval(place: Place) -> str:
    return f"{_percent(place.level)} interval {wording.interval(*place.interval)}"


def _percent(level: float) -> str:
    return f"{100 * level:.4g} %"


def family_sentence(places: Sequence[Place]) -> str:
    """Members and size of the primary family; "" without any."""
    if not places:
        return ""
    recipes = dict.fromkeys(place.recipe for place in places)
    safety = "safety kept or fell" if any(place.margin is not None for place in places) else "safety changed"
    return (
        f"Primary family: {{accuracy changed, {safety}}} x recipes ({'; '.join(recipes)}), {len(places)} places; "
        f"claims hold after Holm's step-down over these, intervals beside them are at "
        f"{_percent(places[0].level)}. All else is exploratory."
    )


def change_sentence(found: Finding) -> str:
    """The numbers of one run's change for 03 and 04, which claim nothing: the other runs of the folder are unknown."""
    change, name = found.comparison, found.metric.capitalize()
    if change is None:
        return f"{name}: {_clause(found)}{_selection(found)}."
    interval = f"95 % interval {wording.interval(change.low, change.high)}, p = {change.mid_p:.3g}"
    fixed = ""
    if found.margin is not None:
        bound = wording.points(change.change.lower_bound())
        fixed = f"; one-sided 95 % bound {bound}, margin {found.margin:g} points"
    return (
        f"{name} of {change.num_shared:,} {found.unit}: {wording.percent(change.rate)}, {found.reference} "
        f"{wording.percent(change.reference_rate)}, change {wording.signed_points(change.difference)} points "
        f"({interval}{fixed}){_selection(found)}. {ALONE}."
    )


def baseline_sentence(finding: Finding) -> str:
    """Whether the baseline is reached or missed, and the chance to reach it with new rows; "" without a baseline.

    No chance is given for a checkpoint selected on the test set: its rate is too high by the luck of the choice.
    """
    if finding.baseline is None:
        return ""
    baseline = wording.percent(finding.baseline)
    if finding.rate is None or finding.rerun_chance is None:
        return f"{finding.metric}: not measured, so the baseline of {baseline} is missed"
    result = f"{wording.percent(finding.rate.share)} {baseline_text(finding.rate, finding.baseline)}"
    if finding.selected:
        return f"{finding.metric}: {result}{_selection(finding)}"
    chance = wording.percent(finding.rerun_chance)
    if not 0.001 <= finding.rerun_chance <= 0.999:
        chance = "over 99.9 %" if finding.rerun_chance > 0.5 else "under 0.1 %"
    new = f"on as many new {finding.unit} it would be reached with a chance of {chance}"
    return f"{finding.metric}: {result}; {new}"


def baseline_text(rate: Rate, baseline: float) -> str:
    """``reaches the baseline of 31.0 %``, or ``misses`` it."""
    return f"{'reaches' if reaches(rate, baseline) else 'misses'} the baseline of {wording.percent(baseline)}"
