"""What the rows of two runs show: rates, paired comparisons, rows that changed. What is claimed: ``family``."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from fractions import Fraction
from operator import itemgetter
from typing import Any

from scipy import stats as distributions

from lib import gsm8k, safety, stats
from lib.compare.family import LEVEL, Change, Place
from lib.record.paths import ArtifactError
from lib.record.rows import row_id
from lib.stats import Rate

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """What is measured on a row; ``text`` identifies it, rows with equal texts are dependent if texts ``repeat``."""

    name: str
    unit: str
    text: Callable[[Row], str]
    succeeded: Callable[[Row], bool]
    outcome: Callable[[Row], str]
    repeats: bool = False

    def rate(self, rows: Sequence[Row]) -> Rate:
        return Rate.of([self.succeeded(row) for row in rows], [*map(self.text, rows)] if self.repeats else None)


def flexible_outcome(row: Row) -> str:
    """``correct``, ``wrong``, or without any number ``truncated`` (at the token limit) or ``no answer``."""
    score = gsm8k.score_row(row)
    if score["parsed_flexible"] is None:
        return "truncated" if row.get("finish_reason") == "length" else "no answer"
    return "correct" if score["correct_flexible"] else "wrong"


def _question(row: Row) -> str:
    return gsm8k.normalise_question(row["question"])


# Answers are scored from their text, so that rows of an older format will do; a judge's label cannot be.
def _scored(key: str) -> Callable[[Row], Any]:
    return lambda row: gsm8k.score_row(row)[key]


# An unparsed verdict is not safe, as in lib.safety.summarize.
def _is_safe(row: Row) -> bool:
    return row["safety_label"] == "safe"


METRICS = {
    "accuracy": Metric("accuracy", "questions", _question, _scored("correct"), _scored("outcome")),
    "accuracy_flexible": Metric(
        "accuracy, read flexibly", "questions", _question, _scored("correct_flexible"), flexible_outcome
    ),
    "safety": Metric("safety", "prompts", safety.prompt_text, _is_safe, itemgetter("safety_label"), repeats=True),
}


def _metric(name: str) -> Metric:
    if name not in METRICS:
        raise ValueError(f"metric is {name!r}; allowed: {', '.join(METRICS)}")
    return METRICS[name]


def pair_rows(rows: Sequence[Row], reference_rows: Sequence[Row], metric: str) -> list[tuple[Row, Row]]:
    """Rows that both runs have, in the order of the first; of equal texts the first is joined to the first.

    GSM8K rows are joined on ``test_index`` where all of them have it, else on the question; prompts on their text.
    """
    text = _metric(metric).text
    if not rows or not reference_rows:
        return []
    by_index = all(row.get("test_index") is not None for row in [*rows, *reference_rows])
    key_of = itemgetter("test_index") if by_index else text
    keyed, reference_keyed = (keyed_rows(some_rows, key_of) for some_rows in (rows, reference_rows))
    if twice := [key for key, number in (*keyed, *reference_keyed) if by_index and number > 1]:
        raise ValueError(f"test_index {twice[0]} appears more than once in a run; make its row file again")
    pairs = [(row, reference_keyed[key]) for key, row in keyed.items() if key in reference_keyed]
    for row, reference_row in pairs:
        if text(row) != text(reference_row):
            raise ValueError(
                f"test_index {row['test_index']} is one question in one run and another in the other: the runs read "
                "different test files; compare runs of the same gsm8k_source"
            )
    return pairs


def keyed_rows(rows: Sequence[Row], key_of: Callable[[Row], Any]) -> dict[tuple[Any, int], Row]:
    """Rows of one run by (key, 1), and by (key, 2) where a key stands for the second time."""
    seen: Counter[Any] = Counter()
    keyed = {}
    for row in rows:
        key = key_of(row)
        seen[key] += 1
        keyed[key, seen[key]] = row
    return keyed


@dataclass(frozen=True)
class Comparison:
    """One run against its reference on the rows that both have; shares in [0, 1], differences run - reference.

    ``num_effective`` is ``lib.stats.effective_size``; ``p_value`` the exact test on clusters of equal prompts and
    ``mid_p`` the same with half the weight of what was observed, ``p_mcnemar`` the exact one that takes all rows for
    independent. ``correlation`` and ``variance_saved`` as in ``lib.stats.pairing_gain``.
    """

    num_shared: int
    num_effective: float
    rate: float
    reference_rate: float
    only_run: int
    only_reference: int
    difference: float
    low: float
    high: float
    p_value: float
    mid_p: float
    p_mcnemar: float
    correlation: float | None
    variance_saved: float | None

    @property
    def change(self) -> Change:
        """The same in effective rows."""
        share = self.num_effective / self.num_shared
        rates, pairing = (self.rate, self.reference_rate, self.difference), (self.correlation, self.variance_saved)
        counts = self.only_run * share, self.only_reference * share, self.num_effective
        return Change(self.num_shared, *rates, *counts, self.mid_p, *pairing)


@dataclass(frozen=True)
class Finding:
    """One run on one metric; ``skipped`` says why nothing was measured, ``uncompared`` why nothing was compared.

    ``margin`` is how many points safety may fall by; None where none was fixed before the run, and on other metrics.
    ``selected`` says how the checkpoint was selected where that was done on the test set; else "". ``place`` is that of
    the run's recipe in the primary family, None for what is exploratory; ``no_place`` then says why, or is "".
    """

    metric: str
    skipped: str = ""
    rate: Rate | None = None
    baseline: float | None = None
    rerun_chance: float | None = None
    reference: str = "untuned"
    uncompared: str = ""
    comparison: Comparison | None = None
    margin: float | None = None
    selected: str = ""
    place: Place | None = None
    no_place: str = ""

    @property
    def bound(self) -> float | None:
        """One-sided 95 % bound of this run alone, where there is a margin to compare it with."""
        return None if self.margin is None or self.comparison is None else self.comparison.change.lower_bound()

    @property
    def unit(self) -> str:
        return next(metric.unit for metric in METRICS.values() if metric.name == self.metric)

    @property
    def passes(self) -> bool | None:
        """Whether the baseline is reached; None without one or without rows."""
        return None if self.baseline is None or self.rate is None else reaches(self.rate, self.baseline)

    def record(self) -> dict[str, Any]:
        rate, change = self.rate, self.comparison and self.comparison.change
        return {
            "axis": self.metric,
            "skipped": self.skipped,
            "num_rows": rate.n if rate else 0,
            "num_succeeded": rate.successes if rate else 0,
            "rate": rate and rate.share,
            "low": rate and rate.low,
            "high": rate and rate.high,
            "baseline": self.baseline,
            "passes": self.passes,
            "rerun_chance": self.rerun_chance,
            "reference": self.reference,
            "uncompared": self.uncompared,
            "comparison": change and asdict(self.comparison) | {"chance_fell": change.chance_of_loss()},
            "safety_margin": self.margin,
            "safety_bound": self.bound,
            "chance_fell_beyond_margin": None if self.margin is None else change and change.chance_of_loss(self.margin),
            "selected_on_test": bool(self.selected),
        }


def assess_metric(
    metric: str,
    rows: Sequence[Row] | None,
    reference_rows: Sequence[Row] | None,
    *,
    baseline: float | None = None,
    reference: str = "untuned",
    skipped: str = "",
    margin: float | None = None,
) -> Finding:
    """Finding of one run on one metric against its reference; ``skipped``: why there are no rows."""
    spec = _metric(metric)
    if not rows:
        return Finding(spec.name, skipped or "no rows", baseline=baseline, reference=reference, margin=margin)
    comparison = compare_pairs(pair_rows(rows, reference_rows or [], metric), metric)
    why_not = f"no {spec.unit} in common" if reference_rows else "it was not measured"
    uncompared = "" if comparison else why_not
    outcomes, texts = [*map(spec.succeeded, rows)], [*map(spec.text, rows)]
    chance = None if baseline is None else rerun_pass_chance(outcomes, baseline, texts)
    return Finding(spec.name, "", spec.rate(rows), baseline, chance, reference, uncompared, comparison, margin)


def compare_pairs(pairs: Sequence[tuple[Row, Row]], metric: str) -> Comparison | None:
    """Comparison of two runs on rows joined by ``pair_rows``; None without rows."""
    if not pairs:
        return None
    spec = _metric(metric)
    ours, theirs = ([spec.succeeded(pair[side]) for pair in pairs] for side in (0, 1))
    clusters = [spec.text(row) for row, _ in pairs]
    test = stats.paired_test(ours, theirs, LEVEL, clusters)
    num, mcnemar = len(pairs), stats.mcnemar_p(test.only_a, test.only_b)
    effective, rates = stats.effective_size(clusters), (sum(ours) / num, sum(theirs) / num)
    # The test's fields, only_a to mid_p, are Comparison's in the same order.
    return Comparison(num, effective, *rates, *astuple(test), mcnemar, *stats.pairing_gain(ours, theirs))


def reaches(rate: Rate, baseline: float) -> bool:
    """Whether the rate is at least ``baseline``, exactly: 31 of 100 reach 0.31, whatever floating point makes of it."""
    return rate.successes >= rate.n * Fraction(str(baseline))


def rerun_pass_chance(outcomes: Sequence[bool], baseline: float, clusters: Sequence[str]) -> float:
    """Chance that a rerun on as many fresh rows of the same kind reaches ``baseline``.

    Model: rows are independent draws with one unknown rate; Jeffreys' prior Beta(1/2, 1/2) (Brown, Cai, DasGupta
    2001, Stat. Sci. 16, 101-133), so that the rerun's count is beta-binomial (Gelman et al., Bayesian Data
    Analysis, 3rd ed., ch. 2). Equal rows count by their effective number, rounded. A rerun on the *same* rows with
    greedy decoding gives the same answers: this is about the rows that could have been drawn.
    """
    if not 0 <= baseline <= 1:
        raise ValueError(f"baseline is {baseline}; allowed: 0 to 1")
    size = stats.effective_size(clusters)
    successes = size * sum(outcomes) / len(outcomes)
    num_fresh = max(1, round(size))
    needed = math.ceil(num_fresh * Fraction(str(baseline)))
    fresh = distributions.betabinom(num_fresh, successes + 0.5, size - successes + 0.5)
    return min(1.0, float(fresh.sf(needed - 1)))


def recorded_margin(prepared: Row, current: float | None, where: str) -> float | None:
    """The margin in 01's parameters, fixed before anything was generated; None in a run made before there was one.

    ArtifactError unless ``current``, the one of ``where``, is the same.
    """
    recorded = prepared.get("safety_margin")
    if recorded not in (None, current):
        raise ArtifactError(
            f"{where} has safety_margin {current!r}, 01_prepare recorded {recorded!r} before the run: a margin is not "
            f"changed afterwards; set safety_margin={recorded!r}, or make a new run in another folder"
        )
    return recorded


@dataclass(frozen=True)
class Flip:
    """Rows whose outcome went from ``before`` to ``after``; ``ids`` are ``test_index`` where known, else ``id``."""

    before: str
    after: str
    ids: list[int]


def find_flips(before_rows: Sequence[Row], after_rows: Sequence[Row], metric: str) -> list[Flip]:
    """Which rows changed their outcome from one run (usually the untuned) to another; the largest group first."""
    outcome = _metric(metric).outcome
    groups: dict[tuple[str, str], list[int]] = {}
    for before, after in pair_rows(before_rows, after_rows, metric):
        if outcome(before) != outcome(after):
            groups.setdefault((outcome(before), outcome(after)), []).append(row_id(after))
    flips = [Flip(*change, sorted(ids)) for change, ids in groups.items()]
    return sorted(flips, key=lambda flip: (-len(flip.ids), flip.before, flip.after))
