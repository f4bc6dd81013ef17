"""Notebooks that stop: killed, hung and absent kernels, Ctrl-C, a full disk; and what is kept of them.

Small notebooks made here stand in for the real ones, in real kernels under real signals.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from small_notebooks import (
    DRIVER,
    LONG_S,
    PARAMETERS_CELL,
    hanging_cell,
    is_gone,
    rows_cell,
    wait_for,
    write_notebook,
)

import run_all
from lib.driver import kernel as driver_kernel
from lib.driver import kernel_server
from lib.driver import notebook as driver_notebook
from lib.record.files import DiskFull, write_text
from lib.record.paths import PROJECT_ROOT
from lib.record.rows import count_lines
from lib.reports import notebook_page


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """A function that writes a notebook of these cells in the place of 01_prepare, and gives its folder."""
    monkeypatch.setattr(driver_notebook, "NOTEBOOKS_DIR", tmp_path / "notebooks")

    def write(*codes):
        return write_notebook(tmp_path / "notebooks" / "01_prepare.ipynb", *codes)

    return write


def execute(folder, **more):
    parameters = {"run_name": "sandbox_one", "results_dir": str(folder)}
    return driver_notebook.execute("01_prepare", folder / "reports" / "01_prepare.ipynb", parameters, **more)


@pytest.fixture(params=["0", pytest.param("1", marks=pytest.mark.slow)], ids=["plain kernels", "forked kernels"])
def start_driver(request, monkeypatch):
    """A function that starts a driver over a folder of notebooks; what a failing test leaves is ended."""
    monkeypatch.setenv(kernel_server.SERVER_VARIABLE, request.param)
    started = []

    def start(notebooks, output, *argv):
        command = [sys.executable, "-c", DRIVER, str(notebooks), "--presets", "simple", "--stages", "01"]
        command += ["--output-dir", str(output), *argv]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=PROJECT_ROOT, **pipes))
        return started[-1]

    yield start
    for driver in started:
        driver.kill()
        driver.wait()


def count(path):
    return count_lines(path)


def test_a_run_goes_on_when_nobody_reads_what_it_says(tmp_path, notebook, start_driver):
    driver = start_driver(notebook("import time\ntime.sleep(1)"), tmp_path / "out")
    assert any("01_prepare: running" in line for line in iter(driver.stdout.readline, ""))
    driver.stdout.close()
    printed = driver.stderr.read()
    assert driver.wait(timeout=60) == 0, printed
    assert printed == "" and driver_notebook.is_complete(
        tmp_path / "out" / "reports" / "run_simple" / "01_prepare.ipynb"
    )


# --- what is kept -------------------------------------------------------------------------------------------------


def test_a_finished_notebook_is_marked_whole_last(tmp_path, notebook):
    notebook("print('all of it')")
    outcome = execute(tmp_path)
    assert (outcome.error, outcome.interrupted) == ("", False)
    assert driver_notebook.is_complete(outcome.notebook)
    outcome.notebook.with_suffix(".html").unlink()
    assert not driver_notebook.is_complete(outcome.notebook)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"metadata": 1}', '{"metadata": {}}', '{"metadata": {"run_all": 1}}']
)
def test_a_torn_or_foreign_notebook_is_not_whole(tmp_path, content):
    (tmp_path / "x.ipynb").write_text(content)
    (tmp_path / "x.html").write_text("")
    assert not driver_notebook.is_complete(tmp_path / "x.ipynb")


def test_a_stage_whose_notebook_was_cut_short_after_its_manifest_runs_again(tmp_path, notebook, capsys):
    manifest = (
        "from lib.record.manifest import start_stage\nfrom lib.record.paths import run_paths\n"
        "paths = run_paths(results_dir, run_name)\n"
        "parameters = {'run_name': run_name, 'results_dir': results_dir}\n"
        "record = start_stage(paths.manifest('01_prepare'), '01_prepare', run_name, parameters)\n"
        "record.finish(inputs=[], outputs=[], facts={})['status']"
    )
    notebook(manifest, "print('the summary')")
    argv = ["--presets", "simple", "--stages", "01", "--output-dir", str(tmp_path / "out")]
    assert run_all.main(argv) == 0 and run_all.main(argv) == 0
    assert "unchanged, kept" in capsys.readouterr().out
    kept = tmp_path / "out/reports/run_simple/01_prepare.ipynb"
    content = json.loads(kept.read_text())
    del content["metadata"][driver_notebook.COMPLETE_MARK]
    kept.write_text(json.dumps(content))
    assert run_all.main(argv) == 0
    assert "running (its filled notebook is incomplete)" in capsys.readouterr().out


def test_the_summary_stands_on_top_of_the_report_and_no_default_that_was_replaced(tmp_path, notebook):
    slot = "from lib.reports import html\nsummary = html.SummarySlot()"
    notebook(slot, "print('the middle')", "summary.fill(html.sentences(['54.4 % right']))")
    outcome = execute(tmp_path)
    cells = json.loads(outcome.notebook.read_text(encoding="utf-8"))["cells"]
    (shown,) = cells[2]["outputs"]
    assert "".join(shown["data"]["text/plain"]) == "- 54.4 % right" and cells[4]["outputs"] == []
    # The notebook keeps its parameters cell, the page for reading only what was injected in its place.
    page = outcome.notebook.with_suffix(".html").read_text(encoding="utf-8")
    assert 0 < page.index("54.4 % right</li>") < page.index("the middle")
    assert "every cell has to run" not in page and "# folder" not in page and "# Parameters" in page
    assert "".join(cells[0]["source"]) == PARAMETERS_CELL


def test_the_report_of_a_lone_surrogate_and_of_escape_codes_can_be_saved_and_read(tmp_path, notebook):
    notebook(r"print('\x00 \x1b[2J end')")
    outcome = execute(tmp_path)
    assert outcome.error == ""
    # ipykernel can send no lone surrogate; a file can hold one.
    content = json.loads(outcome.notebook.read_text(encoding="utf-8"))
    content["cells"][-1]["outputs"][0]["text"] += "\ud800 shown"
    outcome.notebook.write_text(json.dumps(content), encoding="utf-8")
    driver_notebook._keep(outcome.notebook, driver_notebook.Outcome(), "")
    assert "shown" in json.dumps(json.loads(outcome.notebook.read_text(encoding="utf-8"))["cells"][-1]["outputs"])
    page = outcome.notebook.with_suffix(".html").read_text(encoding="utf-8")
    assert "end" in page and "shown" in page and "\x1b" not in page


# --- kernels ------------------------------------------------------------------------------------------------------


def test_a_kernel_killed_from_outside_is_noticed_in_ten_seconds_and_the_notebook_says_so(
    tmp_path, notebook, start_driver
):
    pid_file = tmp_path / "pid"
    cell = (
        f"import os, pathlib, time\npathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))\ntime.sleep({LONG_S})"
    )
    driver = start_driver(notebook("print('before')", cell), tmp_path / "out")
    pid = int(wait_for(lambda: pid_file.exists() and pid_file.read_text()))
    os.kill(pid, signal.SIGKILL)
    # The banner is what is done first about it: then come the page, with what it has to import, and the message.
    filled = tmp_path / "out/reports/run_simple/01_prepare.ipynb"
    wait_for(lambda: "The kernel died" in filled.read_text(), seconds=10)
    _, printed = driver.communicate(timeout=120)
    assert driver.returncode == 1
    assert "the kernel died" in printed and "to go on: python run_all.py --presets simple" in printed
    banner = json.loads(filled.read_text())["cells"][0]["source"]
    assert "The kernel died" in banner and "python run_all.py --presets simple" in banner
    html = filled.with_suffix(".html").read_text()
    assert "The kernel died" in html and "before" in html
    assert not driver_notebook.is_complete(filled)


def test_a_crash_in_c_leaves_its_last_words_and_nothing_else_reaches_the_terminal(tmp_path, notebook, start_driver):
    cell = "import os\nos.write(2, b'terminate called after throwing std::bad_alloc\\n')\nos.abort()"
    driver = start_driver(notebook("print('before')", cell), tmp_path / "out")
    out, printed = driver.communicate(timeout=200)
    assert driver.returncode == 1
    assert "the kernel died: often there was too little memory; its last words: terminate called after" in printed
    assert (out + printed).count("std::bad_alloc") == 1


def test_a_hung_cell_is_ended_after_its_time(tmp_path, notebook):
    notebook("print('before')", f"import time\ntime.sleep({LONG_S})")
    started = time.monotonic()
    outcome = execute(tmp_path, cell_timeout_s=2, go_on="python run_all.py --presets simple")
    assert time.monotonic() - started < LONG_S / 2
    assert "took over 2 s (--cell-timeout)" in outcome.error
    assert "took over 2 s" in outcome.notebook.with_suffix(".html").read_text()


# The kernel's thread for outputs sleeps when the cell has ended, once: nbclient itself would wait 4 s for it.
LATE_OUTPUTS = """
import time
kernel = get_ipython().kernel
publish = kernel._publish_status
def publish_late(*args, **more):
    kernel._publish_status = publish
    kernel.iopub_thread.schedule(lambda: time.sleep(6))
    publish(*args, **more)
kernel._publish_status = publish_late
"""


def test_outputs_that_come_late_are_waited_for_and_late_ones_are_no_cell_that_took_too_long(
    tmp_path, notebook, monkeypatch
):
    notebook(LATE_OUTPUTS, "print('the next cell')")
    outcome = execute(tmp_path)
    assert outcome.error == "" and "the next cell" in outcome.notebook.read_text(encoding="utf-8")
    monkeypatch.setattr(driver_notebook, "OUTPUT_TIMEOUT_S", 1)
    outcome = execute(tmp_path)
    assert outcome.error.startswith("the outputs of a cell did not come within 1 s of its end")
    assert "The outputs of a cell that had ended did not come." in outcome.notebook.read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["exit 1", "exec sleep 60"], ids=["dies at once", "never answers"])
def test_a_kernel_that_never_starts_is_tried_twice_and_then_reported(tmp_path, notebook, monkeypatch, capsys, command):
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\n{command}\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    monkeypatch.setattr(driver_notebook, "KERNEL_START_TIMEOUT_S", 2)
    notebook("print('never')")
    outcome = execute(tmp_path)
    assert "did not start in 2 tries" in outcome.error
    assert "trying again" in capsys.readouterr().out
    assert "The kernel did not start" in outcome.notebook.with_suffix(".html").read_text()


def test_a_killed_driver_takes_its_kernel_with_it(tmp_path, notebook, start_driver):
    driver = start_driver(notebook(f"import time\ntime.sleep({LONG_S})"), tmp_path / "out")
    kernel = wait_for(lambda: kernel_of(driver))
    # ipykernel looks for its parent once a second, and not at all while it starts or C code runs: not in these states
    # either may it outlive the driver. A process that stands still can do nothing at all for its own end.
    kernel.suspend()
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    try:
        wait_for(lambda: is_gone(kernel))
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            kernel.kill()


def kernel_of(driver):
    """The process of the driver's kernel; None while no kernel runs. Others, such as nvidia-smi, come and go."""
    for child in psutil.Process(driver.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ipykernel" in " ".join([child.name(), *child.cmdline()]):
                return child
    return None


# --- whose Python, and where ---------------------------------------------------------------------------------------

FOREIGN = {"argv": ["/bin/false", "{connection_file}"], "display_name": "theirs", "language": "R"}
ODD_SPECS = {
    "foreign": json.dumps(FOREIGN),
    "environment": json.dumps({**FOREIGN, "argv": ["python", "-m", "x"], "env": {"PYTHONHOME": "/nowhere"}}),
    "provisioner": json.dumps({**FOREIGN, "metadata": {"kernel_provisioner": {"provisioner_name": "theirs"}}}),
    "torn": "{",
}
SHOW_PYTHON = "import sys\nprint(sys.executable)"


def python_of(outcome):
    """What `SHOW_PYTHON` printed in the filled notebook."""
    assert outcome.error == ""
    cells = json.loads(outcome.notebook.read_text(encoding="utf-8"))["cells"]
    return "".join(cells[-1]["outputs"][0]["text"]).split()[0]


@pytest.mark.parametrize("spec", ODD_SPECS)
def test_the_kernel_is_the_drivers_python_whatever_kernelspecs_say(tmp_path, notebook, monkeypatch, spec):
    # As a cluster's module, a hub, conda and a home folder lay them out.
    for folder in ("modules", "data", "home/.local/share/jupyter", "home/.ipython"):
        kernel = tmp_path / folder / "kernels" / "python3"
        kernel.mkdir(parents=True)
        (kernel / "kernel.json").write_text(ODD_SPECS[spec])
    for name, value in {"JUPYTER_PATH": "modules", "JUPYTER_DATA_DIR": "data", "HOME": "home"}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    notebook(SHOW_PYTHON)
    assert python_of(execute(tmp_path)) == sys.executable


def test_the_page_is_of_this_environments_templates(tmp_path, notebook, monkeypatch):
    template = tmp_path / "jupyter" / "nbconvert" / "templates" / "lab"
    template.mkdir(parents=True)
    (template / "conf.json").write_text('{"base_template": "base"}')
    (template / "index.html.j2").write_text("theirs")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    notebook("print('fine')")
    page = execute(tmp_path).notebook.with_suffix(".html").read_text(encoding="utf-8")
    assert "fine" in page and "theirs" not in page


def test_a_notebook_of_another_kernel_and_language_is_run_all_the_same(tmp_path, notebook):
    folder = notebook(SHOW_PYTHON)
    content = json.loads((folder / "01_prepare.ipynb").read_text())
    content["metadata"] = {"kernelspec": {"name": "my-env", "display_name": "My env"}}
    (folder / "01_prepare.ipynb").write_text(json.dumps(content))
    assert python_of(execute(tmp_path)) == sys.executable


def test_an_interpreter_whose_path_looks_like_a_template_is_started(tmp_path, notebook, monkeypatch):
    link = tmp_path / "{prefix}" / "python"
    link.parent.mkdir()
    link.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    link.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(link))
    notebook(SHOW_PYTHON)
    assert python_of(execute(tmp_path)).endswith("python")


@pytest.mark.parametrize(
    "folder", ["{b}", "{run_name}", "{}", "{0.__class__}", "%s %(x)s", "~", "two words", "[x]*?", "$HOME", "a;b&c"]
)
def test_an_output_folder_is_what_was_typed(tmp_path, notebook, folder):
    notebook("print('fine')")
    outcome = execute(tmp_path / folder)
    assert outcome.error == "" and driver_notebook.is_complete(outcome.notebook)
    assert outcome.notebook == tmp_path / folder / "reports" / "01_prepare.ipynb"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([folder, "notebooks"])
    noted = json.loads(outcome.notebook.read_text())["metadata"]["papermill"]["output_path"]
    assert Path(PROJECT_ROOT, noted).resolve() == outcome.notebook


@pytest.mark.parametrize("folder", ["t" * 90, "\udce9", "caf\u00e9" * 20], ids=["long", "not UTF-8", "long in bytes"])
def test_sockets_lie_where_their_path_fits(tmp_path, notebook, monkeypatch, folder):
    place = tmp_path / folder
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    notebook(SHOW_PYTHON)
    assert python_of(execute(tmp_path)) == sys.executable
    assert not list(place.iterdir())


def test_without_a_place_for_sockets_one_sentence_says_what_to_do(tmp_path, notebook, monkeypatch, capsys):
    monkeypatch.setattr(driver_kernel, "SHORT_FOLDERS", ("/nowhere",))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("t" * 90)))
    notebook("1")
    assert run_all.main(["--presets", "simple", "--stages", "01", "--output-dir", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    assert "tttt is longer than" in shown and "set TMPDIR to a short folder" in shown and "Traceback" not in shown


# --- Ctrl-C -------------------------------------------------------------------------------------------------------


def test_one_interrupt_finishes_the_row_saves_and_ends_with_130(tmp_path, notebook, start_driver):
    rows = tmp_path / "rows.jsonl"
    driver = start_driver(notebook(rows_cell(repr(str(rows)), pause_s=0.2)), tmp_path / "out")
    wait_for(lambda: count(rows) >= 2)
    driver.send_signal(signal.SIGINT)
    # The rows have no end of their own: it is the signal that ends them.
    out, printed = driver.communicate(timeout=120)
    assert driver.returncode == 130
    assert "stopping after the current row; Ctrl-C again stops now" in out and "to go on: " in printed
    assert rows.read_bytes().endswith(b"}\n")
    html = (tmp_path / "out/reports/run_simple/01_prepare.html").read_text()
    assert "Stopped by hand" in html and "stopped after a complete row" in html


def test_two_interrupts_end_it_now(tmp_path, notebook, start_driver):
    driver = start_driver(notebook(hanging_cell(tmp_path, "'busy'")), tmp_path / "out")
    wait_for((tmp_path / "busy").exists)
    kernel = kernel_of(driver)
    driver.send_signal(signal.SIGINT)
    # Heard, and the row goes on: a second one that came before would be one with the first.
    assert any("stopping after the current row" in line for line in iter(driver.stdout.readline, ""))
    time.sleep(0.5)
    assert driver.poll() is None and not is_gone(kernel)
    driver.send_signal(signal.SIGINT)
    # The row would go on for far longer.
    driver.communicate(timeout=120)
    assert driver.returncode == 130
    wait_for(lambda: is_gone(kernel))


def test_a_signal_to_end_is_like_an_interrupt_and_no_further_preset_starts(tmp_path, notebook, start_driver):
    rows = tmp_path / "rows.jsonl"
    notebooks = notebook(rows_cell(repr(str(rows)), pause_s=0.2))
    driver = start_driver(notebooks, tmp_path / "out", "--presets", "simple", "medium")
    wait_for(lambda: count(rows) >= 1)
    driver.send_signal(signal.SIGTERM)
    out, _ = driver.communicate(timeout=120)
    assert driver.returncode == 130 and "medium" not in out


# --- disks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_reported_earlier_work_is_kept_and_the_run_goes_on(small_disk, tmp_path, notebook, capsys):
    # Rows until nothing fits; the second time there is room, and the rows that are there are not made again.
    cell = (
        "import pathlib; from lib.record.rows import RowLog\n"
        f"log = RowLog(pathlib.Path({str(small_disk)!r}) / 'rows.jsonl', 'p')\n"
        "kept = len(log.rows)\n"
        "for number in range(kept, 100):\n"
        "    log.append({'id': number, 'text': 'x' * 300_000})\n"
        f"pathlib.Path({str(tmp_path)!r}, 'kept').write_text(str(kept))"
    )
    notebook(cell)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(42_000_000))
    argv = ["--presets", "simple", "--stages", "01", "--output-dir", str(small_disk / "out")]
    assert run_all.main(argv) == 1
    printed = capsys.readouterr().err
    assert "the disk is full" in printed and "MB free" in printed and "free some space" in printed
    assert "Traceback" not in printed
    complete = [json.loads(line) for line in (small_disk / "rows.jsonl").read_bytes().split(b"\n")[:-1]]
    assert [row["id"] for row in complete] == list(range(len(complete))) and len(complete) > 60
    filler.unlink()
    assert run_all.main(argv) == 0
    assert int((tmp_path / "kept").read_text()) == len(complete)


def test_a_disk_that_is_full_for_the_report_itself_is_reported_in_a_line(tmp_path, notebook, monkeypatch, capsys):
    notebook("print('fine')")

    def full(path, *_):
        raise DiskFull(driver_notebook.full_disk_text(path))

    monkeypatch.setattr(notebook_page, "write_text", full)
    assert run_all.main(["--presets", "simple", "--stages", "01", "--output-dir", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().err
    assert "01_prepare.html cannot be written: the disk is full" in printed and "to go on: " in printed


def test_a_failed_write_for_want_of_space_leaves_the_old_file(small_disk):
    target: Path = small_disk / "metrics.json"
    write_text(target, "old")
    with pytest.raises(DiskFull, match=r"metrics\.json cannot be written: the disk is full"):
        write_text(target, "x" * 80_000_000)
    assert target.read_text() == "old" and [path.name for path in small_disk.iterdir()] == ["metrics.json"]
