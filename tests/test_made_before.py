"""A run made before the code was moved into folders still verifies, and its rows and checkpoints are used again.

Only the command line is called and only files are read: the fixture's README says how the run was made.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROJECT_ROOT = Path(__file__).resolve().parent.parent
FIXTURE = Path(__file__).resolve().parent / "fixtures" / "made_before"
RUN = "run_sandbox_one"
# Rows are marked in a column that no stage writes, so a row that was generated again lacks its mark.
MARK = "made_before"
# FORK_KERNELS: the tests' own setting makes every kernel import torch, which takes longer than the run.
NOT_INHERITED = ("ASSETS_DIR", "PRESET", "FORK_KERNELS")


@pytest.fixture
def results(tmp_path):
    """A copy of the fixture's results folder."""
    return shutil.copytree(FIXTURE / "runs", tmp_path / "runs")


def run_all(*argv: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    command = [sys.executable, "run_all.py", *argv]
    return subprocess.run(command, cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True, timeout=600)


def run_again(results: Path, *stages: str) -> str:
    """Run these stages of the fixture's run again, with its own parameters; returns the output."""
    for stage in stages:
        (manifest,) = results.rglob(f"{stage}_*/manifest.json")
        manifest.unlink()
    settings = (FIXTURE / "settings.txt").read_text(encoding="utf-8").split()
    flags = [
        "--presets",
        "sandbox_one",
        "--output-dir",
        str(results),
        "--offline",
        "--stages",
        *stages,
        "--set",
        *settings,
    ]
    done = run_all(*flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def generated_files(results: Path) -> dict[str, Path]:
    """Every row file whose rows a model generated, by its path in the results folder."""
    files = {path.relative_to(results).as_posix(): path for path in results.rglob("*.jsonl")}
    others = ("01_prepare/", "training_log.jsonl")
    return {name: path for name, path in files.items() if not any(part in name for part in others)}


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def mark_rows(results: Path) -> None:
    # The file's name in the mark: a verdict row copies the columns of its response row.
    for name, path in generated_files(results).items():
        rows = read_rows(path)
        path.write_text("".join(json.dumps({**row, MARK: name}) + "\n" for row in rows), encoding="utf-8")


def contents(files: dict[str, Path]) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in files.items()}


def test_the_run_still_verifies(results):
    done = run_all("--verify", str(results))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "0 mismatches; recomputed from the rows of 1 run"


def test_a_changed_row_is_still_found(results):
    path = results / RUN / "ailuminate_safety_sandbox_one.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"safe"', '"unsafe"', 1), encoding="utf-8")
    done = run_all("--verify", str(results))
    assert done.returncode == 1 and "safety_label is 'unsafe', recomputed 'safe'" in done.stderr


@pytest.mark.slow
def test_no_row_is_generated_again_and_nothing_is_trained_again(results):
    mark_rows(results)
    trained = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "training_log.jsonl")
    trained += ("training.json", "checkpoints/checkpoint-2/complete.json", "checkpoints/checkpoint-4/complete.json")
    kept = {name: results / RUN / "02_train" / name for name in trained}
    # The log and training.json hold seconds: equal bytes mean that no step was taken.
    kept |= {name: results / name for name in ("final_metrics.json", "final_metrics.csv")}
    rows, files = contents(generated_files(results)), contents(kept)
    # Answers, responses and verdicts of the run, of the untuned model and of one scale; two checkpoints; four wordings.
    assert len(rows) == 3 * 3 + 2 + 4
    stages = ("01", "02", "03", "04", "05")
    output = run_again(results, *stages)
    assert all(re.search(rf"{stage}_\w+: running", output) for stage in stages), output
    made = contents(generated_files(results))
    # Runs are judged in other ways on both sides since: the untuned responses were not, when this one was made.
    assert {name for name in made if "judge_card/untuned/" in name} == made.keys() - rows.keys()
    assert made.items() >= rows.items()
    assert contents(kept) == files


@pytest.mark.slow
def test_training_goes_on_from_a_checkpoint_made_before(results):
    train = results / RUN / "02_train"
    adapter = (train / "adapter" / "adapter_model.safetensors").read_bytes()
    log = read_rows(train / "training_log.jsonl")
    shutil.rmtree(train / "adapter")
    (train / "training.json").unlink()
    run_again(results, "02")
    assert json.loads((train / "training.json").read_text(encoding="utf-8"))["resumed_from"] == 4
    assert (train / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    # The seconds of each step too: none was taken again.
    assert read_rows(train / "training_log.jsonl") == log
