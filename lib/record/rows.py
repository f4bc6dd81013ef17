"""Row files: JSON lines that grow one row at a time and survive a kill."""

import json
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lib.record import progress, shards
from lib.record.files import named_when_full, sha256_json, unique_keys, write_text
from lib.record.locks import hold_file, release_file
from lib.record.paths import ArtifactError, RunPaths, display_path
from lib.record.plain_files import MAX_ROW_BYTES, MAX_ROWS, open_plain

Row = Mapping[str, Any]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    write_text(path, "".join(json_line(row) for row in rows))


def json_line(row: Mapping[str, Any]) -> str:
    # ASCII only: a lone surrogate or a U+2028 in model text can then neither fail to encode nor split a line.
    return json.dumps(row, ensure_ascii=True) + "\n"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON lines file; ArtifactError if it is missing or empty, or names a line that is not a JSON object."""
    if not path.exists():
        raise ArtifactError(f"{display_path(path)} is missing")
    rows = [_parse_row(path, number, line) for number, line in _numbered_lines(path) if line.strip()]
    if not rows:
        raise ArtifactError(
            f"{display_path(path)} is empty: one row per line was expected; delete it and make it again"
        )
    return rows


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    # Bytes end at \n alone: str.splitlines would cut a row at U+2028 or a form feed inside a string.
    with open_plain(path) as stream:
        for number, line in enumerate(stream, start=1):
            if len(line) > MAX_ROW_BYTES or number > MAX_ROWS:
                allowed = f"allowed are {MAX_ROWS:,} rows of {MAX_ROW_BYTES:,} bytes"
                raise ArtifactError(f"{display_path(path)}, line {number}: {len(line):,} bytes; {allowed}")
            yield number, line


def _parse_row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{display_path(path)}, line {number}: not JSON ({error}); fix or delete it") from None
    if not isinstance(row, dict):
        raise ArtifactError(f"{display_path(path)}, line {number}: a {type(row).__name__}, a JSON object was expected")
    return row


class RowLog:
    """An append-only row file that survives ``kill -9``; ``label`` (``untuned``) stands in the progress.

    Opening it keeps complete rows of the same protocol in ``rows`` (key -> row), drops rows of another one
    (``num_dropped``) and cuts off an incomplete last line (``torn``); ArtifactError for any other faulty line.
    """

    def __init__(self, path: Path, protocol_hash: str, key: str = "id", label: str = "") -> None:
        self.path, self.protocol_hash, self.key, self.label = path, protocol_hash, key, label
        self.rows: dict[Any, dict[str, Any]] = {}
        self.num_dropped, self.torn = 0, False
        self._tracker: progress.Tracker | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and self._load():
            write_jsonl(path, self.rows.values())

    def _load(self) -> bool:
        """Fill ``rows``; returns whether the file holds anything else and has to be rewritten."""
        num_lines = 0
        for number, line in _numbered_lines(self.path):
            # Every finished row ends in a newline: what follows the last one was cut short by a kill.
            self.torn = not line.endswith(b"\n")
            if self.torn:
                break
            num_lines = number
            row = _parse_row(self.path, number, line)
            if self.key not in row:
                raise ArtifactError(f"{display_path(self.path)}, line {number}: column {self.key!r} is missing")
            if row.get("protocol_hash") == self.protocol_hash:
                self.rows[row[self.key]] = row
            else:
                self.num_dropped += 1
        return self.torn or num_lines != len(self.rows)

    def append(self, row: Row) -> None:
        """Add a finished row; an interrupt inside ``complete_rows`` is raised once the row is in the file."""
        stamped = {**row, "protocol_hash": self.protocol_hash}
        with named_when_full(self.path), open_plain(self.path, "a", encoding="utf-8", newline="\n") as stream:
            stream.write(json_line(stamped))
        self.rows[stamped[self.key]] = stamped
        if self._tracker:
            self._tracker.advance(stamped)
        _stop_between_rows()

    @contextmanager
    def complete_rows(self, kind: str = "rows", total: int = 0) -> Iterator[None]:
        """Inside, progress is shown and the first interrupt waits until a row is in the file; ``total`` 0: unknown."""
        with progress.track(f"{self.label} {kind}".strip(), total, self.rows.values()) as tracker, _late_interrupt():
            self._tracker = tracker
            try:
                yield
            finally:
                self._tracker = None

    def finish(self, keys: Sequence[Any]) -> list[dict[str, Any]]:
        """Rows of ``keys``, sorted so in the file too, without other rows; ArtifactError if one is missing."""
        missing = [key for key in keys if key not in self.rows]
        if missing:
            raise ArtifactError(f"{display_path(self.path)}: {len(missing)} rows are missing, the first {missing[0]!r}")
        rows = [self.rows[key] for key in keys]
        write_jsonl(self.path, rows)
        # Held by `open_shared_log`.
        release_file(self.path)
        return rows

    def with_rows_of(self, path: Path) -> "RowLog":
        """Itself, also with the rows of its protocol in a file that others may be writing to."""
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        rows = [_parse_row(path, number, line) for number, line in enumerate(lines, 1) if line.endswith(b"\n")]
        self.rows |= {row[self.key]: row for row in rows if row.get("protocol_hash") == self.protocol_hash}
        return self

    def join_shares(self, keys: Sequence[Any]) -> None:
        """Take over the rows of the shares beside the file, if there are any; ArtifactError if they are others."""
        if found := shards.shares(self.path):
            read = {path: read_jsonl(path) if path.stat().st_size else [] for path in found}
            rows = shards.joined(read, keys, self.key, self.protocol_hash)
            self.rows |= {row[self.key]: dict(row) for row in rows}
            write_jsonl(self.path, self.rows.values())
            shards.remove(self.path)


def fill_rows(
    log: RowLog,
    rows: Sequence[Row],
    generate: Callable[[list[Row], Callable[[int, Any], None]], None],
    to_row: Callable[[Row, Any], Row],
    *,
    kind: str = "rows",
    key: str = "id",
) -> list[Row]:
    """The finished row of each of ``rows``, in their order; only those that ``log`` and its shares lack are generated.

    ``generate`` gets the missing rows, and calls back with the position and result of each, in any order; its finished
    row, made by ``to_row``, is in the file before the call returns.
    """
    log.join_shares([row[key] for row in rows])
    missing = [row for row in rows if row[key] not in log.rows]
    if missing:
        with log.complete_rows(kind, len(rows)):
            generate(missing, lambda index, result: log.append(to_row(missing[index], result)))
    return log.finish([row[key] for row in rows])


# Set by the first interrupt inside `RowLog.complete_rows`, read by each `RowLog.append`.
_stop_wanted = threading.Event()


@contextmanager
def _late_interrupt() -> Iterator[None]:
    """Inside, the first Ctrl-C takes effect after the current row: minutes of a model's work may stand in it."""
    # Python lets only the main thread set handlers, and delivers signals nowhere else.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _stop_wanted.clear()
    before = signal.signal(signal.SIGINT, _on_interrupt)
    try:
        yield
        _stop_between_rows()
    finally:
        signal.signal(signal.SIGINT, before)
        _stop_wanted.clear()


def _on_interrupt(_number: int, _frame: FrameType | None) -> None:
    if _stop_wanted.is_set():
        raise KeyboardInterrupt("stopped inside a row")
    _stop_wanted.set()


def _stop_between_rows() -> None:
    if _stop_wanted.is_set():
        raise KeyboardInterrupt("stopped after a complete row")


def open_shared_log(path: Path, protocol_hash: str, label: str = "") -> RowLog:
    """A row file held until ``finish``, or process end: one of several runs fills it, the others find its rows."""
    hold_file(path, beside=True)
    return RowLog(path, protocol_hash, label=label)


def open_untuned_log(paths: RunPaths, kind: str, protocol: Mapping[str, Any]) -> RowLog:
    """The shared row file of the untuned model under ``protocol``; ``kind`` begins its name, as ``gsm8k_preds``."""
    protocol_hash = sha256_json(protocol)
    return open_shared_log(paths.untuned_rows(kind, protocol_hash), protocol_hash, label="untuned")


def row_id(row: Row) -> int:
    """``test_index`` where it is known, else the row's position ``id``."""
    return row["id"] if row.get("test_index") is None else row["test_index"]


def count_lines(path: Path) -> int:
    """Finished rows of a row file: its newlines; 0 where there is no file."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0
