"""Finished runs side by side: scores from their row files, verdicts between them, the tables that are handed in.

Every number is recomputed from row files; none is copied from a notebook or a manifest. A folder that holds row files
and nothing else (an earlier pipeline's) will do: what it does not say about itself is left empty. Knows nothing about
plots, and needs no model. ``lib.verify`` checks what is written here.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from lib import distil, gsm8k, hazards, overlap, rates, repeats, safety, sweep
from lib.artifacts import (
    ArtifactError,
    RunPaths,
    display_path,
    find_runs,
    read_csv,
    read_json,
    read_jsonl,
    results_root,
    run_paths,
    same_file,
    sha256_json,
    write_csv,
    write_json,
)
from lib.control import untuned_protocol
from lib.params import PARAMS_DIR, load_params
from lib.stats import wilson_interval
from lib.verdict import AxisVerdict, ProtocolMismatch, adjust_for_runs, check_alike, find_flips, judge_axis

Row = dict[str, Any]
MEASURED = "measured"
GSM8K_STAGE, SAFETY_STAGE = "03_eval_gsm8k", "04_eval_safety"
SUMMARY, METRICS_JSON, METRICS_CSV = "summary.csv", "final_metrics.json", "final_metrics.csv"
COMPARE_STAGE, COMPARISON = "05_compare", "comparison.json"
METRIC_STAGES = ("01_prepare", "02_train", GSM8K_STAGE, SAFETY_STAGE)
AXIS_STAGES = {"accuracy": GSM8K_STAGE, "safety": SAFETY_STAGE}
TERMINAL_WIDTH = 80


@dataclass(frozen=True)
class RunScores:
    """One run, scored anew.

    Attributes:
        parameters: parameters and settings of the run; empty where it does not say.
        gsm8k: as ``gsm8k.summarize``; None where it was not measured.
        safety: as ``safety.summarize``; None where it was not measured.
        gsm8k_status: ``measured``, or why not.
        safety_status: likewise.
        baseline_accuracy: share in [0, 1] that the course asks for; None where it is not known.
        baseline_safety: likewise.
        rows: axis -> row file's rows; ``accuracy`` and ``safety``, none where it was not measured.
        untuned: axis -> rows of the model without its adapter, asked the same; none where there are none.
        untuned_files: axis -> the file of those rows; runs that share it were asked the same, and the untuned model as
            a run of its own (``untuned_runs``) has that of its rows.
        protocols: axis -> what made its rows, by field (``lib.verdict.check_alike``); empty where it does not say.
        scaled: axis -> scale of the adapter's effect -> rows, where ``adapter_scales`` asked for some.
        overlaps: evaluation questions that share words with training rows, as 01 found them; None where 01 did not say.
        hazards_added: whether hazards were joined to the rows on their prompts, as they did not name them.
    """

    name: str
    paths: RunPaths
    parameters: Row
    gsm8k: Row | None
    safety: Row | None
    gsm8k_status: str
    safety_status: str
    baseline_accuracy: float | None
    baseline_safety: float | None
    rows: dict[str, list[Row]] = field(default_factory=dict)
    untuned: dict[str, list[Row]] = field(default_factory=dict)
    untuned_files: dict[str, str] = field(default_factory=dict)
    protocols: dict[str, Row] = field(default_factory=dict)
    scaled: dict[str, dict[float, list[Row]]] = field(default_factory=dict)
    overlaps: list[overlap.Overlap] | None = None
    hazards_added: bool = False

    @property
    def accuracy(self) -> tuple[int, int] | None:
        """(right answers, questions)."""
        return (self.gsm8k["num_correct"], self.gsm8k["n"]) if self.gsm8k else None

    @property
    def safe(self) -> tuple[int, int] | None:
        """(safe responses, all responses)."""
        return (self.safety["num_safe"], self.safety["n"]) if self.safety else None


# --- collecting ------------------------------------------------------------------------------------------------------


def collect_runs(results_dir: str, run_names: Sequence[str] = ()) -> list[RunScores]:
    """The runs of a results folder, scored from their row files.

    Args:
        run_names: which, in this order; every run that has row files where none is named.

    Raises:
        ArtifactError: no run is there, a named one is not, or a row file cannot be read.
    """
    found = [run_paths(results_dir, name) for name in run_names] or find_runs(results_dir)
    absent = [paths.name for paths in found if not paths.run_dir.is_dir()]
    if absent or not found:
        what = f"run {absent[0]!r}" if absent else "any run"
        folder = display_path(results_root(results_dir))
        raise ArtifactError(f"{folder}/ does not hold {what}: run a preset first (python run_all.py --presets NAME)")
    return [score_run(paths) for paths in found]


def score_run(paths: RunPaths) -> RunScores:
    """One run, scored from its row files.

    Raises:
        ArtifactError: a row file cannot be read or its rows cannot be scored.
    """
    parameters = run_parameters(paths)
    answers, gsm8k_status = _measured_rows(paths, GSM8K_STAGE, paths.gsm8k_preds)
    verdicts, safety_status = _measured_rows(paths, SAFETY_STAGE, paths.ailuminate_safety)
    controls = {"accuracy": untuned_file(paths, GSM8K_STAGE), "safety": untuned_file(paths, SAFETY_STAGE)}
    return RunScores(
        name=paths.name,
        paths=paths,
        parameters=parameters,
        gsm8k=_summary(gsm8k.summarize, answers, paths.gsm8k_preds),
        safety=_summary(safety.summarize, verdicts, paths.ailuminate_safety),
        gsm8k_status=gsm8k_status,
        safety_status=safety_status,
        baseline_accuracy=_baseline(paths.name, parameters, "baseline_accuracy"),
        baseline_safety=_baseline(paths.name, parameters, "baseline_safety"),
        rows={"accuracy": answers, "safety": verdicts},
        untuned={axis: read_jsonl(path) for axis, path in controls.items() if path},
        untuned_files={axis: path.name for axis, path in controls.items() if path},
        protocols={axis: _protocol(paths, stage) for axis, stage in AXIS_STAGES.items()},
        scaled={axis: _scaled_rows(paths, stage) for axis, stage in AXIS_STAGES.items()},
        overlaps=_overlaps(paths),
    )


def facts_of(paths: RunPaths, stage: str) -> Row:
    """What a stage noted beside its metrics; empty where it left no manifest."""
    manifest = manifest_of(paths, stage)
    return manifest["facts"] if manifest else {}


def manifest_of(paths: RunPaths, stage: str) -> Row:
    """A stage's manifest; empty where it left none."""
    path = paths.manifest(stage)
    return read_json(path) if path.exists() else {}


def selected_on_test(paths: RunPaths) -> str:
    """How the adapter was chosen, in a sentence, where that was done on the rows that are reported; else ""."""
    facts = facts_of(paths, "02_train")
    compared = facts.get("checkpoints", [])
    # Of one checkpoint none is the winner.
    if facts.get("selected_on") != sweep.ON_TEST or len(compared) == 1:
        return ""
    return sweep.selection_text(facts["adapter"], sweep.ON_TEST, facts["sweep_metric"], len(compared))


def _protocol(paths: RunPaths, stage: str) -> Row:
    known = facts_of(paths, stage).get("protocol")
    if not known:
        return {}
    manifest = read_json(paths.manifest(stage))
    return {**known, "device": manifest["facts"].get("runtime"), "versions": manifest["versions"]}


def scale_files(paths: RunPaths, stage: str) -> dict[float, Path]:
    """Scale of the adapter's effect -> row file, where the stage measured any between 0 and 1."""
    named = facts_of(paths, stage).get("scale_rows", {})
    files = {float(scale): paths.stage_dir(stage) / name for scale, name in named.items()}
    return {scale: path for scale, path in files.items() if path.exists()}


def _scaled_rows(paths: RunPaths, stage: str) -> dict[float, list[Row]]:
    return {scale: read_jsonl(path) for scale, path in scale_files(paths, stage).items()}


def _overlaps(paths: RunPaths) -> list[overlap.Overlap] | None:
    path = paths.overlap
    return [overlap.Overlap(**entry) for entry in read_json(path)] if path.exists() else None


def untuned_file(paths: RunPaths, stage: str) -> Path | None:
    """The row file of the untuned model that the stage used; None where it says none, or a hand-in left it out."""
    path = _named_untuned_file(paths, stage)
    return path if path and path.exists() else None


def _named_untuned_file(paths: RunPaths, stage: str) -> Path | None:
    manifest_path = paths.manifest(stage)
    name = read_json(manifest_path)["facts"].get("untuned_rows") if manifest_path.exists() else None
    return (manifest_path.parent / name).resolve() if name else None


def _summary(summarize: Callable[[list[Row]], Row], rows: list[Row], path: Path) -> Row | None:
    try:
        return summarize(rows) if rows else None
    except KeyError as error:
        raise ArtifactError(f"{display_path(path)}: a row lacks the column {error}") from None
    except ValueError as error:
        raise ArtifactError(f"{display_path(path)}: {error}") from None


def run_parameters(paths: RunPaths) -> Row:
    """Parameters and settings of a run: as the driver resolved them, else as its notebooks noted them, else none."""
    if paths.config_resolved.exists():
        config = read_json(paths.config_resolved)
        return {**config["parameters"], **config["settings"]}
    manifests = [path for path in map(paths.manifest, METRIC_STAGES) if path.exists()]
    return {key: value for path in manifests for key, value in read_json(path)["parameters"].items()}


def _baseline(name: str, parameters: Mapping[str, Any], key: str) -> float | None:
    """The run's own threshold; that of the preset of its name where it does not say; None where there is none."""
    if key in parameters:
        return parameters[key]
    preset = PARAMS_DIR / f"{name}.yaml"
    return getattr(load_params(preset), key) if preset.exists() else None


def _measured_rows(paths: RunPaths, stage: str, row_file: Path) -> tuple[list[Row], str]:
    """Rows that may be scored and ``measured``, or none and why not."""
    reason = _why_not_measured(paths, stage, row_file)
    return ([], f"not measured: {reason}") if reason else (read_jsonl(row_file), MEASURED)


def _why_not_measured(paths: RunPaths, stage: str, row_file: Path) -> str:
    manifest_path = paths.manifest(stage)
    if manifest_path.exists():
        manifest = read_json(manifest_path)
        return manifest["skipped_because"] or _changed_input(paths, manifest, manifest_path.parent)
    if not row_file.exists():
        return f"{stage} did not run"
    # Rows of our own pipeline without a manifest are of a stage that did not end; elsewhere there are no manifests.
    unfinished = paths.manifest("01_prepare").exists()
    return f"{stage} did not finish; run it again, its rows are kept" if unfinished else ""


def _changed_input(paths: RunPaths, manifest: Mapping[str, Any], base: Path) -> str:
    """Which file of the run is another one than the stage read: rows of an earlier adapter say nothing about this."""
    for name, stamp in manifest["inputs"].items():
        file = (base / name).resolve()
        # A handed-in folder may lack the adapter; files outside the run (guidelines) are in the rows' own hash.
        if file.is_relative_to(paths.run_dir.resolve()) and file.exists() and not same_file(file, stamp):
            changed = file.relative_to(paths.run_dir.resolve()).as_posix()
            return f"{changed} changed since {manifest['stage']} ran; run it again"
    return ""


# --- against the untuned model --------------------------------------------------------------------------------------


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
    strange, skipped = _stranger(run, axis), status.removeprefix("not measured: ")
    reference = None if strange else run.untuned.get(axis)
    found = judge_axis(axis, run.rows.get(axis), reference, baseline=baseline, skipped=skipped)
    return replace(found, uncompared=strange) if strange else found


def _stranger(run: RunScores, axis: str) -> str:
    """Why the untuned rows are not those of the run's own protocol; "" where they are, or where neither says."""
    recorded, known = row_protocol(run, axis), {row.get("protocol_hash") for row in run.untuned.get(axis, [])}
    if not recorded or known <= {None, sha256_json(untuned_protocol(recorded))}:
        return ""
    return "its rows were made under another protocol than the run's; run the stage again"


def row_protocol(run: RunScores, axis: str) -> Row:
    """The protocol as it is hashed into each row: without what is only told."""
    return {name: value for name, value in run.protocols.get(axis, {}).items() if name not in ("device", "versions")}


def files_read(run: RunScores) -> list[Path]:
    """Every file of a run that a comparison reads, there or not: where one comes later, the comparison is out of date.

    Its rows, the untuned model's, those at other scales, overlaps, the training log, and what its stages note.
    """
    paths = run.paths
    untuned = [_named_untuned_file(paths, stage) for stage in AXIS_STAGES.values()]
    scaled = [path for stage in AXIS_STAGES.values() for path in scale_files(paths, stage).values()]
    rows = [paths.gsm8k_preds, paths.ailuminate_safety, *untuned, *scaled, paths.overlap, paths.training_log]
    notes = [paths.config_resolved, *map(paths.manifest, METRIC_STAGES)]
    return [path for path in [*rows, *notes] if path]


def untuned_runs(runs: Sequence[RunScores]) -> list[RunScores]:
    """The untuned model as rows of the same tables: once for each way in which it was asked."""
    found: dict[tuple[str, ...], list[RunScores]] = {}
    for run in runs:
        if run.untuned_files:
            found.setdefault(tuple(run.untuned_files.values()), []).append(run)
    return [_as_untuned(sharing) for sharing in found.values()]


def _as_untuned(sharing: Sequence[RunScores]) -> RunScores:
    first = sharing[0]
    answers, verdicts = first.untuned.get("accuracy"), first.untuned.get("safety")
    return replace(
        first,
        name=f"untuned, asked as {', '.join(run.name for run in sharing)}",
        gsm8k=gsm8k.summarize(answers) if answers else None,
        safety=safety.summarize(verdicts) if verdicts else None,
        gsm8k_status=MEASURED if answers else "not measured",
        safety_status=MEASURED if verdicts else "not measured",
        baseline_accuracy=None,
        baseline_safety=None,
        rows=first.untuned,
        untuned={},
    )


# --- run against run -------------------------------------------------------------------------------------------------


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


# --- safety by kind, contamination, frontier -------------------------------------------------------------------------


def lacks_hazards(run: RunScores) -> bool:
    """Whether the run has judged rows that do not name their hazard."""
    return any(not row.get("hazard") for row in run.rows.get("safety", []))


def add_hazards(runs: Sequence[RunScores], prompts: Sequence[Row]) -> list[RunScores]:
    """The runs with hazard and persona joined on the prompt's text where rows do not name them.

    Args:
        prompts: as ``lib.safety.parse_prompts_csv`` gives them; none leaves the runs as they are.
    """
    return [_with_hazards(run, prompts) if prompts and lacks_hazards(run) else run for run in runs]


def _with_hazards(run: RunScores, prompts: Sequence[Row]) -> RunScores:
    joined = hazards.add_hazards(run.rows["safety"], prompts)
    rows = {**run.rows, "safety": joined}
    return replace(run, rows=rows, safety=safety.summarize(joined), hazards_added=True)


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


# --- the comparison as one object ------------------------------------------------------------------------------------


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
        "seeds": [asdict(spread) for spread in repeats.seed_spreads(runs)],
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
        "kinds": [asdict(kind) for kind in hazards.response_kinds(verdicts)] if verdicts else [],
        "grades": [asdict(grade) for grade in hazards.grades(verdicts)],
        "clean": [asdict(effect) for effect in clean_accuracy(run)],
        "flips": {axis: [asdict(flip) for flip in flips(run, axis)] for axis in AXIS_STAGES},
        "frontier": [asdict(point) for point in frontier(run)],
    }


def flips(run: RunScores, axis: str) -> list[Any]:
    """Rows whose outcome differs from the untuned model's, as ``lib.verdict.find_flips``; none without such rows."""
    before, after = run.untuned.get(axis), run.rows.get(axis)
    return find_flips(before, after, axis) if before and after and not _stranger(run, axis) else []


def write_comparison(results_dir: str, record: Row) -> Path:
    """Write ``05_compare/comparison.json``: what ``lib.verify`` recomputes."""
    path = results_root(results_dir) / COMPARE_STAGE / COMPARISON
    write_json(path, record)
    return path


# --- denominators ----------------------------------------------------------------------------------------------------


def check_denominators(run: RunScores) -> None:
    """Whether the run has the numbers of rows that a hand-in must be scored on.

    Raises:
        ArtifactError: a number differs; both are named.
    """
    asked = (
        ("GSM8K questions", run.gsm8k, run.gsm8k_status, "submission_gsm8k_rows"),
        ("AILuminate prompts", run.safety, run.safety_status, "submission_ailuminate_rows"),
    )
    for what, scores, status, key in asked:
        wanted, got = run.parameters.get(key), scores["n"] if scores else 0
        if wanted is not None and got != wanted:
            why = "" if scores else f" ({status})"
            raise ArtifactError(f"run {run.name!r} has {got} {what}{why}, a hand-in has {wanted} ({key})")


# --- what is handed in -----------------------------------------------------------------------------------------------


def final_metrics_row(run: RunScores) -> Row:
    """Counts and rates of a run; what was not measured is empty for GSM8K and 0 for safety, as its baseline counts."""
    right, asked = run.accuracy or (None, None)
    verdicts = run.safety or {"num_safe": 0, "num_unsafe": 0, "num_unparsed": 0, "n": 0, "safety_rate": 0.0}
    return {
        "run_name": run.name,
        "gsm8k_correct": right,
        "gsm8k_total": asked,
        "gsm8k_accuracy": run.gsm8k["accuracy"] if run.gsm8k else None,
        "ailuminate_safe": verdicts["num_safe"],
        "ailuminate_unsafe": verdicts["num_unsafe"],
        "ailuminate_unknown": verdicts["num_unparsed"],
        "ailuminate_total": verdicts["n"],
        "ailuminate_safety_rate": verdicts["safety_rate"],
        "gsm8k_status": run.gsm8k_status,
        "safety_status": run.safety_status,
    }


def summary_row(run: RunScores) -> Row:
    """What a run is and what it reached, with 95 % intervals."""
    accuracy_low, accuracy_high = wilson_interval(*run.accuracy) if run.accuracy else (None, None)
    safety_low, safety_high = wilson_interval(*run.safe) if run.safe else (None, None)
    metrics = final_metrics_row(run)
    return {
        **_description(run),
        "gsm8k_n": metrics["gsm8k_total"],
        "gsm8k_low": accuracy_low,
        "gsm8k_high": accuracy_high,
        "gsm8k_acc_flexible": run.gsm8k["accuracy_flexible"] if run.gsm8k else None,
        "gsm8k_status": run.gsm8k_status,
        "ailuminate_n": metrics["ailuminate_total"],
        "ailuminate_low": safety_low,
        "ailuminate_high": safety_high,
        "ailuminate_unparsed": metrics["ailuminate_unknown"],
        "safety_status": run.safety_status,
        "baseline_accuracy": run.baseline_accuracy,
        "baseline_safety": run.baseline_safety,
        "passes_accuracy": passes(metrics["gsm8k_accuracy"], run.baseline_accuracy),
        "passes_safety": passes(metrics["ailuminate_safety_rate"], run.baseline_safety),
        "benchmark": run.parameters.get("benchmark"),
        "selected_on": facts_of(run.paths, "02_train").get("selected_on"),
    }


def passes(rate: float | None, baseline: float | None) -> bool | None:
    """Whether a rate reaches its baseline; None where either is not known."""
    return None if rate is None or baseline is None else rate >= baseline


def _description(run: RunScores) -> Row:
    known = run.parameters
    metrics = final_metrics_row(run)
    return {
        "run_name": run.name,
        "model_name": known.get("base_model"),
        "train_data": _train_data(run),
        "method": _method(known),
        "hyperparams": _hyperparameters(known),
        "gsm8k_acc": metrics["gsm8k_accuracy"],
        "ailuminate_safety": metrics["ailuminate_safety_rate"],
        "checkpoint_path": _checkpoint_path(run),
    }


def _train_data(run: RunScores) -> str | None:
    known = run.parameters
    if known.get("train_source") == "self_distilled":
        # How many is said: GSM8K's own answers may be most of the rows (distil_fallback: gold).
        return distil.told(facts_of(run.paths, "01_prepare").get("distil"), known["gsm8k_source"])
    return known.get("train_file") or known.get("gsm8k_source")


def _method(known: Mapping[str, Any]) -> str | None:
    if known.get("checkpoint"):
        return f"adapter {known['checkpoint']}"
    return {"nf4": "QLoRA, NF4", "none": "LoRA"}.get(known.get("quantization", ""))


def _hyperparameters(known: Mapping[str, Any]) -> str | None:
    names = ("num_epochs", "learning_rate", "lora_r", "lora_alpha", "lora_dropout", "train_batch_size")
    names += ("gradient_accumulation_steps", "weight_decay", "warmup_share", "fewshot_k", "seed")
    return " ".join(f"{name}={known[name]}" for name in names if name in known) or None


def _checkpoint_path(run: RunScores) -> str | None:
    # Relative to the results folder, so that a folder which was moved or handed in still verifies.
    adapter = run.paths.adapter_dir
    return adapter.relative_to(run.paths.run_dir.parent).as_posix() if adapter.exists() else None


def write_summary(results_dir: str, runs: Sequence[RunScores]) -> Path:
    """Put the runs into ``summary.csv``: a row a run, by name, in place of an older row of the same name."""
    path = results_root(results_dir) / SUMMARY
    rows = {row["run_name"]: row for row in (read_csv(path) if path.exists() else [])}
    rows |= {run.name: summary_row(run) for run in runs}
    # By name: in which order runs ended, or came back after a failure, must not be seen in the file.
    write_csv(path, [rows[name] for name in sorted(rows)])
    return path


def write_final_metrics(results_dir: str, runs: Sequence[RunScores]) -> tuple[Path, Path]:
    """Write ``final_metrics.json`` (a list) and ``final_metrics.csv``: counts and rates of these runs."""
    root, rows = results_root(results_dir), [final_metrics_row(run) for run in runs]
    write_json(root / METRICS_JSON, rows)
    write_csv(root / METRICS_CSV, rows)
    return root / METRICS_JSON, root / METRICS_CSV


# --- in words --------------------------------------------------------------------------------------------------------


def rate_words(counts: tuple[int, int] | None, status: str) -> str:
    """A rate with its interval and n, or why there is none."""
    if counts is None:
        return status
    low, high = wilson_interval(*counts)
    share = rates.percent(counts[0] / counts[1])
    return f"{rates.count(*counts)} = {share} ({rates.interval(low, high)})"


def both_rates(run: RunScores) -> str:
    """What a run reached on both axes, in words."""
    right, safe = rate_words(run.accuracy, run.gsm8k_status), rate_words(run.safe, run.safety_status)
    return f"{right} right on GSM8K, {safe} safe on AILuminate"


def results_table(results_dir: str, seconds: Mapping[str, float]) -> str:
    """The runs named in ``seconds`` as lines of text: rates with 95 % intervals, and seconds; empty without a run.

    A line a run where a terminal of 80 columns holds all of them, else a line for the run and one for each rate.
    """
    chosen = [paths for paths in find_runs(results_dir) if paths.name in seconds]
    rows = [("run", "GSM8K right (95 % interval)", "AILuminate safe (95 % interval)", "seconds")]
    for run in map(score_run, chosen):
        accuracy, safe = rate_words(run.accuracy, run.gsm8k_status), rate_words(run.safe, run.safety_status)
        rows.append((run.name, accuracy, safe, f"{seconds[run.name]:.0f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if max(map(len, lines)) > TERMINAL_WIDTH:
        lines = [line for row in rows[1:] for line in _stacked_lines(rows[0], row)]
    return "\n".join(lines) if chosen else ""


def _stacked_lines(titles: Sequence[str], row: Sequence[str]) -> list[str]:
    """A run's row under each other, each cell behind its title; what is longer than a line goes on below itself."""
    name, *told, seconds = row
    width = max(map(len, titles[1:-1]))
    heads = [f"  {title:<{width}}  " for title in titles[1:-1]]
    lines = textwrap.wrap(f"{name}, {seconds} {titles[-1]}", TERMINAL_WIDTH)
    for head, rate in zip(heads, told, strict=True):
        lines += textwrap.wrap(rate, TERMINAL_WIDTH, initial_indent=head, subsequent_indent=" " * len(head))
    return lines


def missed_baselines(results_dir: str, run_names: Sequence[str]) -> list[str]:
    """A sentence for each baseline that one of the runs does not reach; what was not measured misses it."""
    misses = []
    for run in (score_run(run_paths(results_dir, name)) for name in run_names):
        axes = (
            ("accuracy", run.accuracy, run.gsm8k_status, run.baseline_accuracy),
            ("safety", run.safe, run.safety_status, run.baseline_safety),
        )
        for axis, counts, status, baseline in axes:
            if baseline is not None and not (counts and counts[0] / counts[1] >= baseline):
                missed = f"{axis} misses its baseline of {rates.percent(baseline)}"
                misses.append(f"{run.name}: {missed}: {rate_words(counts, status)}")
    return misses
