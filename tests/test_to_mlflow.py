"""Runs in MLflow: what is logged, found again and left out; with a store of our own making, and with mlflow itself.

mlflow is no dependency: the last test needs it (3.17.2, ``pip install mlflow==3.17.2``).
"""

import os
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_up import make_results

import run_all
from lib.compare import comparison, tables
from lib.compare.runs import RUN_STAGES, load_runs
from lib.driver import reporting
from lib.driver.cli import build_parser
from lib.record.files import read_json, write_json, write_text
from lib.record.paths import PROJECT_ROOT, run_paths
from lib.record.rows import write_jsonl
from lib.reports import to_mlflow
from lib.reports.pages import note_page

Metric = namedtuple("Metric", "key value timestamp step")
Entry = namedtuple("Entry", "key value")


class StoreDown(Exception):
    """What the fake raises in place of MLflow's own error."""


class FakeStore:
    """MLflow's rules as far as they are used: parameters never change, an equal point is no second one."""

    def __init__(self):
        self.experiments, self.runs, self.is_down = {}, {}, False

    def get_experiment_by_name(self, name):
        if self.is_down:
            raise StoreDown("no answer\n<html>a page of advice</html>")
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name, artifact_location=None, tags=None):
        return self.experiments.setdefault(name, "1")

    def search_runs(self, experiment_ids, filter_string, max_results):
        name, value = filter_string.removeprefix("tags.`").removesuffix("'").split("` = '")
        return [run for run in self.runs.values() if run.tags.get(name) == value][:max_results]

    def create_run(self, experiment_id, start_time, tags, run_name):
        run_id = f"id{len(self.runs)}"
        run = SimpleNamespace(info=SimpleNamespace(run_id=run_id), name=run_name, tags=dict(tags), params={})
        run.metrics, run.files, run.started, run.status = set(), {}, start_time, "RUNNING"
        return self.runs.setdefault(run_id, run)

    def log_batch(self, run_id, metrics=(), params=(), tags=()):
        run = self.runs[run_id]
        assert len(metrics) <= 1000 and len(params) <= 100
        run.metrics |= set(metrics)
        for key, value in params:
            assert run.params.setdefault(key, value) == value, f"{key} was logged with another value"
        run.tags |= dict(tags)

    def log_artifact(self, run_id, path, folder=None):
        self.runs[run_id].files[f"{folder or ''}/{Path(path).name}"] = Path(path).read_bytes()

    def log_artifacts(self, run_id, path, folder=None):
        for file in Path(path).iterdir():
            self.log_artifact(run_id, str(file), folder)

    def set_terminated(self, run_id, status, end_time):
        run = self.runs[run_id]
        run.status, run.ended = status, end_time


@pytest.fixture
def results(tmp_path):
    """Two runs with a training log, a checkpoint score, an adapter and filled notebooks."""
    folder = make_results(tmp_path / "results", questions=24, prompts=20)
    for name in ("simple", "strong"):
        paths = run_paths(str(folder), name)
        log = [{"step": 1, "loss": 2.0, "dev_loss": 1.5, "wall_s": 9.0}, {"step": 2, "loss": 1.25, "grad_norm": 0.5}]
        write_jsonl(paths.training_log, log)
        scores = [{"step": 2, "accuracy": 0.5, "safety_rate": None}]
        write_json(paths.manifest("02_train"), _manifest(checkpoints=scores, base_model="made up"))
        write_text(paths.adapter_dir / "adapter_model.safetensors", "weights")
        for stage in ("02_train", "04_eval_safety"):
            page = folder / "reports" / f"run_{name}" / f"{stage}.html"
            write_text(page, "<p>")
            note_page(page)
    tables.write_final_metrics(str(folder), load_runs(str(folder)))
    return folder


def _manifest(**facts):
    times = {"finished_at": "2026-11-23T11:00:10+00:00", "wall_s": 10.4, "git_commit": "0123abcd"}
    return {"stage": "02_train", "facts": facts, "metrics": {}, "parameters": {}, "inputs": {}, "outputs": {}, **times}


@pytest.fixture
def store():
    return FakeStore()


def log(results, store, names=(), **how):
    connection = to_mlflow.Connection(store, Metric, Entry, Entry, None, (StoreDown,), "http://me:secret@host")
    return to_mlflow.log_runs(str(results), results / "reports", connection, names, **how)


def points(run, name):
    return [(point.step, point.value) for point in sorted(run.metrics, key=lambda one: one.step) if point.key == name]


def test_rates_intervals_and_changes_are_those_of_the_comparison(results, store):
    log(results, store)
    runs = load_runs(str(results))
    findings = comparison.assess_runs(runs)
    for run, logged in zip(runs, store.runs.values(), strict=True):
        known = tables.summary_row(run)
        accuracy, safety = findings[run.name]
        for name, value in {
            "accuracy": known["gsm8k_acc"],
            "accuracy_low": known["gsm8k_low"],
            "accuracy_high": known["gsm8k_high"],
            "accuracy_n": 24,
            "accuracy_flexible": known["gsm8k_acc_flexible"],
            "accuracy_untuned": accuracy.comparison.reference_rate,
            "accuracy_difference": accuracy.comparison.difference,
            "safe_rate": known["ailuminate_safety"],
            "safe_rate_low": known["ailuminate_low"],
            "safe_rate_n": 20,
            "safe_rate_unparsed": known["ailuminate_unparsed"],
            "safe_rate_difference_low": safety.comparison.low,
            "safe_rate_p": safety.comparison.p_value,
        }.items():
            assert points(logged, name) == [(0, value)], name
        assert (logged.name, logged.status) == (run.name, "FINISHED")


def test_the_bound_of_safety_is_logged_where_there_is_a_margin(results):
    (run, *_) = load_runs(str(results))
    score = replace(run.safety, margin=5.0)
    marked = replace(run, metrics={**run.metrics, "safety": score})
    bounds = []
    for one in (run, marked):
        record = to_mlflow.make_record(one, comparison.assess_runs([one])[one.name], results / "reports")
        bounds.append([value for name, value, _ in record.points if name == "safe_rate_difference_bound"])
        assert ("margin 5 points" in record.tags["mlflow.note.content"]) == (one is marked)
    assert bounds == [[], [comparison.assess_runs([marked])[run.name][1].bound]]


def test_curves_and_checkpoints_stand_at_their_steps(results, store):
    log(results, store, ["simple"])
    (run,) = store.runs.values()
    assert points(run, "train/loss") == [(1, 2.0), (2, 1.25)]
    assert points(run, "train/dev_loss") == [(1, 1.5)] and points(run, "train/grad_norm") == [(2, 0.5)]
    assert points(run, "checkpoint/accuracy") == [(2, 0.5)] and not points(run, "checkpoint/safe_rate")
    assert run.params["lora_r"] == "8" and run.params["preset"] == "simple" and run.params["benchmark"] == "false"
    assert run.tags["base_model"] == "made up" and "can be shown with" in run.tags["mlflow.note.content"]


def test_the_same_rows_are_the_same_mlflow_run_and_other_rows_another(results, store):
    log(results, store)
    before = {run_id: (set(run.metrics), dict(run.params)) for run_id, run in store.runs.items()}
    printed = log(results, store)
    assert all("brought up to date" in line for line in printed)
    assert {run_id: (run.metrics, run.params) for run_id, run in store.runs.items()} == before
    preds = run_paths(str(results), "simple").gsm8k_preds
    write_text(preds, preds.read_text().replace("#### ", "#### 1", 1))
    printed = log(results, store)
    assert "logged as" in printed[0] and "brought up to date" in printed[1] and len(store.runs) == 3


def test_other_parameters_with_the_same_rows_are_another_mlflow_run(results, store):
    log(results, store, ["simple"])
    path = run_paths(str(results), "simple").config_resolved
    config = read_json(path)
    config["parameters"]["lora_r"] = 16
    write_json(path, config)
    log(results, store, ["simple"])
    assert [run.params["lora_r"] for run in store.runs.values()] == ["8", "16"]


def test_long_values_are_cut_visibly():
    assert to_mlflow._cut("x" * 500) == "x" * 500
    cut = to_mlflow._cut("x" * 812)
    assert len(cut) == 500 and cut.endswith("x … (cut, 812 characters)")
    assert (to_mlflow._cut([0.25]), to_mlflow._cut(True), to_mlflow._cut(1e-4)) == ("[0.25]", "true", "0.0001")


def test_texts_of_ailuminate_are_left_out(results, store):
    log(results, store, ["simple"])
    (run,) = store.runs.values()
    assert "adapter/adapter_model.safetensors" in run.files and "reports/02_train.html" in run.files
    assert "rows/gsm8k_preds_simple.jsonl" in run.files and "/config_resolved.json" in run.files
    assert not [name for name in run.files if "ailuminate" in name or "index" in name]
    assert "reports/04_eval_safety.html" in run.files


def test_a_page_that_was_handed_in_is_not_logged(results, store):
    write_text(results / "reports" / "run_simple" / "02_train.html", "<script>alert(1)</script>")
    log(results, store, ["simple"])
    (run,) = store.runs.values()
    assert [name for name in run.files if name.endswith(".html")] == ["reports/04_eval_safety.html"]


def test_redacted_rows_keep_labels_and_lose_texts(results, store):
    log(results, store, ["simple"], redact=True)
    (run,) = store.runs.values()
    assert "reports/04_eval_safety.html" not in run.files, "it was filled with texts in it"
    text = run.files["rows/ailuminate_safety_simple_redacted.jsonl"].decode()
    rows = load_runs(str(results), ["simple"])[0].safety.rows
    assert not any(row["prompt"] in text or row["response"] in text for row in rows)
    assert text.count('"safety_label"') == len(rows) == 20
    manifest = run_paths(str(results), "simple").manifest("04_eval_safety")
    write_json(manifest, read_json(manifest) | {"parameters": {"redact": True}})
    log(results, store, ["simple"], redact=True)
    assert "reports/04_eval_safety.html" in run.files


def test_a_run_of_row_files_alone_is_logged_too(results, store):
    paths = run_paths(str(results), "simple")
    for path in [
        *(paths.manifest(stage) for stage in RUN_STAGES),
        paths.config_resolved,
        paths.training_log,
    ]:
        path.unlink(missing_ok=True)
    log(results, store, ["simple"])
    (run,) = store.runs.values()
    assert (run.started, run.ended, run.params) == (0, 0, {}) and points(run, "accuracy_n") == [(0, 24)]


def test_a_store_that_does_not_answer_is_told_in_a_line_without_its_password(results, store):
    store.is_down = True
    with pytest.raises(to_mlflow.TrackError) as printed:
        log(results, store)
    assert str(printed.value) == "MLflow at http://***@host could not be written: no answer"


# --- the driver ---------------------------------------------------------------------------------------------------


def test_without_mlflow_nothing_starts(results, monkeypatch, capsys):
    monkeypatch.setattr(to_mlflow.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr("lib.driver.commands.run_all", lambda *_: pytest.fail("something was started"))
    for command in (["--report-only"], ["--presets", "sandbox_one"]):
        assert run_all.main([*command, "--track", "mlflow", "--output-dir", str(results)]) == 2
        assert "pip install mlflow==" in capsys.readouterr().err


def test_failing_to_log_is_status_1_and_keeps_a_worse_one(results, store, monkeypatch, capsys):
    store.is_down = True
    connection = to_mlflow.Connection(store, Metric, Entry, Entry, None, (StoreDown,), "here")
    monkeypatch.setattr(to_mlflow, "connect", lambda _: connection)
    args = build_parser().parse_args(["--track", "mlflow", "--output-dir", str(results)])
    assert [reporting.track_runs(args, ["simple"], status) for status in (0, 1, 3, 130)] == [1, 1, 3, 130]
    assert capsys.readouterr().err.count("MLflow at here could not be written: no answer") == 3
    store.is_down = False
    assert reporting.track_runs(args, ["simple"], 0) == 0 and [run.name for run in store.runs.values()] == ["simple"]
    assert reporting.track_runs(args, ["absent"], 0) == 1 and "no run has rows" in capsys.readouterr().err


# --- mlflow itself ------------------------------------------------------------------------------------------------


def test_mlflow_finds_the_runs_again_and_doubles_no_point(results, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    command = [sys.executable, "run_all.py", "--report-only", "--track", "mlflow", "--output-dir", str(results)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")}
    for _ in range(2):
        subprocess.run(command, cwd=PROJECT_ROOT, env=environment, check=True, capture_output=True)
    client = mlflow.MlflowClient(f"sqlite:///{results}/{to_mlflow.STORE}")
    experiment = client.get_experiment_by_name(to_mlflow.EXPERIMENT)
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == ["simple", "strong"] and runs["simple"].info.status == "FINISHED"
    run = load_runs(str(results), ["simple"])[0]
    assert runs["simple"].data.metrics["accuracy"] == run.accuracy.rate.share
    assert runs["simple"].data.params["lora_r"] == "8"
    history = client.get_metric_history(runs["simple"].info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 2.0), (2, 1.25)]
    kept = {entry.path for entry in client.list_artifacts(runs["simple"].info.run_id)}
    assert kept == {"adapter", "config_resolved.json", "reports", "rows", "tables"}
    assert (results / to_mlflow.STORE_ARTIFACTS).is_dir() and not (PROJECT_ROOT / "mlruns").exists()
