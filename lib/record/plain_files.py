"""Files of a folder that may have come from elsewhere: no link is followed, no device read, no size believed."""

import errno
import gc
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from lib.record.paths import ArtifactError, display_path

# A row is a question or prompt with a text of some thousand tokens; a results folder holds some hundred files.
MAX_ROW_BYTES, MAX_ROWS, MAX_FILES = 2_000_000, 500_000, 20_000
# Of one file that is read as a whole, by the end of its name; files of weights are only hashed.
MAX_READ_BYTES = {".jsonl": 200_000_000, ".json": 20_000_000, ".csv": 20_000_000, ".png": 20_000_000}


def list_files(folder: Path) -> dict[Path, int]:
    """Size in bytes of every file below ``folder``; ArtifactError where it holds a link, pipe or device."""

    def refuse(error: OSError) -> None:
        raise ArtifactError(f"{display_path(Path(error.filename or folder))} cannot be read ({error.strerror})")

    if not os.path.lexists(folder):
        return {}
    if folder.is_symlink():
        raise ArtifactError(_why_not_plain(folder, is_link=True))
    sizes: dict[Path, int] = {}
    for parent, folders, names in os.walk(folder, onerror=refuse):
        for name in (*folders, *names):
            path = Path(parent, name)
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                sizes[path] = status.st_size
            elif not stat.S_ISDIR(status.st_mode):
                raise ArtifactError(_why_not_plain(path, stat.S_ISLNK(status.st_mode)))
        if len(sizes) > MAX_FILES:
            raise ArtifactError(f"{display_path(folder)} holds over {MAX_FILES:,} files: allowed are so many")
    return sizes


def _why_not_plain(path: Path, is_link: bool) -> str:
    if is_link:
        return (
            f"{display_path(path)} is a link: a results folder holds plain files; copy its target there, or delete it"
        )
    return f"{display_path(path)} is not a plain file"


def check_readable(path: Path, size: int) -> None:
    """Raise ArtifactError where a file of ``size`` bytes is larger than any that the pipeline writes."""
    allowed = MAX_READ_BYTES.get(path.suffix, size)
    if size > allowed:
        raise ArtifactError(f"{display_path(path)} has {size / 1e6:,.0f} MB: allowed are {allowed / 1e6:.0f} MB")


APPENDING = os.O_APPEND | os.O_CREAT
FLAGS = {"rb": os.O_RDONLY, "a": os.O_WRONLY | APPENDING, "a+": os.O_RDWR | APPENDING}


def open_plain(path: Path, mode: Literal["rb", "a", "a+"] = "rb", **how: Any) -> IO[Any]:
    """Open ``path``; ArtifactError where it is a link, no plain file or too large, OSError as ``open`` raises it."""
    try:
        # A pipe would wait for its other end.
        descriptor = os.open(path, FLAGS[mode] | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise ArtifactError(_why_not_plain(path, error.errno == errno.ELOOP)) from None
    status = os.fstat(descriptor)
    try:
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactError(_why_not_plain(path, is_link=False))
        check_readable(path, status.st_size)
    except ArtifactError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, mode, **how)


@contextmanager
def limited_memory(num_bytes: int) -> Iterator[None]:
    """Inside, this process may take ``num_bytes`` more; beyond them it gets a MemoryError."""
    # A few megabytes of brackets are gigabytes of lists: no limit on sizes of files covers that.
    import psutil

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    held = getattr(psutil.Process().memory_info(), "data", None)
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    if held is not None:  # only Linux says it
        resource.setrlimit(resource.RLIMIT_DATA, (min([held + num_bytes, *limits]), hard))
    # Millions of lists without cycles: looking for cycles among them again and again takes most of the time.
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
