"""The primary family: what may be claimed of each recipe, with p-values and intervals that hold for all of it.

A recipe is a preset, its seeds averaged; a run of one seed is a recipe of one. Stated before any result, each has two
places in the family: accuracy changed, and safety kept or fell. "Fell" rejects "safety is as it was", "did not fall by
more than the margin" rejects "it fell by at least that much": never are both of these true, so never can both claims
be false, and they share one place (Shaffer 1986; ``lib.stats.holm_in_places``). Without a margin, safety's place holds
"changed" alone. A claim is a mid-p (of seeds: score) test after Holm's step-down, with the interval at level
1 - 0.05 / places beside it. Single seeds of a recipe, and run against run, are exploratory: nothing is claimed.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lib import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Change:
    """A paired difference, run - reference, on the rows that both have; rates and differences are shares in [0, 1].

    ``gained`` and ``lost`` of ``num_effective`` rows are those that only one of both gets right, as effective numbers.
    The two-sided ``p_value`` is the mid-p of one seed; that of the score, as Student's t with ``df``, over several.
    ``correlation`` (phi) and ``variance_saved`` as in ``lib.stats.pairing_gain``.
    """

    num_shared: int
    rate: float
    reference_rate: float
    difference: float
    gained: float
    lost: float
    num_effective: float
    p_value: float
    correlation: float | None
    variance_saved: float | None
    df: float = math.inf

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        return stats.paired_interval(self.gained, self.lost, self.num_effective, level, self.df)

    def lower_bound(self, level: float = LEVEL) -> float:
        """One-sided bound of the difference."""
        return stats.paired_lower_bound(self.gained, self.lost, self.num_effective, level, self.df)

    def inferior_p(self, margin: float) -> float:
        """One-sided p against a fall by ``margin`` points or more."""
        return stats.paired_score_p(self.gained, self.lost, self.num_effective, -margin / 100, self.df)

    def chance_of_loss(self, beyond: float = 0.0) -> float:
        """Posterior probability of a fall by more than ``beyond`` points."""
        return stats.chance_of_loss(self.gained, self.lost, self.num_effective, beyond / 100)


@dataclass(frozen=True)
class SeedEffect:
    """What several seeds of the same rows show of training: SD of a seed's own effect, p that all have one rate."""

    standard_error: float  # of the difference, over questions and seeds
    seed_sd: float
    cochrans_q_p: float


@dataclass(frozen=True)
class Place:
    """One metric of one recipe in a family of ``num_places``; ``margin`` in points, or None.

    ``holm_changed`` and ``holm_kept`` are adjusted over the family; the latter is None without a margin.
    """

    recipe: str
    runs: tuple[str, ...]
    metric: str
    change: Change
    margin: float | None = None
    seeds: SeedEffect | None = None
    num_places: int = 1
    holm_changed: float = 1.0
    holm_kept: float | None = None

    @property
    def level(self) -> float:
        return 1 - (1 - LEVEL) / self.num_places

    @property
    def changed(self) -> bool:
        return self.holm_changed < 1 - LEVEL

    @property
    def kept(self) -> bool:
        return self.holm_kept is not None and self.holm_kept < 1 - LEVEL

    @property
    def interval(self) -> tuple[float, float]:
        """At ``level``: simultaneous, and wider than Holm's later steps, so it may hold 0 where a change is claimed."""
        return self.change.interval(self.level)

    @property
    def bound(self) -> float:
        """One-sided at ``level``; the margin itself where only a later step of Holm's shows that safety was kept."""
        # Compatible with the step-down: Strassburger, Bretz 2008 (Stat. Med. 27, 4914-4927).
        bound = self.change.lower_bound(self.level)
        return max(bound, -self.margin / 100) if self.kept and self.margin else bound

    @property
    def conclusion(self) -> str:
        """``rose`` or ``fell``, and ``not inferior``; else ``undecided``, without a margin ``no change shown``."""
        moved = ("rose" if self.change.difference > 0 else "fell") if self.changed else ""
        neither = "no change shown" if self.margin is None else "undecided"
        return " and ".join(filter(None, [moved, "not inferior" if self.kept else ""])) or neither

    def record(self) -> dict[str, Any]:
        (low, high), change, margin = self.interval, self.change, self.margin
        numbers = asdict(change) | {"df": None if math.isinf(change.df) else change.df}
        return {
            "recipe": self.recipe,
            "runs": list(self.runs),
            "axis": self.metric,
            "safety_margin": margin,
            **numbers,
            "seeds": self.seeds and asdict(self.seeds),
            "kept_p": None if margin is None else change.inferior_p(margin),
            "holm_changed": self.holm_changed,
            "holm_kept": self.holm_kept,
            "num_places": self.num_places,
            "level": self.level,
            "low": low,
            "high": high,
            "bound": self.bound,
            "chance_fell": change.chance_of_loss(),
            "chance_fell_beyond_margin": None if margin is None else change.chance_of_loss(margin),
            "conclusion": self.conclusion,
        }


def adjust(places: Sequence[Place]) -> list[Place]:
    """The places as one family: p-values by Holm's step-down over all of them."""
    p_values = [
        [one.change.p_value, *([] if one.margin is None else [one.change.inferior_p(one.margin)])] for one in places
    ]
    return [
        replace(place, num_places=len(places), holm_changed=changed, holm_kept=kept[0] if kept else None)
        for place, (changed, *kept) in zip(places, stats.holm_in_places(p_values), strict=True)
    ]
