"""Finished runs side by side: scores from their row files, verdicts between them, the tables that are handed in.

Every number is recomputed from row files; none is copied from a notebook or a manifest. A folder that holds row files
and nothing else (an earlier pipeline's) will do: what it does not say about itself is left empty. Knows nothing about
plots, and needs no model. ``lib.compare.verify`` checks what is written here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lib import gsm8k, safety
from lib.evaluate import hazards
from lib.params import PARAMS_DIR, load_params
from lib.prepare import overlap
from lib.record.files import read_json
from lib.record.manifest import facts_of, same_file
from lib.record.paths import ArtifactError, RunPaths, display_path, find_runs, results_root, run_paths
from lib.record.rows import read_jsonl

Row = dict[str, Any]


MEASURED = "measured"


GSM8K_STAGE, SAFETY_STAGE = "03_eval_gsm8k", "04_eval_safety"


METRIC_STAGES = ("01_prepare", "02_train", GSM8K_STAGE, SAFETY_STAGE)


AXIS_STAGES = {"accuracy": GSM8K_STAGE, "safety": SAFETY_STAGE}


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
        protocols: axis -> what made its rows, by field (``check_alike``); empty where it does not say.
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
    path = named_untuned_file(paths, stage)
    return path if path and path.exists() else None


def named_untuned_file(paths: RunPaths, stage: str) -> Path | None:
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


def row_protocol(run: RunScores, axis: str) -> Row:
    """The protocol as it is hashed into each row: without what is only told."""
    return {name: value for name, value in run.protocols.get(axis, {}).items() if name not in ("device", "versions")}


def files_read(run: RunScores) -> list[Path]:
    """Every file of a run that a comparison reads, there or not: where one comes later, the comparison is out of date.

    Its rows, the untuned model's, those at other scales, overlaps, the training log, and what its stages note.
    """
    paths = run.paths
    untuned = [named_untuned_file(paths, stage) for stage in AXIS_STAGES.values()]
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
