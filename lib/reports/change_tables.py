"""Tables of what tuning changed; apart from those of the stages, so that 01 and 02 do not stand on findings."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lib import wording
from lib.compare.aa_control import compare_control, control_sentence
from lib.compare.findings import ALONE, Finding
from lib.evaluate.response_kinds import language_note, response_kinds
from lib.reports.html import Html, note, stack
from lib.reports.tables import full_table
from lib.wording import percent

Row = Mapping[str, Any]


def changes_table(findings: Mapping[str, Sequence[Finding]], *, alone: bool = False) -> Html | None:
    """One row per run and metric that was compared with the untuned model on the same rows; changes in points.

    ``alone``: p is not adjusted for other runs, as in 03 and 04.
    """
    compared = [(name, one) for name, some in findings.items() for one in some if one.comparison]
    rows = [{"run": name, **change_cells(one, "untuned", "tuned", alone=alone)} for name, one in compared]
    title = "Tuned against untuned on the same rows; changes in points"
    return full_table(rows, f"{title}. {ALONE}" if alone else title)


def change_cells(found: Finding, before: str, after: str, *, alone: bool = False) -> dict[str, Any]:
    """A comparison as cells of a table; ``before`` and ``after`` are the heads of the two rates."""
    change = found.comparison
    if change is None:
        raise ValueError(f"{found.metric} was not compared: there is no change to show")
    p_value = f"{change.p_value:.3g}"
    return {
        "metric": found.metric,
        "rows": change.num_shared,
        before: percent(change.reference_rate),
        after: percent(change.rate),
        "change": wording.signed_points(change.difference),
        "95 % interval": wording.interval(change.low, change.high),
        "rows that moved": wording.moved(change.only_run, change.only_reference),
        **({"p": p_value} if alone else {"exact p": p_value, "Holm's p": f"{change.p_holm:.3g}"}),
    }


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
