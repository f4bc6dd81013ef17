"""Lines and paths for the person at the terminal."""

import os
import sys
from pathlib import Path
from typing import TextIO

from lib.record.paths import PROJECT_ROOT
from lib.record.redaction import visible

# Where the command was typed: once something runs, the project is the working directory.
TYPED_IN = Path.cwd()


def as_typed(path: Path) -> str:
    """``path`` as it can be used where the command was typed."""
    path = (PROJECT_ROOT / path).resolve()
    return str(path.relative_to(TYPED_IN) if path.is_relative_to(TYPED_IN) else path)


def fail(message: str) -> None:
    """Print ``message`` on standard error."""
    tell(message, sys.stderr)


def tell(message: str, stream: TextIO | None = None) -> None:
    """Print ``message``, on the standard output by default, with control characters spelled out."""
    stream = stream or sys.stdout
    try:
        print(visible(message), file=stream, flush=True)
    except OSError as error:
        lose_reader(stream)
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            fail(f"the standard output cannot be written ({error.strerror}): what follows is not shown")


def lose_reader(stream: TextIO) -> None:
    """Discard what is written to ``stream``: its reader has gone (``| head``) or its disk is full."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
