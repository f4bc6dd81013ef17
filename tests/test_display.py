"""Progress on the terminal: what a line says of a stage's counts, and how it fits."""

import io
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from rich.console import Console
from small_notebooks import wait_for

from lib.driver import display
from lib.driver.display import Display, Follower, _live_line, duration, final_lines, fit, memory_words
from lib.record import progress
from lib.record.paths import PROJECT_ROOT
from lib.record.progress import Counts

BEGIN = "sandbox_one 03  120/263 untuned answers"
DETAILS = ["1.92 rows/s", "74 s left", "52.3 % right (43.1 to 61.4)", "850 tokens/s", "3.1 GiB"]
ANSWERS = Counts("answers", total=8, done=1, num_scored=1, num_good=1, num_tokens=10)


@pytest.fixture
def no_memory(monkeypatch):
    monkeypatch.setattr(display, "memory_words", lambda _: "")


def write(folder, *work, driver=None, started=0.0, where=None):
    """What a worker and its kernel leave in the file of a task; returns it."""
    about = {"state": "running", "where": where or socket.gethostname(), "started": started}
    progress.write_file(folder / "3.json", {**about, "driver": driver or os.getpid(), "work": work})
    return folder / "3.json"


def line(follower, now):
    begin, details, _ = follower.look(now)
    return fit(begin, details, 10_000)


# --- a stage ------------------------------------------------------------------------------------------------------


def test_a_stage_is_followed_from_one_kind_of_rows_to_the_next(tmp_path, no_memory):
    follower = Follower("one 03", tmp_path / "3.json")
    assert follower.look(-3.0) is None
    write(tmp_path, started=time.time() - 7)
    assert line(follower, -2.0) == "one 03  working  7 s in"
    write(tmp_path, ANSWERS)
    assert line(follower, 1.0) == "one 03  1/8 answers  100.0 % right (20.7 to 100.0)"
    write(tmp_path, replace(ANSWERS, done=5, num_scored=5, num_good=3, num_tokens=50))
    expected = "one 03  5/8 answers  2.00 rows/s  2 s left  60.0 % right (23.1 to 88.2)  20 tokens/s"
    assert line(follower, 3.0) == expected
    done = replace(ANSWERS, done=8, num_scored=8, num_good=3, num_tokens=80)
    write(tmp_path, done)
    assert line(follower, 3.5).startswith("one 03  8/8 answers  37.5 %"), "no rate while the next model is loaded"
    untuned = replace(ANSWERS, kind="untuned answers")
    write(tmp_path, done, untuned)
    assert line(follower, 4.0).startswith("one 03  1/8 untuned answers  100.0 %")
    assert final_lines([done, untuned]) == [
        "8 answers, 37.5 % right (13.7 to 69.4)",
        "1 untuned answers, 100.0 % right (20.7 to 100.0)",
    ]


def test_the_rate_is_of_the_last_minute(tmp_path, no_memory):
    follower = Follower("one", tmp_path / "3.json")
    for second in range(0, 200, 10):
        write(tmp_path, Counts("rows", 1000, max(0, second - 100) * 2))
        shown = line(follower, float(second))
    assert shown == "one  180/1000 rows  2.00 rows/s  7 min left"


def test_training_shows_steps_loss_and_time_left(tmp_path, no_memory):
    follower = Follower("one 02", tmp_path / "3.json")
    for step in range(1, 5):
        counts = Counts("steps", 20, step, num_tokens=500 * step, loss=1.5 / step, dev_loss=0.9)
        write(tmp_path, counts)
        shown = line(follower, float(step))
    assert shown == "one 02  4/20 steps  1.00 steps/s  16 s left  loss 0.3750, dev 0.9000  500 tokens/s"


def test_a_file_that_a_killed_driver_left_is_not_shown(tmp_path, no_memory):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    path = write(tmp_path, ANSWERS, driver=ended.pid)
    assert Follower("one", path).look(0.0) is None
    write(tmp_path, ANSWERS, driver=ended.pid, where="another machine")
    assert line(Follower("one", path), 0.0).startswith("one  1/8 answers"), "its processes cannot be looked up here"


# --- a line -------------------------------------------------------------------------------------------------------


def test_a_wide_line_has_everything_and_80_columns_keep_what_matters():
    assert fit(BEGIN, DETAILS, 119) == "  ".join([BEGIN, *DETAILS])
    assert fit(BEGIN, DETAILS, 79) == "  ".join([BEGIN, *DETAILS[1:3]])


@pytest.mark.parametrize("width", [1, 10, 30, 45, 60, 79, 100, 119, 200])
def test_no_line_is_wider_than_its_room_and_no_part_is_cut(width):
    shown = fit(BEGIN, DETAILS, width)
    assert len(shown) <= width
    assert width < 45 or set(shown.split("  ")[2:]) <= set(DETAILS)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (74, "74 s"), (119.4, "119 s"), (185, "3 min"), (7140, "119 min"), (7620, "2 h 07 min")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


# --- showing ------------------------------------------------------------------------------------------------------


def console(width=80, terminal=True):
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, legacy_windows=False)


def show(folder, screen):
    """What is shown while four rows are written, each as soon as the one before it was shown."""
    with Display({"one 03": folder / "3.json"}, console=screen, every_s=0.05):
        for number in range(1, 5):
            write(folder, replace(ANSWERS, done=number))
            wait_for(lambda words=f"{number}/8 answers": words in screen.file.getvalue())
    return screen.file.getvalue()


def test_without_a_terminal_there_are_plain_lines(tmp_path, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    shown = show(tmp_path, console(terminal=False))
    lines = shown.splitlines()
    assert "\x1b" not in shown and lines[-1].startswith("  one 03  4/8 answers")
    assert len(lines) == len(set(line.split("/")[0] for line in lines))


def test_in_ci_a_terminal_gets_plain_lines_too(tmp_path, monkeypatch):
    monkeypatch.setenv("CI", "true")
    assert "\x1b" not in show(tmp_path, console())


def test_on_a_terminal_one_line_is_rewritten_and_gone_at_the_end(tmp_path, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    shown = show(tmp_path, console())
    assert "4/8 answers" in shown and "\x1b[2K" in shown
    assert shown.count("\n") <= 1


def test_quiet_shows_nothing(tmp_path):
    screen = console(terminal=False)
    with Display({"one": write(tmp_path, ANSWERS)}, console=screen, every_s=0.01, quiet=True) as shown:
        shown.update()
        assert not shown._thread.is_alive()
    assert screen.file.getvalue() == ""


@pytest.mark.parametrize(("width", "bar"), [(80, False), (120, False), (140, True)])
def test_a_live_line_never_wraps(width, bar):
    screen = console(width)
    screen.print(_live_line(BEGIN, DETAILS, Counts("untuned answers", 263, 120), width))
    (shown,) = screen.file.getvalue().splitlines()
    assert len(shown.rstrip()) < width and ("━" in shown) is bar


def test_memory_is_that_of_the_processes_that_were_started():
    code = "data = bytearray(b'x') * 2**28; print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        words = memory_words(os.getpid())
        child.communicate(b"\n")
    assert float(words.split()[0]) >= 0.2 and words.split()[1] == "GiB"


@pytest.mark.parametrize(
    ("script", "gib"),
    [("echo 1024; echo 2048", 3.0), ("echo '[N/A]'", 0.0), ("echo broken >&2; exit 9", 0.0)],
)
def test_memory_of_gpus_is_what_nvidia_smi_reports(tmp_path, monkeypatch, script, gib):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert memory_words(os.getpid()).endswith(f"GPU {gib} GiB" if gib else "")
    assert ("GPU" in memory_words(os.getpid())) is bool(gib)


def test_progress_needs_no_torch():
    code = "import sys, lib.driver.display; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT).returncode == 0
