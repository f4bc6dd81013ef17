"""The notebook's own bar: one line in place, one that stays, nothing where nobody looks."""

import os
import re
from types import SimpleNamespace

import nbclient
import nbformat
import pytest
from small_notebooks import wait_for

from lib.driver import notebook_bar
from lib.driver.display import Look
from lib.driver.notebook_bar import NotebookBar, line_of
from lib.record.paths import DRIVER_VARIABLE, RESULTS_VARIABLE, run_paths
from lib.record.rows import RowLog, write_jsonl

NASTY = "<img src=x onerror=alert(1)>"


@pytest.fixture
def shown(monkeypatch):
    """What is displayed in a kernel that a person looks at: (plain text, HTML, display id, whether it is an update)."""
    calls = []

    def display(output, *, display_id, update):
        calls.append((output.text, output.html, display_id, update))

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setattr(notebook_bar, "SECONDS_BETWEEN_LOOKS", 0.02)
    # Of this machine and of what earlier tests started.
    monkeypatch.setattr("lib.driver.display.memory_words", lambda: "")
    monkeypatch.delenv(DRIVER_VARIABLE, raising=False)
    return calls


def answer(log, number, correct):
    log.append({"id": number, "question": "q", "correct": correct, "num_output_tokens": 5})


def wait_for_words(shown, words):
    wait_for(lambda: any(words in text for text, *_ in shown))


def test_one_line_follows_the_rows_and_one_stays(tmp_path, shown):
    paths = run_paths(str(tmp_path), "mine")
    write_jsonl(paths.gsm8k_eval_rows, [{"question": "q"}] * 4)
    log = RowLog(paths.gsm8k_preds, "hash")
    with NotebookBar(paths, "03_eval_gsm8k", {}):
        answer(log, 0, True)
        wait_for_words(shown, "1/4 answers")
        answer(log, 1, False)
        wait_for_words(shown, "2/4 answers")
    assert len({display_id for *_, display_id, _ in shown}) == 1
    assert [update for *_, update in shown] == [False] + [True] * (len(shown) - 1)
    assert shown[0][0] == "mine 03  working  0 s in"
    # Lines of several looks: the pace in them sinks while no row comes.
    lines = {text for text, *_ in shown if "2/4 answers" in text}
    assert all("50.0 % right (9.5 to 90.5)" in line for line in lines)
    last, last_html, *_ = shown[-1]
    assert last.startswith("mine 03  done after ") and last.endswith("s: 2 answers, 50.0 % right (9.5 to 90.5)")
    assert '<progress max="4" value="2"' in next(page for text, page, *_ in shown if text in lines)
    assert "<progress" not in last_html


def test_it_can_be_used_again_and_counts_anew(tmp_path, shown):
    paths = run_paths(str(tmp_path), "mine")
    bar = NotebookBar(paths, "03_eval_gsm8k", {})
    with bar:
        answer(RowLog(paths.gsm8k_preds, "hash"), 0, True)
    with bar:
        pass
    finals = [(text, display_id) for text, _, display_id, _ in shown if "after" in text]
    assert len({display_id for _, display_id in finals}) == len(finals) == 2
    assert "1 answers, 100.0 % right" in finals[0][0] and "no new row" in finals[1][0]


def test_what_the_files_do_not_say_can_be_told(tmp_path, shown):
    paths = run_paths(str(tmp_path), "mine")
    log = RowLog(paths.run_dir.parent / "untuned" / "distil_samples_0123.jsonl", "hash")
    with NotebookBar(paths, "01_prepare", {}, kind="own answers", total=8):
        answer(log, 0, True)
        wait_for_words(shown, "1/8 own answers")
    assert shown[-1][0].endswith("s: 1 own answers")


def test_an_error_goes_through_and_the_line_says_that_it_stopped(tmp_path, shown):
    with pytest.raises(KeyboardInterrupt), NotebookBar(run_paths(str(tmp_path), "mine"), "02_train", {}):
        raise KeyboardInterrupt
    assert re.search(r"stopped after \d+ s: no new row$", shown[-1][0])


def test_text_is_escaped():
    output = line_of(Look(NASTY, kind=NASTY, done=1, total=2))
    assert "<img" not in output.html and output.html.count("&lt;img") == 2 and NASTY in output.text


@pytest.mark.parametrize("nobody", ["driver", "script"])
def test_nothing_is_shown_where_nobody_looks(tmp_path, shown, monkeypatch, nobody):
    if nobody == "driver":
        monkeypatch.setenv(DRIVER_VARIABLE, "1")
    else:
        monkeypatch.setattr("IPython.get_ipython", lambda: None)
    paths = run_paths(str(tmp_path), "mine")
    with NotebookBar(paths, "03_eval_gsm8k", {}):
        answer(RowLog(paths.gsm8k_preds, "hash"), 0, True)
    assert shown == []


CELL = """
import time
from lib.driver import notebook_bar
from lib.record.paths import run_paths
from lib.record.rows import RowLog
notebook_bar.SECONDS_BETWEEN_LOOKS = 0.05
paths = run_paths("", "mine")
log = RowLog(paths.gsm8k_preds, "hash")
with notebook_bar.NotebookBar(paths, "03_eval_gsm8k", {}):
    for number in range(6):
        log.append({"id": number, "question": "q", "correct": True, "num_output_tokens": 5})
        time.sleep(0.1)
"""


@pytest.mark.parametrize("started_by", ["a person", "the driver"])
def test_a_filled_notebook_holds_one_final_line_of_a_person_and_none_of_the_driver(tmp_path, started_by):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    environment = {name: value for name, value in os.environ.items() if name != DRIVER_VARIABLE}
    environment |= {DRIVER_VARIABLE: "1"} if started_by == "the driver" else {}
    client = nbclient.NotebookClient(notebook, timeout=120, iopub_timeout=120, kernel_name="python3")
    client.execute(env=environment | {RESULTS_VARIABLE: str(tmp_path)})
    outputs = notebook.cells[0].outputs
    if started_by == "the driver":
        assert outputs == []
    else:
        (output,) = outputs
        assert output.output_type == "display_data" and "<progress" not in output.data["text/html"]
        assert output.data["text/plain"].endswith("s: 6 answers, 100.0 % right (61.0 to 100.0)")
