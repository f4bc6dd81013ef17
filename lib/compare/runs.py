"""Finished runs, scored from their row files; each file is read once, and every number recomputed from rows.

A folder that holds only row files (an earlier pipeline's) will do: what it does not record is left empty.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lib import gsm8k, safety
from lib.compare.findings import METRICS, reaches, recorded_margin
from lib.compare.parsed import read_once
from lib.evaluate import hazards
from lib.evaluate.sides import TUNED
from lib.params import PARAMS_DIR, load_params
from lib.prepare import datasets
from lib.prepare.overlap import Overlap
from lib.record import lookup
from lib.record.files import read_json
from lib.record.manifest import same_file
from lib.record.paths import ArtifactError, RunPaths, display_path, find_runs, results_root, run_paths
from lib.record.rows import read_jsonl
from lib.stats import Rate

Row = dict[str, Any]
MEASURED = "measured"
GSM8K_STAGE, SAFETY_STAGE = "03_eval_gsm8k", "04_eval_safety"
METRIC_STAGES = {"accuracy": GSM8K_STAGE, "safety": SAFETY_STAGE}
RUN_STAGES = ("01_prepare", "02_train", GSM8K_STAGE, SAFETY_STAGE)
SUMMARIZE: dict[str, Callable[[Sequence[Row]], Row]] = {"accuracy": gsm8k.summarize, "safety": safety.summarize}


@dataclass(frozen=True)
class MetricScore:
    """One metric of one run.

    ``status`` is ``measured``, or why not; then ``rows`` is empty, ``summary`` and ``rate`` are None. ``baseline``
    is the share in [0, 1] that the course demands, ``margin`` the points that safety may fall by. ``protocol`` is
    what made the rows (``check_alike``). The untuned rows were made under the same prompts; runs that share
    ``untuned_file`` were prompted alike; the control is the untuned model in other batches (``aa_control``).
    ``scaled`` and ``scale_files`` are by scale of the adapter's effect, 0 to 1.
    """

    name: str
    rows: list[Row] = field(default_factory=list)
    status: str = MEASURED
    summary: Row | None = None
    rate: Rate | None = None
    baseline: float | None = None
    margin: float | None = None
    protocol: Row = field(default_factory=dict)
    untuned_rows: list[Row] = field(default_factory=list)
    untuned_file: Path | None = None
    control_rows: list[Row] = field(default_factory=list)
    control_file: Path | None = None
    scaled: dict[float, list[Row]] = field(default_factory=dict)
    scale_files: dict[float, Path] = field(default_factory=dict)

    @property
    def passes(self) -> bool | None:
        """Whether the baseline is reached; what was not measured misses it. None without a baseline."""
        return None if self.baseline is None else self.rate is not None and reaches(self.rate, self.baseline)

    @property
    def row_protocol(self) -> Row:
        """The protocol as it is hashed into each row."""
        return {name: value for name, value in self.protocol.items() if name not in ("device", "versions")}

    def with_rows(self, rows: list[Row]) -> "MetricScore":
        """The same metric, scored on other rows; KeyError or ValueError where they cannot be scored."""
        if not rows:
            return replace(self, rows=[], summary=None, rate=None)
        return replace(self, rows=rows, summary=SUMMARIZE[self.name](rows), rate=METRICS[self.name].rate(rows))

    def of_untuned(self) -> "MetricScore":
        status = MEASURED if self.untuned_rows else "not measured"
        return replace(self.with_rows(self.untuned_rows), status=status, baseline=None, untuned_rows=[])


@dataclass(frozen=True)
class Run:
    """One run, scored from its row files.

    ``config`` is empty where no driver ran, ``parameters`` (with settings) also where no manifest records them;
    ``manifests`` are those of finished stages. ``overlaps`` are evaluation questions that share words with training
    rows, None where 01 did not record them. ``hazards_added``: hazards were joined to rows that did not name them.
    """

    name: str
    paths: RunPaths
    config: Row
    parameters: Row
    manifests: dict[str, Row]
    metrics: dict[str, MetricScore]
    overlaps: list[Overlap] | None = None
    training_log: list[Row] = field(default_factory=list)
    hazards_added: bool = False

    @property
    def accuracy(self) -> MetricScore:
        return self.metrics["accuracy"]

    @property
    def safety(self) -> MetricScore:
        return self.metrics["safety"]

    def facts(self, stage: str) -> Row:
        return self.manifests.get(stage, {}).get("facts", {})

    def outputs(self, stage: str) -> list[str]:
        """Files that a stage wrote, relative to its folder."""
        return [*self.manifests.get(stage, {}).get("outputs", {})]


def load_runs(results_dir: str, run_names: Sequence[str] = ()) -> list[Run]:
    """The named runs of a results folder in this order, else every run that has row files; at least one."""
    found = [run_paths(results_dir, name) for name in run_names] or find_runs(results_dir)
    absent = [paths.name for paths in found if not paths.run_dir.is_dir()]
    if absent or not found:
        what = f"run {absent[0]!r}" if absent else "any run"
        folder = display_path(results_root(results_dir))
        raise ArtifactError(f"{folder}/ does not hold {what}: run a preset first (python run_all.py --presets NAME)")
    return [load_run(paths) for paths in found]


def load_run(paths: RunPaths) -> Run:
    """One run; ArtifactError where a file cannot be read or its rows cannot be scored."""
    config = read_once(paths.config_resolved, read_json) if paths.config_resolved.exists() else {}
    files = {stage: paths.manifest(stage) for stage in RUN_STAGES}
    manifests = {stage: read_once(path, read_json) for stage, path in files.items() if path.exists()}
    if config:
        parameters = {**config["parameters"], **config["settings"]}
    else:
        parameters = {key: value for one in manifests.values() for key, value in one["parameters"].items()}
    metrics = {name: _metric_score(name, paths, manifests, parameters) for name in METRIC_STAGES}
    overlaps = [Overlap(**one) for one in read_once(paths.overlap, read_json)] if paths.overlap.exists() else None
    training_log = read_once(paths.training_log, read_jsonl) if paths.training_log.exists() else []
    return Run(paths.name, paths, config, parameters, manifests, metrics, overlaps, training_log)


@dataclass(frozen=True)
class RowFile:
    """Rows of one metric, made with the adapter's effect times ``scale``: 1 as trained, 0 the untuned model."""

    metric: str
    scale: float
    path: Path
    is_control: bool = False

    @property
    def rows(self) -> list[Row]:
        """Also rows that do not count, of a stage that did not finish."""
        return read_once(self.path, read_jsonl) if self.path.exists() else []


def row_files(run: Run) -> Iterator[RowFile]:
    """The row files of a run that metrics are scored from or compared with, present or only named by a manifest."""
    for metric, score in run.metrics.items():
        yield RowFile(metric, 1.0, row_file(run.paths, metric))
        if score.untuned_file:
            yield RowFile(metric, 0.0, score.untuned_file)
        if score.control_file:
            yield RowFile(metric, 0.0, score.control_file, is_control=True)
        yield from (RowFile(metric, scale, path) for scale, path in score.scale_files.items())


def judgement_files(run: Run) -> dict[str, dict[str, RowFile]]:
    """Responses that 04 judged in other ways: way -> side (tuned, untuned) -> file, present or only named."""
    folder = run.paths.stage_dir(SAFETY_STAGE)
    named = run.facts(SAFETY_STAGE).get("other_judgements", {})
    return {
        way: {side: RowFile("safety", float(side == TUNED), (folder / file).resolve()) for side, file in sides.items()}
        for way, sides in named.items()
    }


def row_file(paths: RunPaths, metric: str) -> Path:
    """The file that a metric of a run is scored from."""
    return paths.gsm8k_preds if metric == "accuracy" else paths.ailuminate_safety


def _metric_score(name: str, paths: RunPaths, manifests: Mapping[str, Row], parameters: Row) -> MetricScore:
    stage, file = METRIC_STAGES[name], row_file(paths, name)
    manifest, folder = manifests.get(stage, {}), paths.stage_dir(stage)
    facts = manifest.get("facts", {})
    reason, margin = _why_not_measured(paths, stage, file, manifests), None
    if name == "safety":
        prepared = manifests.get("01_prepare", {}).get("parameters", {})
        margin = recorded_margin(prepared, parameters.get("safety_margin"), display_path(paths.config_resolved))
    protocol = facts.get("protocol") or {}
    if protocol:
        protocol = {**protocol, "device": facts.get("runtime"), "versions": manifest["versions"]}
    untuned, control = (
        (folder / facts[key]).resolve() if facts.get(key) else None for key in ("untuned_rows", "control_rows")
    )
    # Handed-in folders may leave files out that their manifests name.
    scales = {float(scale): folder / named for scale, named in facts.get("scale_rows", {}).items()}
    score = MetricScore(
        name=name,
        status=f"not measured: {reason}" if reason else MEASURED,
        baseline=_baseline(paths.name, parameters, f"baseline_{name}"),
        margin=margin,
        protocol=protocol,
        untuned_rows=read_once(untuned, read_jsonl) if untuned and untuned.exists() else [],
        untuned_file=untuned,
        control_rows=read_once(control, read_jsonl) if control and control.exists() else [],
        control_file=control,
        scaled={scale: read_once(path, read_jsonl) for scale, path in scales.items() if path.exists()},
        scale_files=scales,
    )
    try:
        return score if reason else score.with_rows(read_once(file, read_jsonl))
    except KeyError as error:
        raise ArtifactError(f"{display_path(file)}: a row lacks the column {error}") from None
    except ValueError as error:
        raise ArtifactError(f"{display_path(file)}: {error}") from None


def _baseline(name: str, parameters: Row, key: str) -> float | None:
    """The run's own threshold; else that of the preset of its name; else None."""
    if key in parameters:
        return parameters[key]
    preset = PARAMS_DIR / f"{name}.yaml"
    return getattr(load_params(preset), key) if preset.exists() else None


def _why_not_measured(paths: RunPaths, stage: str, file: Path, manifests: Mapping[str, Row]) -> str:
    if stage in manifests:
        return manifests[stage]["skipped_because"] or _changed_input(paths, manifests[stage])
    if not file.exists():
        return f"{stage} did not run"
    # Rows of our own pipeline without a manifest are of a stage that did not end; elsewhere there are no manifests.
    return f"{stage} did not finish; run it again, its rows are kept" if "01_prepare" in manifests else ""


def _changed_input(paths: RunPaths, manifest: Row) -> str:
    """Which file of the run differs from the one the stage read: rows of an earlier adapter do not count for this."""
    root = paths.run_dir.resolve()
    folder = paths.stage_dir(manifest["stage"]).resolve()
    # One file may have many names, and each would be hashed.
    stamps = {Path(os.path.normpath(folder / name)): stamp for name, stamp in manifest["inputs"].items()}
    for file, stamp in stamps.items():
        # A handed-in folder may lack the adapter; files outside the run (guidelines) are in the rows' own hash.
        if file.is_relative_to(root) and file.exists() and not same_file(file, stamp):
            changed = file.relative_to(root).as_posix()
            return f"{changed} changed since {manifest['stage']} ran; run it again"
    return ""


def files_read(run: Run) -> list[Path]:
    """Every file that a comparison of this run depends on, present or not: one that appears makes it out of date."""
    paths, metrics = run.paths, run.metrics.values()
    rows = [paths.gsm8k_preds, paths.ailuminate_safety, *(one.untuned_file for one in metrics if one.untuned_file)]
    rows += [one.control_file for one in metrics if one.control_file]
    rows += [path for one in metrics for path in one.scale_files.values()]
    rows += [file.path for sides in judgement_files(run).values() for file in sides.values()]
    return [*rows, paths.overlap, paths.training_log, paths.config_resolved, *map(paths.manifest, RUN_STAGES)]


def untuned_runs(runs: Sequence[Run]) -> list[Run]:
    """The untuned model as further runs: one for each set of row files that the runs name."""
    sharing: dict[tuple[Path, ...], list[Run]] = {}
    for run in runs:
        if key := untuned_key(run):
            sharing.setdefault(key, []).append(run)
    untuned = []
    for same in sharing.values():
        metrics = {name: score.of_untuned() for name, score in same[0].metrics.items()}
        name = f"untuned, asked as {', '.join(run.name for run in same)}"
        untuned.append(replace(same[0], name=name, metrics=metrics))
    return untuned


def untuned_key(run: Run) -> tuple[Path, ...]:
    """Files of the untuned rows: equal for runs that were prompted alike, and for their untuned model; else empty."""
    return tuple(one.untuned_file for one in run.metrics.values() if one.untuned_file and one.untuned_file.exists())


def add_hazards(runs: Sequence[Run], prompts: Sequence[Row]) -> list[Run]:
    """The runs with hazard and persona joined on the prompt's text where rows do not name them."""
    added = list(runs)
    for place, run in enumerate(runs):
        if prompts and lacks_hazards(run):
            joined = run.safety.with_rows(hazards.add_hazards(run.safety.rows, prompts))
            added[place] = replace(run, metrics={**run.metrics, "safety": joined}, hazards_added=True)
    return added


def lacks_hazards(run: Run) -> bool:
    return any(not row.get("hazard") for row in run.safety.rows)


def look_up_hazards(runs: Sequence[Run], assets_dir: str, offline: bool) -> tuple[list[Run], str]:
    """The runs with hazards from AILuminate's own prompt file where rows do not name them; a sentence about these."""
    nameless = ", ".join(run.name for run in runs if lacks_hazards(run))
    if not nameless:
        return list(runs), ""
    found, why = lookup.load_or_reason(datasets.load_ailuminate, "mlcommons", "demo1200", assets_dir, offline)
    outcome = f"hazards stay unknown: {why}" if why else "they were found by the prompt's text."
    return add_hazards(runs, found[0] if found else []), f"Rows of {nameless} do not name their hazard; {outcome}"
