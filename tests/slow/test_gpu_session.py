"""The prepared measurement of a GPU runs to its end on a CPU, in a tiny shape, with and without a model folder."""

import json
import os
import re
import subprocess
import sys

import pytest
from tiny import save_tiny_model

from lib.record.paths import PROJECT_ROOT

pytestmark = pytest.mark.slow
MEASURED = ["pytest -m gpu", *["generation"] * 3, r"generate_batch\(\)", "training", "judge", *["generation"] * 3]


@pytest.mark.parametrize("real", [False, True], ids=["random weights", "model folder"])
def test_the_session_measures_everything_without_a_network(tmp_path, real):
    folder = str(save_tiny_model(tmp_path / "model")) if real else ""
    if real:
        # Eight examples are 2,000 of its tokens, which are bytes.
        config = tmp_path / "model" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 4096}))
    options = ["--model", folder, "--judge", folder] if real else []
    command = ["bash", str(PROJECT_ROOT / "benchmarks" / "gpu_session.sh"), "result.md", "--tiny", *options]
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    text = (tmp_path / "result.md").read_text(encoding="utf-8")
    assert re.match(r"# .+, \d{4}-\d\d-\d\d\n\ntorch \S+, transformers \S+, Python 3", text)
    assert ("NF4" if real else "random weights") in text
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert all(re.match(rf"\| {name}", row) for name, row in zip(MEASURED, rows, strict=True))
    assert not [row for row in rows if "failed" in row or "not measured" in row]


def test_without_a_file_to_write_it_says_how_it_is_used(tmp_path):
    script = str(PROJECT_ROOT / "benchmarks" / "gpu_session.sh")
    for options in ([], ["--tiny"]):
        ended = subprocess.run(["bash", script, *options], cwd=tmp_path, capture_output=True, text=True)
        assert ended.returncode == 2 and "gpu_session.sh RESULT.md" in ended.stderr
