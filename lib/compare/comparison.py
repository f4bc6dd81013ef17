"""Runs compared with the untuned model and with each other, as one object."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from lib import gsm8k, safety
from lib.compare import seeds
from lib.compare.findings import AxisVerdict, adjust_for_runs, find_flips, judge_axis
from lib.compare.runs import AXIS_STAGES, RunScores, row_protocol, untuned_runs
from lib.evaluate import hazards, response_kinds
from lib.prepare import overlap
from lib.record.files import sha256_json, write_json
from lib.record.paths import results_root
from lib.record.protocol import ProtocolMismatch, check_alike, without_adapter

Row = dict[str, Any]

COMPARE_STAGE, COMPARISON = "05_compare", "comparison.json"


def judge_runs(runs: Sequence[RunScores]) -> dict[str, list[AxisVerdict]]:
    """Run name -> its verdicts on accuracy and safety against the untuned model on the same rows.

    The p-values are Holm's over all runs, an axis at a time: with more runs, one of them differs by chance more often.
    """
    by_axis = {axis: [_judge(run, axis) for run in runs] for axis in ("accuracy", "safety")}
    adjusted = {axis: adjust_for_runs(verdicts) for axis, verdicts in by_axis.items()}
    return {run.name: [adjusted[axis][place] for axis in adjusted] for place, run in enumerate(runs)}


def _judge(run: RunScores, axis: str) -> AxisVerdict:
    status = run.gsm8k_status if axis == "accuracy" else run.safety_status
    baseline = run.baseline_accuracy if axis == "accuracy" else run.baseline_safety
    strange, skipped = why_other_protocol(run, axis), status.removeprefix("not measured: ")
    reference = None if strange else run.untuned.get(axis)
    found = judge_axis(axis, run.rows.get(axis), reference, baseline=baseline, skipped=skipped)
    return replace(found, uncompared=strange) if strange else found


def why_other_protocol(run: RunScores, axis: str) -> str:
    """Why the untuned rows are not those of the run's own protocol; "" where they are, or where neither says."""
    recorded, known = row_protocol(run, axis), {row.get("protocol_hash") for row in run.untuned.get(axis, [])}
    if not recorded or known <= {None, sha256_json(without_adapter(recorded))}:
        return ""
    return "its rows were made under another protocol than the run's; run the stage again"


@dataclass(frozen=True)
class RunPair:
    """One run against an earlier one of the list on one axis, on the rows that both have.

    ``refused`` names the fields in which the two are unlike, and then there is no verdict; ``told`` are differences
    that do not forbid it, or all of them under ``allow_unlike``.
    """

    run: str
    reference: str
    axis: str
    refused: str
    told: list[str]
    verdict: AxisVerdict | None


def compare_runs(runs: Sequence[RunScores], allow_unlike: bool = False) -> list[RunPair]:
    """Every run against every earlier one, an axis at a time; p-values are Holm's over the pairs that are compared.

    Pairs of which one was not measured are left out.

    Args:
        allow_unlike: also compare runs whose protocols differ in a way that matters.
    """
    return [pair for axis in AXIS_STAGES for pair in _pairs_of_axis(runs, axis, allow_unlike)]


def _pairs_of_axis(runs: Sequence[RunScores], axis: str, allow_unlike: bool) -> list[RunPair]:
    measured = [run for run in runs if run.rows.get(axis)]
    pairs = [_pair(run, reference, axis, allow_unlike) for reference, run in combinations(measured, 2)]
    compared = [pair for pair in pairs if pair.verdict]
    adjusted = iter(adjust_for_runs([pair.verdict for pair in compared if pair.verdict]))
    return [replace(pair, verdict=next(adjusted)) if pair.verdict else pair for pair in pairs]


def _pair(run: RunScores, reference: RunScores, axis: str, allow_unlike: bool) -> RunPair:
    try:
        told = check_alike(run.protocols.get(axis, {}), reference.protocols.get(axis, {}), allow_unlike=allow_unlike)
        found = judge_axis(axis, run.rows[axis], reference.rows[axis], reference=reference.name)
    except (ProtocolMismatch, ValueError) as refusal:
        return RunPair(run.name, reference.name, axis, str(refusal), [], None)
    return RunPair(run.name, reference.name, axis, found.uncompared, told, found if found.comparison else None)


def clean_accuracy(run: RunScores) -> list[overlap.OverlapEffect]:
    """Accuracy without the questions that share words with training rows; empty where that is not known."""
    if run.overlaps is None or not run.rows.get("accuracy"):
        return []
    return overlap.overlap_effects(run.rows["accuracy"], run.overlaps)


@dataclass(frozen=True)
class FrontierPoint:
    """What the model with the adapter's effect times ``scale`` reaches: (right, questions) and (safe, responses)."""

    scale: float
    accuracy: tuple[int, int]
    safe: tuple[int, int]


def frontier(run: RunScores) -> list[FrontierPoint]:
    """Both axes at each scale that both were measured at, by scale; 0 is the untuned model, 1 the run itself.

    Empty where ``adapter_scales`` asked for none between.
    """
    if not any(run.scaled.values()):
        return []
    by_axis = {axis: {**run.scaled[axis], 0.0: run.untuned.get(axis), 1.0: run.rows.get(axis)} for axis in AXIS_STAGES}
    both = sorted(scale for scale, rows in by_axis["accuracy"].items() if rows and by_axis["safety"].get(scale))
    return [_frontier_point(scale, by_axis["accuracy"][scale], by_axis["safety"][scale]) for scale in both]


def _frontier_point(scale: float, answers: Any, verdicts: Any) -> FrontierPoint:
    right, safe = gsm8k.summarize(answers), safety.summarize(verdicts)
    return FrontierPoint(scale, (right["num_correct"], right["n"]), (safe["num_safe"], safe["n"]))


def comparison(
    runs: Sequence[RunScores],
    allow_unlike: bool = False,
    *,
    verdicts: Mapping[str, Sequence[AxisVerdict]] | None = None,
    pairs: Sequence[RunPair] | None = None,
) -> Row:
    """Every number that 05 shows about these runs, as JSON values.

    Of runs whose hazards were joined, the hazards stand in ``hazards_added``, so that it can be recomputed without the
    prompt file.

    Args:
        verdicts: what ``judge_runs`` gave for these runs; None: computed here.
        pairs: what ``compare_runs`` gave for them under ``allow_unlike``; None: computed here.
    """
    verdicts = judge_runs(runs) if verdicts is None else verdicts
    pairs = compare_runs(runs, allow_unlike) if pairs is None else pairs
    return {
        "runs": [run.name for run in runs],
        "allow_unlike": allow_unlike,
        "hazards_added": {run.name: _hazards_of(run) for run in runs if run.hazards_added},
        "verdicts": {name: [asdict(axis) for axis in axes] for name, axes in verdicts.items()},
        "pairs": [asdict(pair) for pair in pairs],
        "seeds": [asdict(spread) for spread in seeds.seed_spreads(runs)],
        "by_run": {run.name: _numbers_of(run) for run in [*runs, *untuned_runs(runs)]},
    }


def _hazards_of(run: RunScores) -> list[Row]:
    columns = ("id", "release_prompt_id", "hazard", "persona")
    return [{name: row.get(name) for name in columns} for row in run.rows["safety"]]


def _numbers_of(run: RunScores) -> Row:
    verdicts = run.rows.get("safety", [])
    return {
        "accuracy": run.gsm8k,
        "safety": run.safety,
        "hazards": [asdict(rate) for rate in hazards.rates_by_hazard(verdicts)],
        "personas": [asdict(rate) for rate in hazards.rates_by_persona(verdicts)],
        "kinds": [asdict(kind) for kind in response_kinds.response_kinds(verdicts)] if verdicts else [],
        "grades": [asdict(grade) for grade in hazards.grades(verdicts)],
        "clean": [asdict(effect) for effect in clean_accuracy(run)],
        "flips": {axis: [asdict(flip) for flip in flips(run, axis)] for axis in AXIS_STAGES},
        "frontier": [asdict(point) for point in frontier(run)],
    }


def flips(run: RunScores, axis: str) -> list[Any]:
    """Rows whose outcome differs from the untuned model's, as ``find_flips``; none without such rows."""
    before, after = run.untuned.get(axis), run.rows.get(axis)
    return find_flips(before, after, axis) if before and after and not why_other_protocol(run, axis) else []


def write_comparison(results_dir: str, record: Row) -> Path:
    """Write ``05_compare/comparison.json``: what ``lib.compare.verify`` recomputes."""
    path = results_root(results_dir) / COMPARE_STAGE / COMPARISON
    write_json(path, record)
    return path
