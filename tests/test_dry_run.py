"""--dry-run: what would run, be fetched and be written, without the network and without writing anything."""

import json
import os
import shutil
import subprocess
import sys

import pytest

import run_all
from lib.prepare import datasets
from lib.record.paths import METRICS_CSV, METRICS_JSON, PROJECT_ROOT, SUMMARY
from lib.record.rows import write_jsonl

MADE_BEFORE = PROJECT_ROOT / "tests/fixtures/made_before"
# Prints every file opened for writing, folder made, file moved or removed, connection made and program started.
WATCHED = """
import os, sys
def watch(event, arguments):
    writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    changes = event in ("os.mkdir", "os.rename", "os.remove", "os.truncate", "shutil.rmtree", "os.utime")
    if (writes and arguments[0] != os.devnull) or changes or event in ("socket.connect", "subprocess.Popen"):
        os.write(2, f"DID {event} {arguments}\\n".encode())
sys.addaudithook(watch)
import run_all
status = run_all.main(sys.argv[1:])
print("torch" in sys.modules, "scipy" in sys.modules)
sys.exit(status)
"""


@pytest.fixture
def dry(tmp_path, monkeypatch, capsys):
    """Runs a command with --dry-run, without data or models here; returns the exit status and what was printed."""
    monkeypatch.setattr(datasets, "RAW_DIR", tmp_path / "raw")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("ASSETS_DIR", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("httpx.Client.send", "huggingface_hub.HfApi.repo_info", "huggingface_hub.HfApi.dataset_info"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("the network was used"))

    def run(*argv):
        status = run_all.main([*argv, "--dry-run"])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


@pytest.mark.parametrize(
    "argv",
    [
        ["--submission"],
        ["--presets", "sandbox_one", "--set", "fewshot_file=data/examples_of_no_run.jsonl"],
        ["--presets", "simple", "strong", "--seeds", "1", "2", "--rerun-all", "--jobs", "2"],
    ],
)
def test_nothing_is_written_fetched_or_started_and_torch_is_not_imported(tmp_path, argv):
    argv = [*argv, "--dry-run", "--output-dir", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *argv], cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.endswith("dry run: nothing was run, fetched or written\nFalse False\n")
    assert list(tmp_path.iterdir()) == []


def test_a_submission_names_its_adapters_row_counts_sources_and_files(dry):
    status, printed = dry("--submission")
    simple, medium, strong = (printed.partition(f"{name}: ")[2] for name in ("\nsimple", "\nmedium", "\nstrong"))
    assert status == 0
    for part, adapter, questions in (
        (simple or printed, "nbso/simple_pilot_project_model", 1319),
        (medium, "haohxin/medium_pilot_project_model", 263),
        (strong, "haohxin/strong_pilot_project_model", 263),
    ):
        assert f"{adapter}: to be downloaded from the hub (revision main)" in part
        assert f"{questions} GSM8K questions, 240 AILuminate prompts" in part
    assert "gsm8k_train_self-instruct.jsonl: to be downloaded from https://www.csie.ntu.edu.tw/" in strong
    assert "gsm8k_train_self-instruct" not in medium.partition("\nstrong: ")[0]
    tables = (SUMMARY, METRICS_JSON, METRICS_CSV)
    for name in ("run_strong/ailuminate_safety_strong.jsonl", *tables, "reports/index.html"):
        assert f"submission_results/{name}" in printed


def test_set_smoke_test_seeds_and_stages_count(dry):
    settings = ["--set", "safeguard_model=me/judge", "base_model=smollm2-135m-instruct"]
    status, printed = dry("--presets", "simple", "--smoke-test", "--seeds", "3", "--stages", "04", *settings)
    assert status == 0 and "simple_seed3: " in printed and "me/judge: to be downloaded" in printed
    assert "smollm2-135m-instruct: bundled" in printed or "smollm2-135m-instruct: found in" in printed
    assert "smoke/run_simple_seed3/ailuminate_preds_simple_seed3.jsonl" in printed
    assert not [word for word in ("01_prepare", "05_compare", "data  ", "required rows", "adapter ") if word in printed]
    # Training needs the judge only where a checkpoint is chosen by safety, and no adapter.
    assert "judge " not in dry("--presets", "simple", "--stages", "02")[1]
    by_safety = ["sweep_metric=sum", "checkpoint_sweep=true", "dev_rows=8", "dev_safety_rows=8"]
    sweep = ["ailuminate_source=class", *by_safety]
    printed = dry("--presets", "simple", "--stages", "02", "--set", *sweep)[1]
    assert "judge " in printed and "AILuminate 1.0 demo: " in printed and "checkpoint_scores_simple.csv" in printed


def test_what_is_found_is_named_with_its_place_and_what_is_missing_offline_is_said(dry, tmp_path):
    assets = tmp_path / "assets"
    shutil.copytree(MADE_BEFORE / "models/judge", assets / "models/Qwen__Qwen3-4B-SafeRL")
    (assets / datasets.MLCOMMONS_FILE).touch()
    write_jsonl(tmp_path / "raw/gsm8k_train.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}])
    snapshot = tmp_path / "hub/models--Qwen--Qwen2.5-1.5B-Instruct/snapshots" / ("a" * 40)
    shutil.copytree(MADE_BEFORE / "models/base", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("a" * 40)
    (assets / datasets.MLCOMMONS_FILE).write_text("prompt_text\nhello\n")
    argv = ["--presets", "simple", "--offline", "--assets", str(assets), "--set", "ailuminate_prompt_set=all"]
    argv += ["--checkpoint", "me/adapter", "--output-dir", str(tmp_path / "out")]
    # Its rows are not the published ones: refused as without --dry-run.
    assert dry(*argv)[0] == 2
    (assets / datasets.MLCOMMONS_FILE).unlink()
    status, printed = dry(*argv)
    assert status == 0, printed
    assert "Qwen/Qwen2.5-1.5B-Instruct: found in the hub cache (hub)" in printed
    assert f"Qwen/Qwen3-4B-SafeRL: found in {assets / 'models/Qwen__Qwen3-4B-SafeRL'} (assets folder)" in printed
    assert f"GSM8K train: found in {tmp_path / 'raw/gsm8k_train.jsonl'} (data/raw)" in printed
    for name in ("GSM8K test", "AILuminate 1.0 demo", "me/adapter"):
        assert f"{name}: missing, and the network is switched off" in printed
    assert "to be downloaded" not in printed and not (tmp_path / "out").exists()


@pytest.mark.parametrize("why", ["pickle", "code", "cut off", "another base model"])
def test_a_model_that_cannot_be_used_is_an_error(dry, tmp_path, why):
    folder = tmp_path / "assets/models/me__base"
    shutil.copytree(MADE_BEFORE / "models/base", folder)
    if why == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif why == "code":
        (folder / "config.json").write_text('{"auto_map": {}}')
    elif why == "cut off":
        (folder / "model.safetensors").write_text("version https://git-lfs")
    argv = ["--presets", "simple", "--set", "base_model=me/base", "--assets", str(tmp_path / "assets")]
    if why == "another base model":
        adapter = tmp_path / "assets/models/me__adapter"
        shutil.copytree(MADE_BEFORE / "runs/run_sandbox_one/02_train/adapter", adapter)
        folder.rename(folder.with_name("me__other"))
        argv += ["--checkpoint", "me/adapter", "--set", "base_model=me/other"]
    status, printed = dry(*argv)
    assert status == 2 and "preset 'simple': " in printed and "Traceback" not in printed
    assert {"another base model": "was made for base model"}.get(why, "me__base") in printed


@pytest.mark.parametrize(
    "argv",
    [["--presets", "nosuch"], ["--presets", "simple", "--set", "lora_r=0"], ["--presets", "simple", "--jobs", "0"]],
)
def test_a_faulty_command_line_is_refused_as_without_the_flag(dry, argv):
    assert dry(*argv)[0] == 2


@pytest.mark.parametrize(
    "command",
    [["--verify", "tests"], ["--export", "lm-eval"], ["--report-only"], ["--convert-preset", "params/x.yaml"]],
)
def test_commands_that_run_no_preset_are_refused(dry, command):
    status, printed = dry(*command)
    assert status == 2 and "--dry-run is for commands that run presets" in printed


def test_finished_stages_need_nothing_and_the_reason_of_the_others_is_said(dry, tmp_path):
    shutil.copytree(MADE_BEFORE / "runs", tmp_path / "out")
    argv = ["--presets", "sandbox_one", "--output-dir", str(tmp_path / "out")]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    status, printed = dry(*argv)
    assert status == 0 and "01_prepare      parameters changed: " in printed
    manifest = json.loads((tmp_path / "out/run_sandbox_one/01_prepare/manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert "01_prepare      --rerun-all" in dry(*argv, "--rerun-all")[1]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_is_complete_runs_again_only_after_a_stage_that_runs(dry, monkeypatch, tmp_path):
    due = {"02_train": "the code changed"}
    monkeypatch.setattr("lib.driver.dry_run.due_reason", lambda plan, stage, folder, rerun: due.get(stage, ""))
    argv = ["--presets", "sandbox_one", "--output-dir", str(tmp_path / "out")]
    lines = dry(*argv)[1].splitlines()
    states = dict(line.split(maxsplit=1) for line in lines if line.startswith("  0"))
    assert states["01_prepare"] == "complete" and states["02_train"] == "the code changed"
    assert (
        states["03_eval_gsm8k"].startswith("complete; runs again where") and "after the stages" in states["05_compare"]
    )
    assert not [line for line in lines if "  data " in line or "01_prepare.ipynb" in line]
    due.clear()
    printed = dry(*argv)[1]
    assert "base model" not in printed and "05_compare      no run has rows to compare" in printed
    assert "final_metrics" not in printed
    # Rows that are prepared are nothing to compare.
    due["01_prepare"] = "not run yet"
    assert "no run has rows to compare" in dry(*argv, "--stages", "01", "05")[1]
