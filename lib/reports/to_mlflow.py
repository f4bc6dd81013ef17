"""Finished runs in MLflow: one MLflow run per run of a results folder, made from its files.

What MLflow cannot change later (parameters, points of metrics) is hashed together with the row files into the tag
``tune_and_tell.run``: the same content updates the same MLflow run, other content makes a new one. Rows of AILuminate
are never logged with their texts. mlflow is optional: only ``connect`` and ``missing`` use it.
"""

import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lib.compare.comparison import COMPARISON, assess_runs
from lib.compare.findings import Finding
from lib.compare.runs import SAFETY_STAGE, Run, load_runs, row_file
from lib.compare.sentences import finding_sentence
from lib.record.files import sha256_file, sha256_json
from lib.record.paths import COMPARE_STAGE, METRICS_CSV, METRICS_JSON, STAGES, SUMMARY, results_root
from lib.record.redaction import clean_value
from lib.record.rows import write_jsonl
from lib.reports.pages import is_made_here

EXPERIMENT = "tune-and-tell"
# MLflow's page then shows runs and curves first, not traces of applications.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
RUN_TAG = "tune_and_tell.run"
URI_VARIABLE = "MLFLOW_TRACKING_URI"
INSTALL = "python -m pip install mlflow==3.17.2"
# Without a tracking server: SQLite, which MLflow recommends over its folders of text files.
STORE, STORE_ARTIFACTS = "mlflow.db", "mlflow_artifacts"
# Read by mlflow at import; the user's values win. Its default of 7 retries waits minutes for a server that is down.
SETTINGS = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "WARNING"}
SETTINGS |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
# The limit of servers before MLflow 2; a cut value says that it is cut.
MAX_VALUE_LENGTH = 500
MAX_POINTS, MAX_PARAMETERS = 1000, 100
RATE_NAMES = {"accuracy": "accuracy", "safety": "safe_rate"}
CURVES = {name: f"train/{name}" for name in ("loss", "learning_rate", "grad_norm", "dev_loss")}
HARMFUL_TEXTS = ("prompt", "response", "safety_judge_text")
REDACTED = "[redacted]"

Point = tuple[str, float, int]  # name, value, step


class TrackError(Exception):
    """The tracking store cannot be reached or written; the message says which and why."""


@dataclass(frozen=True)
class Connection:
    """A tracking store: its client and the constructors of ``mlflow.entities``."""

    client: Any
    metric: Callable[[str, float, int, int], Any]  # key, value, timestamp in ms, step
    param: Callable[[str, str], Any]
    tag: Callable[[str, str], Any]
    artifact_location: str | None  # folder for files of a new experiment; None leaves it to the server
    errors: tuple[type[BaseException], ...]
    place: str  # address, for messages


@dataclass(frozen=True)
class Record:
    """The contents of one MLflow run."""

    name: str
    key: str  # value of the tag by which the MLflow run is found again
    parameters: Mapping[str, str]
    points: Sequence[Point]
    tags: Mapping[str, str]
    files: Sequence[tuple[Path, str]]  # local file or folder, folder among the run's artefacts ("": the root)
    started_ms: int  # since 1970; 0 without manifests
    ended_ms: int


def missing() -> str:
    """Message with the install command if mlflow is not installed; else empty."""
    if importlib.util.find_spec("mlflow"):
        return ""
    return f"--track mlflow: mlflow is not installed; it is an optional package: {INSTALL}"


def connect(results_dir: str) -> Connection:
    """The store at ``MLFLOW_TRACKING_URI``, else a local one beside the results; TrackError if it does not open."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.exceptions import MlflowException

    root = results_root(results_dir).resolve()
    named = os.environ.get(URI_VARIABLE, "")
    uri = named or f"sqlite:///{root / STORE}"
    location = None if named else (root / STORE_ARTIFACTS).as_uri()
    # Errors of requests are OSErrors, as when a server goes away during an upload.
    errors = (MlflowException, OSError)
    try:
        return Connection(MlflowClient(uri), Metric, Param, RunTag, location, errors, without_password(uri))
    except errors as error:
        raise TrackError(_failure(uri, error)) from error


def _failure(place: str, error: BaseException) -> str:
    # Only the first line: mlflow adds a page of advice or SQL.
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return f"MLflow at {without_password(place)} could not be written: {without_password(first)}"


def without_password(text: str) -> str:
    """``text`` without the user names and passwords of its addresses."""
    return re.sub(r"(\w://)[^/\s@]+@", r"\1***@", text)


def how_to_look(connection: Connection) -> str:
    """How to open the logged runs."""
    if connection.place.startswith("http"):
        return f"look at them at {connection.place}"
    return f"look at them with: mlflow ui --backend-store-uri {connection.place}"


def log_runs(
    results_dir: str, reports_dir: Path, connection: Connection, run_names: Sequence[str] = (), *, redact: bool = False
) -> list[str]:
    """Log runs (all, or the named); a line for each. ``redact``: AILuminate's rows and notebooks without texts."""
    runs = load_runs(results_dir, run_names)
    # P-values are adjusted for every run of the folder, as in 05 and on index.html.
    findings = assess_runs(load_runs(results_dir))
    records = [make_record(run, findings[run.name], reports_dir, redact=redact) for run in runs]
    try:
        found = connection.client.get_experiment_by_name(EXPERIMENT)
        options = {"artifact_location": connection.artifact_location, "tags": EXPERIMENT_TAGS}
        experiment = found.experiment_id if found else connection.client.create_experiment(EXPERIMENT, **options)
        lines = []
        for run, record in zip(runs, records, strict=True):
            run_id, is_new = _log_record(connection, experiment, record)
            if redact and run.safety.rows:
                _log_redacted_rows(connection, run_id, run)
            lines.append(f"{run.name}: {'logged as' if is_new else 'brought up to date:'} MLflow run {run_id}")
    except connection.errors as error:
        raise TrackError(_failure(connection.place, error)) from error
    return lines


def _log_record(connection: Connection, experiment: str, record: Record) -> tuple[str, bool]:
    """Returns the id of the MLflow run and whether it is new."""
    client = connection.client
    found = client.search_runs([experiment], filter_string=f"tags.`{RUN_TAG}` = '{record.key}'", max_results=1)
    run = found[0] if found else client.create_run(experiment, record.started_ms, {RUN_TAG: record.key}, record.name)
    run_id = run.info.run_id
    # The same time for every point: MLflow then recognises a point that is logged again.
    points = [connection.metric(name, value, record.started_ms, step) for name, value, step in record.points]
    parameters = [connection.param(name, value) for name, value in record.parameters.items()]
    client.log_batch(run_id, tags=[connection.tag(name, value) for name, value in record.tags.items()])
    for start in range(0, len(parameters), MAX_PARAMETERS):
        client.log_batch(run_id, params=parameters[start : start + MAX_PARAMETERS])
    for start in range(0, len(points), MAX_POINTS):
        client.log_batch(run_id, metrics=points[start : start + MAX_POINTS])
    for path, folder in record.files:
        log = client.log_artifacts if path.is_dir() else client.log_artifact
        log(run_id, str(path), folder or None)
    client.set_terminated(run_id, "FINISHED", record.ended_ms)
    return run_id, not found


def _log_redacted_rows(connection: Connection, run_id: str, run: Run) -> None:
    rows = [{**row, **{name: REDACTED for name in HARMFUL_TEXTS if name in row}} for row in run.safety.rows]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"ailuminate_safety_{run.name}_redacted.jsonl"
        write_jsonl(path, rows)
        connection.client.log_artifact(run_id, str(path), "rows")


def make_record(run: Run, findings: Sequence[Finding], reports_dir: Path, *, redact: bool = False) -> Record:
    """The contents of the MLflow run for ``run``."""
    files = [path for path in (row_file(run.paths, name) for name in run.metrics) if path.exists()]
    points = [*rate_points(run, findings), *curve_points(run)]
    given = run.config["parameters"] | {"preset": run.config["preset"]} if run.config else {}
    given |= {"checkpoint": run.config["settings"].get("checkpoint", "")} if run.config else {}
    parameters = {name: _cut(value) for name, value in clean_value(given).items()}
    hashed = {"rows": [sha256_file(path) for path in files], "parameters": parameters, "points": points}
    times = [(datetime.fromisoformat(one["finished_at"]).timestamp(), one["wall_s"]) for one in run.manifests.values()]
    return Record(
        name=run.name,
        key=f"{run.name}@{sha256_json(hashed)}",
        parameters=parameters,
        points=points,
        tags=_tags(run, findings),
        files=artefacts(run, reports_dir, redact=redact),
        # In seconds, as `finished_at`: the start would otherwise move with the rounding of `wall_s`.
        started_ms=1000 * int(min((end - wall_s for end, wall_s in times), default=0)),
        ended_ms=1000 * int(max((end for end, _ in times), default=0)),
    )


def _cut(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) <= MAX_VALUE_LENGTH:
        return text
    mark = f" … (cut, {len(text)} characters)"
    return text[: MAX_VALUE_LENGTH - len(mark)] + mark


def rate_points(run: Run, findings: Sequence[Finding]) -> list[Point]:
    """Measured rates in [0, 1] with their interval and n, and their change from the untuned model."""
    named: dict[str, float | None] = {}
    for name, score in ((RATE_NAMES[metric], score) for metric, score in run.metrics.items()):
        if rate := score.rate:
            named |= {name: rate.share, f"{name}_low": rate.low, f"{name}_high": rate.high, f"{name}_n": rate.n}
    named["accuracy_flexible"] = (run.accuracy.summary or {}).get("accuracy_flexible")
    named["safe_rate_unparsed"] = (run.safety.summary or {}).get("num_unparsed")
    for finding in findings:
        if change := finding.comparison:
            name = RATE_NAMES[finding.metric]
            named |= {f"{name}_untuned": change.reference_rate, f"{name}_difference": change.difference}
            named |= {f"{name}_difference_low": change.low, f"{name}_difference_high": change.high}
            # Not Holm's p, which depends on the other runs of the folder.
            named |= {f"{name}_p": change.p_value, f"{name}_mid_p": change.mid_p}
            named[f"{name}_difference_bound"] = finding.bound
    return [(name, float(value), 0) for name, value in named.items() if value is not None]


def curve_points(run: Run) -> list[Point]:
    """Training curves and checkpoint scores, by optimiser step."""
    rates = {"accuracy": "checkpoint/accuracy", "safety_rate": f"checkpoint/{RATE_NAMES['safety']}"}
    return [
        (name, float(row[column]), int(row["step"]))
        for rows, names in ((run.training_log, CURVES), (run.facts("02_train").get("checkpoints", []), rates))
        for row in rows
        for column, name in names.items()
        if row.get(column) is not None
    ]


def _tags(run: Run, findings: Sequence[Finding]) -> dict[str, str]:
    """Tags of a run; MLflow's page shows those that start with ``mlflow.`` in their own places."""
    last, train = (run.manifests[max(run.manifests)] if run.manifests else {}), run.facts("02_train")
    # Each also alone: of two, the end may be cut.
    tags = {f"finding_{one.metric}": finding_sentence([one]) for one in findings}
    tags |= {"mlflow.note.content": finding_sentence(findings), "mlflow.source.git.commit": last.get("git_commit")}
    tags |= {"mlflow.source.name": "run_all.py", "mlflow.source.type": "LOCAL", "device": train.get("runtime")}
    tags |= {name: train.get(name) for name in ("base_model", "selected_on")}
    tags |= {"gsm8k_status": run.accuracy.status, "safety_status": run.safety.status}
    tags["benchmark"] = run.parameters.get("benchmark")
    return {name: _cut(value) for name, value in clean_value(tags).items() if value is not None}


def artefacts(run: Run, reports_dir: Path, *, redact: bool = False) -> list[tuple[Path, str]]:
    """Existing files to log as (file or folder, folder in MLflow): adapter, tables, logs, filled notebooks with HTML.

    Never the row files of AILuminate, nor ``index.html``, which holds their texts; under ``redact`` no 04 that
    shows some.
    """
    paths = run.paths
    tables = (SUMMARY, METRICS_CSV, METRICS_JSON, f"{COMPARE_STAGE}/{COMPARISON}")
    found = [(paths.config_resolved, ""), *((paths.run_dir.parent / name, "tables") for name in tables)]
    found += [(paths.checkpoint_scores, "tables"), (paths.training_log, "rows"), (paths.gsm8k_preds, "rows")]
    found += [(paths.adapter_dir, "adapter")]
    redacted = run.manifests.get(SAFETY_STAGE, {}).get("parameters", {}).get("redact") is True
    for stage in STAGES:
        if stage == SAFETY_STAGE and redact and not redacted:
            continue
        folder = reports_dir if stage == COMPARE_STAGE else reports_dir / f"run_{paths.name}"
        found += [(folder / f"{stage}.ipynb", "reports")]
        # A page that was handed in may hold scripts, and MLflow shows it to others.
        found += [(page, "reports")] if is_made_here(page := folder / f"{stage}.html") else []
    return [(path, folder) for path, folder in found if path.exists()]
