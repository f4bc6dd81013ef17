"""``COMMITMENT``: the SHA-256 of what a run was made of, as ``sha256sum`` writes it; its own hash commits to all of it.

Sent before a deadline, the hash shows later that nothing was changed since. It can be signed by any tool for files.
"""

import os
from collections.abc import Callable
from pathlib import Path

from lib.record.files import read_json, sha256_file, write_text
from lib.record.paths import ArtifactError, display_path

COMMITMENT = "COMMITMENT"
# Rows, adapter, tables and records; pictures and the adapter's card can be made again.
COMMITTED = frozenset({".jsonl", ".json", ".csv", ".safetensors"})


def commitment_text(run_dir: Path, hash_file: Callable[[Path], str] = sha256_file) -> str:
    """A line for each file of a run: its plan, its manifests, and what these name as written; "" without manifest."""
    manifests = sorted(run_dir.glob("0*/manifest.json"))
    files = [run_dir / "config_resolved.json", *manifests]
    for path in manifests:
        for name, stamp in read_json(path)["outputs"].items():
            file = path.parent / name
            if file.suffix not in COMMITTED:
                continue
            if not file.is_file() or file.stat().st_size != stamp["size"]:
                raise ArtifactError(f"{display_path(file)} is not the file that {path.parent.name} wrote")
            files.append(file)
    # Relative to the run's folder, where `sha256sum -c COMMITMENT` is typed.
    names = {os.path.relpath(file, run_dir): file for file in files if file.is_file()}
    return "".join(f"{hash_file(file)}  {name}\n" for name, file in sorted(names.items())) if manifests else ""


def write_commitment(run_dir: Path) -> None:
    """Write ``COMMITMENT`` of a run as it is now; no file where a stage's files changed since, or none is finished."""
    try:
        text = commitment_text(run_dir)
    except ArtifactError:
        text = ""
    if text:
        write_text(run_dir / COMMITMENT, text)
    else:
        (run_dir / COMMITMENT).unlink(missing_ok=True)
