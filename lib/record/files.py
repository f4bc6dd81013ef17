"""Files, written completely or not at all; hashes."""

import csv
import errno
import glob
import hashlib
import io
import json
import math
import os
import re
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from lib.record import locks
from lib.record.paths import ArtifactError, display_path
from lib.record.plain_files import open_plain

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
TEMPORARY_FILES = ".*.tmp"
# Text that a spreadsheet runs as a formula, after any apostrophes; signed numbers are none.
FORMULA = re.compile(r"'*(?![-+][0-9.]+(?:e[-+][0-9]+)?\Z)[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")


class DiskFull(ArtifactError):
    """There is no room for a file; what was there before is still there."""


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value in one canonical spelling (sorted keys, no spaces), as hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def named_when_full(path: Path) -> Iterator[None]:
    """Raise ``DiskFull`` with the file's name, which the operating system does not give."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise DiskFull(full_disk_text(path)) from None


def full_disk_text(path: Path) -> str:
    """Which file had no room, how much is free there, and how to go on."""
    there = next((folder for folder in (path, *path.parents) if folder.is_dir()), path.parent)
    free_mb = shutil.disk_usage(there).free / 1e6
    return (
        f"{display_path(path)} cannot be written: the disk is full ({free_mb:.1f} MB free in {display_path(there)}/); "
        "what was written before is complete: free some space, and the same command goes on"
    )


def error_text(error: Exception) -> str:
    """What an error says; of a full disk also where, and how to go on."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return full_disk_text(Path(error.filename or "."))
    return str(error)


def free_bytes(folder: Path) -> float:
    """Free bytes on the disk of ``folder``; infinity if the file system does not say, as some FUSE ones."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return math.inf
    return usage.free if usage.total else math.inf


def remove_temporary(folder: Path, *, below: bool = True) -> None:
    """Remove what killed writers left in ``folder`` and, if ``below``, under it; only for the holder of its lock."""
    for path in (folder.rglob if below else folder.glob)(TEMPORARY_FILES):
        if path.is_file():
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file completely or not at all (``DiskFull``: no room); a lone surrogate becomes a question mark."""
    with named_when_full(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors="replace", newline="\n") as stream:
                stream.write(text)
                flush_to_disk(stream)
            share(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def flush_to_disk(stream: IO[str]) -> None:
    """Wait until what was written is on the disk, if the file system has such a call."""
    stream.flush()
    try:
        os.fsync(stream.fileno())
    except OSError as error:
        if error.errno not in locks.NOT_OFFERED:
            raise


def share(path: Path) -> None:
    """Let others read a file that was made for its owner only; vfat, exFAT and buckets refuse and need not."""
    with suppress(OSError):
        path.chmod(0o644)


@contextmanager
def folder_in_making(folder: Path, is_complete: Callable[[Path], bool]) -> Iterator[Path]:
    """Where to make ``folder``, renamed at the end of the block; one there that is not complete is replaced."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A killed maker leaves its part, which may be gigabytes: the next one removes it.
    here = f".{folder.name}.{socket.gethostname()}."
    for part in folder.parent.glob(f"{glob.escape(here)}*"):
        # Only of this machine: on a shared disk, processes of another one cannot be looked up.
        maker = part.name.removeprefix(here).partition(".")[0]
        if maker.isdigit() and not locks.is_alive(int(maker)):
            shutil.rmtree(part, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{here}{os.getpid()}.") as temporary:
        made = Path(temporary) / folder.name
        yield made
        try:
            made.replace(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # Another process was first: its folder stays if it is complete.
            if not is_complete(folder):
                folder.replace(made.with_name("old"))
                made.replace(folder)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json_text(value, indent=2))


def json_text(value: Any, indent: int) -> str:
    """``value`` as indented JSON, not limited to ASCII; only lone surrogates are escaped."""
    return json.dumps(value, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``csv_text`` of the rows, atomically."""
    write_text(path, csv_text(rows))


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV with a header: every key of any row is a column, in order of appearance; no value is empty.

    Text that a spreadsheet would run as a formula gets an apostrophe in front, which ``read_csv`` removes.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines: list[str] = []
    # The writer quotes the characters of its line end alone: a bare \r would begin another row.
    writer = csv.DictWriter(SimpleNamespace(write=lines.append), columns, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows({name: f"'{cell}" if _is_formula(cell) else cell for name, cell in row.items()} for row in rows)
    return "".join(line.removesuffix("\r\n") + "\n" for line in lines)


def _is_formula(cell: Any) -> bool:
    return isinstance(cell, str) and FORMULA.match(cell) is not None


def _is_inert(cell: str | None) -> bool:
    return cell is not None and cell.startswith("'") and _is_formula(cell[1:])


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError for a key that appears twice: which value counts would depend on the reader."""
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:80]!r} appears twice")
    return found


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a table of runs; ArtifactError if it is no CSV in UTF-8 with the column ``run_name``."""
    where, again = display_path(path), "delete it, 05 writes it again"
    try:
        with open_plain(path) as stream:
            reader = csv.DictReader(io.StringIO(stream.read().decode(), newline=""))
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ArtifactError(f"{where} is not a CSV table in UTF-8 ({error}); {again}") from None
    # Cells beyond the header stand under None.
    if not all("run_name" in row and None not in row for row in rows):
        raise ArtifactError(f"{where}: not a table with a column run_name; {again}")
    if len({*(reader.fieldnames or [])}) < len(reader.fieldnames or []):
        raise ArtifactError(f"{where}: a column appears twice; {again}")
    return [{name: cell[1:] if _is_inert(cell) else cell for name, cell in row.items()} for row in rows]


def read_json(path: Path) -> Any:
    """The JSON value in ``path``; ArtifactError if the file is missing or is not JSON."""
    try:
        with open_plain(path) as stream:
            return json.loads(stream.read(), object_pairs_hook=unique_keys)
    except FileNotFoundError:
        raise ArtifactError(f"{display_path(path)} is missing") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{display_path(path)} is not JSON ({error}); delete it and run its stage again") from None
