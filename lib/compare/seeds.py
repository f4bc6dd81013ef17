"""The same preset under several seeds: how far its rates spread, what training adds to that, and the seeds averaged.

The interval of a run says how far its rate would move with other questions or prompts; the spread over seeds how far it
moves with another order of the training rows and other first weights of the adapter. On the same rows the spread also
holds noise of question by seed, which the interval holds already: it is taken off before anything is said of training.
What is drawn from the data has a seed for itself (``data_seed``): runs that differ in it too are no repeats.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import chi2

from lib import stats, wording
from lib.compare.family import Change, Place, SeedEffect
from lib.compare.findings import METRICS, Metric, pair_rows
from lib.compare.runs import METRIC_STAGES, Row, Run
from lib.record.manifest import LOCATION_PARAMETERS
from lib.stats import effective_size, wilson_interval

# What may differ between repeats: the seed, and where a run is stored.
NOT_COMPARED = LOCATION_PARAMETERS | {"seed", "run_name", "require_rows", "run_names", "redact"}


def seed_groups(runs: Sequence[Run]) -> dict[tuple[str, str], dict[int, Run]]:
    """Groups of runs that differ only in the seed: (preset, parameters) -> seed -> run.

    Of two runs with the same seed the one of ``--seeds`` (``simple_seed3`` of ``simple``) counts.
    """
    return {key: by_seed for key, by_seed in _groups(runs).items() if len(by_seed) > 1}


def _groups(runs: Sequence[Run]) -> dict[tuple[str, str], dict[int, Run]]:
    """As ``seed_groups``, with groups of one; a run that records no seed is one for itself."""
    groups: dict[tuple[str, str], dict[int, Run]] = {}
    for run in sorted(runs, key=lambda run: (run.name != preset_name(run.name, run.parameters), run.name)):
        alike = sorted((name, repr(value)) for name, value in run.parameters.items() if name not in NOT_COMPARED)
        key = (preset_name(run.name, run.parameters), repr(alike)) if "seed" in run.parameters else (run.name, "")
        groups.setdefault(key, {})[run.parameters.get("seed", 0)] = run
    return {key: dict(sorted(by_seed.items())) for key, by_seed in groups.items()}


def recipes(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Recipe -> its runs, one per seed; in the order of ``runs``. A run whose seed another run has is in none."""
    order = {run.name: number for number, run in enumerate(runs)}
    found = {}
    for (preset, _), by_seed in _groups(runs).items():
        members = [*by_seed.values()]
        # Runs of one preset that differ in more than the seed are several recipes.
        found[members[0].name if len(members) == 1 else f"{preset}, seeds {', '.join(map(str, by_seed))}"] = members
    return dict(sorted(found.items(), key=lambda one: min(order[run.name] for run in one[1])))


def preset_name(run_name: str, parameters: Mapping[str, Any]) -> str:
    """The name of a run without the ``_seed<N>`` that ``--seeds`` gave it; N must be the run's seed."""
    return run_name.removesuffix(f"_seed{parameters.get('seed')}")


@dataclass(frozen=True)
class SeedSpread:
    """One metric of one preset over its seeds; rates in [0, 1], ``counts`` (successes, rows) in the order of ``seeds``.

    ``sd_low`` and ``sd_high`` are the 95 % interval of ``sd`` for normally distributed rates. ``low`` and ``high``
    are Wilson's of the mean rate for the rows of one run, equal prompts taken together; ``sampling_sd`` is what
    ``sd`` would be if nothing but the draw of that many rows differed. ``seed_sd`` is the part of ``sd`` that is
    training's own, ``cochrans_q_p`` tests that it is 0; both are None where the seeds have different rows.
    """

    name: str
    metric: str
    seeds: list[int]
    counts: list[tuple[int, int]]
    mean: float
    minimum: float
    maximum: float
    sd: float
    sd_low: float
    sd_high: float
    low: float
    high: float
    sampling_sd: float
    same_rows: bool
    seed_sd: float | None
    cochrans_q_p: float | None

    @property
    def num_rows(self) -> int:
        """Rows of one run; of the smallest where they differ."""
        return min(total for _, total in self.counts)

    def record(self) -> dict[str, Any]:
        values = dict(vars(self))
        return {"name": values.pop("name"), "axis": values.pop("metric"), **values}


def seed_spread(name: str, by_seed: Mapping[int, Run], metric: str) -> SeedSpread | None:
    """The spread of a group on ``accuracy`` or ``safety``; None where fewer than two seeds were measured."""
    scores = {seed: run.metrics[metric] for seed, run in by_seed.items() if run.metrics[metric].rate}
    rates = [score.rate for score in scores.values()]
    if len(rates) < 2:
        return None
    texts = [sorted(map(METRICS[metric].text, score.rows)) for score in scores.values()]
    size = effective_size(min(texts, key=len)) if METRICS[metric].repeats else min(rate.n for rate in rates)
    shares = [rate.share for rate in rates]
    mean, sd = statistics.fmean(shares), statistics.stdev(shares)
    # (num - 1) sd² / sigma² is chi-squared.
    sd_low, sd_high = (sd * math.sqrt((len(rates) - 1) / chi2.ppf(share, len(rates) - 1)) for share in (0.975, 0.025))
    low, high = wilson_interval(mean * size, size)
    same_rows = all(some == texts[0] for some in texts)
    rows = [score.rows for score in scores.values()]
    found = _seed_effect(*_outcomes(METRICS[metric], rows)) if same_rows else None
    return SeedSpread(
        name=name,
        metric=metric,
        seeds=[*scores],
        counts=[(rate.successes, rate.n) for rate in rates],
        mean=mean,
        minimum=min(shares),
        maximum=max(shares),
        sd=sd,
        sd_low=float(sd_low),
        sd_high=float(sd_high),
        low=low,
        high=high,
        sampling_sd=math.sqrt(mean * (1 - mean) / size),
        same_rows=same_rows,
        seed_sd=found and found[1].seed_sd,
        cochrans_q_p=found and found[1].cochrans_q_p,
    )


def _outcomes(spec: Metric, rows_by_seed: Sequence[Sequence[Row]]) -> tuple[np.ndarray, list[str]]:
    """Outcomes (rows, seeds) of the same rows by their text, and these texts."""
    aligned = [sorted(rows, key=spec.text) for rows in rows_by_seed]
    outcomes = np.array([[spec.succeeded(row) for row in rows] for rows in aligned], dtype=float)
    return outcomes.T, [*map(spec.text, aligned[0])]


def _seed_effect(
    outcomes: np.ndarray, texts: Sequence[str], reference: np.ndarray | float = 0.0
) -> tuple[stats.CrossedDifference, SeedEffect] | None:
    """Mean of ``outcomes - reference`` over rows and seeds, and the seeds' own effect; None if all texts are equal."""
    if effective_size(texts) <= 1:
        return None
    crossed = stats.crossed_difference(outcomes - reference, texts)
    # One of each text: copies have the same answers, and would count double.
    first = [*dict(zip(reversed(texts), range(len(texts))[::-1], strict=True)).values()]
    return crossed, SeedEffect(crossed.standard_error, crossed.seed_sd, stats.cochrans_q_p(outcomes[first]))


def recipe_place(recipe: str, runs: Sequence[Run], metric: str) -> Place | None:
    """The place of several seeds, averaged, in the primary family; None where their rows are not the same."""
    spec, scores = METRICS[metric], [run.metrics[metric] for run in runs]
    pairs = [pair_rows(score.rows, score.untuned_rows, metric) for score in scores]
    named = [sorted(spec.text(row) for row, _ in some) for some in pairs]
    if not named[0] or any(some != named[0] for some in named):
        return None
    (ours, texts), (theirs, _) = (_outcomes(spec, [[pair[side] for pair in some] for some in pairs]) for side in (0, 1))
    found = _seed_effect(ours, texts, theirs)
    if found is None:
        return None
    crossed, effect = found
    margins = {score.margin for score in scores}
    margin = margins.pop() if len(margins) == 1 else None
    names = tuple(run.name for run in runs)
    return Place(recipe, names, spec.name, _mean_change(ours, theirs, texts, crossed), margin, effect)


def _mean_change(
    ours: np.ndarray, theirs: np.ndarray, texts: Sequence[str], crossed: stats.CrossedDifference
) -> Change:
    """The mean change in the rows at which Tango's variance is that of ``crossed``, as for rates in survey samples.

    Korn, Graubard 1998 (Surv. Methodol. 24, 193-201). A score interval is needed: estimate -+ t SE gives 0 to 0 where
    nothing moved, and finds safety kept too often where few rows do.
    """
    by_row, size = (ours - theirs).mean(axis=1), effective_size(texts)
    gained, lost = float(by_row.clip(min=0).mean()), float(-by_row.clip(max=0).mean())
    variance = gained + lost - crossed.difference**2
    if crossed.standard_error > 0 and variance > 0:
        # No more than if every seed had rows for itself.
        size = min(variance / crossed.standard_error**2, size * ours.shape[1])
    counts, df = (gained * size, lost * size, size), crossed.df
    p_value = min(1.0, 2 * min(stats.paired_score_p(*some, df=df) for some in (counts, (counts[1], counts[0], size))))
    rates, pairing = (ours.mean(), theirs.mean()), stats.pairing_gain(ours.mean(axis=1), theirs.mean(axis=1))
    return Change(len(texts), *map(float, rates), crossed.difference, *counts, p_value, *pairing, df)


def seed_spreads(runs: Sequence[Run]) -> list[SeedSpread]:
    """Every spread that the runs allow, preset by preset."""
    groups = seed_groups(runs).items()
    found = [seed_spread(name, by_seed, metric) for (name, _), by_seed in groups for metric in METRIC_STAGES]
    return [spread for spread in found if spread]


def spread_sentence(spread: SeedSpread) -> str:
    """What the spread says and what it does not."""
    unit = METRICS[spread.metric].unit
    measured = (
        f"{spread.name}, {spread.metric}: {wording.percent(spread.mean)} on average over {len(spread.seeds)} seeds, "
        f"from {wording.interval(spread.minimum, spread.maximum)} %, SD {wording.points(spread.sd)} points (95 % "
        f"interval of the SD {wording.interval(spread.sd_low, spread.sd_high)}); a run's sample of {spread.num_rows:,} "
        f"{unit} alone leaves {wording.interval(spread.low, spread.high)} %."
    )
    if spread.seed_sd is not None:
        own = f"that of training alone is estimated at {wording.points(spread.seed_sd)} points"
        test = f"Cochran's Q for no difference between the seeds: p = {spread.cochrans_q_p:.3g}"
        noise = "the SD holds noise of question by seed"
        return f"{measured} All seeds used the same {unit}: {noise}; without it, {own} ({test})."
    if spread.same_rows:
        return f"{measured} All seeds used the same {unit}, too few to tell training from noise."
    alone = f"{wording.points(spread.sampling_sd)} points"
    draw = f"the spread includes their draw, which alone gives an SD of {alone}."
    return f"{measured} The seeds used different {unit}: {draw}"
