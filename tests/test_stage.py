"""lib.reports.stage: a stage from its first cell to its last, in a real kernel where cells are skipped."""

import nbformat
import pytest
from nbclient import NotebookClient

from lib.record.files import read_json
from lib.record.paths import PROJECT_ROOT, ArtifactError, run_paths
from lib.record.rows import write_jsonl
from lib.reports.stage import open_stage

NAMES = {"run_name": "one", "results_dir": "", "description": "a test", "benchmark": False, "seed": 3}
OPEN = """
import sys
sys.path.insert(0, {root!r})
from lib.reports.stage import open_stage
run_name, results_dir, description, benchmark = "one", {folder!r}, "a test", False
stage = open_stage("04_eval_safety", globals())
stage.header()
"""


@pytest.fixture
def stage(tmp_path):
    return open_stage("03_eval_gsm8k", NAMES | {"results_dir": str(tmp_path)})


def test_parameters_paths_and_header(stage, tmp_path):
    assert stage.parameters["seed"] == 3 and stage.folder == tmp_path / "run_one" / "03_eval_gsm8k"
    header = stage.header().text
    assert "Run one: a test. NOT A BENCHMARK" in header and "parameters of this run" in header


def test_finish_writes_the_manifest_and_shows_what_was_written(stage):
    written = stage.paths.run_dir / "rows.jsonl"
    write_jsonl(written, [{"id": 0}])
    shown = stage.finish(inputs=[], outputs=[written], facts={"a": 1}, metrics={"n": 1}, summary=["Done."])
    manifest = read_json(stage.paths.manifest("03_eval_gsm8k"))
    assert (manifest["status"], manifest["facts"], manifest["metrics"]) == ("complete", {"a": 1}, {"n": 1})
    assert "rows.jsonl" in shown.text and list(manifest["outputs"]) == ["../rows.jsonl"]


def test_a_missing_file_names_the_stage_that_makes_it(stage):
    for path, needed in ((stage.paths.train_rows, "01_prepare"), (stage.paths.adapter_dir, "02_train")):
        with pytest.raises(ArtifactError, match=f"is missing: run {needed} for preset 'one' first"):
            stage.require(path)


def test_rows_of_an_empty_file_are_an_empty_list(stage):
    stage.paths.fewshot_rows.parent.mkdir(parents=True)
    stage.paths.fewshot_rows.touch()
    assert stage.read_rows(stage.paths.fewshot_rows) == []


def test_after_skip_no_cell_runs_until_the_stage_is_opened_again(tmp_path):
    opening = OPEN.format(root=str(PROJECT_ROOT), folder=str(tmp_path))
    cells = [opening, "stage.summary()", "stage.skip('no judge <b>', facts={'a': 1})", "1 / 0", opening, "'again'"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=120).execute()
    outputs = ["".join(map(str, cell.outputs)) for cell in notebook.cells]
    assert "NOT MEASURED. no judge &lt;b&gt;" in outputs[1] and not outputs[2] and not outputs[3]
    assert "Run one" in outputs[4] and "again" in outputs[5]


def test_a_skipped_stage_says_why_in_its_manifest(stage):
    stage.skip("no judge", facts={"runtime": "cpu"})
    manifest = read_json(run_paths(str(stage.paths.run_dir.parent), "one").manifest("03_eval_gsm8k"))
    assert (manifest["status"], manifest["skipped_because"]) == ("skipped", "no judge")
    assert manifest["facts"] == {"runtime": "cpu"} and manifest["outputs"] == {}
