"""A row file in shares that several machines make at once: ``<i>-of-<n>.jsonl`` in a folder beside it, then joined."""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.record.gpus import gpu_in_use
from lib.record.paths import ArtifactError, display_path
from lib.record.plain_files import list_files

FOLDER_ENDING, PART_ENDING, GPU_ENDING = ".shards", ".part", ".gpu"
Row = Mapping[str, Any]
NAME = re.compile(r"([1-9][0-9]*)-of-([1-9][0-9]*)\.jsonl")


def folder_of(rows: Path) -> Path:
    """Where the shares of a row file are until they are joined."""
    return rows.with_name(rows.name + FOLDER_ENDING)


def share_path(rows: Path, index: int, num_shares: int) -> Path:
    """The file of share ``index``, from 1, of a row file; while it is made, its name ends in ``.part``."""
    return folder_of(rows) / f"{index}-of-{num_shares}.jsonl"


def close_share(path: Path) -> None:
    """Give a whole share its name, beside it the GPU that made it; does nothing to a file that is no share."""
    if path.name.endswith(PART_ENDING):
        whole = path.with_name(path.name.removesuffix(PART_ENDING))
        whole.with_suffix(GPU_ENDING).write_text(gpu_in_use() or "CPU", encoding="utf-8")
        path.replace(whole)


def shares(rows: Path) -> list[Path]:
    """The whole shares of a row file, in order; ArtifactError names one that is missing or of another division."""
    folder = folder_of(rows)
    found = {path: NAME.fullmatch(path.name) for path in list_files(folder) if path.suffix == ".jsonl"}
    if not found:
        return []
    why = f"; run the same command again, or delete {display_path(folder)} to make these rows without shares"
    strange = [path for path, name in found.items() if not name]
    counts = {int(name[2]) for name in found.values() if name}
    if strange or len(counts) > 1:
        names = ", ".join(sorted(path.name for path in found))
        raise ArtifactError(f"{display_path(folder)}: shares of one division were expected, it holds {names}{why}")
    whole = [share_path(rows, index, max(counts)) for index in range(1, max(counts) + 1)]
    if missing := [path for path in whole if path not in found]:
        raise ArtifactError(f"{display_path(missing[0])} is missing, {len(missing)} of {len(whole)} shares are{why}")
    return whole


def joined(read: Mapping[Path, Sequence[Row]], keys: Sequence[Any], key: str, protocol_hash: str) -> list[Row]:
    """The rows of all shares, which together have each of ``keys`` once; ArtifactError names what is amiss."""
    seen: dict[Any, Path] = {}
    for path, rows in read.items():
        where = display_path(path)
        for row in rows:
            if row.get("protocol_hash") != protocol_hash:
                raise ArtifactError(f"{where}: row {row[key]!r} was made under another protocol; delete the file")
            if row[key] in seen:
                raise ArtifactError(
                    f"{where}: row {row[key]!r} stands in {seen[row[key]].name} too; delete one of them"
                )
            seen[row[key]] = path
    if missing := [name for name in keys if name not in seen]:
        raise ArtifactError(f"{display_path(path.parent)}: no share has row {missing[0]!r}; delete the folder")
    if foreign := seen.keys() - set(keys):
        name = min(foreign, key=str)
        raise ArtifactError(f"{display_path(seen[name])}: row {name!r} was not asked for; delete the file")
    return [row for rows in read.values() for row in rows]


def gpus_of(rows: Path) -> set[str]:
    """The kinds of GPU that made the shares of a row file."""
    return {path.read_text(encoding="utf-8") for path in folder_of(rows).glob(f"*{GPU_ENDING}")}


def remove(rows: Path) -> None:
    """Remove the shares of a row file that has their rows."""
    folder = folder_of(rows)
    if folder.is_dir():
        # Renamed first: what a kill leaves of it must not look like missing shares.
        gone = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(gone, ignore_errors=True)
        shutil.rmtree(folder.rename(gone), ignore_errors=True)
