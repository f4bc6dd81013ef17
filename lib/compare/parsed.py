"""Files of a results folder, each parsed once while it does not change: its check and its readers share the result."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Parsed = TypeVar("Parsed")
_parsed: dict[tuple[Path, Any], tuple[tuple[int, ...], Any]] = {}


def read_once(path: Path, read: Callable[[Path], Parsed]) -> Parsed:
    """``read(path)``, from memory if the file was read before; callers share the result and must not change it."""
    if not path.exists():
        return read(path)
    status, key = path.stat(), (path.resolve(), read)
    # Our own writers rename a new file over the old one, so its inode tells them apart within a clock tick.
    stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
    if key not in _parsed or _parsed[key][0] != stamp:
        _parsed[key] = stamp, read(path)
    return _parsed[key][1]
