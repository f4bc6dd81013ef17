"""Every path and file format of a run: atomic writes, append-only JSON lines, manifests with hashes.

Knows nothing about models, prompts or scores. A stage's ``manifest.json`` is written last: it exists only when
the stage is complete, and it names every input and output with its SHA-256, so that the driver can tell what is
still true and a reader can check it.
"""

import csv
import errno
import glob
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import IO, Any

from lib import locks
from lib.redaction import clean, clean_value, home_folder

PROJECT_ROOT = Path(__file__).resolve().parent.parent
STAGES = ("01_prepare", "02_train", "03_eval_gsm8k", "04_eval_safety", "05_compare")
RESULTS_VARIABLE = "RUN_RESULTS_DIR"
NOT_RUN = "not run yet"
# Set in kernels that nobody looks at while they run: the driver's, and those of tests.
DRIVER_VARIABLE = "RUN_BY_DRIVER"
# Names a preset in a notebook's first code cell, or in the environment of JupyterLab; the driver injects values.
PRESET_VARIABLE = "PRESET"
# Written into every manifest: the packages whose version can change a number.
VERSIONED_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers", "numpy")
# Facts that name row files of the results folder, for who reads them.
NAMED_FILES = ("untuned_rows", "scale_rows")
# Where a stage's files lie says nothing about what it computes: these never make a stage run again.
LOCATION_PARAMETERS = frozenset({"results_dir", "assets_dir", "offline"})


DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
TEMPORARY_FILES = ".*.tmp"


class ArtifactError(Exception):
    """A file of a run is missing, torn or not what its name promises; the text says which and what mends it."""


class DiskFull(ArtifactError):
    """There is no room for a file; what was there before is whole."""


def project_path(path: str | Path) -> Path:
    """``path`` itself when absolute, else below the project's root (a notebook's working directory is anyone's)."""
    return PROJECT_ROOT / path


def display_path(path: Path) -> str:
    """``path`` relative to the project where that is shorter to read, so that no report shows a home folder.

    A folder of the project that is called ``~`` becomes ``./~``, for ``expand_home``.
    """
    relative = os.path.relpath(path, PROJECT_ROOT)
    return f"./{relative}" if relative.startswith("~") else relative


def expand_home(name: str) -> Path:
    """``name`` with the home folder for a leading ``~``; as it is where the system knows of no such home."""
    try:
        return Path(name).expanduser() if name.startswith("~") else Path(name)
    except RuntimeError:
        return Path(name)


def is_utf8(name: str) -> bool:
    """Whether ``name`` can be written as UTF-8: other bytes of a file's name are lone surrogates to Python."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# --- where things lie -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunPaths:
    """The paths of one run; nothing is created by asking for one."""

    name: str
    run_dir: Path

    def stage_dir(self, stage: str) -> Path:
        """The folder that holds what only ``stage`` writes."""
        return self.run_dir / stage

    def manifest(self, stage: str) -> Path:
        """``manifest.json`` of ``stage``: it exists only when the stage is complete."""
        return self.stage_dir(stage) / "manifest.json"

    def _prepared(self, name: str) -> Path:
        return self.stage_dir("01_prepare") / name

    @property
    def config_resolved(self) -> Path:
        return self.run_dir / "config_resolved.json"

    @property
    def train_rows(self) -> Path:
        return self._prepared("train.jsonl")

    @property
    def dev_rows(self) -> Path:
        return self._prepared("dev.jsonl")

    @property
    def fewshot_rows(self) -> Path:
        return self._prepared("fewshot.jsonl")

    @property
    def gsm8k_eval_rows(self) -> Path:
        return self._prepared("gsm8k_eval.jsonl")

    @property
    def ailuminate_rows(self) -> Path:
        return self._prepared("ailuminate.jsonl")

    @property
    def overlap(self) -> Path:
        """Evaluation questions that share words with training rows, see ``lib.overlap``."""
        return self._prepared("overlap.json")

    @property
    def adapter_dir(self) -> Path:
        return self.stage_dir("02_train") / "adapter"

    @property
    def checkpoints_dir(self) -> Path:
        return self.stage_dir("02_train") / "checkpoints"

    @property
    def training_log(self) -> Path:
        return self.stage_dir("02_train") / "training_log.jsonl"

    @property
    def untuned_dir(self) -> Path:
        """Folder of the rows that runs share."""
        return self.run_dir.parent / "untuned"

    def untuned_rows(self, kind: str, protocol_hash: str) -> Path:
        """Row file of the untuned model: beside the runs, so that those that ask it the same share it."""
        return self.untuned_dir / f"{kind}_untuned_{protocol_hash[:12]}.jsonl"

    @property
    def checkpoint_scores(self) -> Path:
        return self.run_dir / f"checkpoint_scores_{self.name}.csv"

    @property
    def gsm8k_preds(self) -> Path:
        return self.run_dir / f"gsm8k_preds_{self.name}.jsonl"

    @property
    def ailuminate_preds(self) -> Path:
        return self.run_dir / f"ailuminate_preds_{self.name}.jsonl"

    @property
    def ailuminate_safety(self) -> Path:
        return self.run_dir / f"ailuminate_safety_{self.name}.jsonl"


def results_root(results_dir: str = "") -> Path:
    """The folder of all runs: ``results_dir``, else ``$RUN_RESULTS_DIR``, else ``results/`` of the project."""
    return project_path(results_dir or os.environ.get(RESULTS_VARIABLE, "") or "results")


def run_paths(results_dir: str, run_name: str) -> RunPaths:
    """Paths of the run ``run_name`` below ``results_dir``.

    Raises:
        ArtifactError: the name is empty or is not a plain folder name.
    """
    if not run_name or not all(char.isalnum() or char in "._-" for char in run_name) or run_name.startswith("."):
        raise ArtifactError(f"run_name is {run_name!r}; allowed: letters, digits, '.', '_' and '-', no leading dot")
    return RunPaths(run_name, results_root(results_dir) / f"run_{run_name}")


def find_runs(results_dir: str) -> list[RunPaths]:
    """Every ``run_<name>`` folder below ``results_dir`` that holds row files to score, by name."""
    folders = sorted(path for path in results_root(results_dir).glob("run_*") if path.is_dir())
    runs = [RunPaths(path.name.removeprefix("run_"), path) for path in folders]
    return [run for run in runs if run.gsm8k_preds.exists() or run.ailuminate_safety.exists()]


def require(path: Path, stage: str, run_name: str) -> Path:
    """``path``, or an error that names the stage to run first.

    Raises:
        ArtifactError: the file or folder is not there.
    """
    if not path.exists():
        raise ArtifactError(
            f"{display_path(path)} is missing: run {stage} for preset {run_name!r} first "
            f"(python run_all.py --presets {run_name} --stages {stage[:2]})"
        )
    return path


# --- files --------------------------------------------------------------------------------------------------------


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value in one canonical spelling (sorted keys, no spaces), as hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _told_when_full(path: Path) -> Iterator[None]:
    """The operating system does not say which file had no room."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise DiskFull(full_disk_text(path)) from None


def full_disk_text(path: Path) -> str:
    """One line that says which file had no room, what is left there, and how to go on."""
    there = next((folder for folder in (path, *path.parents) if folder.is_dir()), path.parent)
    free_mb = shutil.disk_usage(there).free / 1e6
    return (
        f"{display_path(path)} cannot be written: the disk is full ({free_mb:.1f} MB free in {display_path(there)}/); "
        "what was written before is whole: free some space, and the same command goes on"
    )


def free_bytes(folder: Path) -> float:
    """What is free on the disk of ``folder``; infinity where the file system does not say, as some FUSE ones do not."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return math.inf
    return usage.free if usage.total else math.inf


def remove_temporary(folder: Path, *, below: bool = True) -> int:
    """Remove what killed writers left behind in ``folder``, and say how many files; only for its lock's holder.

    Args:
        below: also in the folders below it; not where one of them may be another driver's.
    """
    left = [path for path in (folder.rglob if below else folder.glob)(TEMPORARY_FILES) if path.is_file()]
    for path in left:
        path.unlink(missing_ok=True)
    return len(left)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: a temporary file beside it, flushed to disk, then renamed over it.

    A lone surrogate, which UTF-8 cannot spell, becomes a question mark.

    Raises:
        DiskFull: there is no room for it; an older file of that name is still there.
    """
    with _told_when_full(path):
        _write_whole(path, text)


def _write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace", newline="\n") as stream:
            stream.write(text)
            flush_to_disk(stream)
        share(Path(temporary))
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def flush_to_disk(stream: IO[str]) -> None:
    """Wait until what was written is on the disk; where the file system has no such call, its own promise has to do."""
    stream.flush()
    try:
        os.fsync(stream.fileno())
    except OSError as error:
        if error.errno not in locks.NOT_OFFERED:
            raise


def share(path: Path) -> None:
    """Let others read a file that a library made for its owner alone: results are for others to check.

    File systems without rights of their own (vfat, exFAT, buckets) refuse that, and then it is not needed.
    """
    with suppress(OSError):
        path.chmod(0o644)


@contextmanager
def folder_in_making(folder: Path, is_whole: Callable[[Path], bool]) -> Iterator[Path]:
    """Where ``folder`` is to be made: beside it under another name, renamed to it when the block has ended well.

    A maker that was killed leaves its part there, which may be gigabytes: the next one removes it.

    Args:
        is_whole: tells whether a folder that is there already is what is made; another one is replaced.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    here = f".{folder.name}.{socket.gethostname()}."
    for part in folder.parent.glob(f"{glob.escape(here)}*"):
        # Of this machine alone: processes of another one, on a shared disk, cannot be looked for.
        maker = part.name.removeprefix(here).partition(".")[0]
        if maker.isdigit() and not locks.is_alive(int(maker)):
            shutil.rmtree(part, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{here}{os.getpid()}.") as temporary:
        made = Path(temporary) / folder.name
        yield made
        _publish_folder(made, folder, is_whole)


def _publish_folder(made: Path, folder: Path, is_whole: Callable[[Path], bool]) -> None:
    # Where another process was first, its whole one stays.
    try:
        made.replace(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not is_whole(folder):
            folder.replace(made.with_name("old"))
            made.replace(folder)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json_text(value, indent=2))


def json_text(value: Any, indent: int) -> str:
    """``value`` as indented JSON with every letter as it is, but a lone surrogate, for which JSON has an escape."""
    return json.dumps(value, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    write_text(path, "".join(_json_line(row) for row in rows))


def _json_line(row: Mapping[str, Any]) -> str:
    # ASCII only: a lone surrogate or a U+2028 in model text can then neither fail to encode nor split a line.
    return json.dumps(row, ensure_ascii=True) + "\n"


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``csv_text`` of the rows, atomically."""
    write_text(path, csv_text(rows))


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV with a header: every key of any row is a column, in the order met; None or no value is empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a table of runs, as ``write_csv`` writes it.

    Raises:
        ArtifactError: it is no CSV in UTF-8, has no column ``run_name``, or a row with more cells than the header.
    """
    where, again = display_path(path), "delete it, 05 writes it anew"
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_bytes().decode(), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ArtifactError(f"{where} is not a CSV table in UTF-8 ({error}); {again}") from None
    # Cells beyond the header stand under None.
    if not all("run_name" in row and None not in row for row in rows):
        raise ArtifactError(f"{where}: not a table with a column run_name; {again}")
    return rows


def read_json(path: Path) -> Any:
    """The JSON value in ``path``.

    Raises:
        ArtifactError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{display_path(path)} is missing") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{display_path(path)} is not JSON ({error}); delete it and run its stage again") from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON lines file.

    Raises:
        ArtifactError: the file is missing or empty, or a line is not a JSON object (its number is named).
    """
    if not path.exists():
        raise ArtifactError(f"{display_path(path)} is missing")
    rows = [_parse_row(path, number, line) for number, line in _numbered_lines(path) if line.strip()]
    if not rows:
        raise ArtifactError(f"{display_path(path)} is empty: a row a line was expected; delete it and make it again")
    return rows


def _numbered_lines(path: Path) -> list[tuple[int, bytes]]:
    # Split on \n alone: str.splitlines would cut a row at U+2028 or a form feed inside a string.
    return list(enumerate(path.read_bytes().split(b"\n"), start=1))


def _parse_row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{display_path(path)}, line {number}: not JSON ({error}); mend or delete it") from None
    if not isinstance(row, dict):
        raise ArtifactError(f"{display_path(path)}, line {number}: a {type(row).__name__}, a JSON object was expected")
    return row


class RowLog:
    """An append-only row file that survives ``kill -9``.

    On opening, whole rows made under the same protocol are kept in ``rows`` (key -> row), rows of another protocol
    are dropped (``num_dropped``) and a torn last line is cut off (``torn``). ``append`` flushes each row as it is
    finished; ``finish`` rewrites the file in the order asked for, so that its bytes do not depend on which row
    happened to finish first.

    Args:
        path: the row file; its folder is made where it is missing.
        protocol_hash: hash of everything that makes the rows what they are (model, prompts, decoding).
        key: the column that identifies a row.

    Raises:
        ArtifactError: a line in the middle is not a JSON object, or lacks ``key``; the line number is named.
    """

    def __init__(self, path: Path, protocol_hash: str, key: str = "id") -> None:
        self.path, self.protocol_hash, self.key = path, protocol_hash, key
        self.rows: dict[Any, dict[str, Any]] = {}
        self.num_dropped, self.torn = 0, False
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and self._load():
            write_jsonl(path, self.rows.values())

    def _load(self) -> bool:
        """Fill ``rows``; returns whether the file holds more than they are and has to be written anew."""
        lines = _numbered_lines(self.path)
        # Every finished row ends in a newline, so what follows the last one is a row that a kill cut short.
        self.torn = bool(lines.pop()[1])
        for number, line in lines:
            row = _parse_row(self.path, number, line)
            if self.key not in row:
                raise ArtifactError(f"{display_path(self.path)}, line {number}: column {self.key!r} is missing")
            if row.get("protocol_hash") == self.protocol_hash:
                self.rows[row[self.key]] = row
            else:
                self.num_dropped += 1
        return self.torn or len(lines) != len(self.rows)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one finished row and hand it to the operating system before returning.

        Raises:
            DiskFull: there is no room for it; the rows before it are whole.
            KeyboardInterrupt: an interrupt came inside ``whole_rows``; the row is in the file.
        """
        stamped = {**row, "protocol_hash": self.protocol_hash}
        with _told_when_full(self.path), self.path.open("a", encoding="utf-8", newline="\n") as stream:
            stream.write(_json_line(stamped))
        self.rows[stamped[self.key]] = stamped
        _stop_between_rows()

    @contextmanager
    def whole_rows(self) -> Iterator[None]:
        """Inside, an interrupt waits until the row in work is in the file; a second one stops at once.

        Minutes of a model's work may stand in a row that is nearly finished.
        """
        # Python lets only the main thread set handlers, and delivers signals nowhere else.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        _stop_asked.clear()
        before = signal.signal(signal.SIGINT, _on_interrupt)
        try:
            yield
            _stop_between_rows()
        finally:
            signal.signal(signal.SIGINT, before)
            _stop_asked.clear()

    def finish(self, keys: Sequence[Any]) -> list[dict[str, Any]]:
        """Rows of ``keys`` in their order, as written back to the file; other rows leave it.

        Raises:
            ArtifactError: a row is not there.
        """
        missing = [key for key in keys if key not in self.rows]
        if missing:
            raise ArtifactError(f"{display_path(self.path)}: {len(missing)} rows are missing, the first {missing[0]!r}")
        rows = [self.rows[key] for key in keys]
        write_jsonl(self.path, rows)
        return rows


# Set by the first interrupt inside `RowLog.whole_rows`, looked at by each `RowLog.append`.
_stop_asked = threading.Event()


def _on_interrupt(_number: int, _frame: FrameType | None) -> None:
    if _stop_asked.is_set():
        raise KeyboardInterrupt("stopped inside a row")
    _stop_asked.set()


def _stop_between_rows() -> None:
    if _stop_asked.is_set():
        raise KeyboardInterrupt("stopped after a whole row")


# --- the form of a file ---------------------------------------------------------------------------------------------

# What a JSON object holds, by key.
Kinds = Mapping[str, type | tuple[type, ...]]
NONE = type(None)
MANIFEST: Kinds = {
    "stage": str,
    "status": str,
    "skipped_because": str,
    "parameters": dict,
    "metrics": dict,
    "facts": dict,
    "inputs": dict,
    "outputs": dict,
    "code_sha256": str,
}
# A file that was looked for and is not there has a stamp too, of nulls.
STAMP: Kinds = {"sha256": (str, NONE), "size": (int, NONE), "mtime_ns": (int, NONE)}


def manifest_faults(where: str, manifest: Any) -> Iterator[str]:
    """What a stage's manifest lacks or holds in another form; ``where`` begins each sentence."""
    faults = list(wrong_kinds(where, manifest, MANIFEST))
    yield from faults
    for group in () if faults else ("inputs", "outputs"):
        for name, stamp in manifest[group].items():
            yield from wrong_kinds(f"{where}, {group}, {name}", stamp, STAMP)


def wrong_kinds(where: str, value: Any, kinds: Kinds, *, required: bool = True) -> Iterator[str]:
    """Keys of a JSON object that are of another kind than ``kinds`` says, or that are missing where ``required``."""
    if not isinstance(value, dict):
        yield f"{where}: a JSON object was expected, got {kind_name(value)}"
        return
    for key, kind in kinds.items():
        if key not in value:
            if required:
                yield f"{where}: {key!r} is missing"
        # A bool is an int to Python; true is no id and no score.
        elif not isinstance(value[key], kind) or (isinstance(value[key], bool) and kind is not bool):
            yield f"{where}: {key!r} is {kind_name(value[key])}, {_kind_names(kind)} was expected"


def kind_name(value: Any) -> str:
    """What a JSON value is, in a word."""
    return "null" if value is None else type(value).__name__


def _kind_names(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join("null" if one is NONE else one.__name__ for one in kinds)


# --- manifests ----------------------------------------------------------------------------------------------------


def file_stamp(path: Path) -> dict[str, Any]:
    """Identity of a file: SHA-256 of its bytes, size in bytes and modification time in ns."""
    status = path.stat()
    return {"sha256": sha256_file(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns}


ABSENT = {"sha256": None, "size": None, "mtime_ns": None}


def same_file(path: Path, stamp: Mapping[str, Any]) -> bool:
    """Whether ``path`` still holds what ``stamp`` says; it is read only when its size or time moved."""
    if stamp == ABSENT:
        return not path.exists()
    if not path.is_file():
        return False
    status = path.stat()
    if status.st_size != stamp["size"]:
        return False
    return status.st_mtime_ns == stamp["mtime_ns"] or sha256_file(path) == stamp["sha256"]


def code_hash(stage: str) -> str:
    """SHA-256 over the code cells of the stage's source notebook and the modules of ``lib/`` that it stands on.

    Prose and the parameters cell are left out: they cannot change a number that the manifest does not name. So are
    modules that no import leads to: a new plot in 05 trains nothing again.
    """
    cells = json.loads((PROJECT_ROOT / "notebooks" / f"{stage}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join(
        "".join(cell["source"])
        for cell in cells
        if cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", [])
    )
    digest = hashlib.sha256(code.encode())
    for _, text in sorted(_modules_behind(code).items()):
        digest.update(text.encode())
    return digest.hexdigest()


# Both forms that this project uses, at the top of a file and inside a function.
_IMPORT = re.compile(r"^[ \t]*from lib(?:\.(\w+))? import (?:\(([^)]*)\)|(.*))", re.MULTILINE)


def _modules_behind(code: str) -> dict[str, str]:
    """Name and text of every module of ``lib/`` that ``code`` imports, and that those import."""
    every = {path.stem: path for path in (PROJECT_ROOT / "lib").glob("*.py")}
    found, waiting = {}, {"__init__"} | _imported_names(code)
    while waiting:
        name = waiting.pop()
        found[name] = every[name].read_text(encoding="utf-8")
        waiting |= (_imported_names(found[name]) & every.keys()) - found.keys()
    return found


def _imported_names(code: str) -> set[str]:
    lists = [module or listed or line for module, listed, line in _IMPORT.findall(code)]
    return {part.split()[0] for names in lists for part in re.sub("#.*", "", names).split(",") if part.strip()}


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number, without importing any."""
    versions = {"python": platform.python_version()}
    for name in VERSIONED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def interpreter() -> dict[str, str]:
    """Which Python this is, and its environment: relative to the project, else the end of its path without a home."""
    prefix = Path(sys.prefix)
    inside = prefix.is_relative_to(PROJECT_ROOT)
    environment = display_path(prefix) if inside else "/".join(Path(clean(sys.prefix)).parts[-2:])
    return {"implementation": platform.python_implementation(), "environment": environment}


def git_commit() -> str:
    """The project's commit, with ``+changes`` where the tree differs from it; ``unknown`` outside a checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


@dataclass
class StageRecord:
    """What a notebook notes when it starts and writes when it is complete."""

    stage: str
    manifest_path: Path
    run_name: str
    parameters: dict[str, Any]
    code_sha256: str
    git_commit: str
    started: float = field(default_factory=time.perf_counter)

    def relative(self, path: Path) -> str:
        """``path`` as seen from the manifest, so that a results folder can be moved as a whole."""
        return os.path.relpath(path, self.manifest_path.parent)

    def finish(
        self,
        *,
        inputs: Iterable[Path],
        outputs: Iterable[Path],
        facts: Mapping[str, Any],
        metrics: Mapping[str, Any] | None = None,
        skipped: str = "",
    ) -> dict[str, Any]:
        """Write the manifest and return it; nothing else of the stage may be written after it.

        Args:
            inputs: files the stage read; folders stand for every file in them.
            outputs: files the stage wrote, likewise.
            facts: identities and resources: model, adapter, dtype, device, peak memory, rows ...
            metrics: the numbers that the stage reports.
            skipped: why the stage could not measure; empty where it did.
        """
        manifest = {
            "stage": self.stage,
            "run_name": self.run_name,
            "status": "skipped" if skipped else "complete",
            "skipped_because": clean_value(skipped),
            # For others to read: a folder or an address that was typed may hold a home, a name or a token.
            "parameters": clean_value(self.parameters),
            "metrics": dict(metrics or {}),
            "facts": clean_value(dict(facts), keep=NAMED_FILES),
            "inputs": _stamps(inputs, self.manifest_path.parent),
            "outputs": _stamps(outputs, self.manifest_path.parent),
            "code_sha256": self.code_sha256,
            "versions": package_versions(),
            "interpreter": interpreter(),
            "git_commit": self.git_commit,
            "wall_s": round(time.perf_counter() - self.started, 2),
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_json(self.manifest_path, manifest)
        locks.leave(_root_of(self.manifest_path))
        return manifest


def start_stage(manifest_path: Path, stage: str, run_name: str, parameters: Mapping[str, Any]) -> StageRecord:
    """Begin a stage: its old manifest goes first, so that a stage that dies half-way never looks complete.

    Raises:
        ArtifactError: a person runs the notebook while a driver is at work on the same folder.
    """
    if someone_looks():
        _keep_drivers_away(manifest_path, f"{stage} of {run_name}, open in JupyterLab")
    manifest_path.unlink(missing_ok=True)
    # Of now: what is edited during the hours of a stage is not the code that it ran.
    return StageRecord(stage, manifest_path, run_name, dict(parameters), code_hash(stage), git_commit())


def someone_looks() -> bool:
    """Whether a person may be looking: in a kernel that neither the driver nor a test has started."""
    if "IPython" not in sys.modules or os.environ.get(DRIVER_VARIABLE):
        return False
    from IPython import get_ipython

    return hasattr(get_ipython(), "kernel")


def _keep_drivers_away(manifest_path: Path, what: str) -> None:
    """A driver would write the same files: it is refused until this stage is finished or its kernel ended."""
    root = _root_of(manifest_path)
    try:
        locks.join(root, what)
    except locks.FolderInUse as error:
        raise ArtifactError(f"{error}; wait until it has ended, or use another results_dir") from None


def _root_of(manifest_path: Path) -> Path:
    """The folder of all runs: a run's manifest lies one level deeper in it than that of 05."""
    above = manifest_path.parent.parent
    return above.parent if above.name.startswith("run_") else above


def _stamps(paths: Iterable[Path], base: Path) -> dict[str, dict[str, Any]]:
    # Paths are relative to the manifest, so that a run folder can be moved or handed in.
    files = [file for path in paths for file in (_files_below(path) if path.is_dir() else [path])]
    # A file that may be there and is not is an input too: when it appears, the stage has to run again.
    return {_stamp_name(file, base): file_stamp(file) if file.is_file() else dict(ABSENT) for file in files}


def _files_below(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _stamp_name(file: Path, base: Path) -> str:
    # A relative path that climbs out of the project and into a home folder would name whose it is.
    name = os.path.relpath(file, base)
    home = home_folder()
    in_home = home and clean(name) != name and file.is_relative_to(home)
    return f"~/{file.relative_to(home).as_posix()}" if in_home else name


def _stamped_file(name: str, base: Path) -> Path:
    return Path(home_folder(), name[2:]) if name.startswith("~/") else base / name


def stale_reason(manifest_path: Path, stage: str, parameters: Mapping[str, Any]) -> str:
    """Why a stage has to run again; empty when its manifest still holds for these parameters.

    Compared are the parameters (but where things lie, and those that the stage noted as unused: they can matter only
    after one that it used has changed), the code, and the bytes of every input and output.
    """
    if not manifest_path.exists():
        return NOT_RUN
    manifest = _read_manifest(manifest_path)
    if not manifest:
        return "its manifest cannot be read"
    if manifest["status"] != "complete":
        return f"it was skipped: {manifest['skipped_because']}"
    unused = manifest["facts"].get("unused_parameters", [])
    changed = _changed_parameters(manifest["parameters"], clean_value(dict(parameters)))
    changed = [name for name in changed if name not in unused]
    if changed:
        return "parameters changed: " + ", ".join(changed)
    if manifest["code_sha256"] != code_hash(stage):
        return "the code changed"
    return _changed_files(manifest, manifest_path.parent)


def is_redacted(manifest_path: Path) -> bool:
    """Whether a stage filled its notebook under ``--redact``; not where it left no manifest that says so."""
    return _read_manifest(manifest_path).get("parameters", {}).get("redact") is True


def _read_manifest(path: Path) -> dict[str, Any]:
    """A stage's manifest; empty where the file is not one, so that the stage runs again and writes it anew."""
    try:
        manifest = read_json(path)
    except ArtifactError:
        return {}
    return {} if any(manifest_faults(display_path(path), manifest)) else manifest


def _changed_parameters(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    names = sorted((before.keys() | after.keys()) - LOCATION_PARAMETERS)
    absent = object()
    return [name for name in names if before.get(name, absent) != after.get(name, absent)]


def _changed_files(manifest: Mapping[str, Any], base: Path) -> str:
    for kind in ("inputs", "outputs"):
        for name, stamp in manifest[kind].items():
            if not same_file(_stamped_file(name, base), stamp):
                return f"{kind[:-1]} {display_path(_stamped_file(name, base))} changed or is gone"
    return ""
