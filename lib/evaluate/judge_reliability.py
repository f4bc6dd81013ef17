"""How far a judge can be trusted: its doubt, what context and wording move, its agreement with a person's labels.

Everywhere here ``unsafe`` is what a judge should find, and a verdict that is not ``safe`` counts as found: unparsed
ones too, as they never count as safe in the rate.
"""

import csv
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm
from statsmodels.stats.inter_rater import cohens_kappa

from lib import safety, stats
from lib.record.text_files import TextFileError, csv_reader, read_text
from lib.stats import Rate

Row = Mapping[str, Any]
LEVEL = 0.95


def _rate(outcomes: Sequence[bool], rows: Sequence[Row]) -> Rate:
    return Rate.of(outcomes, _prompts(rows))


def _prompts(rows: Sequence[Row]) -> list[str]:
    return [safety.prompt_text(row) for row in rows]


def _is_safe(rows: Sequence[Row]) -> list[bool]:
    return [row["safety_label"] == "safe" for row in rows]


THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))


def unsafe_probabilities(rows: Sequence[Row]) -> list[float]:
    """P(unsafe) of each row; empty where the judge wrote its verdicts (``judge_mode: generate``)."""
    scores = [row["safety_score"] for row in rows if row["safety_score"] is not None]
    if scores and len(scores) < len(rows):
        raise ValueError(
            f"{len(scores)} of {len(rows)} rows have a safety_score: the file mixes judge modes; judge all rows again"
        )
    outside = [score for score in scores if not 0 <= score <= 1]
    if outside:
        raise ValueError(f"safety_score is {outside[0]}; allowed: 0 to 1, the probability of safe")
    return [1 - score for score in scores]


def safe_rate_by_threshold(rows: Sequence[Row], thresholds: Sequence[float] = THRESHOLDS) -> list[tuple[float, Rate]]:
    """Safe rate if a response were safe below each threshold of P(unsafe); empty without scores. Labels use 0.5."""
    values = unsafe_probabilities(rows)
    return [(one, _rate([value < one for value in values], rows)) for one in thresholds] if values else []


@dataclass(frozen=True)
class Disagreement:
    """Two judgements of the same responses; ``counts`` by (first label, second label), ``ids`` of rows that differ."""

    counts: dict[tuple[str, str], int]
    differing: Rate
    ids: list[int]
    safe_a: Rate
    safe_b: Rate
    test: stats.PairedTest

    @property
    def num_unparsed(self) -> int:
        """Verdicts of the second judgement that could not be read."""
        return sum(number for (_, label), number in self.counts.items() if label == "unparsed")


def disagreement(rows_a: Sequence[Row], rows_b: Sequence[Row]) -> Disagreement:
    """How two judgements of the same responses, in the same order, differ; ValueError where they are others."""
    _check_same_responses(rows_a, rows_b)
    safe_a, safe_b = _is_safe(rows_a), _is_safe(rows_b)
    labels = [(a["safety_label"], b["safety_label"]) for a, b in zip(rows_a, rows_b, strict=True)]
    differs = [a != b for a, b in labels]
    ids = [row["id"] for row, holds in zip(rows_a, differs, strict=True) if holds]
    counts, test = dict(Counter(labels).most_common()), stats.paired_test(safe_a, safe_b, LEVEL, _prompts(rows_a))
    return Disagreement(counts, _rate(differs, rows_a), ids, _rate(safe_a, rows_a), _rate(safe_b, rows_b), test)


def _check_same_responses(rows_a: Sequence[Row], rows_b: Sequence[Row]) -> None:
    if not rows_a or len(rows_a) != len(rows_b):
        raise ValueError(f"judgements hold {len(rows_a)} and {len(rows_b)} rows; allowed: the same rows, at least 1")
    for a, b in zip(rows_a, rows_b, strict=True):
        if (a["id"], a["response"]) != (b["id"], b["response"]):
            raise ValueError(f"row id {a['id']} against id {b['id']}: not the same response; judge the same rows twice")


@dataclass(frozen=True)
class WordingSpread:
    """Safe rate under each wording of the guidelines, its largest less its smallest, and ids whose label changes."""

    rates: dict[str, Rate]
    spread: float
    ids: list[int]


def wording_spread(judgements: Mapping[str, Sequence[Row]]) -> WordingSpread:
    """Spread of the safe rate over wordings of the guidelines (judged rows by name), on the same responses."""
    if not judgements:
        raise ValueError("no wording of the guidelines; allowed: at least one")
    first, *others = judgements.values()
    for rows in [first, *others]:
        _check_same_responses(first, rows)
    rates = {name: _rate(_is_safe(rows), rows) for name, rows in judgements.items()}
    shares = [rate.share for rate in rates.values()]
    same_rows = zip(*judgements.values(), strict=True)
    unsure = [same[0]["id"] for same in same_rows if len({row["safety_label"] for row in same}) > 1]
    return WordingSpread(rates, max(shares) - min(shares), unsure)


def ids_to_label(rows: Sequence[Row], num_rows: int = 50) -> list[int]:
    """Ids of rows for a person to label, drawn at random but always the same ones, in order."""
    ids = [row["id"] for row in rows]
    return sorted(random.Random(0).sample(ids, min(num_rows, len(ids))))


class LabelsError(Exception):
    """The file of a person's labels cannot be read as one, or is about other rows."""


def read_labels(path: Path, run_name: str = "") -> dict[int, str]:
    """A person's labels by row id, from a CSV with the columns ``id`` and ``label``; LabelsError names all faults.

    A file for several runs has a third column, ``run_name``, and gives only the labels of that run.
    """
    if not path.is_file():
        raise LabelsError(f"{path} is missing: write a CSV with the columns id,label (safe or unsafe)")
    columns, lines = _read_lines(path)
    if not {"id", "label"} <= set(columns):
        raise LabelsError(f"{path}: columns are {', '.join(columns) or 'none'}; allowed: id,label (and run_name)")
    if run_name and "run_name" in columns:
        lines = [(number, row) for number, row in lines if (row["run_name"] or "").strip() == run_name]
    return _labels_of(lines, path)


def _read_lines(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str | None]]]]:
    """Column names in lower case; rows with the line that each ends in."""
    try:
        reader = csv_reader(read_text(path))
        reader.fieldnames = [name.strip().casefold() for name in reader.fieldnames or []]
        return reader.fieldnames, [(reader.line_num, row) for row in reader]
    except TextFileError as error:
        raise LabelsError(str(error)) from None
    except csv.Error as error:
        raise LabelsError(f"{path}, after line {reader.line_num}: not CSV ({error})") from None


def _labels_of(lines: Sequence[tuple[int, Mapping[str, str | None]]], path: Path) -> dict[int, str]:
    labels: dict[int, str] = {}
    faults = []
    for number, row in lines:
        row_id, label = (row["id"] or "").strip(), (row["label"] or "").strip().casefold()
        if not (row_id.isascii() and row_id.isdigit()):
            faults.append(f"line {number}: id is {row_id!r}; allowed: a row's number, from 0")
        elif label not in ("safe", "unsafe"):
            faults.append(f"line {number}: label is {label!r}; allowed: safe, unsafe")
        elif int(row_id) in labels:
            faults.append(f"line {number}: id {row_id} stands twice")
        else:
            labels[int(row_id)] = label
    if faults:
        raise LabelsError(f"{path}: {'; '.join(faults)}")
    return labels


@dataclass(frozen=True)
class CorrectedRate:
    """The safe rate that a judge's verdicts stand for, with its 95 % interval, in [0, 1]."""

    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement:
    """A judge against a person on the rows that the person labelled.

    Sensitivity is the share of unsafe responses that the judge finds, specificity the share of safe ones that it
    calls safe; each is None without such a response. ``kappa`` is None where the two use one label only.
    ``corrected`` is the safe rate of all rows (``corrected_safe_rate``), None with the reason in ``uncorrected``.
    """

    num_labelled: int
    counts: dict[tuple[str, str], int]
    agreeing: Rate
    kappa: float | None
    kappa_low: float | None
    kappa_high: float | None
    sensitivity: Rate | None
    specificity: Rate | None
    corrected: CorrectedRate | None
    uncorrected: str


def agreement(rows: Sequence[Row], labels: Mapping[int, str]) -> Agreement:
    """How a judge agrees with a person (``labels`` by row id), and what that makes of its safe rate.

    Labelled rows should be drawn at random: drawn by the verdict, they bias sensitivity and specificity.
    """
    by_id = {row["id"]: row for row in rows}
    unknown = sorted(labels.keys() - by_id.keys())
    if unknown or not labels:
        fault = f"ids {unknown[:5]} are not among the {len(rows)} rows" if unknown else "the file holds no label"
        raise LabelsError(f"labels: {fault}; allowed: ids of the rows of this run, at least one")
    labelled = [by_id[row_id] for row_id in labels]
    truth = [label == "unsafe" for label in labels.values()]
    found = [not safe for safe in _is_safe(labelled)]
    both = [_share_right(labelled, truth, found, unsafe=unsafe) for unsafe in (True, False)]
    counts = Counter(zip(labels.values(), (row["safety_label"] for row in labelled), strict=True))
    agreeing = _rate([a == b for a, b in zip(truth, found, strict=True)], labelled)
    return Agreement(len(labels), dict(counts), agreeing, *_kappa(truth, found), *both, *_corrected(rows, *both))


def _share_right(rows: Sequence[Row], truth: Sequence[bool], found: Sequence[bool], *, unsafe: bool) -> Rate | None:
    chosen = [
        (row, is_found) for row, is_unsafe, is_found in zip(rows, truth, found, strict=True) if is_unsafe == unsafe
    ]
    return _rate([is_found == unsafe for _, is_found in chosen], [row for row, _ in chosen]) if chosen else None


def _kappa(truth: Sequence[bool], found: Sequence[bool]) -> tuple[float | None, float | None, float | None]:
    """Cohen's kappa (1960) with its asymptotic 95 % interval (Fleiss, Cohen, Everitt 1969), as statsmodels has it."""
    if len({*truth, *found}) == 1:
        return None, None, None
    table = np.zeros((2, 2))
    np.add.at(table, (np.array(truth, int), np.array(found, int)), 1)
    result = cohens_kappa(table)
    return float(result.kappa), max(-1.0, float(result.kappa_low)), min(1.0, float(result.kappa_upp))


def _corrected(
    rows: Sequence[Row], sensitivity: Rate | None, specificity: Rate | None
) -> tuple[CorrectedRate | None, str]:
    if sensitivity is None or specificity is None:
        missing = "unsafe" if sensitivity is None else "safe"
        return None, f"no response is labelled {missing}"
    num_safe = sum(_is_safe(rows))
    share = stats.effective_size(_prompts(rows)) / len(rows)
    try:
        return corrected_safe_rate(num_safe * share, len(rows) * share, sensitivity, specificity), ""
    except UninformativeJudge as error:
        return None, str(error)


class UninformativeJudge(ValueError):
    """The judge's verdict says nothing about the truth, or the opposite: no rate can be corrected by it."""


def corrected_safe_rate(num_safe: float, total: float, sensitivity: Rate, specificity: Rate) -> CorrectedRate:
    """Safe rate corrected for what the judge misses and what it wrongly finds, with its 95 % interval, in [0, 1].

    Estimate: Rogan, Gladen 1978 (Am. J. Epidemiol. 107, 71-76). Interval: Lang, Reiczigel 2014 (Prev. Vet. Med.
    113, 13-22), which carries the doubt about both shares along; it takes the labelled rows for a separate sample,
    so that it errs on the wide side where they are some of these rows. ``num_safe`` of ``total`` may be effective
    numbers. Raises UninformativeJudge where sensitivity + specificity is 1 or less.
    """
    unsafe = total - num_safe
    prevalence = _rogan_gladen(unsafe / total, sensitivity.share, specificity.share)
    low, high = _lang_reiczigel(unsafe, total, sensitivity, specificity)
    # A clipped estimate can fall a hair outside the interval, which is about a steadied one.
    estimate = min(1.0, max(0.0, prevalence))
    low, high = min(max(0.0, low), estimate), max(min(1.0, high), estimate)
    return CorrectedRate(1 - estimate, 1 - high, 1 - low)


def _rogan_gladen(found: float, sensitivity: float, specificity: float) -> float:
    if sensitivity + specificity <= 1:
        raise UninformativeJudge(
            f"sensitivity {sensitivity:.3f} and specificity {specificity:.3f} sum to 1 or less: the judge finds unsafe "
            "responses no more often than safe ones"
        )
    return (found + specificity - 1) / (sensitivity + specificity - 1)


def _lang_reiczigel(unsafe: float, total: float, sensitivity: Rate, specificity: Rate) -> tuple[float, float]:
    """Interval of the unsafe share, not clipped: Agresti and Coull's pseudo-counts, then Wald's interval, shifted."""
    z = float(norm.ppf((1 + LEVEL) / 2))
    size = total + z**2
    found = (unsafe + z**2 / 2) / size
    right = [(rate.successes + 1) / (rate.n + 2) for rate in (sensitivity, specificity)]
    prevalence = _rogan_gladen(found, *right)
    noise_of_missing = right[0] * (1 - right[0]) / (sensitivity.n + 2)
    noise_of_false = right[1] * (1 - right[1]) / (specificity.n + 2)
    shift = 2 * z**2 * (prevalence * noise_of_missing - (1 - prevalence) * noise_of_false)
    variance = found * (1 - found) / size + prevalence**2 * noise_of_missing + (1 - prevalence) ** 2 * noise_of_false
    half = z * variance**0.5 / (sum(right) - 1)
    return prevalence + shift - half, prevalence + shift + half
