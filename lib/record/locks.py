"""One driver at a time on an output folder, one process at a time on a shared file.

The locks are the system's (``flock``): a killed holder leaves no stale lock, and a driver's kernels inherit the lock on
its folder, which stays held until the last of them has ended. The package filelock can neither be inherited nor shared.
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
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

from lib.record.paths import ArtifactError
from lib.record.plain_files import open_plain
from lib.record.redaction import clean

LOCK_FILE = ".lock"
HOLDER_START = '{"pid": '
MAX_LOCK_CHARACTERS = 100_000
# The kernel of a killed driver ends within about a second; until then it may still write a row.
ORPHAN_GRACE_S = 10.0
LOOK_AGAIN_S = 0.2
# Errors of file systems that lack a call: network mounts, buckets, FUSE. Not EACCES: some network mounts report a lock
# of another machine so.
NOT_OFFERED = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ENOTTY})

# Descriptors of the folders that this process holds; then files held and folders joined, see `hold_file` and `join`.
_held: list[int] = []
_files: dict[Path, IO[str]] = {}


class FolderInUse(Exception):
    """Another driver holds the folder; the message names it."""


class FolderUnwritable(Exception):
    """The folder cannot be made or written; the message says why."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a folder, since a local time, and the command that the user typed."""

    pid: int
    host: str
    since: str
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}: {self.command}"

    @property
    def is_gone(self) -> bool:
        """Whether the process is known to be dead, so that only its kernel can still hold the lock."""
        return self.host == socket.gethostname() and not is_alive(self.pid)


def is_alive(pid: int) -> bool:
    """Whether this machine has a process with this id, of any user."""
    import psutil  # --help works without packages

    return psutil.pid_exists(pid)


def held_descriptors() -> tuple[int, ...]:
    """Descriptors of the folder locks of this process, for kernels to inherit."""
    return tuple(_held)


@contextmanager
def hold(folder: Path, command: str, *, wait: bool = False, tell: Callable[[str], None] = print) -> Iterator[None]:
    """Hold ``folder`` for this process and its kernels; FolderUnwritable, or FolderInUse without ``wait``."""
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
        stream = open_plain(folder / LOCK_FILE, "a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise FolderUnwritable(f"{folder} cannot be written ({error.strerror})") from None
    except ArtifactError as error:
        raise FolderUnwritable(str(error)) from None
    # It will be emptied, and the folder may have come from elsewhere.
    stream.seek(0)
    if not (stream.read(len(HOLDER_START)) or HOLDER_START).startswith(HOLDER_START):
        stream.close()
        raise FolderUnwritable(f"{folder / LOCK_FILE} is not a lock of this project; delete it")
    return stream


def _acquire(stream: IO[str], folder: Path, wait: bool, tell: Callable[[str], None]) -> None:
    started, announced = time.monotonic(), False
    while not _locked(stream, folder, tell):
        holder = read_holder(stream)
        if holder and not holder.is_gone:
            if not wait:
                raise FolderInUse(f"{folder.name}/ is in use by {holder}")
            if not announced:
                tell(f"waiting: {folder.name}/ is in use by {holder}")
            announced = True
        elif not wait and time.monotonic() - started >= ORPHAN_GRACE_S:
            raise FolderInUse(f"{folder.name}/ is in use by {holder or 'another run_all.py'}")
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
    """Keep drivers, not other joiners, out of ``folder`` until ``release_file`` or process end; raises as ``hold``."""
    # For notebooks that a person runs: several may be open at once, but no driver may run.
    if folder in _files:
        return
    stream = _open_lock(folder)
    if not _locked(stream, folder, print, fcntl.LOCK_SH):
        holder = read_holder(stream)
        stream.close()
        raise FolderInUse(f"{folder.name}/ is in use by {holder or 'run_all.py'}")
    _write_holder(stream, what)
    _files[folder] = stream


@contextmanager
def one_at_a_time(path: Path, tell: Callable[[str], None] = print) -> Iterator[None]:
    """Hold ``path`` inside the block, see ``hold_file``."""
    hold_file(path, tell)
    try:
        yield
    finally:
        release_file(path)


def hold_file(path: Path, tell: Callable[[str], None] = print, *, beside: bool = False) -> None:
    """Hold ``path``, which may be absent, until ``release_file`` or process end; waits for this user's others.

    ``beside``: also for those on other machines that share the folder, by a lock in it.
    """
    # A cell that is run again must not wait for itself.
    if path in _files:
        return
    if beside:
        folder = path.parent
        folder.mkdir(parents=True, exist_ok=True)
        stream = open_plain(folder / f".{path.name}{LOCK_FILE}", "a+", encoding="utf-8")
        # Whoever locked the results folder has said once that it has no locks.
        about_none: Callable[[str], None] = lambda _: None  # noqa: E731
    else:
        # A folder of data may be read-only.
        folder, name = machine_folder(), hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]
        stream = (folder / f"{name}{LOCK_FILE}").open("a+", encoding="utf-8")
        about_none = tell
    if not _locked(stream, folder, about_none):
        tell(f"waiting for another run that is making {path.name}")
        # Polled, so that Ctrl-C takes effect at once.
        while not _locked(stream, folder, about_none):
            time.sleep(LOOK_AGAIN_S)
    _files[path] = stream


def release_file(path: Path) -> None:
    """Release a file of ``hold_file`` or a folder of ``join``; does nothing if this process does not hold it."""
    if stream := _files.pop(path, None):
        stream.close()


def machine_folder() -> Path:
    """This user's folder of locks on this machine; PermissionError if it cannot be made or belongs to another user."""
    folder = Path(tempfile.gettempdir()) / f"tune-and-tell-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        message = f"{folder} cannot be made ({error.strerror}): set TMPDIR to one of your folders"
        raise PermissionError(message) from None
    if folder.stat().st_uid != os.getuid() or folder.is_symlink():
        raise PermissionError(f"{folder} belongs to another user: set TMPDIR to one of your folders")
    return folder


def _write_holder(stream: IO[str], command: str) -> None:
    # Appended: processes that joined a folder may write at the same time.
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    holder = Holder(os.getpid(), socket.gethostname(), now, clean(command))
    stream.write(json.dumps(asdict(holder)) + "\n")
    stream.flush()


def read_holder(stream: IO[str]) -> Holder | None:
    """The last writer not known to be dead, else the last one; ``None`` before the first."""
    stream.seek(0)
    holders = []
    for line in stream.read(MAX_LOCK_CHARACTERS).splitlines():
        with suppress(ValueError, TypeError):
            holders.append(Holder(**json.loads(line)))
    return next((holder for holder in reversed(holders) if not holder.is_gone), holders[-1] if holders else None)
