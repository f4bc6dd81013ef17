"""Several notebooks at once on this machine: side by side, shown on one console, stopped together.

Small notebooks stand in for the real ones, in real kernels of real drivers under real signals.
"""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from rich.console import Console
from small_notebooks import DRIVER, hanging_cell, is_gone, rows_cell, wait_for, write_notebook

from lib.driver.display import Display
from lib.record import locks, progress
from lib.record.paths import PROJECT_ROOT
from lib.record.rows import count_lines

# Each preset waits until the other one is there: it ends only where both run at the same time.
MEET = """
import os, pathlib, time
here = pathlib.Path("{folder}")
(here / run_name).write_text(os.environ.get("OMP_NUM_THREADS", ""))
deadline = time.monotonic() + 200
while len(list(here.iterdir())) < 2:
    assert time.monotonic() < deadline, "alone"
    time.sleep(0.05)
"""


def rows_of(folder, **more):
    return rows_cell(f"{str(folder)!r}, run_name + '.jsonl'", pause_s=0.05, **more)


@pytest.fixture
def shared(tmp_path):
    """A folder that the notebooks write into."""
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared"


@pytest.fixture
def start(tmp_path):
    """A function that starts a driver over a notebook of one cell in the place of 01_prepare."""
    started = []

    def start(code, *argv):
        notebooks = write_notebook(tmp_path / "notebooks" / "01_prepare.ipynb", code)
        command = [sys.executable, "-c", DRIVER, str(notebooks), "--stages", "01", *argv]
        command += ["--output-dir", str(tmp_path / "out"), "--set", "device=cpu"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        started.append(subprocess.Popen(command, cwd=PROJECT_ROOT, env=environment, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


# --- running ------------------------------------------------------------------------------------------------------


def test_two_presets_run_side_by_side_and_a_third_after_them(start, shared, tmp_path):
    driver = start(MEET.format(folder=shared), "--presets", "simple", "medium", "strong", "--jobs", "2")
    out, printed = driver.communicate(timeout=300)
    assert driver.returncode == 0, printed
    assert [f"{preset} 01_prepare: done" in out for preset in ("simple", "medium", "strong")] == [True] * 3
    assert out.index("strong 01_prepare: running") > out.index("01_prepare: done")
    threads = {path.name: path.read_text() for path in shared.iterdir()}
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert threads == {"simple": share, "medium": share, "strong": share}
    for preset in threads:
        assert (tmp_path / f"out/reports/run_{preset}/01_prepare.html").exists()
    assert not list((tmp_path / "out").rglob("*.tmp"))


@pytest.mark.slow
def test_what_fails_or_dies_is_reported_and_the_others_go_on(start, shared):
    code = (
        "import os, signal\n"
        "if run_name == 'simple':\n    raise ValueError('the reason')\n"
        "if run_name == 'medium':\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    driver = start(code, "--presets", "simple", "medium", "distilled", "--jobs", "3")
    out, printed = driver.communicate(timeout=300)
    assert driver.returncode == 1
    assert "simple: 01_prepare in cell" in printed and "ValueError: the reason" in printed
    assert "medium: 01_prepare: the kernel died" in printed
    assert "distilled 01_prepare: done" in out and "Traceback" not in printed
    assert "to go on: python run_all.py --stages 01 --presets simple medium distilled --jobs 3" in printed


def test_presets_go_on_when_nobody_reads_what_they_say(start, shared, tmp_path):
    driver = start(MEET.format(folder=shared), "--presets", "simple", "medium", "--jobs", "2")
    assert any("01_prepare: running" in line for line in iter(driver.stdout.readline, ""))
    driver.stdout.close()
    printed = driver.stderr.read()
    assert driver.wait(timeout=200) == 0, printed
    assert printed == "" and all(
        (tmp_path / f"out/reports/run_{preset}/01_prepare.html").exists() for preset in ("simple", "medium")
    )


# --- stopping -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_lets_every_preset_finish_its_row_and_starts_no_other(start, shared, number):
    driver = start(rows_of(shared), "--presets", "simple", "medium", "strong", "--jobs", "2")
    files = [shared / "simple.jsonl", shared / "medium.jsonl"]
    wait_for(lambda: all(count_lines(path) >= 2 for path in files))
    driver.send_signal(number)
    # The rows have no end of their own: it is the signal that ends them.
    out, printed = driver.communicate(timeout=200)
    assert driver.returncode == 130
    assert out.count("stopping after the current row") == 1 and "to go on: " in printed and "strong" not in out
    assert all(path.read_bytes().endswith(b"}\n") for path in files)


@pytest.mark.slow
def test_two_signals_end_it_now(start, shared):
    driver = start(hanging_cell(shared, "run_name"), "--presets", "simple", "medium", "--jobs", "2")
    wait_for(lambda: len(list(shared.iterdir())) == 2)
    below = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGINT)
    # Heard, and the rows go on: a second one that came before would be one with the first.
    assert any("stopping after the current row" in line for line in iter(driver.stdout.readline, ""))
    time.sleep(1)
    assert driver.poll() is None
    driver.send_signal(signal.SIGINT)
    # The rows would go on for far longer.
    driver.communicate(timeout=200)
    assert driver.returncode == 130
    wait_for(lambda: all(map(is_gone, below)))


@pytest.mark.slow
def test_a_killed_driver_takes_everything_with_it_and_the_next_one_goes_on(start, shared, tmp_path):
    argv = ("--presets", "simple", "medium", "--jobs", "2")
    driver = start(rows_of(shared), *argv)
    files = [shared / "simple.jsonl", shared / "medium.jsonl"]
    wait_for(lambda: all(count_lines(path) >= 2 for path in files))
    below = psutil.Process(driver.pid).children(recursive=True)
    assert len(below) >= 2, "two kernels"
    driver.kill()
    driver.communicate()
    # Their rows have no end of their own.
    wait_for(lambda: all(map(is_gone, below)))
    with locks.hold(tmp_path / "out", "next"):
        pass
    kept = [count_lines(path) for path in files]
    again = start(rows_of(shared, num_rows=50), *argv)
    _, printed = again.communicate(timeout=200)
    assert again.returncode == 0, printed
    for path, num_kept in zip(files, kept, strict=True):
        assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == list(range(num_kept + 50))


# --- what is shown ------------------------------------------------------------------------------------------------


def display(terminal, monkeypatch, tasks, **more):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80, height=20, highlight=False)
    return Display(tasks, console=console, every_s=1e-6, background=False, **more), console.file


@pytest.fixture
def tasks(tmp_path):
    """Two runs at stage 03, as their drivers and kernels leave it in their files."""
    tasks = {f"{name} 03": tmp_path / f"{name}.json" for name in ("simple", "medium")}
    for path, num_done in zip(tasks.values(), (3, 5), strict=True):
        running = {"state": "running", "where": socket.gethostname(), "started": 0.0, "driver": os.getpid()}
        progress.write_file(path, {**running, "work": [progress.Counts("answers", 24, num_done)]})
    return tasks


def test_a_terminal_has_one_live_line_per_run_and_printed_lines_above(monkeypatch, tasks):
    screen, file = display(True, monkeypatch, tasks)
    with screen:
        screen.update()
        screen.tell("strong 01_prepare: done\x1b[2J in 9 s")
        drawn = file.getvalue()
        tasks["simple 03"].unlink()
        screen.update()
        after = file.getvalue()[len(drawn) :]
    assert "simple 03  3/24 answers" in drawn and "medium 03  5/24 answers" in drawn
    assert "strong 01_prepare: done" in drawn and "\x1b[2J" not in drawn
    assert "medium 03" in after and "simple 03" not in after


def test_elsewhere_there_are_plain_lines_and_quiet_prints_no_progress(monkeypatch, capsys, tasks):
    monkeypatch.setattr("lib.driver.display.memory_words", lambda _: "")
    both = "  simple 03  3/24 answers\n  medium 03  5/24 answers\n"
    for quiet, expected in ((False, f"{both}line\n"), (True, "line\n")):
        screen, file = display(False, monkeypatch, tasks, quiet=quiet)
        with screen:
            screen.update()
            screen.update()
            screen.tell("line")
            screen.tell("wrong", error=True)
        assert file.getvalue() == expected and capsys.readouterr().err == "wrong\n"
