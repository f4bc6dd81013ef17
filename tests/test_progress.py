"""Progress of a stage: a bar for a person, a file for the driver, nothing elsewhere."""

import os
from types import SimpleNamespace

import nbclient
import nbformat
import pytest

from lib.record import progress
from lib.record.paths import DRIVER_VARIABLE
from lib.record.progress import Counts
from lib.record.rows import RowLog, fill_rows


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    """Each test as in a kernel that has just started."""
    monkeypatch.setattr(progress, "_work", [])
    monkeypatch.setattr(progress, "_written_at", -progress.SECONDS_BETWEEN_WRITES)
    monkeypatch.setattr(progress, "_reported", None)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A task's file, as its worker leaves it for the kernel."""
    path = tmp_path / "plan" / "3.json"
    path.parent.mkdir()
    progress.write_file(path, {"state": "running", "work": []})
    monkeypatch.setenv(progress.FILE_VARIABLE, str(path))
    return path


def answer(row, correct):
    return {**row, "correct": correct, "num_output_tokens": 5}


def fill(log, num_rows, results, kind="answers"):
    def generate(missing, on_result):
        for index in reversed(range(len(missing))):
            on_result(index, results[missing[index]["id"]])

    return fill_rows(log, [{"id": number} for number in range(num_rows)], generate, answer, kind=kind)


def test_the_driver_finds_the_counts_of_each_kind_of_rows_beside_what_it_wrote_itself(tmp_path, file):
    fill(RowLog(tmp_path / "rows.jsonl", "p"), 3, [True, False, None])
    fill(RowLog(tmp_path / "others.jsonl", "p", label="untuned"), 2, [True, True])
    answers, untuned = progress.read_file(file)["work"]
    assert answers == Counts("answers", 3, 3, num_scored=2, num_good=1, num_tokens=15)
    assert (untuned.kind, untuned.num_good) == ("untuned answers", 2)
    assert progress.read_file(file)["state"] == "running" and list(file.parent.iterdir()) == [file]


def test_rows_of_an_earlier_run_count_and_nothing_is_shown_where_nothing_is_missing(tmp_path, file):
    RowLog(tmp_path / "rows.jsonl", "p").append({"id": 1, "safety_label": "safe"})
    fill(RowLog(tmp_path / "rows.jsonl", "p"), 2, [None, None], kind="verdicts")
    (verdicts,) = progress.read_file(file)["work"]
    assert verdicts == Counts("verdicts", 2, 2, num_scored=1, num_good=1, good="safe", num_tokens=5)
    assert [row["id"] for row in fill(RowLog(tmp_path / "rows.jsonl", "p"), 2, [])] == [0, 1]
    assert len(progress.read_file(file)["work"]) == 1


def test_the_file_is_written_at_most_once_a_second_and_at_the_end(file, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.track("rows", 9) as bar:
        seen = []
        for second in (100.0, 100.5, 101.0, 101.5):
            now[0] = second
            bar.advance({})
            seen.append(progress.read_file(file)["work"][0].done)
    assert seen == [1, 1, 3, 3] and progress.read_file(file)["work"][0].done == 4


def test_steps_are_reported_and_the_last_development_loss_is_kept(file):
    progress.report("steps", 1, 2, loss=2.0, dev_loss=1.5, num_tokens=7)
    progress.report("steps", 2, 2, loss=1.0, dev_loss=None, num_tokens=14)
    assert progress.read_file(file)["work"] == [Counts("steps", 2, 2, num_tokens=14, loss=1.0, dev_loss=1.5)]


def test_a_stage_goes_on_when_its_file_is_gone_or_broken(tmp_path, file):
    for damage in (file.unlink, lambda: file.write_text("[]"), lambda: file.write_text("{")):
        damage()
        with progress.track("rows") as bar:
            bar.advance({})
        assert progress.read_file(file) == {}


@pytest.mark.parametrize("nobody", ["driver", "script"])
def test_nothing_is_shown_where_nobody_looks(tmp_path, monkeypatch, capsys, nobody):
    monkeypatch.delenv(DRIVER_VARIABLE, raising=False)
    kernel = SimpleNamespace(kernel=object()) if nobody == "driver" else None
    monkeypatch.setattr("IPython.get_ipython", lambda: kernel)
    if nobody == "driver":
        monkeypatch.setenv(DRIVER_VARIABLE, "1")
    fill(RowLog(tmp_path / "rows.jsonl", "p"), 1, [True])
    assert capsys.readouterr() == ("", "") and [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


CELL = """
import pathlib, time
from lib.record import progress
from lib.record.rows import RowLog
log = RowLog(pathlib.Path({path!r}), "hash")
with log.complete_rows("answers", 6):
    for number in range(6):
        log.append({{"id": number, "correct": True}})
progress.report("steps", 1, 1, loss=0.5)
"""


@pytest.mark.parametrize("started_by", ["a person", "the driver"])
def test_a_notebook_keeps_final_lines_for_a_person_and_nothing_for_the_driver(tmp_path, started_by):
    cell = nbformat.v4.new_code_cell(CELL.format(path=str(tmp_path / "rows.jsonl")))
    notebook = nbformat.v4.new_notebook(cells=[cell])
    environment = {name: value for name, value in os.environ.items() if name != DRIVER_VARIABLE}
    environment |= {DRIVER_VARIABLE: "1"} if started_by == "the driver" else {}
    client = nbclient.NotebookClient(notebook, timeout=120, iopub_timeout=120, kernel_name="python3")
    client.execute(env=environment)
    outputs = notebook.cells[0].outputs
    if started_by == "the driver":
        assert outputs == []
    else:
        assert {output.name for output in outputs} == {"stdout"}
        text = "".join(output.text for output in outputs)
        assert "6 answers, 6 of 6 right (0 s)\n" in text and text.endswith("1 steps, loss 0.5000 (0 s)\n")
