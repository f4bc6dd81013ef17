"""Pages of findings whose truth is known: rows are drawn, compared by the project's functions, and claims counted.

The project's family decides what a page claims: no rule stands here. A claim about one seed depends on counts alone, so
each table of counts is compared once.
"""

import gc
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from simulation import Rows, count_tables, draw_changes, standard_error

from lib import stats
from lib.compare.family import Place, adjust
from lib.compare.findings import compare_pairs
from lib.compare.runs import MetricScore, Run
from lib.compare.seeds import recipe_place
from lib.record.paths import RunPaths

# So many outcomes are drawn at once, to hold them in memory.
AT_ONCE = 2_000_000
CLAIMS = ("rose", "fell", "not inferior")


@dataclass(frozen=True)
class Side:
    """One metric of a page: its rows, the share that is discordant, and each recipe's true change in points."""

    metric: str
    rows: Rows
    discordant: float
    points: tuple[float, ...]
    margin: float | None = None


@dataclass(frozen=True)
class Page:
    """Recipes in one results folder, of so many seeds, whose effects have an SD of ``seed_sd`` points."""

    sides: tuple[Side, ...]
    shared: bool = True
    num_seeds: int = 1
    seed_sd: float = 0.0

    @property
    def truths(self) -> list[tuple[Side, float]]:
        """Side and true change in points of each place of the family, in the order of ``places``."""
        return [(side, points) for side in self.sides for points in side.points]


@dataclass
class Tally:
    """Claims of one kind: how many, by how much too large in sum (points), how many intervals hold the truth."""

    claims: int = 0
    excess: float = 0.0
    covered: int = 0
    covered_alone: int = 0


@dataclass
class Outcome:
    """Claims of a page's draws by (metric, claim, true points), and draws with a false one."""

    page: Page
    num_draws: int
    num_false: int = 0
    tallies: dict[tuple[str, str, float], Tally] = field(default_factory=lambda: defaultdict(Tally))

    @property
    def false_share(self) -> float:
        """Share of the draws in which the page makes at least one false claim."""
        return self.num_false / self.num_draws

    def share(self, metric: str, claim: str, points: float) -> float:
        """Share of the places with this truth that make the claim."""
        places = [side for side, truth in self.page.truths if (side.metric, truth) == (metric, points)]
        return self.tallies[metric, claim, points].claims / (self.num_draws * len(places))

    def exceeds(self, share: float, bound: float, nominal: float = 0.05) -> bool:
        """Whether a share of the draws is above ``bound``, and above ``nominal`` by more than the draws' noise."""
        return share > bound and share - 2 * standard_error(share, self.num_draws) > nominal


def simulate(page: Page, num_draws: int, seed: int) -> Outcome:
    """What a page claims in ``num_draws`` draws."""
    outcome = Outcome(page, num_draws)
    for places, times in _drawn_pages(page, num_draws, np.random.default_rng(seed)):
        _count(outcome, adjust(places), times)
    return outcome


def _drawn_pages(page: Page, num_draws: int, rng: np.random.Generator) -> list[tuple[list[Place], int]]:
    """Places of each distinct page before adjustment, and how often it was drawn."""
    drawn: dict[Any, tuple[list[Place], int]] = {}
    most = max(1, AT_ONCE // sum(len(side.points) * side.rows.num_rows * page.num_seeds for side in page.sides))
    for start in range(0, num_draws, most):
        number = min(most, num_draws - start)
        by_side = [_draw_places(page, side, rng, number) for side in page.sides]
        for draw, found in enumerate(zip(*by_side, strict=True), start):
            places = [place for some in found for place in some]
            key = tuple(map(id, places)) if page.num_seeds == 1 else draw
            drawn[key] = places, drawn.get(key, (places, 0))[1] + 1
    return [*drawn.values()]


def _draw_places(page: Page, side: Side, rng: np.random.Generator, num_draws: int) -> Iterator[list[Place]]:
    effects = rng.normal(0, page.seed_sd, (num_draws, len(side.points), page.num_seeds))
    # A run cannot differ by more than its discordant rows.
    truth = ((np.array(side.points)[:, None] + effects) / 100).clip(-side.discordant, side.discordant)
    changes = draw_changes(rng, side.rows, truth, side.discordant, page.shared)
    tables = count_tables(side.rows, changes[:, :, 0])
    for recipes, counted in zip(changes, tables.tolist(), strict=True):
        yield [_known_place(side, *pair) for pair in zip(recipes, counted, strict=True)]


_known: dict[tuple[Any, ...], Place] = {}


def _known_place(side: Side, changes: np.ndarray, counts: list[int]) -> Place:
    if len(changes) > 1:
        return place_of(side, changes)
    table = (side.metric, side.rows.num_single, side.rows.num_double, *counts)
    if table not in _known:
        _known[table] = place_of(side, changes)
    # One object for each margin, too: a page is known by its places.
    return _known.setdefault((side.margin, *table), replace(_known[table], margin=side.margin))


def place_of(side: Side, changes: np.ndarray) -> Place:
    """The place of one recipe by itself, from rows with these changes, ``(seeds, rows)`` of -1, 0 or 1."""
    # Where a seed lost, the untuned model was right, and where none changed.
    untuned = changes.max(axis=0) <= 0
    ours, theirs = [_rows_of(side, untuned + one > 0) for one in changes], _rows_of(side, untuned)
    if len(ours) > 1:
        scores = [MetricScore(side.metric, rows, margin=side.margin, untuned_rows=theirs) for rows in ours]
        return recipe_place("recipe", [*map(_run_of, scores, range(len(scores)))], side.metric)
    found = compare_pairs([*zip(ours[0], theirs, strict=True)], side.metric)
    return Place("recipe", ("run",), side.metric, found.change, side.margin)


def _run_of(score: MetricScore, seed: int) -> Run:
    return Run(f"run{seed}", RunPaths("run", Path()), {}, {"seed": seed}, {}, {score.name: score})


def _rows_of(side: Side, outcomes: np.ndarray) -> list[dict[str, Any]]:
    return [_row(side.metric, name, bool(one)) for name, one in zip(side.rows.clusters, outcomes, strict=True)]


@cache
def _row(metric: str, name: int, succeeded: bool) -> dict[str, Any]:
    if metric == "safety":
        return {"prompt": f"p{name}", "safety_label": "safe" if succeeded else "unsafe"}
    return {"question": f"q{name}", "gold_answer": "#### 1", "model_output": f"#### {int(succeeded)}"}


def claims_of(place: Place) -> list[str]:
    """What the family claims in this place; empty where nothing."""
    return [claim for claim in place.conclusion.split(" and ") if claim in CLAIMS]


def is_false(claim: str, points: float, margin: float | None) -> bool:
    """Whether a claim is wrong where ``points`` is the true change."""
    if claim == "not inferior":
        return margin is not None and points <= -margin
    return points <= 0 if claim == "rose" else points >= 0


def _count(outcome: Outcome, places: Sequence[Place], times: int) -> None:
    any_false = False
    for (side, points), place in zip(outcome.page.truths, places, strict=True):
        for claim in claims_of(place):
            any_false |= is_false(claim, points, side.margin)
            _add(outcome.tallies[side.metric, claim, points], claim, place, points, times)
    outcome.num_false += times * any_false


def _add(tally: Tally, claim: str, place: Place, points: float, times: int) -> None:
    intervals = [place.interval, place.change.interval()]
    if claim == "not inferior":
        intervals = [(place.bound, math.inf), (place.change.lower_bound(), math.inf)]
    held, held_alone = (low <= points / 100 <= high for low, high in intervals)
    tally.claims += times
    tally.covered += times * held
    tally.covered_alone += times * held_alone
    tally.excess += times * (100 * place.change.difference - points) * (1 if claim == "rose" else -1)


def remember() -> None:
    """For a process that only simulates: functions of a few numbers keep their results, and no garbage is collected.

    The same numbers come again and again, and statsmodels' Holm collects garbage at each call.
    """
    for name in ("paired_interval", "paired_score_p", "mcnemar_p", "mcnemar_mid_p"):
        setattr(stats, name, lru_cache(maxsize=None)(getattr(stats, name)))
    gc.collect = lambda *_: 0
