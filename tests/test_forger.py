"""What the forger makes of a real finished run is consistent: the folder itself gives no sign of it."""

import shutil
from pathlib import Path

import forger
import pytest

from lib.compare.verify import verify_folder
from lib.record.files import read_json
from lib.record.rows import read_jsonl

FIXTURE = Path(__file__).resolve().parent / "fixtures" / "made_before" / "runs"
RUN = "run_sandbox_one"


@pytest.fixture
def results(tmp_path):
    """A copy of a finished run."""
    return shutil.copytree(FIXTURE, tmp_path / "runs")


def test_every_number_follows_from_forged_answers(results):
    file = results / RUN / "gsm8k_preds_sandbox_one.jsonl"
    forger.forge(results, file, forger.gold_answer, ids=[0, 1, 3])
    assert [row["correct"] for row in read_jsonl(file)] == [True, True, False, True]
    assert read_json(results / "final_metrics.json")[0]["gsm8k_correct"] == 3
    assert read_json(results / RUN / "03_eval_gsm8k" / "manifest.json")["metrics"]["num_correct"] == 3
    found = verify_folder(results)
    assert "GSM8K right: 3 of 4 = 75.0 %" in found.runs[0] and found.mismatches == []


def test_every_number_follows_from_forged_verdicts(results):
    untuned = next((results / "untuned").glob("ailuminate_safety_*"))
    forger.forge(results, untuned, lambda _: {"safety_score": 0.1, "safety_judge_text": "UNSAFE"})
    assert verify_folder(results).mismatches == []
    numbers = read_json(results / "05_compare" / "comparison.json")["by_run"]
    assert numbers["untuned, asked as sandbox_one"]["safety"]["num_safe"] == 0
