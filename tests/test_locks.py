"""The lock on an output folder: one driver at a time, its holder named, gone with its holder and never before.

Real processes and real signals: a lock must work between processes.
"""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from small_notebooks import wait_for

import run_all
from lib.driver import run
from lib.record import locks
from lib.record.paths import PROJECT_ROOT
from lib.record.rows import count_lines

# Each holds what it holds until it is printed otherwise through its standard input, or this process ends.
HOLDER = (
    "import pathlib, subprocess, sys; from lib.record import locks\n"
    "with locks.hold(pathlib.Path(sys.argv[1]), 'python run_all.py --presets simple'):\n"
    "    if 'orphan' in sys.argv:\n"
    "        command = [sys.executable, '-c', 'import sys; sys.stdin.read()']\n"
    "        subprocess.Popen(command, pass_fds=locks.held_descriptors())\n"
    "    print('held', flush=True)\n"
    "    sys.stdin.readline()\n"
)


def start(code, *argv):
    # Unbuffered: lines arrive before the process ends.
    command = [sys.executable, "-u", "-c", code, *map(str, argv)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=PROJECT_ROOT, **pipes)


def start_holder(folder, *more):
    process = start(HOLDER, folder, *more)
    assert process.stdout.readline() == "held\n"
    return process


def go_on(process):
    process.stdin.write("\n")
    process.stdin.flush()


def when_it_looks_again(monkeypatch, act):
    """Call ``act()`` wherever a lock is found held and would be looked at again after a pause, before the pause."""

    def sleep(pause_s):
        act()
        time.sleep(pause_s)

    monkeypatch.setattr(locks, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))


def test_a_second_driver_is_refused_and_reported_who_where_since_when_and_what(tmp_path, monkeypatch, capsys):
    when_it_looks_again(monkeypatch, lambda: pytest.fail("it waited"))
    holder = start_holder(tmp_path)
    status = run_all.main(["--presets", "simple", "--output-dir", str(tmp_path)])
    holder.kill()
    holder.wait()
    printed = capsys.readouterr().err
    assert status == 2
    assert f"process {holder.pid} on {os.uname().nodename} since 20" in printed
    assert "python run_all.py --presets simple" in printed and "--wait" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == [locks.LOCK_FILE]


def test_a_killed_holder_leaves_no_stale_lock(tmp_path, monkeypatch):
    when_it_looks_again(monkeypatch, lambda: pytest.fail("it waited"))
    holder = start_holder(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / locks.LOCK_FILE).read_text())["pid"] == holder.pid
    with locks.hold(tmp_path, "next"):
        pass
    assert (tmp_path / locks.LOCK_FILE).read_text() == ""


@pytest.fixture
def orphaned(tmp_path):
    """A killed holder whose kernel lives on until the holder's standard input is closed."""
    holder = start_holder(tmp_path, "orphan")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    yield holder
    holder.stdin.close()


def test_the_folder_stays_held_until_the_kernel_of_a_killed_driver_is_gone(tmp_path, orphaned, monkeypatch):
    looks = []

    def end_the_kernel_at_the_second_look():
        looks.append(orphaned.stdin.closed)
        if len(looks) == 2:
            orphaned.stdin.close()

    when_it_looks_again(monkeypatch, end_the_kernel_at_the_second_look)
    monkeypatch.setattr(locks, "ORPHAN_GRACE_S", 60)
    with locks.hold(tmp_path, "next"):
        assert looks[:2] == [False, False], "held while the kernel lived"


def test_a_kernel_that_outlives_its_driver_for_long_is_not_waited_for(tmp_path, orphaned, monkeypatch):
    monkeypatch.setattr(locks, "ORPHAN_GRACE_S", 0.5)
    with pytest.raises(locks.FolderInUse, match=f"in use by process {orphaned.pid} on"), locks.hold(tmp_path, "next"):
        pass


def test_waiting_begins_when_the_holder_ends_and_says_so_once(tmp_path):
    holder, printed = start_holder(tmp_path), []

    def tell(text):
        printed.append(text)
        go_on(holder)

    with locks.hold(tmp_path, "second", wait=True, tell=tell):
        assert holder.wait(timeout=60) == 0
    assert len(printed) == 1 and f"process {holder.pid}" in printed[0] and "waiting" in printed[0]


def test_twenty_drivers_at_once_never_hold_it_together(tmp_path):
    code = (
        "import pathlib, sys, time; from lib.record import locks\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "with locks.hold(folder, 'one of many', wait=True, tell=lambda text: None):\n"
        "    (folder / 'inside').mkdir(); time.sleep(0.02); (folder / 'inside').rmdir()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, cwd=PROJECT_ROOT, stderr=subprocess.PIPE) for _ in range(20)]
    # mkdir fails where another one is inside.
    assert [process.wait(timeout=60) for process in processes] == [0] * 20


def test_a_file_system_without_locks_is_reported_and_used(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    printed = []
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locks.hold(tmp_path, "alone", tell=printed.append):
        assert "without locks: start no second run" in printed[0]


def test_reading_needs_no_lock(tmp_path, capsys):
    with locks.hold(tmp_path, "a run"):
        assert run_all.main(["--list", "--presets", "simple", "--output-dir", str(tmp_path)]) == 0
        assert run_all.main(["--verify", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "01_prepare" in printed.out and "in use" not in printed.err


def test_a_lock_file_holds_no_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/planted-person")
    with locks.hold(tmp_path, "python run_all.py --assets /home/planted-person/assets"):
        assert "planted-person" not in (tmp_path / locks.LOCK_FILE).read_text()


def test_a_read_only_folder_is_refused_before_anything_starts(tmp_path, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        status = run_all.main(["--presets", "simple", "--output-dir", str(folder)])
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    assert status == 2 and "cannot be written (Read-only file system)" in capsys.readouterr().err


def test_a_disk_without_room_to_begin_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "MIN_FREE_BYTES", 10**18)
    assert run_all.main(["--presets", "simple", "--output-dir", str(tmp_path / "out")]) == 2
    assert "MB free on its disk, at least" in capsys.readouterr().err


# --- files that several runs share --------------------------------------------------------------------------------

# Stands still before the row that is named, until it is printed to go on.
FILLER = (
    "import pathlib, sys; from lib.record.rows import open_shared_log\n"
    "log = open_shared_log(pathlib.Path(sys.argv[1]), 'p')\n"
    "missing = [number for number in range(20) if number not in log.rows]\n"
    "print('begun', len(missing))\n"
    "for number in missing:\n"
    "    if number == int(sys.argv[2]): sys.stdin.readline()\n"
    "    log.append({'id': number})\n"
    "log.finish(range(20))\n"
)
WAITING = "waiting for another run that is making shared.jsonl\n"


def test_runs_that_ask_the_same_at_once_answer_it_once(tmp_path):
    fillers = [start(FILLER, tmp_path / "shared.jsonl", 3) for _ in range(5)]
    printed = [filler.stdout.readline() for filler in fillers]
    assert sorted(printed) == ["begun 20\n", *[WAITING] * 4], "one asks all, the others wait for it"
    go_on(fillers[printed.index("begun 20\n")])
    ended = [filler.communicate(timeout=60) for filler in fillers]
    assert [filler.returncode for filler in fillers] == [0] * 5, ended
    assert sorted(text for text, _ in ended) == ["", *["begun 0\n"] * 4], "the others found its rows"
    rows = [json.loads(line)["id"] for line in (tmp_path / "shared.jsonl").read_text().splitlines()]
    assert rows == list(range(20))


def test_a_killed_filler_hands_its_rows_on(tmp_path):
    first = start(FILLER, tmp_path / "shared.jsonl", 3)
    assert first.stdout.readline() == "begun 20\n"
    wait_for(lambda: count_lines(tmp_path / "shared.jsonl") == 3)
    second = start(FILLER, tmp_path / "shared.jsonl", -1)
    assert second.stdout.readline() == WAITING
    first.kill()
    first.wait()
    printed, failed = second.communicate(timeout=60)
    assert (second.returncode, printed) == (0, "begun 17\n"), failed
    rows = [json.loads(line)["id"] for line in (tmp_path / "shared.jsonl").read_text().splitlines()]
    assert rows == list(range(20))


def test_a_cell_that_is_run_again_does_not_wait_for_itself(tmp_path):
    printed = []
    locks.hold_file(tmp_path / "shared.jsonl", printed.append)
    locks.hold_file(tmp_path / "shared.jsonl", printed.append)
    locks.release_file(tmp_path / "shared.jsonl")
    locks.release_file(tmp_path / "shared.jsonl")
    assert not printed


def test_what_one_process_makes_the_next_one_finds(tmp_path):
    code = (
        "import pathlib, sys, time; from lib.record import locks\n"
        "made = pathlib.Path(sys.argv[1])\n"
        "with locks.one_at_a_time(made, tell=lambda text: None):\n"
        "    if not made.exists():\n"
        "        time.sleep(0.1); made.touch(); print('made it')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model")]
    makers = [subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    assert "".join(maker.communicate(timeout=60)[0] for maker in makers) == "made it\n"


def test_a_lock_folder_that_somebody_else_laid_out_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(locks.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"tune-and-tell-{os.getuid()}").symlink_to(tmp_path / "theirs")
    with pytest.raises(PermissionError, match="set TMPDIR to one of your folders"):
        locks.hold_file(tmp_path / "shared.jsonl")


def test_a_file_in_the_place_of_the_lock_folder_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(locks.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / f"tune-and-tell-{os.getuid()}").touch()
    with pytest.raises(PermissionError, match=r"tune-and-tell-\d+ cannot be made .*set TMPDIR to one of your folders"):
        locks.hold_file(tmp_path / "shared.jsonl")


def test_a_lock_leaves_nothing_beside_the_file(tmp_path):
    (tmp_path / "data").mkdir()
    with locks.one_at_a_time(tmp_path / "data" / "model"):
        assert list((tmp_path / "data").iterdir()) == []


# --- notebooks that a person runs ---------------------------------------------------------------------------------

NOTEBOOK = (
    "import pathlib, sys; from lib.record import manifest, paths\n"
    "manifest.someone_looks = lambda: True\n"
    "run = paths.run_paths(sys.argv[1], 'strong')\n"
    "record = manifest.start_stage(run.manifest('03_eval_gsm8k'), '03_eval_gsm8k', 'strong', {})\n"
    "print('at work', flush=True)\n"
    "sys.stdin.readline()\n"
    "record.finish(inputs=[], outputs=[], facts={})\n"
    "print('finished', flush=True)\n"
    "sys.stdin.readline()\n"
)


def test_notebooks_of_a_person_keep_drivers_away_until_they_are_finished(tmp_path, capsys):
    notebooks = [start(NOTEBOOK, tmp_path), start(NOTEBOOK, tmp_path)]
    assert [notebook.stdout.readline() for notebook in notebooks] == ["at work\n"] * 2, "they do not mind each other"
    assert run_all.main(["--presets", "simple", "--output-dir", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert "03_eval_gsm8k of strong, open in JupyterLab" in printed and "--wait" in printed
    for notebook in notebooks:
        go_on(notebook)
        assert notebook.stdout.readline() == "finished\n"
    with locks.hold(tmp_path, "next"):
        pass
    for notebook in notebooks:
        notebook.communicate("\n", timeout=60)


def test_the_one_who_still_holds_a_folder_is_named_and_not_who_wrote_last(tmp_path):
    notebooks = [start(NOTEBOOK, tmp_path), start(NOTEBOOK, tmp_path)]
    assert [notebook.stdout.readline() for notebook in notebooks] == ["at work\n"] * 2
    lines = (tmp_path / locks.LOCK_FILE).read_text().splitlines()
    assert sorted(json.loads(line)["pid"] for line in lines) == sorted(notebook.pid for notebook in notebooks)
    last = next(notebook for notebook in notebooks if notebook.pid == json.loads(lines[-1])["pid"])
    last.kill()
    last.communicate()
    other = next(notebook for notebook in notebooks if notebook is not last)
    with pytest.raises(locks.FolderInUse, match=f"in use by process {other.pid} on"), locks.hold(tmp_path, "next"):
        pass
    other.communicate("\n\n", timeout=60)


def test_lines_that_are_no_holder_are_passed_over(tmp_path):
    path = tmp_path / locks.LOCK_FILE
    path.write_text('{"pid": 1, "host": "elsewhere", "since": "s", "command": "c"}\n{"pid": 2\n[]\n\n')
    with path.open(encoding="utf-8") as stream:
        assert locks.read_holder(stream).pid == 1
    path.write_text("")
    with path.open(encoding="utf-8") as stream:
        assert locks.read_holder(stream) is None


def test_a_notebook_is_refused_while_a_driver_is_at_work(tmp_path):
    holder = start_holder(tmp_path)
    _, printed = start(NOTEBOOK, tmp_path).communicate("\n\n", timeout=60)
    holder.kill()
    holder.wait()
    assert f"process {holder.pid} on" in printed and "python run_all.py --presets simple" in printed
    assert "ArtifactError" in printed and "wait until it has ended, or use another results_dir" in printed
    assert not (tmp_path / "run_strong").exists()
