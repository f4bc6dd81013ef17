"""The same preset under several seeds: how far its rates spread, beside what a sample of rows can show.

The interval of a run says how far its rate would move with other questions or prompts; the spread over seeds how far it
moves with another order of the training rows and other first weights of the adapter. What is drawn from the data has a
seed for itself (``data_seed``): runs that differ in it too are not repeats of each other.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import chi2

from lib import wording
from lib.compare.findings import METRICS
from lib.compare.runs import METRIC_STAGES, Run
from lib.record.manifest import LOCATION_PARAMETERS
from lib.stats import effective_size, wilson_interval

# What may differ between repeats: the seed, and where a run is stored.
NOT_COMPARED = LOCATION_PARAMETERS | {"seed", "run_name", "require_rows", "run_names", "redact"}


def seed_groups(runs: Sequence[Run]) -> dict[tuple[str, str], dict[int, Run]]:
    """Groups of runs that differ only in the seed: (preset, parameters) -> seed -> run.

    Of two runs with the same seed the one of ``--seeds`` (``simple_seed3`` of ``simple``) counts.
    """
    groups: dict[tuple[str, str], dict[int, Run]] = {}
    for run in sorted(runs, key=lambda run: (run.name != preset_name(run.name, run.parameters), run.name)):
        if "seed" in run.parameters:
            alike = {name: repr(value) for name, value in run.parameters.items() if name not in NOT_COMPARED}
            key = preset_name(run.name, run.parameters), repr(sorted(alike.items()))
            groups.setdefault(key, {})[run.parameters["seed"]] = run
    return {key: dict(sorted(by_seed.items())) for key, by_seed in groups.items() if len(by_seed) > 1}


def preset_name(run_name: str, parameters: Mapping[str, Any]) -> str:
    """The name of a run without the ``_seed<N>`` that ``--seeds`` gave it; N must be the run's seed."""
    return run_name.removesuffix(f"_seed{parameters.get('seed')}")


@dataclass(frozen=True)
class SeedSpread:
    """One metric of one preset over its seeds; rates in [0, 1], ``counts`` (successes, rows) in the order of ``seeds``.

    ``sd_low`` and ``sd_high`` are the 95 % interval of ``sd`` for normally distributed rates. ``low`` and ``high``
    are Wilson's of the mean rate for the rows of one run, equal prompts taken together; ``sampling_sd`` is what
    ``sd`` would be if nothing but the draw of that many rows differed.
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
    rates = [score.rate for score in scores.values() if score.rate]
    if len(rates) < 2:
        return None
    texts = [sorted(map(METRICS[metric].text, score.rows)) for score in scores.values()]
    size = effective_size(min(texts, key=len)) if METRICS[metric].repeats else min(rate.n for rate in rates)
    shares = [rate.share for rate in rates]
    mean, sd = statistics.fmean(shares), statistics.stdev(shares)
    # (num - 1) sd² / sigma² is chi-squared.
    sd_low, sd_high = (sd * math.sqrt((len(rates) - 1) / chi2.ppf(share, len(rates) - 1)) for share in (0.975, 0.025))
    low, high = wilson_interval(mean * size, size)
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
        same_rows=all(some == texts[0] for some in texts),
    )


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
    if spread.same_rows:
        return (
            f"{measured} All seeds used the same {unit}: the spread is that of training, in addition to the sample's."
        )
    alone = f"{wording.points(spread.sampling_sd)} points"
    draw = f"the spread includes their draw, which alone gives an SD of {alone}."
    return f"{measured} The seeds used different {unit}: {draw}"
