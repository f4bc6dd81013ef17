"""A few seeded kills of light notebooks, each gone on with: nothing lost, doubled or different.

The real stages under at least a hundred kills are ``benchmarks/chaos.py``; here the notebooks that need torch are
replaced by ones that write rows as slowly, and 05 by one that counts them, so that five kills take seconds.
"""

import json

import pytest
from small_notebooks import write_notebook

from benchmarks import chaos
from lib.record.paths import STAGES

ROWS = """
import time
from lib.record.manifest import start_stage
from lib.record.paths import run_paths
from lib.record.rows import RowLog
paths = run_paths(results_dir, run_name)
parameters = {"run_name": run_name, "results_dir": results_dir}
record = start_stage(paths.manifest(STAGE), STAGE, run_name, parameters)
log = RowLog(paths.gsm8k_preds, "p")
with log.whole_rows():
    for number in range(25):
        if number not in log.rows:
            time.sleep(0.03)
            gold = f"{number}\\n#### {number}"
            log.append({"id": number, "question": "?", "gold_answer": gold, "model_output": f"#### {number % 7}",
                        "parsed_final": str(number % 7), "correct": number < 7, "finish_reason": "stop",
                        "num_output_tokens": 3})
log.finish(range(25))
"""
# Counts what the stage before it wrote, as the real comparison does, and writes its manifest.
COMPARE = """
import time
from lib.record.files import write_json
from lib.record.manifest import start_stage
from lib.record.paths import results_root, run_paths
from lib.record.rows import read_jsonl
root = results_root(results_dir)
parameters = {"results_dir": results_dir, "run_names": run_names}
record = start_stage(root / "05_compare" / "manifest.json", "05_compare", "all runs", parameters)
rows = [row for name in run_names for row in read_jsonl(run_paths(results_dir, name).gsm8k_preds)]
time.sleep(0.5)
write_json(root / "counts.json", {"rows": len(rows), "right": sum(row["correct"] for row in rows)})
time.sleep(0.5)
record.finish(inputs=[], outputs=[root / "counts.json"], facts={})["status"]
"""
FINISH = "record.finish(inputs=[], outputs=[paths.gsm8k_preds], facts={})['status']"


@pytest.fixture
def project(tmp_path):
    """A copy of the project whose stage 03 writes 25 rows in about a second."""
    project = chaos.copy_project(tmp_path)
    rows = f"STAGE = '03_eval_gsm8k'\n{ROWS}"
    write_notebook(project / "notebooks" / "03_eval_gsm8k.ipynb", rows, FINISH, "print('summary')")
    names = 'results_dir: str = ""  # folder\nrun_names: list = []  # runs'
    write_notebook(project / "notebooks" / "05_compare.ipynb", COMPARE, parameters=names)
    return project


@pytest.mark.slow
def test_five_kills_lose_nothing(project):
    result = chaos.wreak(project, 5, seed=3, stages=("03_eval_gsm8k", "05_compare"), tell=lambda _: None)
    assert result["kills"] == 5 and {row["stage"] for row in result["by_stage"]} == {STAGES[2], STAGES[4]}
    assert (result["faults"], result["broken"]) == (0, [])


def test_what_is_lost_doubled_or_different_is_counted(tmp_path):
    rows = [{"id": number, "model_output": "x", "wall_s": number} for number in range(4)]
    for name, kept in (("ours", rows), ("theirs", [rows[0], rows[0], {**rows[1], "model_output": "y"}, rows[3]])):
        (tmp_path / name / "run_x").mkdir(parents=True)
        text = "".join(json.dumps(row) + "\n" for row in kept)
        (tmp_path / name / "run_x" / "gsm8k_preds_x.jsonl").write_text(text)
    losses = chaos.compare(tmp_path / "ours", tmp_path / "theirs")
    counts = [counter["03_eval_gsm8k"] for counter in (losses.lost, losses.duplicated, losses.differing)]
    assert counts == [1, 1, 1] and losses.num_faults >= 3


def test_a_file_that_a_kill_tore_is_found(tmp_path):
    (tmp_path / "run_x").mkdir()
    (tmp_path / "run_x" / "manifest.json").write_text('{"stage": ')
    (tmp_path / "run_x" / "rows.jsonl").write_text('{"id": 1}\n{"id": 2, "torn')
    assert [fault.split()[0] for fault in chaos.broken_files(tmp_path)] == ["run_x/manifest.json"]
