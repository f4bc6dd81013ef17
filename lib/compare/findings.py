"""What a comparison of two runs says: paired verdicts in words, whether the two are alike, which rows changed.

Knows the columns of row files and the rules for a claim, nothing about models, files or pages; the statistics are
``lib.stats``. A change is claimed only where three agree: the paired interval leaves out 0, the exact test rejects, and
it still does after Holm's adjustment for every run that was looked at.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from scipy import stats as distributions

from lib import gsm8k, safety, stats, wording
from lib.record.rows import row_id

Row = Mapping[str, Any]


LEVEL = 0.95


POWER = 0.8


@dataclass(frozen=True)
class Axis:
    """What is measured on a row: its name, what its rows are called, the text that makes a row, and what counts."""

    name: str
    unit: str
    text: Callable[[Row], str]
    succeeded: Callable[[Row], bool]


def _question(row: Row) -> str:
    return gsm8k.normalise_question(row["question"])


# Answers are scored anew from their text, so that rows of an older format will do; a judge's label cannot be.
AXES = {
    "accuracy": Axis("accuracy", "questions", _question, lambda row: gsm8k.score_row(row)["correct"]),
    "accuracy_flexible": Axis(
        "accuracy, read flexibly", "questions", _question, lambda row: gsm8k.score_row(row)["correct_flexible"]
    ),
    # An unparsed verdict is not safe, as in lib.safety.summarize.
    "safety": Axis("safety", "prompts", safety.prompt_text, lambda row: row["safety_label"] == "safe"),
}


def pair_rows(rows: Sequence[Row], reference_rows: Sequence[Row], axis: str) -> list[tuple[Row, Row]]:
    """Rows that both runs have, in the order of the first.

    GSM8K rows are joined on ``test_index`` where all of them know it, else on the question; prompts on their text. A
    text that stands several times is joined first to first, second to second.

    Args:
        rows: ``question`` and perhaps ``test_index``, or ``prompt``.
        reference_rows: rows of the other run, the same columns.
        axis: one of ``AXES``.

    Raises:
        ValueError: the axis is unknown, a ``test_index`` stands twice in a run, or it holds another question in each.
    """
    text = _axis(axis).text
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


def _axis(name: str) -> Axis:
    if name not in AXES:
        raise ValueError(f"axis is {name!r}; allowed: {', '.join(AXES)}")
    return AXES[name]


def _keyed(rows: Sequence[Row], text: Callable[[Row], str], by_index: bool) -> dict[Any, Row]:
    if not by_index:
        seen: Counter[str] = Counter()
        return {_occurrence(text(row), seen): row for row in rows}
    keyed = {row["test_index"]: row for row in rows}
    if len(keyed) < len(rows):
        twice = Counter(row["test_index"] for row in rows).most_common(1)[0][0]
        raise ValueError(f"test_index {twice} stands more than once in a run; make its row file again")
    return keyed


def _occurrence(text: str, seen: Counter[str]) -> tuple[str, int]:
    seen[text] += 1
    return text, seen[text]


@dataclass(frozen=True)
class Comparison:
    """One run against its reference on the rows that both have; shares in [0, 1], differences run - reference.

    ``p_value`` is the exact test on whole clusters of equal prompts (McNemar's where none is equal), ``p_mcnemar`` the
    one that takes each row for its own, ``p_holm`` is adjusted for ``num_compared`` runs. ``detectable`` is the
    smallest true difference that these rows would show with a chance of 80 %, given as many discordant ones and as many
    runs; None where none would. ``num_effective`` is what the rows are worth, see ``lib.stats.effective_size``.
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
        """Whether a change may be claimed: interval, exact test and Holm's adjustment agree."""
        return self.excludes_zero and max(self.p_value, self.p_holm) < 1 - LEVEL


@dataclass(frozen=True)
class AxisVerdict:
    """One run on one axis: its rate on all its rows, its baseline, and its comparison with ``reference``.

    ``skipped`` says why nothing was measured, ``uncompared`` why there is no comparison; both are "" where there is.
    Fields that were not measured are None.
    """

    axis: str
    skipped: str = ""
    num_rows: int = 0
    num_succeeded: int = 0
    rate: float | None = None
    low: float | None = None
    high: float | None = None
    baseline: float | None = None
    passes: bool | None = None
    rerun_chance: float | None = None
    reference: str = "untuned"
    uncompared: str = ""
    comparison: Comparison | None = None


def judge_axis(
    axis: str,
    rows: Sequence[Row] | None,
    reference_rows: Sequence[Row] | None,
    *,
    baseline: float | None = None,
    reference: str = "untuned",
    skipped: str = "",
) -> AxisVerdict:
    """Verdict of one run on one axis against its reference, usually the same model without its adapter.

    Args:
        axis: one of ``AXES``.
        rows: the run's rows; None or none where the axis was not measured.
        reference_rows: the reference's rows; None or none where it was not measured.
        baseline: share in [0, 1] that the rate must reach; None without one.
        reference: its name in words.
        skipped: why ``rows`` is None, for example "skipped by eval_safety: false".

    Raises:
        ValueError: the axis is unknown, or the rows do not fit each other, see ``pair_rows``.
    """
    if not rows:
        return AxisVerdict(axis=_axis(axis).name, skipped=skipped or "no rows", baseline=baseline, reference=reference)
    spec = _axis(axis)
    outcomes, texts = [spec.succeeded(row) for row in rows], [spec.text(row) for row in rows]
    low, high = stats.clustered_wilson_interval(outcomes, texts, LEVEL)
    comparison = compare_pairs(pair_rows(rows, reference_rows, axis), axis) if reference_rows else None
    return AxisVerdict(
        axis=spec.name,
        num_rows=len(rows),
        num_succeeded=sum(outcomes),
        rate=sum(outcomes) / len(rows),
        low=low,
        high=high,
        baseline=baseline,
        passes=None if baseline is None else reaches(sum(outcomes), len(rows), baseline),
        rerun_chance=None if baseline is None else rerun_pass_chance(outcomes, baseline, texts),
        reference=reference,
        uncompared="" if comparison else _why_uncompared(reference_rows, spec.unit),
        comparison=comparison,
    )


def _why_uncompared(reference_rows: Sequence[Row] | None, unit: str) -> str:
    return f"no {unit} in common" if reference_rows else "it was not measured"


def compare_pairs(pairs: Sequence[tuple[Row, Row]], axis: str) -> Comparison | None:
    """Comparison of two runs on rows joined by ``pair_rows``, for one run looked at; None without rows."""
    if not pairs:
        return None
    spec = _axis(axis)
    ours = [spec.succeeded(row) for row, _ in pairs]
    theirs = [spec.succeeded(row) for _, row in pairs]
    clusters = [spec.text(row) for row, _ in pairs]
    test = stats.paired_test(ours, theirs, LEVEL, clusters)
    comparison = Comparison(
        num_shared=len(pairs),
        num_effective=stats.effective_size(clusters),
        rate=sum(ours) / len(pairs),
        reference_rate=sum(theirs) / len(pairs),
        only_run=test.only_a,
        only_reference=test.only_b,
        difference=test.difference,
        low=test.low,
        high=test.high,
        p_value=test.p_value,
        p_mcnemar=stats.mcnemar_p(test.only_a, test.only_b),
        p_holm=test.p_value,
        num_compared=1,
        detectable=None,
    )
    return replace(comparison, detectable=_detectable(comparison, 1))


def _detectable(comparison: Comparison, num_compared: int) -> float | None:
    """Smallest detectable difference at Holm's strictest step, so that it is never called smaller than it may be."""
    discordant_share = (comparison.only_run + comparison.only_reference) / comparison.num_shared
    level = 1 - (1 - LEVEL) / num_compared
    # Rounded down: the test wants whole rows.
    num_rows = math.floor(comparison.num_effective + 1e-9)
    return stats.minimum_detectable_difference(num_rows, discordant_share, POWER, level)


def adjust_for_runs(verdicts: Sequence[AxisVerdict]) -> list[AxisVerdict]:
    """The same verdicts with ``p_holm`` and ``detectable`` for all runs that were compared on this axis.

    Args:
        verdicts: of several runs on one axis, in any order; those without a comparison do not count.

    Raises:
        ValueError: they are of several axes.
    """
    if len({verdict.axis for verdict in verdicts}) > 1:
        names = ", ".join(sorted({verdict.axis for verdict in verdicts}))
        raise ValueError(f"verdicts are of {names}; allowed: one axis at a time")
    compared = [verdict.comparison for verdict in verdicts if verdict.comparison]
    adjusted = iter(stats.holm([comparison.p_value for comparison in compared]))
    return [_adjusted(verdict, adjusted, len(compared)) for verdict in verdicts]


def _adjusted(verdict: AxisVerdict, adjusted: Iterator[float], num_compared: int) -> AxisVerdict:
    if not verdict.comparison:
        return verdict
    comparison = replace(
        verdict.comparison,
        p_holm=next(adjusted),
        num_compared=num_compared,
        detectable=_detectable(verdict.comparison, num_compared),
    )
    return replace(verdict, comparison=comparison)


def reaches(num_succeeded: int, num_rows: int, baseline: float) -> bool:
    """Whether the rate is at least ``baseline``, exactly: 31 of 100 reach 0.31, whatever floating point makes of it."""
    return num_succeeded >= num_rows * Fraction(str(baseline))


def rerun_pass_chance(outcomes: Sequence[bool], baseline: float, clusters: Sequence[str]) -> float:
    """Chance that a rerun on as many fresh rows of the same kind reaches ``baseline``.

    Model: rows are independent draws with one unknown rate; Jeffreys' prior Beta(1/2, 1/2) (Brown, Cai, DasGupta 2001,
    Stat. Sci. 16, 101-133), so that the rerun's count is beta-binomial (posterior predictive: Gelman et al., Bayesian
    Data Analysis, 3rd ed., ch. 2). Equal rows count by their effective number, rounded. A rerun on the *same* rows with
    greedy decoding gives the same answers: this is about the rows that could have been drawn.

    Args:
        outcomes: one per row, at least one.
        baseline: share in [0, 1].
        clusters: each row's cluster, for example its prompt.

    Raises:
        ValueError: the lengths differ, there are no rows, or the baseline is outside its range.
    """
    if not 0 <= baseline <= 1:
        raise ValueError(f"baseline is {baseline}; allowed: 0 to 1")
    size = stats.effective_size(clusters)
    successes = size * sum(outcomes) / len(outcomes)
    num_fresh = max(1, round(size))
    needed = math.ceil(num_fresh * Fraction(str(baseline)))
    fresh = distributions.betabinom(num_fresh, successes + 0.5, size - successes + 0.5)
    return min(1.0, float(fresh.sf(needed - 1)))


def verdict_sentence(verdicts: Iterable[AxisVerdict]) -> str:
    """The verdicts of one run in words, one part an axis.

    "accuracy: +4.2 points (95 % interval 1.1 to 7.3) over untuned; safety: no change can be shown with 240 prompts
    (95 % interval -2.9 to 3.8, smallest detectable 6.1 points)".

    A number of points is claimed only where ``Comparison.shows_change`` holds; else the words say what was not shown.
    """
    return "; ".join(f"{verdict.axis}: {_axis_words(verdict)}" for verdict in verdicts)


def _axis_words(verdict: AxisVerdict) -> str:
    if verdict.skipped:
        return f"not measured ({verdict.skipped})"
    if not verdict.comparison:
        interval = wording.interval(verdict.low, verdict.high)
        rate = f"{wording.percent(verdict.rate)} of {verdict.num_rows:,} (95 % interval {interval})"
        return f"{rate}, not compared with {verdict.reference} ({verdict.uncompared})"
    if verdict.comparison.shows_change:
        return _claim(verdict.comparison, verdict.reference)
    return _no_claim(verdict.comparison, _unit(verdict))


def _unit(verdict: AxisVerdict) -> str:
    return next(axis.unit for axis in AXES.values() if axis.name == verdict.axis)


def _interval(comparison: Comparison) -> str:
    return f"95 % interval {wording.interval(comparison.low, comparison.high)}"


def _claim(comparison: Comparison, reference: str) -> str:
    word = "over" if comparison.difference > 0 else "against"
    return f"{wording.signed_points(comparison.difference)} points ({_interval(comparison)}) {word} {reference}"


def _no_claim(comparison: Comparison, unit: str) -> str:
    if not comparison.excludes_zero:
        told = f"{_interval(comparison)}, {_detectable_words(comparison.detectable)}"
        return f"no change can be shown with {comparison.num_shared:,} {unit} ({told})"
    if comparison.p_value >= 1 - LEVEL:
        return f"no change that is sure ({_interval(comparison)}, but exact p = {comparison.p_value:.3g})"
    told = f"{_interval(comparison)}, p = {comparison.p_value:.3g}, Holm's p = {comparison.p_holm:.3g}"
    return f"no change that holds among {comparison.num_compared} runs ({told})"


def _detectable_words(detectable: float | None) -> str:
    return "too few to detect any" if detectable is None else f"smallest detectable {wording.points(detectable)} points"


def baseline_sentence(verdict: AxisVerdict) -> str:
    """Whether the baseline is reached or missed, and the chance to reach it with new rows; "" without a baseline."""
    if verdict.baseline is None:
        return ""
    if verdict.skipped:
        return f"{verdict.axis}: not measured, so the baseline of {wording.percent(verdict.baseline)} is missed"
    return (
        f"{verdict.axis}: {wording.percent(verdict.rate)} {baseline_verb(verdict.passes)} the baseline of "
        f"{wording.percent(verdict.baseline)}; on as many new {_unit(verdict)} it would be reached with a chance of "
        f"{_chance(verdict.rerun_chance)}"
    )


def baseline_verb(passes: bool) -> str:
    """The one word for each verdict on a baseline, wherever it is told."""
    return "reaches" if passes else "misses"


def _chance(share: float) -> str:
    if share > 0.999:
        return "over 99.9 %"
    return "under 0.1 %" if share < 0.001 else wording.percent(share)


@dataclass(frozen=True)
class Flip:
    """Rows whose outcome went from ``before`` to ``after``; ``ids`` are ``test_index`` where known, else ``id``."""

    before: str
    after: str
    ids: list[int]


def flexible_outcome(row: Row) -> str:
    """``correct``, ``wrong``, or without any number ``truncated`` (the token limit came first) or ``no answer``."""
    score = gsm8k.score_row(row)
    if score["parsed_flexible"] is None:
        return "truncated" if row.get("finish_reason") == "length" else "no answer"
    return "correct" if score["correct_flexible"] else "wrong"


_OUTCOMES: dict[str, Callable[[Row], str]] = {
    "accuracy": lambda row: gsm8k.score_row(row)["outcome"],
    "accuracy_flexible": flexible_outcome,
    "safety": lambda row: row["safety_label"],
}


def _outcome_of(axis: str) -> Callable[[Row], str]:
    _axis(axis)
    return _OUTCOMES[axis]


def outcome_counts(rows: Sequence[Row], axis: str) -> dict[str, int]:
    """How many rows had which outcome, the most frequent first: strict and flexible reading tell format from reasoning.

    Raises:
        ValueError: the axis is unknown.
    """
    return dict(Counter(map(_outcome_of(axis), rows)).most_common())


def find_flips(before_rows: Sequence[Row], after_rows: Sequence[Row], axis: str) -> list[Flip]:
    """Which rows changed their outcome from one run to another, of those that both have; the largest group first.

    Args:
        before_rows: usually the untuned run's.
        after_rows: the tuned run's.
        axis: ``accuracy`` (strict outcomes), ``accuracy_flexible``, or ``safety`` (labels).

    Raises:
        ValueError: as ``pair_rows``.
    """
    outcome = _outcome_of(axis)
    groups: dict[tuple[str, str], list[int]] = {}
    for before, after in pair_rows(before_rows, after_rows, axis):
        change = outcome(before), outcome(after)
        if change[0] != change[1]:
            groups.setdefault(change, []).append(row_id(after))
    flips = [Flip(*change, sorted(ids)) for change, ids in groups.items()]
    return sorted(flips, key=lambda flip: (-len(flip.ids), flip.before, flip.after))
