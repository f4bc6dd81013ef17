"""Intervals and paired tests for rates over rows.

Duplicate rows (the same prompt twice) are not independent: functions that they would mislead take clusters. An interval
and a test are different methods and can disagree at the edge: claim a difference only where both show it.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import integrate, optimize, signal, stats
from statsmodels.stats.contingency_tables import cochrans_q
from statsmodels.stats.proportion import proportion_confint

# Weight of the observed split in a mid-p.
MID_P = 0.5


def wilson_interval(successes: float, total: float, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a rate (1927); both numbers may be effective ones, see ``effective_size``."""
    _check_share("level", level)
    if total <= 0 or not 0 <= successes <= total:
        raise ValueError(f"successes is {successes} and total is {total}; allowed: total above 0, successes 0 to total")
    low, high = proportion_confint(successes, total, alpha=1 - level, method="wilson")
    return float(low), float(high)


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} is {value}; allowed: above 0, below 1")


def effective_size(clusters: Sequence[Hashable]) -> float:
    """Independent rows that ``clusters`` are worth: n / deff = n² / Σ m², for clusters of m rows (Kish 1965).

    The design effect is the one for full correlation within a cluster, 1 + (m - 1): greedy decoding gives copies of
    a prompt the same answer. For 216 prompts that appear once and 12 that appear twice it is 218.2.
    """
    if not clusters:
        raise ValueError("clusters is empty; allowed: one name for each row, at least one row")
    sizes = Counter(clusters).values()
    return len(clusters) ** 2 / sum(size**2 for size in sizes)


@dataclass(frozen=True)
class Rate:
    """``successes`` of ``n`` rows, and the 95 % interval of their share in [0, 1]."""

    successes: int
    n: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.successes / self.n

    @classmethod
    def of(cls, outcomes: Sequence[bool], clusters: Sequence[Hashable] | None = None) -> "Rate":
        """Rate of the true ``outcomes``, at least one; rows of one cluster (equal prompts) count as dependent.

        The interval has the effective number of rows in place of n, as recommended, with a design effect from the
        data, in Franco, Little, Louis, Slud 2019 (JSSAM 7, 334-364).
        """
        clusters = range(len(outcomes)) if clusters is None else clusters
        _check_pairs("outcomes", outcomes, "clusters", clusters)
        successes, n, size = sum(map(bool, outcomes)), len(outcomes), effective_size(clusters)
        # Without the rounding of the product: the same digits as for rows without clusters.
        effective = successes if size == n else successes / n * size
        return cls(successes, n, *wilson_interval(effective, size))

    @classmethod
    def of_counts(cls, successes: int, n: int) -> "Rate":
        """Rate of independent rows; ``n`` above 0."""
        return cls(successes, n, *wilson_interval(successes, n))


def _check_pairs(name_a: str, a: Sequence[object], name_b: str, b: Sequence[object]) -> None:
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"{name_a} holds {len(a)} and {name_b} {len(b)} values; allowed: equal numbers, at least 1")


@dataclass(frozen=True)
class PairedTest:
    """Rows that only one of two runs gets right, the difference rate(a) - rate(b) with its interval, the tests' p."""

    only_a: int
    only_b: int
    difference: float
    low: float
    high: float
    p_value: float
    mid_p: float


def paired_test(
    a: Sequence[bool], b: Sequence[bool], level: float = 0.95, clusters: Sequence[Hashable] | None = None
) -> PairedTest:
    """McNemar's test, exact and mid-p, and Tango's score interval for two runs on the same rows, in the same order.

    With ``clusters`` the test flips the signs of entire clusters, as Fisher did, and the interval counts effective
    rows. The mid-p gives half the weight to the observed sum: its size is nearer to the level and its power higher,
    and it agrees with the interval but for rare tables (Fagerland, Lydersen, Laake 2013, BMC Med. Res. Methodol. 13,
    91): of those with 263 rows, in 1 of 700 or fewer.
    """
    _check_pairs("a", a, "b", b)
    clusters = range(len(a)) if clusters is None else clusters
    _check_pairs("a", a, "clusters", clusters)
    differences = [bool(x) - bool(y) for x, y in zip(a, b, strict=True)]
    only_a, only_b = differences.count(1), differences.count(-1)
    share = effective_size(clusters) / len(a)
    low, high = paired_interval(only_a * share, only_b * share, len(a) * share, level)
    p_values = _sign_flip_p(differences, clusters)
    return PairedTest(only_a, only_b, (only_a - only_b) / len(a), low, high, *p_values)


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Two-sided exact McNemar test: the discordant rows fall to either run like a coin (1.0 without any)."""
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b).pvalue)


def mcnemar_mid_p(only_a: int, only_b: int) -> float:
    """Two-sided mid-p McNemar test: ``mcnemar_p`` less half the probability of the observed split or its mirror."""
    number = only_a + only_b
    if number == 0:
        return 1.0
    # An even split is its own mirror.
    observed = stats.binom.pmf(only_a, number, 0.5) * (1 if only_a == only_b else 2)
    return float(mcnemar_p(only_a, only_b) - observed / 2)


def _sign_flip_p(differences: Sequence[int], clusters: Sequence[Hashable]) -> tuple[float, float]:
    """Exact p and mid-p of the test that flips the sign of entire clusters; McNemar's where all have one size."""
    sums: dict[Hashable, int] = defaultdict(int)
    for difference, cluster in zip(differences, clusters, strict=True):
        sums[cluster] += difference
    sizes = Counter(abs(total) for total in sums.values() if total)
    if len(sizes) <= 1:
        split = sum(total > 0 for total in sums.values()), sum(total < 0 for total in sums.values())
        return mcnemar_p(*split), mcnemar_mid_p(*split)
    # Distribution of the rows in clusters with a positive sign, size by size: as many as there are, like coins.
    chances = np.ones(1)
    for size, number in sorted(sizes.items()):
        coins = np.zeros(size * number + 1)
        coins[::size] = stats.binom.pmf(np.arange(number + 1), number, 0.5)
        # By FFT where that is faster: to 1e-15 absolutely, so never below 0 but for rounding.
        chances = signal.convolve(chances, coins)
    flipped, observed = np.abs(2 * np.arange(len(chances)) - (len(chances) - 1)), abs(sum(sums.values()))
    beyond, at = (max(0.0, float(chances[some].sum())) for some in (flipped > observed, flipped == observed))
    return min(1.0, beyond + at), min(1.0, beyond + at / 2)


def paired_interval(
    only_a: float, only_b: float, total: float, level: float = 0.95, df: float = math.inf
) -> tuple[float, float]:
    """Tango's asymptotic score interval for (only_a - only_b) / total; the numbers may be effective ones.

    It leaves out 0 exactly where McNemar's test without continuity correction rejects. With ``df``, the score is
    compared with Student's t. Source: Tango 1998 (Stat. Med. 17, 891-908), recommended in Fagerland, Lydersen, Laake
    2014 (Stat. Med. 33, 2850-2875).
    """
    _check_share("level", level)
    # With room for rounding: effective numbers are fractions.
    if total <= 0 or min(only_a, only_b) < 0 or only_a + only_b > total * (1 + 1e-12):
        raise ValueError(
            f"only_a is {only_a}, only_b {only_b}, total {total}; allowed: 0 or more, together up to total"
        )
    critical = _critical(level, df)

    def beyond(difference: float) -> float:
        excess, variance = _score(only_a, only_b, total, difference)
        return excess**2 - critical * variance

    estimate = (only_a - only_b) / total
    return _root(beyond, estimate, -1.0), _root(beyond, estimate, 1.0)


def _critical(level: float, df: float = math.inf) -> float:
    return float(stats.t.ppf((1 + level) / 2, df) ** 2)


def paired_lower_bound(only_a: float, only_b: float, total: float, level: float = 0.95, df: float = math.inf) -> float:
    """One-sided bound: (only_a - only_b) / total is not below it; numbers as in ``paired_interval``."""
    # Either end of a 90 % interval is a one-sided 95 % bound; rounded, or 0.95 gives a hair less than 0.9.
    return paired_interval(only_a, only_b, total, round(2 * level - 1, 15), df)[0]


def paired_score_p(only_a: float, only_b: float, total: float, difference: float = 0.0, df: float = math.inf) -> float:
    """One-sided p of Tango's score test against a true difference of ``difference`` or less.

    Below 1 - level where ``paired_lower_bound`` is above ``difference``; 0.5 where nothing is known.
    """
    excess, variance = _score(only_a, only_b, total, difference)
    return float(stats.t.sf(excess / math.sqrt(variance), df)) if variance > 0 else 0.5


def _score(only_a: Any, only_b: Any, total: float, difference: float) -> tuple[Any, Any]:
    """Rows gained beyond a true ``difference``, and the variance of that number under it; of arrays too.

    The variance holds the share of ``only_b`` that is likeliest under ``difference``, the larger root of
    2n q² + linear q - only_b d (1 - d) = 0 (Tango's equation 26).
    """
    linear = (2 * total - only_a + only_b) * difference - only_a - only_b
    # Never below 0 but for rounding.
    discriminant = np.maximum(0.0, linear**2 + 8 * total * only_b * difference * (1 - difference))
    share_b = (np.sqrt(discriminant) - linear) / (4 * total)
    return only_a - only_b - total * difference, total * (2 * share_b + difference * (1 - difference))


def _root(function: Callable[[float], float], estimate: float, end: float) -> float:
    # The estimate itself is a root where no row or every row is discordant: start a hair beside it.
    start = estimate + 1e-12 * end
    if abs(start) >= 1 or function(end) <= 0:
        return end
    return float(optimize.brentq(function, start, end, xtol=1e-14))


def chance_of_loss(only_a: float, only_b: float, total: float, beyond: float = 0.0) -> float:
    """Posterior probability that run a is worse than b by more than ``beyond``, 0 up to 1; numbers may be effective.

    The prior is Jeffreys', Dirichlet(1/2, 1/2, 1/2) on the shares gained, lost and same: the share of discordant rows
    is then Beta(only_a + only_b + 1, same + 1/2), and the lost part of it an independent Beta(only_b + 1/2, only_a +
    1/2). By numeric integration over the former.
    """
    discordant = stats.beta(only_a + only_b + 1, max(0.0, total - only_a - only_b) + 0.5)
    lost = stats.beta(only_b + 0.5, only_a + 0.5)
    if beyond == 0:
        return float(lost.sf(0.5))
    # Between quantiles, so that a narrow peak is not missed.
    start, end = max(beyond, discordant.ppf(1e-12)), discordant.isf(1e-12)
    if start >= end:
        return 0.0
    found = integrate.quad(lambda x: discordant.pdf(x) * lost.sf((1 + beyond / x) / 2), start, end, epsabs=1e-10)
    return float(min(1.0, found[0]))


def pairing_gain(a: Sequence[float], b: Sequence[float]) -> tuple[float | None, float | None]:
    """Correlation of paired outcomes (phi), and the share of the difference's variance that pairing saved.

    The latter is below 0 where outcomes oppose each other. None where one run or both have one outcome only.
    """
    (var_a, covariance), (_, var_b) = np.cov(a, b, bias=True)
    phi = float(covariance / math.sqrt(var_a * var_b)) if var_a > 0 and var_b > 0 else None
    return phi, float(2 * covariance / (var_a + var_b)) if var_a + var_b > 0 else None


@dataclass(frozen=True)
class CrossedDifference:
    """Mean of paired differences over rows and seeds, its standard error and degrees of freedom (Satterthwaite).

    ``seed_sd`` is the estimated SD of a seed's own effect; 0.0 where the seeds spread no further than noise lets them.
    """

    difference: float
    standard_error: float
    df: float
    seed_sd: float


def crossed_difference(differences: np.ndarray, clusters: Sequence[Hashable]) -> CrossedDifference:
    """``differences`` (rows, seeds) of the same rows: row (cluster), seed and residual as crossed random effects.

    Over seeds, the means vary by the seed's own effect plus residual / rows (Searle, Casella, McCulloch 1992, ch. 4);
    the mean varies by var over rows / effective rows, which holds the residual already, plus seed variance / seeds.
    ValueError for fewer than two seeds or distinct rows.
    """
    num_rows, num_seeds = differences.shape
    size = effective_size(clusters)
    if num_seeds < 2 or size <= 1:
        raise ValueError(f"{num_seeds} seeds and {size:g} distinct rows; allowed: at least 2 seeds, above 1 row")
    by_row, by_seed, mean = differences.mean(axis=1), differences.mean(axis=0), float(differences.mean())
    residual = differences - by_row[:, None] - by_seed + mean
    noise = float((residual**2).sum()) / ((num_rows - 1) * (num_seeds - 1))
    seed_variance = max(0.0, float(by_seed.var(ddof=1)) - noise / size)
    of_rows, of_seeds = float(by_row.var()) / (size - 1), seed_variance / num_seeds
    parts = of_rows**2 / (size - 1) + of_seeds**2 / (num_seeds - 1)
    df = (of_rows + of_seeds) ** 2 / parts if parts else size - 1
    return CrossedDifference(mean, math.sqrt(of_rows + of_seeds), df, math.sqrt(seed_variance))


def cochrans_q_p(outcomes: np.ndarray) -> float:
    """Cochran's Q test that all columns of ``outcomes`` (rows, seeds; 0 or 1) have one rate; 1.0 if none differ."""
    differ = outcomes[outcomes.min(axis=1) < outcomes.max(axis=1)]
    return float(cochrans_q(differ).pvalue) if len(differ) else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979), in the order given: each holds for its comparison when all are looked at."""
    # statsmodels' multipletests collects garbage at each call, which takes 20 to 300 ms.
    ordered, order = np.sort(p_values), np.argsort(p_values)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(ordered * np.arange(len(order), 0, -1)))
    return adjusted.tolist()


def holm_in_places(places: Sequence[Sequence[float]]) -> list[list[float]]:
    """Holm's adjusted p-values of hypotheses in places; of those in one place at most one can be true.

    Two that exclude each other can never both be rejected falsely, so they count once (Shaffer 1986, JASA 81, 826-831).
    A true set has one of each place at most, and is hardest to reject with the largest p of each: that is the closed
    test of Bonferroni's, and the family-wise error is at most the level.
    """
    largest = [max(place) for place in places]
    others = [largest[:number] + largest[number + 1 :] for number in range(len(places))]
    return [[holm([p, *rest])[0] for p in place] for place, rest in zip(places, others, strict=True)]


def minimum_detectable_difference(
    total: int, discordant_share: float, power: float = 0.8, level: float = 0.95, observed: float = MID_P
) -> float | None:
    """Smallest true difference that McNemar's test on ``total`` rows finds with probability ``power``.

    ``observed`` as in ``mcnemar_power``. The power is exact, over the binomial number of discordant rows and their
    split; a difference above ``discordant_share`` (rows that just one run gets right) takes its place. None where not
    even 1 would be found so often.
    """
    _check_share("power", power)
    _check_share("level", level)
    if total < 1 or not 0 <= discordant_share <= 1:
        raise ValueError(
            f"total is {total} and discordant_share is {discordant_share}; allowed: at least 1, and 0 to 1"
        )

    def shortfall(difference: float) -> float:
        return power - mcnemar_power(total, max(discordant_share, difference), difference, level, observed)

    if shortfall(1.0) > 0:
        return None
    return float(optimize.brentq(shortfall, 0.0, 1.0, xtol=1e-9))


def mcnemar_power(
    total: int, discordant_share: float, difference: float, level: float = 0.95, observed: float = MID_P
) -> float:
    """Probability that McNemar's test rejects, for a true ``difference`` up to ``discordant_share``.

    ``observed`` is the weight of the observed split in the p-value: 1/2 for the mid-p, 1 for the exact test.
    """
    if discordant_share == 0:
        return 0.0
    num_discordant, largest = np.arange(total + 1), _largest_minority(total, level, observed)
    chances = stats.binom.pmf(num_discordant, total, discordant_share)
    # What is left out sums to less than rounding.
    likely = chances > 1e-17
    num_discordant, largest, chances = num_discordant[likely], largest[likely], chances[likely]
    chance_a = (discordant_share + difference) / (2 * discordant_share)
    rejects = stats.binom.cdf(largest, num_discordant, chance_a)
    rejects += stats.binom.sf(num_discordant - largest - 1, num_discordant, chance_a)
    return float(np.sum(chances * rejects))


# A search over differences needs the same limits at each step.
@lru_cache(maxsize=64)
def _largest_minority(total: int, level: float, observed: float) -> np.ndarray:
    """The largest smaller side of 0 to ``total`` discordant rows at which the test rejects; -1 where none does."""
    coins, half_alpha = stats.binom(np.arange(total + 1), 0.5), (1 - level) / 2
    largest = coins.ppf(half_alpha)
    return largest - (coins.cdf(largest) - (1 - observed) * coins.pmf(largest) > half_alpha)


def noninferiority_power(total: int, discordant_share: float, margin: float, level: float = 0.95) -> float:
    """Probability that ``paired_lower_bound`` is above -``margin`` when nothing changed.

    Exact, over the binomial number of discordant rows and their split in halves.
    """
    _check_share("margin", margin)
    most = int(stats.binom.isf(1e-12, total, discordant_share))
    num_discordant, only_b = np.arange(most + 1.0)[:, None], np.arange(most + 1.0)
    only_a = np.maximum(num_discordant - only_b, 0)
    chances = stats.binom.pmf(num_discordant, total, discordant_share) * stats.binom.pmf(only_b, num_discordant, 0.5)
    excess, variance = _score(only_a, only_b, total, -margin)
    excluded = (excess > 0) & (excess**2 > _critical(2 * level - 1) * variance)
    return float(chances[excluded].sum())
