"""Row files: JSON lines that grow a row at a time and survive a kill."""

import json
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lib.record.files import named_when_full, sha256_json, write_text
from lib.record.locks import hold_file, release_file
from lib.record.paths import ArtifactError, RunPaths, display_path

Row = Mapping[str, Any]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    write_text(path, "".join(json_line(row) for row in rows))


def json_line(row: Mapping[str, Any]) -> str:
    # ASCII only: a lone surrogate or a U+2028 in model text can then neither fail to encode nor split a line.
    return json.dumps(row, ensure_ascii=True) + "\n"


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
        with named_when_full(self.path), self.path.open("a", encoding="utf-8", newline="\n") as stream:
            stream.write(json_line(stamped))
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


def fill_rows(
    log: RowLog,
    rows: Sequence[Row],
    generate: Callable[[list[Row], Callable[[int, Any], None]], None],
    to_row: Callable[[Row, Any], Row],
    *,
    kind: str = "rows",
    key: str = "id",
) -> list[Row]:
    """The rows of ``log`` in the order of ``rows``; missing ones are generated and appended as they finish.

    Args:
        rows: what to generate from, each with its ``key``.
        generate: gets the missing rows, and a function to call with the index of one and its result.
        to_row: the row to keep, from a row and its result.
        kind: what the rows are, in words.
    """
    missing = [row for row in rows if row[key] not in log.rows]
    if missing:
        with log.whole_rows():
            generate(missing, lambda index, result: log.append(to_row(missing[index], result)))
    return log.finish([row[key] for row in rows])


# Set by the first interrupt inside `RowLog.whole_rows`, looked at by each `RowLog.append`.
_stop_asked = threading.Event()


def _on_interrupt(_number: int, _frame: FrameType | None) -> None:
    if _stop_asked.is_set():
        raise KeyboardInterrupt("stopped inside a row")
    _stop_asked.set()


def _stop_between_rows() -> None:
    if _stop_asked.is_set():
        raise KeyboardInterrupt("stopped after a whole row")


class SharedRowLog(RowLog):
    """A row file that several runs may want at once: one of them fills it, the others wait and find its rows.

    It is held from here to ``finish``, or to the end of the process.
    """

    def __init__(self, path: Path, protocol_hash: str) -> None:
        hold_file(path)
        super().__init__(path, protocol_hash)

    def finish(self, keys: Sequence[Any]) -> list[dict[str, Any]]:
        """As ``RowLog.finish``; other runs may have the file then."""
        rows = super().finish(keys)
        release_file(self.path)
        return rows


def open_untuned_log(paths: RunPaths, kind: str, protocol: Mapping[str, Any]) -> SharedRowLog:
    """The row file of the untuned model under ``protocol``; ``kind`` begins its name, as ``gsm8k_preds``."""
    protocol_hash = sha256_json(protocol)
    return SharedRowLog(paths.untuned_rows(kind, protocol_hash), protocol_hash)


def row_id(row: Row) -> int:
    """``test_index`` where it is known, else the row's position ``id``."""
    return row["id"] if row.get("test_index") is None else row["test_index"]


def count_lines(path: Path) -> int:
    """Finished rows of a row file: its newlines; 0 where there is no file."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0
