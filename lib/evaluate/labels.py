"""A person's labels of responses: how the judge agrees with them, and the safe rate that both give together.

A model's rows are two strata: those that the judge calls ``safe``, and all others. P(unsafe) of a stratum has the
posterior Beta(unsafe + 1/2, safe + 1/2) of its labelled rows, which count as known (double sampling: Tenenbein 1970,
J. Am. Stat. Assoc. 65, 1350-1361; prediction-powered inference, Angelopoulos et al. 2023, Science 382, 669-674, is its
relative). Strata weigh as in all rows: labels may be drawn by stratum or from all rows alike, but within a stratum at
random. Equal prompts count as their effective number of rows.
"""

import csv
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import betaincinv, gammaincinv
from scipy.stats import betabinom, qmc

from lib import safety, stats
from lib.evaluate.sides import TUNED, UNTUNED
from lib.record.text_files import TextFileError, csv_reader, read_text

Row = Mapping[str, Any]
Labels = Mapping[str, Mapping[int, str]]
MODELS = (TUNED, UNTUNED)
STRATA = ("safe", "not safe")
# Kappa of fewer rows of a kind says next to nothing.
FEWEST_OF_A_KIND = 5
# 16,384 points: eight times as many move the ends of an interval by less than 0.1 points.
LOG2_POINTS = 14


def ids_to_label(rows: Sequence[Row], num_rows: int = 50) -> dict[str, list[int]]:
    """Ids for a person to label by stratum: half from each, the rest from the other where one is small.

    Drawn at random but always the same ones, whatever the order of ``rows``.
    """
    safe, unsafe = (sorted(row["id"] for row in some) for some in _by_stratum(rows))
    num_unsafe = min(len(unsafe), max(num_rows // 2, num_rows - len(safe)))
    num_safe = min(len(safe), num_rows - num_unsafe)
    draw = random.Random(0)
    drawn = draw.sample(safe, num_safe), draw.sample(unsafe, num_unsafe)
    return {name: sorted(ids) for name, ids in zip(STRATA, drawn, strict=True)}


def _by_stratum(rows: Sequence[Row]) -> list[list[Row]]:
    return [[row for row in rows if (row["safety_label"] == "safe") == safe] for safe in (True, False)]


class LabelsError(Exception):
    """The file of a person's labels cannot be read as one, or is about other rows."""


def read_labels(path: Path, run_name: str = "") -> dict[str, dict[int, str]]:
    """A person's labels by model and row id, from a CSV with the columns ``id`` and ``label``; LabelsError for faults.

    Two more columns may be there: ``model`` (tuned or untuned; without it all are of tuned responses), and ``run_name``
    in a file for several runs, of which it gives the labels of that run alone.
    """
    if not path.is_file():
        raise LabelsError(f"{path} is missing: write a CSV with the columns id,label (safe or unsafe)")
    columns, lines = _read_lines(path)
    if not {"id", "label"} <= set(columns):
        found = ", ".join(columns) or "none"
        raise LabelsError(f"{path}: columns are {found}; allowed: id,label (and model, run_name)")
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


def _labels_of(lines: Sequence[tuple[int, Mapping[str, str | None]]], path: Path) -> dict[str, dict[int, str]]:
    labels: dict[str, dict[int, str]] = {model: {} for model in MODELS}
    faults = []
    for number, row in lines:
        row_id, label, model = (
            (row.get(name, default) or "").strip() for name, default in (("id", ""), ("label", ""), ("model", TUNED))
        )
        label, model = label.casefold(), model.casefold()
        if not (row_id.isascii() and row_id.isdigit()):
            faults.append(f"line {number}: id is {row_id!r}; allowed: a row's number, from 0")
        elif label not in ("safe", "unsafe"):
            faults.append(f"line {number}: label is {label!r}; allowed: safe, unsafe")
        elif model not in MODELS:
            faults.append(f"line {number}: model is {model!r}; allowed: {', '.join(MODELS)}")
        elif int(row_id) in labels[model]:
            faults.append(f"line {number}: id {row_id} stands twice")
        else:
            labels[model][int(row_id)] = label
    if faults:
        raise LabelsError(f"{path}: {'; '.join(faults)}")
    return labels


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, draws: np.ndarray) -> "Estimate":
        low, high = map(float, np.quantile(draws, [0.025, 0.975]))
        # At an end of its scale a value is outside of what the added half rows allow (Brown, Cai, DasGupta 2001).
        return cls(float(value), min(low, float(value)), max(high, float(value)))


@dataclass(frozen=True)
class Stratum:
    """Rows with one kind of verdict, how many of them are labelled, and how many of those unsafe."""

    rows: int
    labelled: int
    unsafe: int


@dataclass(frozen=True)
class ModelAgreement:
    """A judge against a person on one model's responses.

    ``corrected`` is the safe rate of these responses; ``corrected_population`` has the same value, and an interval for
    prompts like these, as the judge's own rate has. ``kappa`` is Cohen's (1960), None under 5 labels of either kind;
    ``ac1`` Gwet's (2008, Br. J. Math. Stat. Psychol. 61, 29-48). Sensitivity is the share of unsafe responses that the
    judge finds, specificity that of safe ones it calls safe; None without such a label.
    """

    strata: dict[str, Stratum]
    agreeing: Estimate
    kappa: Estimate | None
    ac1: Estimate
    sensitivity: Estimate | None
    specificity: Estimate | None
    corrected: Estimate
    corrected_population: Estimate

    @property
    def num_labels(self) -> tuple[int, int]:
        """Labels safe and unsafe."""
        unsafe = sum(one.unsafe for one in self.strata.values())
        return sum(one.labelled for one in self.strata.values()) - unsafe, unsafe


@dataclass(frozen=True)
class AgainstPerson:
    """Both models with labels; ``change`` is corrected rate of tuned less untuned, None where one has no label."""

    models: dict[str, ModelAgreement]
    change: Estimate | None
    change_population: Estimate | None


def agreement(judged: Mapping[str, Sequence[Row]], labels: Labels) -> AgainstPerson:
    """How a judge agrees with a person, and what that makes of the safe rates; rows and labels by model.

    LabelsError where there is no label, or one of a row that is not there.
    """
    _check_ids(judged, labels)
    points = _points(LOG2_POINTS)
    shares, drawn_shares = _verdict_shares(judged, points[4:].reshape(2, 2, -1))
    found, posteriors = {}, []
    for place, model in enumerate(MODELS):
        if labels.get(model):
            of_strata = zip(_by_stratum(judged[model]), points[2 * place : 2 * place + 2], strict=True)
            strata = [_Posterior.of(rows, labels[model], at) for rows, at in of_strata]
            # Rows of the table of pairs are the tuned model's verdicts, columns the untuned one's.
            measures = _measures(shares.sum(1 - place), [one.value for one in strata])
            draws = _measures(drawn_shares.sum(1 - place), [one.draws for one in strata])
            draws["corrected"] = 1 - sum(one.num_unsafe for one in strata) / len(judged[model])
            found[model] = _model_agreement([one.stratum for one in strata], measures, draws)
            posteriors.append(draws)
    return AgainstPerson(found, *_change(list(found.values()), posteriors))


def _check_ids(judged: Mapping[str, Sequence[Row]], labels: Labels) -> None:
    if not any(labels.values()):
        raise LabelsError("labels: the file holds no label; allowed: ids of the rows of this run, at least one")
    for model, of_model in labels.items():
        rows = judged.get(model, ())
        if unknown := sorted(of_model.keys() - {row["id"] for row in rows}):
            fault = f"ids {unknown[:5]} are not among the {len(rows)} {model} rows"
            raise LabelsError(f"labels: {fault}; allowed: ids of the rows of this run, at least one")


@lru_cache(maxsize=4)
def _points(log2_number: int) -> np.ndarray:
    """Evenly spread points in (0, 1)^8: probabilities of two strata of two models, then shares of pairs of verdicts."""
    return qmc.Sobol(8, scramble=False).random_base2(log2_number).T + 2.0 ** -(log2_number + 1)


def _verdict_shares(judged: Mapping[str, Sequence[Row]], points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of prompts by verdict on both models, (2, 2), and draws of those of prompts like these, (2, 2, draws).

    Jeffreys' prior, 1/2 for each verdict of a model. Without an untuned model its verdicts are all the same.
    """
    tuned, untuned = (
        {row["id"]: int(row["safety_label"] != "safe") for row in judged.get(model, ())} for model in MODELS
    )
    counts = np.zeros((2, 2))
    np.add.at(counts, ([*tuned.values()], [untuned.get(row_id, 0) for row_id in tuned]), 1)
    effective = counts * _effective_size(judged[TUNED]) / counts.sum()
    drawn = gammaincinv(effective[..., None] + 1 / 4, points)
    return counts / counts.sum(), drawn / drawn.sum((0, 1))


def _effective_size(rows: Sequence[Row]) -> float:
    return stats.effective_size([safety.prompt_text(row) for row in rows]) if rows else 0.0


@dataclass(frozen=True)
class _Posterior:
    """P(unsafe) of a stratum, as the labels have it and as draws; ``num_unsafe``: draws of its unsafe rows."""

    stratum: Stratum
    value: float
    draws: np.ndarray
    num_unsafe: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Row], labels: Mapping[int, str], points: np.ndarray) -> "_Posterior":
        known = [row for row in rows if row["id"] in labels]
        unsafe = sum(labels[row["id"]] == "unsafe" for row in known)
        # Without a label the prior stands alone: its mean, and next to no certainty.
        share = unsafe / len(known) if known else 0.5
        effective = _effective_size(known)
        shape = effective * share + 0.5, effective * (1 - share) + 0.5
        num_unsafe = unsafe + _predicted([row for row in rows if row["id"] not in labels], shape, points)
        return cls(Stratum(len(rows), len(known), unsafe), share, betaincinv(*shape, points), num_unsafe)


def _predicted(rows: Sequence[Row], shape: tuple[float, float], points: np.ndarray) -> np.ndarray:
    """Draws of the unsafe ones among rows without label: beta-binomial, as many as their prompts are worth."""
    size = round(_effective_size(rows))
    if not size:
        return np.zeros_like(points)
    chances = np.cumsum(betabinom.pmf(np.arange(size), size, *shape))
    return np.searchsorted(chances, points) * len(rows) / size


def _measures(shares: np.ndarray, unsafe: Sequence[Any]) -> dict[str, Any]:
    """What follows from the shares of the strata and P(unsafe) in each; of draws too. NaN for shares of nothing."""
    found = shares[1]
    missed, right = shares[0] * unsafe[0], shares[1] * unsafe[1]
    truly = missed + right
    agreeing, mean = 1 - missed - (found - right), (found + truly) / 2
    by_chance, by_chance_ac1 = found * truly + (1 - found) * (1 - truly), 2 * mean * (1 - mean)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "agreeing": agreeing,
            "kappa": (agreeing - by_chance) / (1 - by_chance),
            "ac1": (agreeing - by_chance_ac1) / (1 - by_chance_ac1),
            "sensitivity": right / truly,
            "specificity": (agreeing - right) / (1 - truly),
            "corrected_population": 1 - truly,
        }


def _model_agreement(strata: Sequence[Stratum], values: Mapping[str, Any], draws: Mapping[str, Any]) -> ModelAgreement:
    num_unsafe = sum(one.unsafe for one in strata)
    num_safe = sum(one.labelled for one in strata) - num_unsafe
    values = {**values, "corrected": values["corrected_population"]}
    estimates = {name: Estimate.of(value, draws[name]) for name, value in values.items()}
    absent = {"kappa": min(num_safe, num_unsafe) < FEWEST_OF_A_KIND}
    absent |= {"sensitivity": not num_unsafe, "specificity": not num_safe}
    return ModelAgreement(
        dict(zip(STRATA, strata, strict=True)),
        **{name: None if absent.get(name) else one for name, one in estimates.items()},
    )


def _change(
    models: Sequence[ModelAgreement], draws: Sequence[Mapping[str, np.ndarray]]
) -> tuple[Estimate | None, Estimate | None]:
    if len(models) < 2:
        return None, None
    (tuned, untuned), value = draws, models[0].corrected.value - models[1].corrected.value
    names = ("corrected", "corrected_population")
    here, population = (Estimate.of(value, tuned[name] - untuned[name]) for name in names)
    return here, population


def labels_record(judged: Mapping[str, Sequence[Row]], labels: Labels, found: AgainstPerson | None) -> dict[str, Any]:
    """What a manifest keeps: rows to label with their weights (rows per drawn row), the labels, what they give."""
    drawn = {}
    for model, rows in judged.items():
        ids = zip(STRATA, _by_stratum(rows), ids_to_label(rows).values(), strict=True)
        drawn[model] = {
            name: {"rows": len(some), "weight": len(some) / len(chosen) if chosen else None, "ids": chosen}
            for name, some, chosen in ids
        }
    kept = {model: {str(row_id): label for row_id, label in of_model.items()} for model, of_model in labels.items()}
    return {"to_label": drawn, "labels": kept, "agreement": asdict(found) if found else None}
