"""HTML pages that we write: what a browser lets them do and which of them were made here."""

import base64
import hashlib
import os
from contextlib import suppress
from pathlib import Path

from lib.record.files import sha256_file
from lib.record.paths import PROJECT_ROOT

# The SHA-256 and size of every filled notebook's page made by this copy of the project, one page per line. Not in a
# results folder, which others hand in.
LEDGER = PROJECT_ROOT / "data" / "pages_made_here.txt"
LEDGER_VARIABLE = "RUN_PAGES_LEDGER"


def content_policy(style: str | None = None, script: str | None = None) -> str:
    """Content security policy of a page: no script and no style sheet but these two texts, no address, no frame.

    Without ``style``, any inline style: those of a notebook's outputs are many, and would be hashed from the very
    page that they are to be checked in. With no address allowed, a style can load or send nothing.
    """
    styles = _hash_source(style) if style else "'unsafe-inline'"
    scripts = _hash_source(script) if script else "'none'"
    allowed = f"style-src {styles}; script-src {scripts}; img-src data:"
    return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"


def _hash_source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _ledger() -> Path:
    return Path(os.environ.get(LEDGER_VARIABLE) or LEDGER)


def note_page(page: Path) -> None:
    """Note that ``page`` was made here; where the ledger cannot be written, the page is not known."""
    line = f"{sha256_file(page)} {page.stat().st_size}\n".encode()
    with suppress(OSError):
        # One short write in append mode: jobs write side by side.
        descriptor = os.open(_ledger(), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor, "wb", buffering=0) as stream:
            stream.write(line)


def is_made_here(page: Path) -> bool:
    """Whether ``page`` is a file, no link, that holds byte for byte what this copy of the project wrote."""
    if page.is_symlink() or not page.is_file():
        return False
    try:
        lines = _ledger().read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return False
    # The size first: a file of many gigabytes is never read.
    hashes = {line[:64] for line in lines if line[64:] == f" {page.stat().st_size}"}
    return bool(hashes) and sha256_file(page) in hashes
