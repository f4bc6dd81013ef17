"""The same preset under several seeds: how far its rates spread, beside what a sample of rows can tell.

Two sources of chance that do not replace each other. The interval of a run says how far its rate would move with other
questions or prompts; the spread over seeds says how far it moves with another order of the training rows and other
first weights of the adapter. What is drawn from the data, the base model's own answers among it, has a seed of its own
(``data_seed``): runs that differ in it too are no repeats of each other. Reads scores, knows nothing about files, plots
or models.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scipy.stats import chi2

from lib import wording
from lib.record.manifest import LOCATION_PARAMETERS
from lib.stats import wilson_interval

if TYPE_CHECKING:  # for the reader only
    from lib.compare.runs import RunScores

AXES = {"accuracy": "question", "safety": "prompt"}
# What may differ between repeats: the seed, and where a run lies.
NOT_COMPARED = LOCATION_PARAMETERS | {"seed", "run_name", "require_rows", "run_names", "redact"}


@dataclass(frozen=True)
class SeedGroup:
    """Runs of one preset that differ in their seed alone; ``runs`` stands in the order of ``seeds``."""

    name: str
    seeds: list[int]
    runs: "list[RunScores]"


def seed_groups(runs: "Sequence[RunScores]") -> list[SeedGroup]:
    """Groups of at least two runs of one preset, alike in every parameter but the seed.

    A run belongs to the preset that its name says (``simple_seed3`` to ``simple``). Of two runs with the same seed the
    one of ``--seeds`` counts. A run that does not know its parameters is in no group.
    """
    found: dict[tuple[str, str], dict[int, RunScores]] = {}
    for run in sorted(runs, key=lambda run: (run.name != preset_name(run.name, run.parameters), run.name)):
        if "seed" in run.parameters:
            key = (preset_name(run.name, run.parameters), _alike(run.parameters))
            found.setdefault(key, {})[run.parameters["seed"]] = run
    return [
        SeedGroup(name, sorted(by_seed), [by_seed[seed] for seed in sorted(by_seed)])
        for (name, _), by_seed in found.items()
        if len(by_seed) > 1
    ]


def preset_name(run_name: str, parameters: Mapping[str, Any]) -> str:
    """The name of a run without the ``_seed<N>`` that ``--seeds`` gave it; N must be the run's seed."""
    return run_name.removesuffix(f"_seed{parameters.get('seed')}")


def _alike(parameters: Mapping[str, Any]) -> str:
    return repr(sorted((name, repr(value)) for name, value in parameters.items() if name not in NOT_COMPARED))


@dataclass(frozen=True)
class SeedSpread:
    """One axis of a group. Rates are shares in [0, 1].

    Attributes:
        counts: (successes, rows) of each seed that was measured, in the order of ``seeds``.
        sd: standard deviation over the seeds (divided by their number less one).
        sd_low, sd_high: 95 % interval of ``sd`` for normally distributed rates; with few seeds it is wide.
        low, high: Wilson's 95 % interval of the mean rate for the rows of one run.
        sampling_sd: what ``sd`` would be if nothing but the draw of that many rows differed.
        same_rows: whether every seed was asked the same questions or prompts.
    """

    name: str
    axis: str
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
    def num_seeds(self) -> int:
        return len(self.seeds)

    @property
    def num_rows(self) -> int:
        """Rows of one run; of the smallest where they differ."""
        return min(total for _, total in self.counts)


def seed_spread(group: SeedGroup, axis: str) -> SeedSpread | None:
    """The spread of a group on ``accuracy`` or ``safety``; None where fewer than two seeds were measured.

    Raises:
        ValueError: the axis is neither.
    """
    if axis not in AXES:
        raise ValueError(f"axis is {axis!r}; allowed: {', '.join(AXES)}")
    scores = [run.accuracy if axis == "accuracy" else run.safe for run in group.runs]
    measured = [
        (seed, run, counts) for seed, run, counts in zip(group.seeds, group.runs, scores, strict=True) if counts
    ]
    if len(measured) < 2:
        return None
    counts = [counts for _, _, counts in measured]
    shares = [successes / total for successes, total in counts]
    mean, sd, total = statistics.fmean(shares), statistics.stdev(shares), min(total for _, total in counts)
    sd_low, sd_high = _sd_interval(sd, len(shares))
    low, high = wilson_interval(mean * total, total)
    return SeedSpread(
        name=group.name,
        axis=axis,
        seeds=[seed for seed, _, _ in measured],
        counts=counts,
        mean=mean,
        minimum=min(shares),
        maximum=max(shares),
        sd=sd,
        sd_low=sd_low,
        sd_high=sd_high,
        low=low,
        high=high,
        sampling_sd=math.sqrt(mean * (1 - mean) / total),
        same_rows=len({_rows_asked(run, axis) for _, run, _ in measured}) == 1,
    )


def seed_spreads(runs: "Sequence[RunScores]") -> list[SeedSpread]:
    """Every spread that the runs allow, a preset at a time."""
    found = [seed_spread(group, axis) for group in seed_groups(runs) for axis in AXES]
    return [spread for spread in found if spread]


def _sd_interval(sd: float, num: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a standard deviation of ``num`` normal values: (num - 1) sd² / sigma² is chi-squared."""
    tail = (1 - level) / 2
    low, high = (sd * math.sqrt((num - 1) / float(chi2.ppf(share, num - 1))) for share in (1 - tail, tail))
    return low, high


def _rows_asked(run: "RunScores", axis: str) -> tuple[str, ...]:
    return tuple(sorted(row[AXES[axis]] for row in run.rows.get(axis, [])))


# --- telling ---------------------------------------------------------------------------------------------------------


def spread_rows(spreads: Sequence[SeedSpread]) -> list[dict[str, Any]]:
    """Cells of a table, a row a preset and axis."""
    return [
        {
            "preset": spread.name,
            "axis": spread.axis,
            "seeds": ", ".join(map(str, spread.seeds)),
            "mean": wording.percent(spread.mean),
            "lowest to highest": f"{wording.interval(spread.minimum, spread.maximum)} %",
            "SD over seeds": f"{wording.points(spread.sd)} points",
            "95 % interval of the SD": wording.interval(spread.sd_low, spread.sd_high),
            "SD of the sample alone": f"{wording.points(spread.sampling_sd)} points",
            "95 % interval of one run": f"{wording.interval(spread.low, spread.high)} %",
            "rows of a run": spread.num_rows,
            "same rows": spread.same_rows,
        }
        for spread in spreads
    ]


def spread_sentence(spread: SeedSpread) -> str:
    """What the spread says and what it does not."""
    unit = AXES[spread.axis] + "s"
    measured = (
        f"{spread.name}, {spread.axis}: {wording.percent(spread.mean)} on average over {spread.num_seeds} seeds, "
        f"from {wording.interval(spread.minimum, spread.maximum)} %, SD {wording.points(spread.sd)} points (95 % "
        f"interval of the SD {wording.interval(spread.sd_low, spread.sd_high)}); a run's sample of {spread.num_rows:,} "
        f"{unit} alone leaves {wording.interval(spread.low, spread.high)} %."
    )
    if spread.same_rows:
        return (
            f"{measured} Every seed was asked the same {unit}: the spread is that of training, and comes on "
            "top of the sample's interval."
        )
    return (
        f"{measured} The seeds were asked different {unit}, so the spread holds their draw too, which alone gives an "
        f"SD of {wording.points(spread.sampling_sd)} points."
    )
