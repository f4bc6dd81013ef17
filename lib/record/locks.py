"""One driver at a time on an output folder, one process at a time on a shared file: locks that go with their holder.

A lock is the operating system's (``flock``) and not a file that says so: a killed holder leaves no stale lock. A
driver's kernel inherits the lock on its folder, so the folder stays held until the last process that may write there
is gone. Knows nothing about what is run.
"""

import errno
import fcntl
import hashlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

from lib.record.redaction import clean

LOCK_FILE = ".lock"
# The kernel of a killed driver ends by itself within about a second; until then it may still write a row.
ORPHAN_GRACE_S = 10.0
LOOK_AGAIN_S = 0.2
# What file systems say that do not offer a call: network mounts, buckets, FUSE. Not EACCES: that is a lock of another
# machine on some network mounts.
NOT_OFFERED = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ENOTTY})

_held: list[int] = []
# Files that this process holds, and folders that it has joined; see `hold_file` and `join`.
_files: dict[Path, IO[str]] = {}


class FolderInUse(Exception):
    """Another driver holds the folder; the text names it."""


class FolderUnwritable(Exception):
    """The folder cannot be made or written; the text says why."""


@dataclass(frozen=True)
class Holder:
    """Who holds a folder.

    Attributes:
        since: local time with its offset, to the second.
        command: what was typed.
    """

    pid: int
    host: str
    since: str
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}: {self.command}"

    @property
    def is_gone(self) -> bool:
        """Whether the driver itself is known to be dead, so that only its kernel can still hold the lock."""
        return self.host == socket.gethostname() and not is_alive(self.pid)


def is_alive(pid: int) -> bool:
    """Whether there is a process of this number on this machine, whoever's it is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def held_descriptors() -> tuple[int, ...]:
    """Descriptors of the locks that this process holds, for kernels to inherit."""
    return tuple(_held)


@contextmanager
def hold(folder: Path, command: str, *, wait: bool = False, tell: Callable[[str], None] = print) -> Iterator[None]:
    """Hold ``folder`` for this process and its kernels.

    Args:
        command: what was typed; shown to whoever comes second.
        wait: wait for another driver to end instead of refusing.
        tell: gets a sentence where it waits, and where the file system has no locks.

    Raises:
        FolderInUse: another driver holds the folder, and ``wait`` is false.
        FolderUnwritable: the folder cannot be made or written.
    """
    with _open_lock(folder) as stream:
        _acquire(stream, folder, wait, tell)
        stream.truncate(0)
        _write_holder(stream, command)
        _held.append(stream.fileno())
        try:
            yield
        finally:
            _held.remove(stream.fileno())
            stream.truncate(0)


def _open_lock(folder: Path) -> IO[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / LOCK_FILE).open("a+", encoding="utf-8")
    except OSError as error:
        raise FolderUnwritable(f"{folder} cannot be written ({error.strerror})") from None


def _acquire(stream: IO[str], folder: Path, wait: bool, tell: Callable[[str], None]) -> None:
    started, told = time.monotonic(), False
    while not _locked(stream, folder, tell):
        holder = read_holder(stream)
        waited = time.monotonic() - started
        orphan = holder is None or holder.is_gone
        if not wait and not (orphan and waited < ORPHAN_GRACE_S):
            raise FolderInUse(f"{folder.name}/ is in use by {holder or 'another run_all.py'}")
        if wait and not told and not orphan:
            tell(f"waiting: {folder.name}/ is in use by {holder}")
            told = True
        time.sleep(LOOK_AGAIN_S)


def _locked(stream: IO[str], folder: Path, tell: Callable[[str], None], kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(stream, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
        tell(f"{folder.name}/ lies on a file system without locks: start no second run on it ({error.strerror})")
    return True


def join(folder: Path, what: str) -> None:
    """Hold ``folder`` until ``leave`` or the end of this process, together with whoever joins it too.

    For notebooks that a person runs: several may be open at once, but no driver may be at work.

    Args:
        what: what is being done; shown to a driver that is refused.

    Raises:
        FolderInUse: a driver holds the folder.
        FolderUnwritable: the folder cannot be made or written.
    """
    if folder in _files:
        return
    stream = _open_lock(folder)
    if not _locked(stream, folder, print, fcntl.LOCK_SH):
        holder = read_holder(stream)
        stream.close()
        raise FolderInUse(f"{folder.name}/ is in use by {holder or 'run_all.py'}")
    _write_holder(stream, what)
    _files[folder] = stream


def leave(folder: Path) -> None:
    """Let drivers have ``folder``; nothing happens where this process did not join it."""
    release_file(folder)


@contextmanager
def one_at_a_time(path: Path, tell: Callable[[str], None] = print) -> Iterator[None]:
    """Only one process at a time is inside for ``path``: what it makes there, the next one finds.

    Args:
        tell: gets a sentence where it waits for another process.
    """
    hold_file(path, tell)
    try:
        yield
    finally:
        release_file(path)


def hold_file(path: Path, tell: Callable[[str], None] = print) -> None:
    """Hold ``path``, which may be absent, until ``release_file`` or the end of this process; waits for another holder.

    A process that holds it already goes on at once: a cell that is run again must not wait for itself. Processes of
    this user on this machine are meant; the lock on a run's folder keeps others away.
    """
    if path in _files:
        return
    # Not beside it: a folder of data holds data, and may be one that nobody can write to.
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]
    folder, told = machine_folder(), False
    stream = (folder / f"{name}{LOCK_FILE}").open("a+", encoding="utf-8")
    # Looked at again and again, not waited for inside the system: Ctrl-C is heard at once.
    while not _locked(stream, folder, tell):
        if not told:
            tell(f"waiting for another run that is making {path.name}")
            told = True
        time.sleep(LOOK_AGAIN_S)
    _files[path] = stream


def release_file(path: Path) -> None:
    """Let others have ``path``; nothing happens where this process does not hold it."""
    stream = _files.pop(path, None)
    if stream is not None:
        stream.close()


def machine_folder() -> Path:
    """Where locks lie that are of this machine and user, and of no folder.

    Raises:
        PermissionError: the folder cannot be made, or is somebody else's.
    """
    folder = Path(tempfile.gettempdir()) / f"tune-and-tell-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise PermissionError(
            f"{folder} cannot be made ({error.strerror}): set TMPDIR to a folder of your own"
        ) from None
    if folder.stat().st_uid != os.getuid() or folder.is_symlink():
        raise PermissionError(f"{folder} belongs to another user: set TMPDIR to a folder of your own")
    return folder


def _write_holder(stream: IO[str], command: str) -> None:
    """Append a line: those who hold a folder together write at the same time, and none may cut another's line."""
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    holder = Holder(os.getpid(), socket.gethostname(), now, clean(command))
    stream.write(json.dumps(asdict(holder)) + "\n")
    stream.flush()


def read_holder(stream: IO[str]) -> Holder | None:
    """The last writer that is not known to be dead, or else the last one; ``None`` where nobody has written yet."""
    stream.seek(0)
    holders = [holder for line in stream.read().splitlines() if (holder := _parse_holder(line))]
    return next((holder for holder in reversed(holders) if not holder.is_gone), holders[-1] if holders else None)


def _parse_holder(line: str) -> Holder | None:
    try:
        return Holder(**json.loads(line))
    except (ValueError, TypeError):
        return None
