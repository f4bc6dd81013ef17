"""A planted token, home folder and user name are found nowhere in what is written for others.

The real notebooks 01 and 05 run in a driver whose environment holds them; then every byte that was written is searched.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from benchmarks.chaos import copy_project
from lib import redaction
from lib.artifacts import PROJECT_ROOT, RowLog, stale_reason, start_stage, write_jsonl
from tests.tiny import save_tiny_model

TOKEN = "hf_PlantedTokenPlantedToken0123456789"
PLAIN_SECRET = "planted-secret-without-a-form"
USER = "planted-user"
SECRETS = (TOKEN, PLAIN_SECRET, USER)


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """An environment with secrets, and a home folder that holds the assets and the models of the run."""
    home = tmp_path / "home" / USER
    home.mkdir(parents=True)
    for name, value in {
        "HOME": str(home),
        "USER": USER,
        "LOGNAME": USER,
        "HF_TOKEN": TOKEN,
        "SOME_API_KEY": PLAIN_SECRET,
        "XDG_CACHE_HOME": str(home / ".cache"),
    }.items():
        monkeypatch.setenv(name, value)
    return home


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("File ~/x and /home/planted-user/x", "File ~/x and ~/x"),
        ('"\\n/home/planted-user"', '"\\n~"'),
        ("../../home/planted-user/out", "~/out"),
        ("file:///home/planted-user/a.py:12", "file://~/a.py:12"),
        ("/scratch/planted-user/run", "/scratch/user/run"),
        ("planted-user@host", "user@host"),
        ("/home/planted-user2/x", "/home/planted-user2/x"),
        ("{'USER': 'planted-user'} LOGNAME=planted-user", "{'USER': 'user'} LOGNAME=user"),
        ("planted-user has 5 apples", "planted-user has 5 apples"),
        (f"HF_TOKEN={TOKEN}", "HF_TOKEN=***"),
        ("Bearer hf_abcdefghijklmnopqrstuvwx!", "Bearer ***!"),
        (f"key {PLAIN_SECRET}.", "key ***."),
        ("https://me:pass@example.org/x", "https://***@example.org/x"),
        ("hf_hub_download and task-specific words stay", "hf_hub_download and task-specific words stay"),
        ("base64,/home/planted-user/AAAA==", "base64,/home/planted-user/AAAA=="),
    ],
)
def test_what_is_cleaned_and_what_stays(monkeypatch, text, expected):
    for name, value in {"HOME": "/home/planted-user", "USER": USER, "HF_TOKEN": TOKEN, "X_KEY": PLAIN_SECRET}.items():
        monkeypatch.setenv(name, value)
    assert redaction.clean(text) == expected


def test_a_users_name_that_every_machine_has_is_left_alone(monkeypatch):
    for name in ("USER", "LOGNAME", "USERNAME"):
        monkeypatch.setenv(name, "data")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-but-long-enough")
    assert redaction.clean("../data/raw false-but-long-enough") == "../data/raw false-but-long-enough"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b]0;title\x07\x1b[2J", "\\x1b]0;title\\x07\\x1b[2J"),
        ("back\rspace\x08", "back\\rspace\\x08"),
        ("\u202eright to left", "\\u202eright to left"),
        ("\ud800", "\\ud800"),
        ("two\nlines\tand é 漢", "two\nlines\tand é 漢"),
    ],
)
def test_a_terminal_sees_control_characters_and_does_not_obey_them(text, expected):
    assert redaction.visible(text) == expected


def run_driver(project: Path, *argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "run_all.py", "--presets", "sandbox_one", "--output-dir", "out", *argv]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300)


def plant_answers(run_dir: Path) -> None:
    """Rows of an evaluation, so that 05 has something to compare."""
    rows = [{"id": 0, "question": "?", "gold_answer": "#### 7", "model_output": "#### 7", "parsed_final": "7"}]
    finish = {"correct": True, "finish_reason": "stop", "num_output_tokens": 3}
    write_jsonl(run_dir / "gsm8k_preds_sandbox_one.jsonl", [{**row, **finish} for row in rows])


def written(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_nothing_planted_is_in_anything_that_three_real_stages_write(tmp_path, planted):
    model = save_tiny_model(planted / "models" / "base")
    assets = planted / "assets"
    shutil.copytree(PROJECT_ROOT / "data" / "sandbox", assets)
    sources = ["--set", f"base_model={model}", f"gsm8k_source={assets}", f"ailuminate_source={assets}"]
    project = copy_project(tmp_path)
    plant_answers(project / "out" / "run_sandbox_one")
    sources += ["max_train_rows=4", "dev_rows=2", "num_epochs=1", "save_steps=1", "gsm8k_max_new_tokens=4"]
    sources += ["max_seq_length=4096", "fewshot_k=1", "device=cpu"]
    done = run_driver(project, "--stages", "01", "02", "05", "--assets", str(assets), "--offline", *sources)
    assert done.returncode == 0, done.stdout + done.stderr
    files = written(project / "out")
    assert b"~/models/base" in files["run_sandbox_one/02_train/adapter/adapter_config.json"]
    assert "reports/05_compare.html" in files
    assert "reports/run_sandbox_one/01_prepare.html" in files and "run_sandbox_one/config_resolved.json" in files
    for name, content in {**files, "terminal": (done.stdout + done.stderr).encode()}.items():
        assert not [secret for secret in SECRETS if secret.encode() in content], name
    # The same again: what was cleaned in the manifest must not look like a change.
    again = run_driver(project, "--stages", "01", "--assets", str(assets), "--offline", *sources)
    assert "01_prepare: unchanged, kept" in again.stdout, again.stdout


def test_a_failing_notebook_that_prints_its_environment_leaks_nothing(tmp_path, planted, monkeypatch):
    from lib import execution

    content = nbformat.v4.new_notebook()
    content.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    codes = ['run_name: str = "x"  # name', "import os\nprint(dict(os.environ))\nprint(os.path.expanduser('~'))"]
    codes += ["raise OSError(os.environ['HF_TOKEN'] + ' in ' + os.environ['HOME'])"]
    content.cells = [nbformat.v4.new_code_cell(code) for code in codes]
    content.cells[0].metadata["tags"] = ["parameters"]
    monkeypatch.setattr(execution, "NOTEBOOKS_DIR", tmp_path / "notebooks")
    (tmp_path / "notebooks").mkdir()
    nbformat.write(content, tmp_path / "notebooks" / "01_prepare.ipynb")
    outcome = execution.execute("01_prepare", tmp_path / "out" / "01.ipynb", {"run_name": str(planted / "x")})
    assert outcome.error.startswith("OSError")
    for name, text in written(tmp_path / "out").items():
        assert not [secret for secret in SECRETS if secret.encode() in text], name


def test_a_manifest_of_cleaned_parameters_still_holds(tmp_path, planted):
    (planted / "in.jsonl").write_text("in")
    manifest = tmp_path / "run" / "manifest.json"
    parameters = {"base_model": str(planted / "models" / "x"), "seed": 1}
    record = start_stage(manifest, "01_prepare", "x", parameters)
    record.finish(inputs=[planted / "in.jsonl"], outputs=[], facts={"where": str(planted)})
    noted = json.loads(manifest.read_text())
    assert not [secret for secret in SECRETS if secret in manifest.read_text()]
    assert noted["parameters"]["base_model"] == "~/models/x" and list(noted["inputs"]) == ["~/in.jsonl"]
    assert stale_reason(manifest, "01_prepare", parameters) == ""
    (planted / "in.jsonl").write_text("other")
    assert "in.jsonl changed" in stale_reason(manifest, "01_prepare", parameters)


def test_row_files_are_the_record_and_stay_as_they_are(tmp_path, planted):
    row = {"id": 0, "response": f"the path is {os.environ['HOME']} and {TOKEN}"}
    RowLog(tmp_path / "rows.jsonl", "p").append(row)
    write_jsonl(tmp_path / "others.jsonl", [row])
    assert TOKEN in (tmp_path / "rows.jsonl").read_text() and USER in (tmp_path / "others.jsonl").read_text()
