"""Folders that came from elsewhere: links, pipes, sizes and shapes that were made to do harm."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_runs import make_run, write_tables

import run_all
from lib.compare.folder_schema import PNG_START
from lib.record import locks
from lib.record.files import read_json, write_json
from lib.record.manifest import file_stamp, same_file
from lib.record.paths import PROJECT_ROOT, ArtifactError, run_paths
from lib.record.plain_files import list_files, open_plain
from lib.record.rows import RowLog, read_jsonl


@pytest.fixture
def results(tmp_path):
    """A finished run of ``sandbox_one``, and beside it a file of the person who opens it."""
    folder = tmp_path / "hand-in"
    make_run(folder, "sandbox_one")
    write_tables(folder)
    (tmp_path / "thesis.txt").write_text("two years of work")
    return folder


def run(results, *argv):
    return run_all.main([*argv, "--output-dir", str(results)])


COMPARE = ("--presets", "sandbox_one", "--stages", "05", "--offline")
PLACES = [".lock", "reports", "reports/index.html", "05_compare", "untuned", "run_sandbox_one/02_train/adapter/x.json"]
PLACES += [
    "run_sandbox_one/gsm8k_preds_sandbox_one.jsonl",
    "run_sandbox_one/03_eval_gsm8k/plots",
    "summary.csv",
    "run_b",
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("target", ["thesis.txt", "."])
def test_no_command_follows_a_link_of_a_results_folder(results, capsys, place, target):
    link = results / place
    if link.exists():
        link.rename(results.parent / "moved")
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(results.parent / target)
    before = sorted(results.parent.iterdir())
    statuses = [run(results, *COMPARE), run(results, "--report-only"), run_all.main(["--verify", str(results)])]
    assert statuses == [2, 1, 1]
    assert capsys.readouterr().err.count(f"{place} is a link") == 3
    assert (results.parent / "thesis.txt").read_text() == "two years of work"
    assert sorted(results.parent.iterdir()) == before and link.is_symlink()


def test_a_lock_that_is_another_file_keeps_its_content(results, capsys):
    (results / ".lock").write_text("notes of a person")
    assert run(results, *COMPARE) == 2
    assert "is not a lock of this project; delete it" in capsys.readouterr().err
    assert (results / ".lock").read_text() == "notes of a person"
    (results / ".lock").unlink()
    with locks.hold(results, "python run_all.py"), pytest.raises(locks.FolderInUse), locks.hold(results, "again"):
        pass


def test_a_row_is_not_written_through_a_link(results, tmp_path):
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "made")
    log = RowLog(tmp_path / "rows.jsonl", "protocol")
    with pytest.raises(ArtifactError, match=r"rows\.jsonl is a link"):
        log.append({"id": 1})
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()])
def test_a_pipe_a_device_and_a_folder_are_not_opened(tmp_path, make):
    make(tmp_path / "rows.jsonl")
    with pytest.raises((ArtifactError, IsADirectoryError)):
        open_plain(tmp_path / "rows.jsonl")


def grow(path, num_bytes):
    with path.open("ab") as stream:
        stream.truncate(num_bytes)


def name_output(results, name, size=1):
    path = run_paths(str(results), "sandbox_one").manifest("03_eval_gsm8k")
    manifest = read_json(path)
    manifest["outputs"][name] = {"sha256": "0", "size": size, "mtime_ns": 1}
    write_json(path, manifest)


def huge_output(results):
    name_output(results, "big", 200 << 30)
    (results / "run_sandbox_one/03_eval_gsm8k/big").touch()
    grow(results / "run_sandbox_one/03_eval_gsm8k/big", 200 << 30)


def edit_manifest(results, **parts):
    path = run_paths(str(results), "sandbox_one").manifest("03_eval_gsm8k")
    manifest = read_json(path)
    path.write_text(json.dumps({**manifest, **{key: manifest[key] | names for key, names in parts.items()}}))


def input_under_many_names(results):
    """Each name of the same 200 MB, with their true hash: all of them would be read."""
    big = results / "run_sandbox_one/big"
    big.touch()
    grow(big, 200_000_000)
    stamp = file_stamp(big) | {"mtime_ns": 1}
    edit_manifest(results, inputs={"../" + "../run_sandbox_one/" * n + "big": stamp for n in range(150)})
    (results / "run_sandbox_one/03_eval_gsm8k/notes").write_text("x")
    name_output(results, "notes")


def huge_input(results):
    huge_output(results)
    stamps = read_json(run_paths(str(results), "sandbox_one").manifest("03_eval_gsm8k"))["outputs"]
    edit_manifest(results, inputs={"../03_eval_gsm8k/big": stamps["big"] | {"mtime_ns": 1}})


def many_outputs(results):
    edit_manifest(results, outputs={f"{n}": {"sha256": "0", "size": 1, "mtime_ns": 1} for n in range(200_000)})


def many_runs_compared(results):
    (results / "05_compare").mkdir()
    compared = {"runs": [f"r{n}" for n in range(1000)], "hazards_added": {}, "allow_unlike": True}
    write_json(results / "05_compare/comparison.json", compared)


def many_files(results):
    (results / "notes").mkdir()
    for number in range(20_001):
        (results / f"notes/{number}").touch()


def append(name, text):
    return lambda results: (results / f"run_sandbox_one/{name}").open("a").write(text)


ROWS = "gsm8k_preds_sandbox_one.jsonl"
BOMBS = {
    "a file of the system": (
        lambda results: name_output(results, "../../../../../../../proc/self/pagemap"),
        "is not in",
    ),
    "another person's file": (lambda results: name_output(results, "../../../../../../etc/hostname"), "is not in"),
    "200 GB to hash": (huge_output, "allowed are"),
    "6 GB of rows": (lambda results: grow(results / "run_sandbox_one" / ROWS, 6 << 30), "allowed are 200 MB"),
    "a row of 3 MB": (append(ROWS, '{"id": "' + "9" * 3_000_000 + '"}\n'), "allowed are 500,000 rows of 2,000,000"),
    "two million rows": (append(ROWS, "{}\n" * 2_000_000), "allowed are 500,000 rows"),
    "rows of brackets": (append(ROWS, ('{"id": 1, "a": [' + "[]," * 600_000 + "[]]}\n") * 90), "of memory"),
    "a manifest of brackets": (append("config_resolved.json", "[" + "{}," * 6_000_000 + "{}]"), "is not JSON"),
    "200 GB of an input": (huge_input, "of files to hash"),
    "one input, many names": (input_under_many_names, "notes is not the file that"),
    "names of many files": (many_outputs, "MB of manifests"),
    "many runs compared": (many_runs_compared, "should have at most 64 items"),
    "a commitment of countless lines": (append("COMMITMENT", "\n" * 100_000_000), "COMMITMENT has 100,000,"),
    "many files": (many_files, "over 20,000 files"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_in_seconds_and_within_a_gigabyte(results, kind):
    make, words = BOMBS[kind]
    make(results)
    code = (
        "import re, sys, time, run_all; status = run_all.main(['--verify', sys.argv[1]]); "
        # Not ru_maxrss: a child begins with what its parent had.
        "peak = re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]; "
        "print(time.process_time(), int(peak) // 1024); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(results)], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=100
    )
    seconds, peak_mib = map(float, done.stdout.split()[-2:])
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
    assert peak_mib < 1000 and seconds < 10, (seconds, peak_mib)


def test_pictures_of_many_megabytes_are_refused(results, capsys):
    (results / "05_compare" / "plots").mkdir(parents=True)
    for number in range(3):
        picture = results / "05_compare" / "plots" / f"{number}.png"
        picture.write_bytes(PNG_START + bytes(40))
        grow(picture, 9_000_000)
    assert run(results, "--report-only") == 1
    assert "has 27 MB of pictures: allowed are 20 MB" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="no /proc")
def test_a_file_without_size_is_not_read():
    # The driver compares inputs that a handed-in manifest names, and some files there have no end.
    assert same_file(Path("/proc/version"), {"sha256": hashlib.sha256().hexdigest(), "size": 0, "mtime_ns": 1})


def test_a_key_that_appears_twice_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"id": 1, "correct": false, "correct": true}\n')
    (tmp_path / "manifest.json").write_text('{"metrics": {"n": 1, "n": 2}}')
    with pytest.raises(ArtifactError, match=r"rows\.jsonl, line 1: not JSON \(the key 'correct' appears twice\)"):
        read_jsonl(tmp_path / "rows.jsonl")
    with pytest.raises(ArtifactError, match="the key 'n' appears twice"):
        read_json(tmp_path / "manifest.json")


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    if os.access(tmp_path / "closed", os.R_OK):
        pytest.skip("this user reads everything")
    with pytest.raises(ArtifactError, match=r"closed cannot be read \(Permission denied\)"):
        list_files(tmp_path)
