"""Dequantised weights kept in ``data/models/dense/`` (may be deleted): packing takes a CPU half a minute or more."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lib.record.files import folder_in_making, free_bytes, read_json, sha256_file, sha256_json, write_json
from lib.record.paths import PROJECT_ROOT

CACHE_DIR = PROJECT_ROOT / "data" / "models" / "dense"
# Below this the packing takes no time, and tests would leave hundreds of folders.
MIN_BYTES = 2**26
NOTE = "made_from.json"


def identity(weight_files: list[Path], **more: Any) -> dict[str, Any]:
    """What dequantised weights depend on: the weight files' bytes, and what the caller adds (dtype, versions)."""
    states = {path: path.stat() for path in weight_files}
    hashes = {path.name: _sha256(path, state.st_size, state.st_mtime_ns) for path, state in states.items()}
    return {"weights": hashes, **more}


@cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    # A stage loads the same base up to five times, and gigabytes take seconds to hash.
    return sha256_file(path)


def load_or_make(
    made_from: Mapping[str, Any],
    num_bytes: int,
    load: Callable[[Path], PreTrainedModel],
    make: Callable[[], PreTrainedModel],
) -> PreTrainedModel:
    """The model as kept for ``made_from``, or made and kept, unless it is small or the disk is full or read-only."""
    if num_bytes < MIN_BYTES:
        return make()
    folder = CACHE_DIR / sha256_json(made_from)[:16]
    if _is_made_from(folder, made_from):
        return load(folder)
    made = make()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if free_bytes(folder.parent) >= 3 * num_bytes:
            with folder_in_making(folder, partial(_is_made_from, made_from=made_from)) as part:
                made.save_pretrained(part)
                write_json(part / NOTE, dict(made_from))
    except OSError as error:
        print(f"dequantised weights are not kept for the next load: {error}")
    return made


def _is_made_from(folder: Path, made_from: Mapping[str, Any]) -> bool:
    # The note is written last, so a folder with it is complete.
    return (folder / NOTE).exists() and read_json(folder / NOTE) == made_from
