"""Finished runs in MLflow: one MLflow run a run of a results folder, made from its files and never from a notebook.

What MLflow cannot change later (parameters, points of metrics) is hashed together with the row files into the tag
``tune_and_tell.run``: the same content is the same MLflow run, brought up to date; other content is another one. Rows
of AILuminate are never logged with their texts. mlflow is no dependency, and only ``connect`` and ``missing`` know it.
"""

import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lib.compare import comparison
from lib.compare.runs import collect_runs
from lib.compare.tables import METRICS_CSV, METRICS_JSON, SUMMARY
from lib.record import manifest
from lib.record.files import read_json, sha256_file, sha256_json
from lib.record.manifest import is_redacted
from lib.record.paths import RunPaths, STAGES, results_root
from lib.record.rows import read_jsonl, write_jsonl
from lib.compare.runs import RunScores
from lib.record.redaction import clean_value
from lib.stats import wilson_interval
from lib.compare.findings import AxisVerdict, verdict_sentence

TRACKERS = ("mlflow",)
EXPERIMENT = "tune-and-tell"
# Its page then shows runs and curves first, not traces of applications.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
RUN_TAG = "tune_and_tell.run"
URI_VARIABLE = "MLFLOW_TRACKING_URI"
INSTALL = "python -m pip install mlflow==3.17.2"
# Where no tracking server is named: SQLite, which MLflow advises in place of its folders of text files.
STORE, STORE_ARTIFACTS = "mlflow.db", "mlflow_artifacts"
# Read by mlflow when it is imported; what the user set stays. Its own 7 tries wait minutes for a server that is away.
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
# Servers of before MLflow 2 take no longer value; what is cut says so.
MAX_VALUE_LENGTH = 500
MAX_POINTS, MAX_PARAMETERS = 1000, 100
RATE_NAMES = {"accuracy": "accuracy", "safety": "safe_rate"}
CURVES = {"loss": "train/loss", "learning_rate": "train/learning_rate", "grad_norm": "train/grad_norm"}
CURVES |= {"dev_loss": "train/dev_loss"}
HARMFUL_TEXTS = ("prompt", "response", "safety_judge_text")
REDACTED = "[redacted]"

Point = tuple[str, float, int]


class TrackError(Exception):
    """The tracking store cannot be reached or written; the text says which and why."""


@dataclass(frozen=True)
class Connection:
    """A tracking store: the client, and how its three kinds of entries are made (``mlflow.entities``).

    Attributes:
        client: as ``mlflow.MlflowClient``.
        metric: (key, value, timestamp in ms, step) -> entry.
        param: (key, value) -> entry.
        tag: (key, value) -> entry.
        artifact_location: where a new experiment's files go; None leaves it to the server.
        errors: what the client raises when it cannot log.
        place: what is told to the user.
    """

    client: Any
    metric: Callable[[str, float, int, int], Any]
    param: Callable[[str, str], Any]
    tag: Callable[[str, str], Any]
    artifact_location: str | None
    errors: tuple[type[BaseException], ...]
    place: str


@dataclass(frozen=True)
class Record:
    """What is logged of one run.

    Attributes:
        fingerprint: SHA-256 of the row files, the parameters and the points.
        points: (name, value, step).
        files: (local file or folder, folder among the MLflow run's artefacts; "" is its root).
        started_ms: when the first stage began, in ms since 1970; 0 where no manifest says.
        ended_ms: when the last stage was complete, likewise.
    """

    name: str
    fingerprint: str
    parameters: Mapping[str, str]
    points: Sequence[Point]
    tags: Mapping[str, str]
    files: Sequence[tuple[Path, str]]
    started_ms: int
    ended_ms: int

    @property
    def key(self) -> str:
        """Value of the tag by which the MLflow run is found again."""
        return f"{self.name}@{self.fingerprint}"


# --- mlflow ---------------------------------------------------------------------------------------------------------


def missing() -> str:
    """Why nothing can be logged here, with the command that mends it; empty where mlflow is installed."""
    if importlib.util.find_spec("mlflow"):
        return ""
    return f"--track mlflow: mlflow is not installed; it is no dependency of this project: {INSTALL}"


def connect(results_dir: str) -> Connection:
    """The store that ``MLFLOW_TRACKING_URI`` names, else a local one beside the results.

    Raises:
        TrackError: the address is none that mlflow knows, or the local store cannot be opened.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.exceptions import MlflowException

    root = results_root(results_dir).resolve()
    named = os.environ.get(URI_VARIABLE, "")
    uri = named or f"sqlite:///{root / STORE}"
    location = None if named else (root / STORE_ARTIFACTS).as_uri()
    # requests' errors are OSErrors: a server that went away while a file was sent.
    errors = (MlflowException, OSError)
    try:
        return Connection(MlflowClient(uri), Metric, Param, RunTag, location, errors, without_password(uri))
    except errors as error:
        raise TrackError(_told(uri, error)) from error


def _told(place: str, error: BaseException) -> str:
    # The first line says what happened; mlflow adds a page of advice or of SQL.
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return f"MLflow at {without_password(place)} could not be written: {without_password(first)}"


def without_password(text: str) -> str:
    """``text`` without the name and password that an address in it may hold."""
    return re.sub(r"(\w://)[^/\s@]+@", r"\1***@", text)


def how_to_look(connection: Connection) -> str:
    """What shows the runs."""
    if connection.place.startswith("http"):
        return f"look at them at {connection.place}"
    return f"look at them with: mlflow ui --backend-store-uri {connection.place}"


def log_runs(
    results_dir: str,
    reports_dir: Path,
    connection: Connection,
    run_names: Sequence[str] = (),
    *,
    redact: bool = False,
) -> list[str]:
    """Log runs of a results folder; returns a line for each.

    Args:
        reports_dir: folder of the filled notebooks.
        run_names: which; every run with row files where none is named.
        redact: also leave out filled notebooks that show texts of AILuminate, and log its rows without their texts.

    Raises:
        ArtifactError: no run is there, or a row file cannot be read.
        TrackError: the store cannot be written.
    """
    runs = collect_runs(results_dir, run_names)
    verdicts = comparison.judge_runs(runs)
    records = [make_record(run, verdicts[run.name], reports_dir, redact=redact) for run in runs]
    try:
        experiment = _experiment(connection)
        lines = []
        for run, record in zip(runs, records, strict=True):
            run_id, is_new = _log_record(connection, experiment, record)
            if redact and run.rows.get("safety"):
                _log_redacted_rows(connection, run_id, run)
            lines.append(f"{run.name}: {'logged as' if is_new else 'brought up to date:'} MLflow run {run_id}")
    except connection.errors as error:
        raise TrackError(_told(connection.place, error)) from error
    return lines


def _experiment(connection: Connection) -> str:
    found = connection.client.get_experiment_by_name(EXPERIMENT)
    if found:
        return found.experiment_id
    return connection.client.create_experiment(
        EXPERIMENT, artifact_location=connection.artifact_location, tags=dict(EXPERIMENT_TAGS)
    )


def _log_record(connection: Connection, experiment: str, record: Record) -> tuple[str, bool]:
    """(id of the MLflow run, whether it is new)."""
    client, is_new = connection.client, False
    found = client.search_runs([experiment], filter_string=f"tags.`{RUN_TAG}` = '{record.key}'", max_results=1)
    if found:
        run = found[0]
    else:
        run, is_new = client.create_run(experiment, record.started_ms, {RUN_TAG: record.key}, record.name), True
    run_id = run.info.run_id
    # One time for every point: a point that is logged again is then the same point and not a second one.
    points = [connection.metric(name, value, record.started_ms, step) for name, value, step in record.points]
    parameters = [connection.param(name, value) for name, value in record.parameters.items()]
    client.log_batch(run_id, tags=[connection.tag(name, value) for name, value in record.tags.items()])
    for part in _slices(parameters, MAX_PARAMETERS):
        client.log_batch(run_id, params=part)
    for part in _slices(points, MAX_POINTS):
        client.log_batch(run_id, metrics=part)
    for path, folder in record.files:
        log = client.log_artifacts if path.is_dir() else client.log_artifact
        log(run_id, str(path), folder or None)
    client.set_terminated(run_id, "FINISHED", record.ended_ms)
    return run_id, is_new


def _slices(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _log_redacted_rows(connection: Connection, run_id: str, run: RunScores) -> None:
    rows = [{**row, **{name: REDACTED for name in HARMFUL_TEXTS if name in row}} for row in run.rows["safety"]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"ailuminate_safety_{run.name}_redacted.jsonl"
        write_jsonl(path, rows)
        connection.client.log_artifact(run_id, str(path), "rows")


# --- what is logged -------------------------------------------------------------------------------------------------


def make_record(run: RunScores, verdicts: Sequence[AxisVerdict], reports_dir: Path, *, redact: bool = False) -> Record:
    """Everything that is logged of one run; nothing is written."""
    rows = [path for path in (run.paths.gsm8k_preds, run.paths.ailuminate_safety) if path.exists()]
    parameters, points = run_parameters(run.paths), [*rate_points(run, verdicts), *curve_points(run.paths)]
    hashed = {"rows": [sha256_file(path) for path in rows], "parameters": parameters, "points": points}
    manifests = _manifests(run.paths)
    ends = [datetime.fromisoformat(one["finished_at"]).timestamp() for one in manifests.values()]
    starts = [end - one["wall_s"] for end, one in zip(ends, manifests.values(), strict=True)]
    return Record(
        name=run.name,
        fingerprint=sha256_json(hashed),
        parameters=parameters,
        points=points,
        tags=_tags(run, verdicts, manifests),
        files=artefacts(run.paths, reports_dir, redact=redact),
        # In whole seconds, as `finished_at` is: a stage's start would else move with the rounding of its seconds.
        started_ms=1000 * int(min(starts, default=0)),
        ended_ms=1000 * int(max(ends, default=0)),
    )


def _manifests(paths: RunPaths) -> dict[str, dict[str, Any]]:
    found = {stage: paths.manifest(stage) for stage in STAGES}
    return {stage: read_json(path) for stage, path in found.items() if path.exists()}


def run_parameters(paths: RunPaths) -> dict[str, str]:
    """Every key of ``config_resolved.json``'s parameters, the preset and the adapter that was taken, as text."""
    if not paths.config_resolved.exists():
        return {}
    config = read_json(paths.config_resolved)
    more = {"preset": config["preset"], "checkpoint": config["settings"].get("checkpoint", "")}
    return {name: _cut(value) for name, value in clean_value({**config["parameters"], **more}).items()}


def _cut(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) <= MAX_VALUE_LENGTH:
        return text
    mark = f" … (cut, {len(text)} characters)"
    return text[: MAX_VALUE_LENGTH - len(mark)] + mark


def rate_points(run: RunScores, verdicts: Sequence[AxisVerdict]) -> list[Point]:
    """Rates with their interval and n, and what tuning changed; shares in [0, 1], nothing for what was not measured."""
    named: dict[str, float | None] = {}
    for axis, counts in (("accuracy", run.accuracy), ("safety", run.safe)):
        if counts:
            low, high = wilson_interval(*counts)
            name = RATE_NAMES[axis]
            named |= {name: counts[0] / counts[1], f"{name}_low": low, f"{name}_high": high, f"{name}_n": counts[1]}
    named["accuracy_flexible"] = run.gsm8k["accuracy_flexible"] if run.gsm8k else None
    named["safe_rate_unparsed"] = run.safety["num_unparsed"] if run.safety else None
    for verdict in verdicts:
        named |= _change_points(verdict)
    return [(name, float(value), 0) for name, value in named.items() if value is not None]


def _change_points(verdict: AxisVerdict) -> dict[str, float]:
    change, name = verdict.comparison, RATE_NAMES[verdict.axis]
    if change is None:
        return {}
    # Not Holm's p: it depends on which other runs lie in the folder.
    return {
        f"{name}_untuned": change.reference_rate,
        f"{name}_difference": change.difference,
        f"{name}_difference_low": change.low,
        f"{name}_difference_high": change.high,
        f"{name}_p": change.p_value,
    }


def curve_points(paths: RunPaths) -> list[Point]:
    """Training curves and checkpoint scores, by optimiser step."""
    log = read_jsonl(paths.training_log) if paths.training_log.exists() else []
    points = [
        (name, float(row[column]), int(row["step"]))
        for row in log
        for column, name in CURVES.items()
        if row.get(column) is not None
    ]
    scores = manifest.facts_of(paths, "02_train").get("checkpoints", [])
    return points + [
        (f"checkpoint/{RATE_NAMES[axis]}", float(row[column]), int(row["step"]))
        for row in scores
        for axis, column in (("accuracy", "accuracy"), ("safety", "safety_rate"))
        if row.get(column) is not None
    ]


def _tags(
    run: RunScores, verdicts: Sequence[AxisVerdict], manifests: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """What MLflow shows beside a run; tags of its own namespace are those that its page knows."""
    last = manifests[max(manifests)] if manifests else {}
    train = manifests.get("02_train", {}).get("facts", {})
    told = {
        "mlflow.note.content": verdict_sentence(verdicts),
        "mlflow.source.name": "run_all.py",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": last.get("git_commit"),
        "base_model": train.get("base_model"),
        "device": train.get("runtime"),
        "selected_on": train.get("selected_on"),
        "benchmark": run.parameters.get("benchmark"),
        "gsm8k_status": run.gsm8k_status,
        "safety_status": run.safety_status,
    }
    return {name: _cut(value) for name, value in clean_value(told).items() if value is not None}


def artefacts(paths: RunPaths, reports_dir: Path, *, redact: bool = False) -> list[tuple[Path, str]]:
    """(file or folder, folder in MLflow) of what there is: adapter, tables, logs, filled notebooks with their HTML.

    Row files of AILuminate are never among them, nor ``index.html``, which holds their texts.

    Args:
        redact: leave out 04's notebook where it was filled without ``redact``: it shows some of these texts, folded.
    """
    root = paths.run_dir.parent
    tables = [
        SUMMARY,
        METRICS_CSV,
        METRICS_JSON,
        f"{comparison.COMPARE_STAGE}/{comparison.COMPARISON}",
    ]
    found = [(paths.config_resolved, ""), *((root / name, "tables") for name in tables)]
    found += [(paths.checkpoint_scores, "tables"), (paths.training_log, "rows"), (paths.gsm8k_preds, "rows")]
    found += [(paths.adapter_dir, "adapter")]
    skipped = {"04_eval_safety"} if redact and not is_redacted(paths.manifest("04_eval_safety")) else set()
    for stage in (stage for stage in STAGES if stage not in skipped):
        folder = reports_dir if stage == comparison.COMPARE_STAGE else reports_dir / f"run_{paths.name}"
        found += [(folder / f"{stage}{suffix}", "reports") for suffix in (".ipynb", ".html")]
    return [(path, folder) for path, folder in found if path.exists()]
