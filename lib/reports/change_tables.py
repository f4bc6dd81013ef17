"""Tables of what tuning changed; apart from those of the stages, so that 01 and 02 do not stand on findings."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lib import wording
from lib.compare.aa_control import compare_control, control_sentence
from lib.compare.family import Change, Place
from lib.compare.findings import Finding
from lib.compare.sentences import ALONE
from lib.evaluate.response_kinds import language_note, response_kinds
from lib.reports.html import Html, note, stack
from lib.reports.tables import full_table
from lib.wording import percent

Row = Mapping[str, Any]


def changes_table(findings: Mapping[str, Sequence[Finding]], *, alone: bool = False) -> Html | None:
    """One row per run and metric that was compared with the untuned model on the same rows; changes in points.

    Seeds averaged follow their runs. ``alone``: without p-values of the primary family, as in 03 and 04.
    """
    compared = [(name, one) for name, some in findings.items() for one in some if one.comparison]
    rows = [{"run": name, **change_cells(one, "untuned", "tuned")} for name, one in compared]
    title = "Tuned against untuned on the same rows; changes in points"
    if alone:
        return full_table(rows, f"{title}. {ALONE}")
    places = [one.place if one.place and len(one.place.runs) == 1 else None for _, one in compared]
    shown = [row | _holm_cells(place) for row, place in zip(rows, places, strict=True)]
    averaged = dict.fromkeys(one.place for _, one in compared if one.place and len(one.place.runs) > 1)
    for place in averaged:
        cells = _cells(place.metric, place.change, place.margin, "untuned", "tuned")
        shown.append({"run": place.recipe, **cells, "p": f"{place.change.p_value:.3g}", **_holm_cells(place)})
    return full_table(shown, title)


def change_cells(found: Finding, before: str, after: str) -> dict[str, Any]:
    """A comparison as cells of a table; ``before`` and ``after`` are the heads of the two rates."""
    change = found.comparison
    if change is None:
        raise ValueError(f"{found.metric} was not compared: there is no change to show")
    cells = _cells(found.metric, change.change, found.margin, before, after)
    moved = wording.moved(change.only_run, change.only_reference)
    return cells | {"rows that moved": moved, "p": f"{change.mid_p:.3g}"}


def _cells(metric: str, change: Change, margin: float | None, before: str, after: str) -> dict[str, Any]:
    beyond = None if margin is None else f"{change.chance_of_loss(margin):.2f}"
    saved = None if change.variance_saved is None else percent(change.variance_saved)
    return {
        "metric": metric,
        "rows": change.num_shared,
        before: percent(change.reference_rate),
        after: percent(change.rate),
        "change": wording.signed_points(change.difference),
        "95 % interval": wording.interval(*change.interval()),
        "P(fell)": f"{change.chance_of_loss():.2f}",
        "P(fell > margin)": beyond,
        "phi": None if change.correlation is None else f"{change.correlation:.2f}",
        "variance saved": saved,
        "rows that moved": None,
    }


def _holm_cells(place: Place | None) -> dict[str, str | None]:
    kept = None if place is None or place.holm_kept is None else f"{place.holm_kept:.3g}"
    return {"Holm's p": place and f"{place.holm_changed:.3g}", "Holm's p, kept": kept}


def control_lines(untuned: Sequence[Row], again: Sequence[Row], metric: str) -> list[str]:
    """What changed where the untuned model got the same rows twice (``aa_control``); empty where it did not."""
    found = compare_control(untuned, again, metric)
    return [control_sentence(found)] if found else []


def kinds_table(judged: Mapping[str, Sequence[Mapping[str, Any]]], languages: Iterable[str] = ()) -> Html | None:
    """Counts of each kind of response, one row per model; models without rows are left out.

    ``languages`` are those of the prompts: below the table stands what the kinds are worth where one is not English.
    """
    found = {name: response_kinds(rows) for name, rows in judged.items() if rows}
    counts = {name: {one.kind: one.rate.successes for one in kinds} for name, kinds in found.items()}
    shown = full_table([{"model": name, **kinds} for name, kinds in counts.items()], "Kinds of responses")
    notes = [note(text) for text in map(language_note, dict.fromkeys(languages)) if text]
    return stack([shown, *notes]) if shown else None
