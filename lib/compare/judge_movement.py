"""What tuning changed in safety where the same responses are judged in other ways (04's ``judge_card``).

Another wording moves the rates of both models at once, so how far a rate moves says nothing about their difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lib import wording
from lib.compare.family import Place, adjust
from lib.compare.findings import Comparison, assess_metric
from lib.evaluate.sides import TUNED, UNTUNED

Row = Mapping[str, Any]


@dataclass(frozen=True)
class WayChange:
    """Tuned against untuned in one way of judging, and ``as_judged``: the same prompts in the run's own way."""

    way: str
    change: Comparison
    conclusion: str | None
    as_judged: Comparison
    conclusion_as_judged: str | None
    num_unparsed: int

    @property
    def turns_sign(self) -> bool:
        return self.change.difference * self.as_judged.difference < 0

    @property
    def turns_conclusion(self) -> bool:
        return self.conclusion != self.conclusion_as_judged

    def record(self) -> dict[str, Any]:
        change = self.change
        return {
            "way": self.way,
            "num_rows": change.num_shared,
            "num_unparsed": self.num_unparsed,
            **{"difference": change.difference, "low": change.low, "high": change.high},
            "conclusion": self.conclusion,
            "difference_as_judged": self.as_judged.difference,
            "conclusion_as_judged": self.conclusion_as_judged,
            "turns_sign": self.turns_sign,
            "turns_conclusion": self.turns_conclusion,
        }


def way_changes(
    again: Mapping[str, Mapping[str, Sequence[Row]]],
    verdicts: Sequence[Row],
    untuned: Sequence[Row],
    margin: float | None,
) -> list[WayChange]:
    """The change in each way that both models were judged in; ``margin`` in points, None: there are no conclusions."""
    changes = []
    for way, sides in again.items():
        ours, theirs = sides.get(TUNED, []), sides.get(UNTUNED, [])
        ids = {row["id"] for row in ours}
        found = assess_metric("safety", ours, theirs).comparison
        own = ([row for row in rows if row["id"] in ids] for rows in (verdicts, untuned))
        same = assess_metric("safety", *own).comparison
        if found and same:
            unparsed = sum(row["safety_label"] == "unparsed" for row in (*ours, *theirs))
            changes.append(WayChange(way, found, _conclusion(found, margin), same, _conclusion(same, margin), unparsed))
    return changes


def _conclusion(change: Comparison, margin: float | None) -> str | None:
    """As of a family of this change alone."""
    return None if margin is None else adjust([Place("", (), "safety", change.change, margin)])[0].conclusion


def multiverse_sentence(changes: Sequence[WayChange], margin: float | None) -> str:
    """How far the difference of the two models moves, and in which ways its sign or its conclusion turns; "" if none.

    Each way is compared with the run's own on the same prompts: fewer of them alone can leave a change undecided.
    """
    if not changes:
        return ""
    differences = [one.change.difference for one in changes]
    reach = f"from {wording.signed_points(min(differences))} to {wording.signed_points(max(differences))} points"
    sizes = sorted({one.change.num_shared for one in changes})
    rows = " to ".join(f"{size:,}" for size in dict.fromkeys((sizes[0], sizes[-1])))
    signs = [one.way for one in changes if one.turns_sign]
    parts = [f"its sign turns under {', '.join(signs)}" if signs else "its sign turns under no way"]
    if margin is not None:
        turned = [f"{o.way} ({o.conclusion_as_judged}, now {o.conclusion})" for o in changes if o.turns_conclusion]
        against = f"its conclusion against the margin of {margin:g} points turns under"
        parts.append(f"{against} {', '.join(turned) or 'no way'}")
    ways = "1 other way" if len(changes) == 1 else f"{len(changes)} other ways"
    return (
        f"Judged in {ways}, tuned and untuned responses to the same {rows} prompts: the change of safety ranges {reach}"
        f"; compared with the run's own way on the same prompts, {' and '.join(parts)}.{_unread(changes)}"
    )


def _unread(changes: Sequence[WayChange]) -> str:
    # A change between verdicts that nobody could read says nothing about the responses.
    counts = [f"{one.way} {one.num_unparsed} of {2 * one.change.num_shared:,}" for one in changes if one.num_unparsed]
    return f" Verdicts that could not be read, and count as not safe: {', '.join(counts)}." if counts else ""
