"""What the rows of two runs show: rates, paired comparisons, rows that changed, and the sentences about them.

A change is claimed only where three agree: the paired interval excludes 0, the exact test rejects, and it still does
after Holm's adjustment for every run that was compared. "No change" is no claim of safety: that it did not fall by more
than a margin is one, where the one-sided bound of the same interval is above it (non-inferiority).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from fractions import Fraction
from operator import itemgetter
from typing import Any

from scipy import stats as distributions

from lib import gsm8k, safety, stats, wording
from lib.record.paths import ArtifactError
from lib.record.rows import row_id
from lib.stats import Rate

Row = Mapping[str, Any]
LEVEL, POWER = 0.95, 0.8
ADJUSTED = ("adjusted_low", "adjusted_high")
ALONE = "This run alone, before adjustment; 05 adjusts"


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
    by_index = all(row.get("test_index") is not None for row in [*rows, *reference_rows])
    keyed, reference_keyed = (_keyed(some_rows, text, by_index) for some_rows in (rows, reference_rows))
    pairs = [(row, reference_keyed[key]) for key, row in keyed.items() if key in reference_keyed]
    for row, reference_row in pairs:
        if text(row) != text(reference_row):
            raise ValueError(
                f"test_index {row['test_index']} is one question in one run and another in the other: the runs read "
                "different test files; compare runs of the same gsm8k_source"
            )
    return pairs


def _keyed(rows: Sequence[Row], text: Callable[[Row], str], by_index: bool) -> dict[Any, Row]:
    seen: Counter[Any] = Counter()
    keyed = {}
    for row in rows:
        key = row["test_index"] if by_index else text(row)
        seen[key] += 1
        if by_index and seen[key] > 1:
            raise ValueError(f"test_index {key} appears more than once in a run; make its row file again")
        keyed[key, seen[key]] = row
    return keyed


@dataclass(frozen=True)
class Comparison:
    """One run against its reference on the rows that both have; shares in [0, 1], differences run - reference.

    ``num_effective`` is ``lib.stats.effective_size``; ``p_value`` the exact test on clusters of equal prompts,
    ``p_mcnemar`` the one that takes all rows for independent, ``p_holm`` adjusted for ``num_compared`` runs.
    ``detectable`` is the smallest true difference that these rows would show with a chance of 80 %, given as many
    discordant ones and as many runs; None where none would. No report prints it: after a run, the interval says what is
    excluded, and this number contradicts it (Hoenig, Heisey 2001, Am. Stat. 55, 19-24).
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
    p_mcnemar: float
    p_holm: float
    num_compared: int
    detectable: float | None

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    @property
    def shows_change(self) -> bool:
        return self.excludes_zero and max(self.p_value, self.p_holm) < 1 - LEVEL

    @property
    def lower_bound(self) -> float:
        """One-sided 95 % bound of the difference, equal prompts taken together; of this run alone, not adjusted."""
        return stats.paired_lower_bound(*self._effective_counts())

    @property
    def adjusted_interval(self) -> tuple[float, float]:
        """Interval at level 1 - 0.05 / ``num_compared``: those of all runs hold together, also of a claim (Bonferroni).

        Wider than Holm's later steps, so it may hold 0 where a change is claimed.
        """
        return stats.paired_interval(*self._effective_counts(), 1 - (1 - LEVEL) / self.num_compared)

    def _effective_counts(self) -> tuple[float, float, float]:
        share = self.num_effective / self.num_shared
        return self.only_run * share, self.only_reference * share, self.num_effective

    def among(self, num_compared: int, p_holm: float) -> "Comparison":
        discordant_share = (self.only_run + self.only_reference) / self.num_shared
        # At Holm's strictest step and in full rows, so that it is never called smaller than it may be.
        level, num_rows = 1 - (1 - LEVEL) / num_compared, math.floor(self.num_effective + 1e-9)
        detectable = stats.minimum_detectable_difference(num_rows, discordant_share, POWER, level)
        return replace(self, num_compared=num_compared, p_holm=p_holm, detectable=detectable)


@dataclass(frozen=True)
class Finding:
    """One run on one metric; ``skipped`` says why nothing was measured, ``uncompared`` why nothing was compared.

    ``margin`` is how many points safety may fall by; None where none was fixed before the run, and on other metrics.
    ``selected`` says how the checkpoint was selected where that was done on the test set; else "".
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

    @property
    def bound(self) -> float | None:
        """``Comparison.lower_bound`` where there is a margin to compare it with."""
        return None if self.margin is None or self.comparison is None else self.comparison.lower_bound

    @property
    def not_inferior(self) -> bool:
        return self.margin is not None and self.bound is not None and 100 * self.bound > -self.margin

    @property
    def conclusion(self) -> str | None:
        """``fell`` or ``rose``, and ``not inferior``; neither: ``undecided``. None without a margin or comparison."""
        if self.margin is None or self.comparison is None:
            return None
        changed = ("rose" if self.comparison.difference > 0 else "fell") if self.comparison.shows_change else ""
        return " and ".join(filter(None, [changed, "not inferior" if self.not_inferior else ""])) or "undecided"

    @property
    def unit(self) -> str:
        return next(metric.unit for metric in METRICS.values() if metric.name == self.metric)

    @property
    def passes(self) -> bool | None:
        """Whether the baseline is reached; None without one or without rows."""
        return None if self.baseline is None or self.rate is None else reaches(self.rate, self.baseline)

    def record(self) -> dict[str, Any]:
        rate = self.rate
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
            "comparison": self.comparison
            and asdict(self.comparison) | dict(zip(ADJUSTED, self.comparison.adjusted_interval, strict=True)),
            "safety_margin": self.margin,
            "safety_bound": self.bound,
            "safety_conclusion": self.conclusion,
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
    comparison = compare_pairs(pair_rows(rows, reference_rows, metric), metric) if reference_rows else None
    uncompared = f"no {spec.unit} in common" if reference_rows else "it was not measured"
    outcomes, texts = [*map(spec.succeeded, rows)], [*map(spec.text, rows)]
    chance = None if baseline is None else rerun_pass_chance(outcomes, baseline, texts)
    uncompared = "" if comparison else uncompared
    return Finding(spec.name, "", spec.rate(rows), baseline, chance, reference, uncompared, comparison, margin)


def compare_pairs(pairs: Sequence[tuple[Row, Row]], metric: str) -> Comparison | None:
    """Comparison of two runs on rows joined by ``pair_rows``, for one run compared; None without rows."""
    if not pairs:
        return None
    spec = _metric(metric)
    ours, theirs = ([spec.succeeded(pair[side]) for pair in pairs] for side in (0, 1))
    clusters = [spec.text(row) for row, _ in pairs]
    test = stats.paired_test(ours, theirs, LEVEL, clusters)
    num, mcnemar = len(pairs), stats.mcnemar_p(test.only_a, test.only_b)
    effective, rates = stats.effective_size(clusters), (sum(ours) / num, sum(theirs) / num)
    # The test's fields, only_a to p_value, are Comparison's in the same order.
    return Comparison(num, effective, *rates, *astuple(test), mcnemar, test.p_value, 1, None).among(1, test.p_value)


def adjust_for_runs(findings: Sequence[Finding]) -> list[Finding]:
    """The same findings with ``p_holm`` and ``detectable`` for all runs that were compared on this metric."""
    names = sorted({finding.metric for finding in findings})
    if len(names) > 1:
        raise ValueError(f"findings are of {', '.join(names)}; allowed: one metric at a time")
    p_values = [finding.comparison.p_value for finding in findings if finding.comparison]
    adjusted = iter(stats.holm(p_values))
    return [
        replace(one, comparison=one.comparison.among(len(p_values), next(adjusted))) if one.comparison else one
        for one in findings
    ]


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


def finding_sentence(findings: Iterable[Finding]) -> str:
    """The findings of one run, one clause per metric; points are claimed only where ``Comparison.shows_change``.

    "accuracy: +4.2 points (95 % interval 1.1 to 7.3) over untuned; safety: did not fall by more than 5 points
    (one-sided 95 % bound -3.1) against untuned".
    """
    return "; ".join(f"{finding.metric}: {_clause(finding)}{_selection(finding)}" for finding in findings)


def _selection(finding: Finding) -> str:
    return f", {finding.selected}" if finding.selected and finding.rate else ""


def _clause(finding: Finding) -> str:
    rate, change = finding.rate, finding.comparison
    if rate is None:
        return f"not measured ({finding.skipped})"
    if change is None:
        interval = wording.interval(rate.low, rate.high)
        shown = f"{wording.percent(rate.share)} of {rate.n:,} (95 % interval {interval})"
        return f"{shown}, not compared with {finding.reference} ({finding.uncompared})"
    if finding.margin is not None:
        return _margin_clause(finding, change)
    interval = f"95 % interval {wording.interval(change.low, change.high)}"
    if change.shows_change:
        word = "over" if change.difference > 0 else "against"
        interval = _claimed_interval(change)
        return f"{wording.signed_points(change.difference)} points ({interval}) {word} {finding.reference}"
    if not change.excludes_zero:
        excluded = "changes beyond it are excluded"
        return f"no change can be shown with {change.num_shared:,} {finding.unit} ({interval}; {excluded})"
    if change.p_value >= 1 - LEVEL:
        return f"no change that is sure ({interval}, but exact p = {change.p_value:.3g})"
    p_values = f"p = {change.p_value:.3g}, Holm's p = {change.p_holm:.3g}"
    return f"no change that holds among {change.num_compared} runs ({interval}, {p_values})"


def _claimed_interval(change: Comparison) -> str:
    """The interval of a claim; among several runs also the adjusted one, as what is claimed is too large on average."""
    interval = f"95 % interval {wording.interval(change.low, change.high)}"
    if change.num_compared == 1:
        return interval
    return f"{interval}, for all {change.num_compared} compared together {wording.interval(*change.adjusted_interval)}"


def _margin_clause(finding: Finding, change: Comparison) -> str:
    """Whether safety fell, did not fall by more than the margin, or neither can be shown."""
    margin, bound = f"{finding.margin:g} points", f"one-sided 95 % bound {wording.points(change.lower_bound)}"
    kept = f"by more than {margin} ({bound})"
    if change.shows_change:
        word, against = ("rose", "over") if change.difference > 0 else ("fell", "against")
        points = f"{wording.points(abs(change.difference))} points ({_claimed_interval(change)})"
        size = f"{word} by {points} {against} {finding.reference}"
        joint = ", and did not fall " if word == "rose" else ", but not "
        return size + joint + kept if finding.not_inferior else size
    if finding.not_inferior:
        return f"did not fall {kept} against {finding.reference}"
    fall = f"a fall of up to {wording.points(-change.lower_bound)} points is compatible"
    return f"undecided: {fall} with {change.num_shared:,} {finding.unit} (one-sided 95 % bound, margin {margin})"


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


def change_sentence(found: Finding) -> str:
    """The numbers of one run's change for 03 and 04, which claim nothing: the other runs of the folder are unknown."""
    change, name = found.comparison, found.metric.capitalize()
    if change is None:
        return f"{name}: {_clause(found)}{_selection(found)}."
    interval = f"95 % interval {wording.interval(change.low, change.high)}, p = {change.p_value:.3g}"
    fixed = ""
    if found.margin is not None:
        fixed = f"; one-sided 95 % bound {wording.points(change.lower_bound)}, margin {found.margin:g} points"
    return (
        f"{name} of {change.num_shared:,} {found.unit}: {wording.percent(change.rate)}, {found.reference} "
        f"{wording.percent(change.reference_rate)}, change {wording.signed_points(change.difference)} points "
        f"({interval}{fixed}){_selection(found)}. {ALONE}."
    )


def baseline_sentence(finding: Finding) -> str:
    """Whether the baseline is reached or missed, and the chance to reach it with new rows; "" without a baseline.

    No chance is given for a checkpoint selected on the test set: its rate is too high by the luck of the choice.
    """
    if finding.baseline is None:
        return ""
    baseline = wording.percent(finding.baseline)
    if finding.rate is None or finding.rerun_chance is None:
        return f"{finding.metric}: not measured, so the baseline of {baseline} is missed"
    result = f"{wording.percent(finding.rate.share)} {baseline_text(finding.rate, finding.baseline)}"
    if finding.selected:
        return f"{finding.metric}: {result}{_selection(finding)}"
    chance = wording.percent(finding.rerun_chance)
    if not 0.001 <= finding.rerun_chance <= 0.999:
        chance = "over 99.9 %" if finding.rerun_chance > 0.5 else "under 0.1 %"
    new = f"on as many new {finding.unit} it would be reached with a chance of {chance}"
    return f"{finding.metric}: {result}; {new}"


def baseline_text(rate: Rate, baseline: float) -> str:
    """``reaches the baseline of 31.0 %``, or ``misses`` it."""
    return f"{'reaches' if reaches(rate, baseline) else 'misses'} the baseline of {wording.percent(baseline)}"


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
