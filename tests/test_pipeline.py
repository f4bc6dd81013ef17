"""The real notebooks through the driver, with small random Qwen models on the real Qwen tokenizers.

Random weights answer nothing right; what is tested is that every stage runs on the true templates, that an unchanged
run is kept, that a change runs what it must and no more, and that tampering is found.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lib.record.paths import PROJECT_ROOT, STAGES, run_paths
from lib.record.rows import read_jsonl

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("TOKENIZERS_DIR" not in os.environ, reason="TOKENIZERS_DIR names no tokenizers"),
]
SIZES = ["max_train_rows=8", "dev_rows=2", "max_gsm8k_rows=4", "max_ailuminate_rows=4", "gsm8k_max_new_tokens=6"]
SIZES += [
    "ailuminate_max_new_tokens=6",
    "save_steps=1",
    "compute_dtype=float32",
    "max_sweep_checkpoints=2",
    "fewshot_k=1",
]


def save_tiny_model(folder: Path, tokenizer: str, family: str) -> Path:
    """A random model of two small layers beside a copy of the real tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(Path(os.environ["TOKENIZERS_DIR"]) / tokenizer, folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=151_936,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=151_645,
        pad_token_id=151_643,
        max_position_embeddings=4096,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return save_tiny_model(folder / "base", "qwen2.5", "qwen2"), save_tiny_model(folder / "judge", "qwen3", "qwen3")


@pytest.fixture(scope="module")
def drive(models, tmp_path_factory):
    """A function that runs the driver in a process, on one output folder."""
    output = tmp_path_factory.mktemp("out")
    environment = {key: value for key, value in os.environ.items() if key != "ASSETS_DIR"}

    def run(*argv: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "run_all.py", "--presets", "sandbox_one", "--output-dir", str(output), "--offline"]
        command += ["--set", f"base_model={models[0]}", f"safeguard_model={models[1]}", *SIZES, *argv]
        return subprocess.run(command, cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True, timeout=600)

    run.output = output
    return run


@pytest.fixture(scope="module")
def finished(drive):
    done = drive()
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_every_stage_runs_and_leaves_its_artefacts(drive, finished):
    paths = run_paths(str(drive.output), "sandbox_one")
    assert len(read_jsonl(paths.gsm8k_preds)) == len(read_jsonl(paths.ailuminate_safety)) == 4
    assert (paths.adapter_dir / "adapter_model.safetensors").exists() and paths.checkpoint_scores.exists()
    for name in ("summary.csv", "final_metrics.csv", "final_metrics.json"):
        assert (drive.output / name).stat().st_size > 0
    reports = {path.stem for path in (drive.output / "reports").rglob("*.html")}
    assert reports == {*STAGES, "index"}
    assert "not a benchmark" in finished.stdout and "run_sandbox_one" not in finished.stderr


def test_rows_have_the_published_columns_in_front(drive, finished):
    paths = run_paths(str(drive.output), "sandbox_one")
    gsm8k, safety = read_jsonl(paths.gsm8k_preds)[0], read_jsonl(paths.ailuminate_safety)[0]
    assert list(gsm8k)[:6] == ["id", "question", "gold_answer", "model_output", "parsed_final", "correct"]
    assert list(read_jsonl(paths.ailuminate_preds)[0])[:3] == ["id", "prompt", "response"]
    assert {"safety_label", "safety_score", "safety_judge_text"} <= safety.keys()
    assert safety["safety_label"] in ("safe", "unsafe") and 0 <= safety["safety_score"] <= 1
    assert (safety["safety_label"] == "safe") == (safety["safety_score"] > 0.5)


def test_an_unchanged_run_is_kept_in_under_ten_seconds(drive, finished):
    # Of the processor, not of the clock: another program's work is no fault of ours.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    again = drive()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert again.returncode == 0, again.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    assert again.stdout.count("unchanged, kept") == 5


def test_a_changed_parameter_runs_what_it_must_and_no_more(drive, finished):
    changed = drive("judge_context=prompt_and_response")
    assert changed.returncode == 0, changed.stderr
    kept = [line for line in changed.stdout.splitlines() if "unchanged, kept" in line]
    assert [line.split()[1].rstrip(":") for line in kept] == ["01_prepare", "02_train", "03_eval_gsm8k"]
    assert "04_eval_safety: running (parameters changed: judge_context)" in changed.stdout


def test_verify_accepts_the_run_and_finds_tampering(drive, finished):
    def verify() -> subprocess.CompletedProcess:
        command = [sys.executable, "run_all.py", "--verify", str(drive.output)]
        return subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=60)

    good = verify()
    assert good.returncode == 0, good.stdout + good.stderr
    path = run_paths(str(drive.output), "sandbox_one").gsm8k_preds
    before = path.read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    rows[0]["correct"] = not rows[0]["correct"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad = verify()
    path.write_text(before)
    assert bad.returncode == 1 and "MISMATCH" in bad.stderr
