"""Files of a run: complete or not at all, incomplete lines, garbage, manifests and when stages become stale."""

import csv
import errno
import fcntl
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_notebooks import copy_project

from lib.driver import run
from lib.record import files, locks, source_code
from lib.record import paths as record_paths
from lib.record.manifest import stale_reason, start_stage
from lib.record.paths import PROJECT_ROOT, ArtifactError, run_paths
from lib.record.rows import RowLog, read_jsonl, write_jsonl

NASTY_TEXTS = ["", "plain", "\u2028line\u2029", "\x00\x1b[31m", "\ud800 lone surrogate", "<script>x</script>", "é\r\n"]


def test_paths_follow_the_published_names(tmp_path):
    paths = run_paths(str(tmp_path), "medium")
    assert paths.gsm8k_preds == tmp_path / "run_medium" / "gsm8k_preds_medium.jsonl"
    assert paths.ailuminate_preds.name == "ailuminate_preds_medium.jsonl"
    assert paths.ailuminate_safety.name == "ailuminate_safety_medium.jsonl"
    assert paths.checkpoint_scores.name == "checkpoint_scores_medium.csv"
    assert paths.config_resolved == tmp_path / "run_medium" / "config_resolved.json"
    assert paths.manifest("02_train") == tmp_path / "run_medium" / "02_train" / "manifest.json"


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x\n"])
def test_a_run_name_is_a_plain_folder_name(name):
    with pytest.raises(ArtifactError, match="run_name"):
        run_paths("", name)


def test_a_missing_file_names_the_stage_to_run(tmp_path):
    paths = run_paths(str(tmp_path), "simple")
    with pytest.raises(ArtifactError, match="run 01_prepare for preset 'simple' first") as caught:
        record_paths.require(paths.train_rows, "01_prepare", "simple")
    assert "train.jsonl" in str(caught.value)


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [{"id": number, "text": text} for number, text in enumerate(NASTY_TEXTS)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows


@pytest.fixture(params=[errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL], ids=errno.errorcode.get)
def poor_file_system(request, monkeypatch):
    """Reading, writing and renaming, and nothing else: vfat, buckets, some FUSE mounts."""

    def refuse(*_, **__):
        raise OSError(request.param, os.strerror(request.param))

    for name in ("chmod", "chown", "utime", "link", "symlink", "fsync", "setxattr"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(fcntl, "flock", refuse)
    # What libfuse answers for a file system that does not say.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=0, used=0, free=0))


def test_a_folder_is_used_where_nothing_but_files_can_be_made(tmp_path, poor_file_system):
    files.write_text(tmp_path / "plain.txt", "old")
    files.write_text(tmp_path / "plain.txt", "new")
    assert (tmp_path / "plain.txt").read_text() == "new"
    log = RowLog(tmp_path / "rows.jsonl", "protocol")
    log.append({"id": 1})
    assert log.finish([1]) == read_jsonl(tmp_path / "rows.jsonl")
    with files.folder_in_making(tmp_path / "made", lambda _: True) as part:
        files.write_json(part / "note.json", {})
        files.share(part / "note.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "plain.txt", "rows.jsonl"]


def test_a_driver_holds_a_folder_where_nothing_but_files_can_be_made(tmp_path, poor_file_system, capsys):
    with run.locked(tmp_path, "python run_all.py"), locks.one_at_a_time(tmp_path / "asset"):
        run.check_writable(tmp_path / "reports")
    assert "without locks: start no second run" in capsys.readouterr().err


def test_a_broken_disk_is_no_missing_courtesy(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        files.write_text(tmp_path / "plain.txt", "text")
    assert list(tmp_path.iterdir()) == []


def test_written_files_are_for_others_to_read(tmp_path):
    files.write_text(tmp_path / "plain.txt", "text")
    assert (tmp_path / "plain.txt").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\n\n", "empty"),
        (b'{"id": 1}\n{"id": 2\n', "line 2"),
        (b'{"id": 1}\nnot json\n{"id": 3}\n', "line 2"),
        (b'{"id": 1}\n[1, 2]\n', "line 2"),
        (b"\xff\xfe\n", "line 1"),
        (b"[" * 100_000 + b"\n", "line 1"),
        (b"<!DOCTYPE html>\n<html></html>\n", "line 1"),
    ],
)
def test_a_row_file_with_garbage_is_refused_with_its_line(tmp_path, content, words):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"rows\.jsonl") as caught:
        read_jsonl(tmp_path / "rows.jsonl")
    assert words in str(caught.value)


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path):
    target = tmp_path / "value.json"
    files.write_json(target, {"old": 1})
    with pytest.raises(TypeError):
        files.write_text(target, b"no text")
    assert json.loads(target.read_text()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["value.json"]


def test_a_table_has_every_column_that_a_row_has(tmp_path):
    rows = [{"run": "one", "rate": 0.5}, {"run": "two, or three", "status": "not measured", "rate": None}]
    files.write_csv(tmp_path / "table.csv", rows)
    assert (tmp_path / "table.csv").read_bytes() == b'run,rate,status\none,0.5,\n"two, or three",,not measured\n'
    assert files.csv_text([]) == "\n"


FORMULAS = [
    "=cmd|' /C calc'!A0",
    "@SUM(1)",
    "+HYPERLINK(1)",
    "-2+3",
    "\tx",
    "\rx",
    "\n=1",
    "\uff1d1",
    "'=1",
    "''@x",
    "-x",
]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_text_that_a_spreadsheet_would_run_is_written_inert_and_read_as_it_was(tmp_path, text):
    rows = [{"run_name": text, "rate": -0.5}]
    files.write_csv(tmp_path / "table.csv", rows)
    with (tmp_path / "table.csv").open(newline="") as stream:
        assert list(csv.reader(stream))[1] == [f"'{text}", "-0.5"]
    read = files.read_csv(tmp_path / "table.csv")
    assert read == [{"run_name": text, "rate": "-0.5"}]
    # Tables that are read and extended, and those of earlier versions, do not change.
    assert files.csv_text(read) == files.csv_text(rows)
    (tmp_path / "older.csv").write_text("run_name,model\nx,=cmd\ny,'quoted'\nz,-1.5e-05\n")
    assert [row["model"] for row in files.read_csv(tmp_path / "older.csv")] == ["=cmd", "'quoted'", "-1.5e-05"]


def test_a_log_keeps_whole_rows_and_drops_a_torn_last_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    log = RowLog(path, "p")
    for number in range(3):
        log.append({"id": number})
    path.write_bytes(path.read_bytes() + b'{"id": 3, "te')
    again = RowLog(path, "p")
    assert (sorted(again.rows), again.torn) == ([0, 1, 2], True)
    # The torn piece must leave the file too: a row appended to it would be garbage in the middle.
    again.append({"id": 3})
    assert [row["id"] for row in read_jsonl(path)] == [0, 1, 2, 3]


def test_a_log_refuses_garbage_in_the_middle_and_leaves_the_file_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    content = b'{"id": 0, "protocol_hash": "p"}\ngarbage\n{"id": 2, "protocol_hash": "p"}\n'
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="line 2"):
        RowLog(path, "p")
    assert path.read_bytes() == content


def test_a_log_drops_rows_of_another_protocol(tmp_path):
    RowLog(tmp_path / "rows.jsonl", "old").append({"id": 0})
    log = RowLog(tmp_path / "rows.jsonl", "new")
    assert (log.rows, log.num_dropped) == ({}, 1)


def test_a_finished_log_has_the_order_asked_for_whatever_finished_first(tmp_path):
    contents = []
    for order in ([2, 0, 1], [0, 1, 2]):
        log = RowLog(tmp_path / f"{order[0]}.jsonl", "p")
        for number in order:
            log.append({"id": number})
        assert [row["id"] for row in log.finish([0, 1, 2])] == [0, 1, 2]
        contents.append(log.path.read_bytes())
    assert contents[0] == contents[1]
    with pytest.raises(ArtifactError, match="1 rows are missing, the first 7"):
        log.finish([0, 7])


def test_rows_survive_kill_9(tmp_path):
    path = tmp_path / "rows.jsonl"
    code = (
        "import sys, itertools, pathlib; from lib.record.rows import RowLog\n"
        "log = RowLog(pathlib.Path(sys.argv[1]), 'p')\n"
        "for number in itertools.count(): log.append({'id': number, 'text': 'x' * 5000})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=PROJECT_ROOT)
    deadline = time.monotonic() + 30
    while (not path.exists() or path.stat().st_size < 50_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = RowLog(path, "p").rows
    assert len(kept) >= 9 and sorted(kept) == list(range(len(kept)))


@pytest.fixture
def finished_stage(tmp_path):
    """A complete stage with one input and one output."""
    (tmp_path / "in.txt").write_text("in")
    (tmp_path / "out.txt").write_text("out")
    record = start_stage(tmp_path / "manifest.json", "01_prepare", "x", {"seed": 1, "assets_dir": "here"})
    record.finish(inputs=[tmp_path / "in.txt"], outputs=[tmp_path / "out.txt"], facts={"rows": 1})
    return tmp_path


def stale(folder, **parameters):
    return stale_reason(folder / "manifest.json", "01_prepare", {"seed": 1, "assets_dir": "here", **parameters})


def test_a_complete_stage_holds_until_something_changes(finished_stage):
    assert stale(finished_stage) == ""
    assert stale(finished_stage, assets_dir="there") == ""
    assert "seed" in stale(finished_stage, seed=2)
    assert "new_key" in stale(finished_stage, new_key=None)


def test_a_parameter_that_the_stage_did_not_use_makes_nothing_run_again(finished_stage):
    parameters = {"seed": 1, "judge_mode": "probabilities"}
    record = start_stage(finished_stage / "manifest.json", "01_prepare", "x", parameters)
    record.finish(inputs=[], outputs=[], facts={"unused_parameters": ["judge_mode"]})
    assert stale(finished_stage, judge_mode="generate") == ""
    assert stale(finished_stage, judge_mode="generate", seed=2) == "parameters changed: seed"


@pytest.mark.parametrize("name", ["in.txt", "out.txt"])
def test_a_changed_or_missing_file_makes_a_stage_stale(finished_stage, name):
    path = finished_stage / name
    content = path.read_text()
    path.write_text(content.upper())
    assert name in stale(finished_stage)
    # The same bytes with another time are the same file: a copied folder need not run again.
    path.write_text(content)
    os.utime(path, (1, 1))
    assert stale(finished_stage) == ""
    path.unlink()
    assert name in stale(finished_stage)


def test_a_stage_that_started_again_or_was_skipped_is_not_complete(finished_stage):
    manifest = finished_stage / "manifest.json"
    record = start_stage(manifest, "01_prepare", "x", {"seed": 1})
    assert stale(finished_stage) == "not run yet"
    record.finish(inputs=[], outputs=[], facts={}, skipped="no prompts")
    assert stale(finished_stage) == "it was skipped: no prompts"


@pytest.fixture
def small_project(tmp_path, monkeypatch):
    """A project of one notebook; its modules ``site``, ``track`` and ``record.typed`` are not behind the notebook."""
    modules = {
        "__init__": "",
        "rows": "from lib.record.paths import (\n    one,\n    two,\n)\n",
        "record/__init__": "",
        "record/paths": "if TYPE_CHECKING:\n    from lib.record.typed import T\ndef f():\n    from lib import late\n",
        "record/typed": "from lib import track\n",
        "late": "# from lib import track\nNUMBER = 'import lib.site'\n",
        "site": "from lib import rows\n",
        "track": "NUMBER = 1\n",
        "json_lines": "",
    }
    for name, text in modules.items():
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / f"{name}.py").write_text(text)
    cells = [{"cell_type": "code", "metadata": {}, "source": ["import json\n", "from lib import rows, json_lines"]}]
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "01_prepare.ipynb").write_text(json.dumps({"cells": cells}))
    monkeypatch.setattr(source_code, "PROJECT_ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("module", "is_behind"),
    [
        ("__init__", True),
        ("rows", True),
        ("json_lines", True),
        ("record/paths", True),
        ("late", True),
        ("record/typed", False),
        ("site", False),
        ("track", False),
    ],
)
def test_a_stage_is_stale_when_a_module_behind_it_has_changed(small_project, module, is_behind):
    before = source_code.code_hash("01_prepare")
    with (small_project / "lib" / f"{module}.py").open("a") as stream:
        stream.write("# edited\n")
    assert (source_code.code_hash("01_prepare") != before) is is_behind


@pytest.mark.parametrize(
    ("module", "stale", "fresh"),
    [
        ("reports/comparison_plots.py", "05", "01 02 03 04"),
        ("engine/generate.py", "03 04", "05"),
        ("train/sft.py", "02", "01 03 04 05"),
        ("gsm8k.py", "01 02 03 05", ""),
        ("record/manifest.py", "01 02 03 04 05", ""),
        ("reports/site.py", "", "01 02 03 04 05"),
        ("reports/to_mlflow.py", "", "01 02 03 04 05"),
        ("driver/run.py", "", "01 02 03 04 05"),
        ("driver/display.py", "", "01 02 03 04 05"),
        ("compare/verify.py", "", "01 02 03 04 05"),
    ],
)
def test_a_changed_module_makes_exactly_the_stages_stale_that_run_it(tmp_path, monkeypatch, module, stale, fresh):
    project = copy_project(tmp_path)
    monkeypatch.setattr(source_code, "PROJECT_ROOT", project)
    before = {stage[:2]: source_code.code_hash(stage) for stage in record_paths.STAGES}
    with (project / "lib" / module).open("a") as stream:
        stream.write("# edited\n")
    changed = {stage[:2] for stage in record_paths.STAGES if source_code.code_hash(stage) != before[stage[:2]]}
    assert set(stale.split()) <= changed and not set(fresh.split()) & changed


def test_code_that_is_edited_while_a_stage_runs_is_not_recorded_as_what_ran(small_project):
    record = start_stage(small_project / "manifest.json", "01_prepare", "x", {})
    began_with = source_code.code_hash("01_prepare")
    (small_project / "lib" / "rows.py").write_text("NUMBER = 2\n")
    assert record.finish(inputs=[], outputs=[], facts={})["code_sha256"] == began_with
    assert stale_reason(small_project / "manifest.json", "01_prepare", {}) == "the code changed"


def test_a_manifest_names_no_home_folder(finished_stage):
    text = (finished_stage / "manifest.json").read_text()
    assert str(finished_stage) not in text and f"{Path.home()}/" not in text
    assert json.loads(text)["versions"]["torch"] != "not installed"


@pytest.mark.parametrize(
    ("there", "stays"),
    [(None, "made"), ("complete, by another process", "complete, by another process"), ("half of one", "made")],
)
def test_a_folder_is_published_whole_and_the_first_whole_one_stays(tmp_path, there, stays):
    folder = tmp_path / "kept"
    with files.folder_in_making(folder, lambda path: (path / "note").read_text().startswith("complete")) as made:
        made.mkdir()
        (made / "note").write_text("made")
        if there:
            folder.mkdir()
            (folder / "note").write_text(there)
    assert (folder / "note").read_text() == stays
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


MAKER = (
    "import pathlib, sys, time; from lib.record import files\n"
    "with files.folder_in_making(pathlib.Path(sys.argv[1]), lambda _: True) as made:\n"
    "    made.mkdir(); (made / 'half').touch(); print('half', flush=True); sys.stdin.readline()\n"
)


def test_what_a_killed_maker_left_is_removed_by_the_next_and_a_living_ones_is_not(tmp_path):
    command = [sys.executable, "-c", MAKER, str(tmp_path / "model")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    makers = [subprocess.Popen(command, cwd=PROJECT_ROOT, **pipes) for _ in range(2)]
    assert [maker.stdout.readline() for maker in makers] == ["half\n"] * 2
    killed, living = makers
    killed.kill()
    killed.communicate()
    # Of another machine, and of nobody: neither is known to be left behind.
    others = [".model.elsewhere.1.abcdefgh", f".model.{os.uname().nodename}.notes"]
    for name in others:
        (tmp_path / name).mkdir()
    with files.folder_in_making(tmp_path / "model", lambda _: True) as made:
        made.mkdir()
        here = f".model.{os.uname().nodename}."
        left = [path.name.removeprefix(here).split(".")[0] for path in tmp_path.glob(f"{here}*.*")]
        assert sorted(left) == sorted(map(str, (living.pid, os.getpid())))
    living.communicate("\n", timeout=60)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["model", *others])


def test_a_making_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="no room"), files.folder_in_making(tmp_path / "model", bool) as made:
        made.mkdir()
        raise OSError("no room")
    assert list(tmp_path.iterdir()) == []


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "environment"),
    [
        (PROJECT_ROOT / ".venv", ".venv"),
        ("/home/planted/envs/llm", "envs/llm"),
        ("/home/planted", "~"),
        ("/home/planted/env", "~/env"),
        ("/scratch/planted/env", "user/env"),
        ("/usr/local", "usr/local"),
    ],
)
def test_a_manifest_names_its_interpreter_and_nobody(tmp_path, monkeypatch, prefix, environment):
    for name, value in {"HOME": "/home/planted", "USER": "planted", "LOGNAME": "planted"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "prefix", str(prefix))
    record = start_stage(tmp_path / "run_x" / "01_prepare" / "manifest.json", "01_prepare", "x", {})
    noted = record.finish(inputs=[], outputs=[], facts={})["interpreter"]
    assert noted == {"implementation": platform.python_implementation(), "environment": environment}


def test_a_tilde_is_the_home_folder_only_where_it_was_typed_as_one(monkeypatch):
    monkeypatch.setenv("HOME", "/home/planted")
    assert record_paths.expand_home("~/models") == Path("/home/planted/models")
    assert record_paths.expand_home("~no-such-user/models") == Path("~no-such-user/models")
    # A folder of the project that is called so.
    assert record_paths.display_path(PROJECT_ROOT / "~" / "assets") == "./~/assets"
    assert record_paths.expand_home("./~/assets") == Path("~/assets")


def test_facts_that_name_row_files_stay_names_whatever_the_user_is_called(tmp_path, monkeypatch):
    monkeypatch.setenv("USER", "untuned")
    facts = {"untuned_rows": "../../untuned/rows.jsonl", "where": "/scratch/untuned/x"}
    record = start_stage(tmp_path / "run_x" / "01_prepare" / "manifest.json", "01_prepare", "x", {})
    noted = record.finish(inputs=[], outputs=[], facts=facts)["facts"]
    assert noted == {"untuned_rows": facts["untuned_rows"], "where": "/scratch/user/x"}


def test_names_that_are_not_utf8_can_be_written_and_read_back(tmp_path):
    value = {"name": "caf\udce9", "word": "caf\u00e9"}
    files.write_json(tmp_path / "x.json", value)
    assert files.read_json(tmp_path / "x.json") == value
    files.write_text(tmp_path / "x.txt", "caf\udce9")
    assert (tmp_path / "x.txt").read_text() == "caf?"
