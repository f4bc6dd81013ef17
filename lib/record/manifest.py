"""A stage's ``manifest.json``: its parameters, code, inputs and outputs with their hashes.

It is written last, so it exists only for a complete stage; the driver reads from it whether a stage has to run again.
"""

import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from lib.record import locks, schema
from lib.record.commitment import COMMITMENT, write_commitment
from lib.record.files import read_json, sha256_file, write_json
from lib.record.gpus import gpu_in_use
from lib.record.paths import COMPARE_STAGE, ENGINE_VARIABLE, PROJECT_ROOT, ArtifactError, RunPaths, display_path
from lib.record.plain_files import list_files
from lib.record.progress import someone_looks
from lib.record.redaction import clean, clean_value, home_folder
from lib.record.source_code import code_hash

Row = dict[str, Any]
NOT_RUN = "not run yet"
# Written into every manifest: the packages whose version can change a number.
VERSIONED_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers", "numpy")
# Facts that name row files of the results folder.
NAMED_FILES = ("untuned_rows", "control_rows", "scale_rows", "other_judgements")
# Where files lie, and who else makes rows, does not change what is computed: these never make a stage run again.
LOCATION_PARAMETERS = frozenset({"results_dir", "assets_dir", "offline", "part"})
ABSENT = {"sha256": None, "size": None, "mtime_ns": None}
# Set by the driver for a kernel: when it was requested, in seconds since 1970.
REQUESTED_VARIABLE = "KERNEL_REQUESTED_AT"


def file_stamp(path: Path) -> dict[str, Any]:
    """SHA-256 of a file, size in bytes and modification time in ns."""
    status = path.stat()
    return {"sha256": sha256_file(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def same_file(path: Path, stamp: Mapping[str, Any]) -> bool:
    """Whether ``path`` still has the content of ``stamp``; it is read only if its time changed."""
    if stamp == ABSENT or not path.is_file():
        return stamp == ABSENT and not path.exists()
    status = path.stat()
    # Two empty files are equal, and those of /proc are of size 0 but may have no end.
    is_untouched = status.st_size == 0 or status.st_mtime_ns == stamp["mtime_ns"]
    return status.st_size == stamp["size"] and (is_untouched or sha256_file(path) == stamp["sha256"])


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number, without importing any."""
    versions = {"python": platform.python_version()}
    for name in VERSIONED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def interpreter() -> dict[str, str]:
    """This Python, and its environment: relative to the project, else the last two parts of its path."""
    prefix = Path(sys.prefix)
    inside = prefix.is_relative_to(PROJECT_ROOT)
    environment = display_path(prefix) if inside else "/".join(Path(clean(sys.prefix)).parts[-2:])
    return {"implementation": platform.python_implementation(), "environment": environment}


def made_on() -> dict[str, str]:
    """The machine, its GPU and the engine that ran the stage; "" for no GPU, and for a notebook run by hand."""
    return {"node": socket.gethostname(), "gpu": gpu_in_use(), "engine": os.environ.get(ENGINE_VARIABLE, "")}


def git_commit() -> str:
    """The project's commit, with ``+changes`` where the tree differs from it; ``unknown`` outside a checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


@dataclass
class StageRecord:
    """A running stage."""

    stage: str
    manifest_path: Path
    run_name: str
    parameters: dict[str, Any]
    code_sha256: str
    git_commit: str
    kernel_start_s: float | None = None  # until the stage's first cell; None in a kernel that no driver started
    started: float = field(default_factory=time.perf_counter)

    def relative(self, path: Path) -> str:
        """``path`` relative to the manifest, so that a results folder can be moved."""
        return os.path.relpath(path, self.manifest_path.parent)

    def finish(
        self,
        *,
        inputs: Iterable[Path],
        outputs: Iterable[Path],
        facts: Row,
        metrics: Row | None = None,
        skipped: str = "",
    ) -> Row:
        """Write and return the manifest, last of a stage; folders stand for their files, ``skipped`` says why."""
        manifest = {
            "stage": self.stage,
            "run_name": self.run_name,
            "status": "skipped" if skipped else "complete",
            "skipped_because": clean_value(skipped),
            # A folder or an address that was typed may contain a home, a name or a token.
            "parameters": clean_value(self.parameters),
            "metrics": dict(metrics or {}),
            "facts": clean_value(dict(facts), keep=NAMED_FILES),
            "inputs": _stamps(inputs, self.manifest_path.parent),
            "outputs": _stamps(outputs, self.manifest_path.parent),
            "code_sha256": self.code_sha256,
            "versions": package_versions(),
            "interpreter": interpreter(),
            "git_commit": self.git_commit,
            "made_on": made_on(),
            "kernel_start_s": self.kernel_start_s,
            "wall_s": round(time.perf_counter() - self.started, 2),
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_json(self.manifest_path, manifest)
        if self.stage != COMPARE_STAGE:
            write_commitment(self.manifest_path.parent.parent)
        locks.release_file(_root_of(self.manifest_path))
        return manifest


def start_stage(manifest_path: Path, stage: str, run_name: str, parameters: Mapping[str, Any]) -> StageRecord:
    """Begin a stage, without its old manifest; ArtifactError if a driver uses the folder of a notebook run by hand."""
    if someone_looks():
        # A driver would write the same files: it is refused until this stage is finished or its kernel ended.
        list_files(_root_of(manifest_path))
        try:
            locks.join(_root_of(manifest_path), f"{stage} of {run_name}, open in JupyterLab")
        except locks.FolderInUse as error:
            raise ArtifactError(f"{error}; wait until it has ended, or use another results_dir") from None
    # A part of a stage's rows is made beside what the stage, or another run's, still has.
    if not parameters.get("part"):
        manifest_path.unlink(missing_ok=True)
        (manifest_path.parent.parent / COMMITMENT).unlink(missing_ok=True)
    # Taken away: a stage that is opened again in the same kernel did not wait for it.
    requested = os.environ.pop(REQUESTED_VARIABLE, "")
    start_s = round(max(0.0, time.time() - float(requested)), 2) if requested else None
    # Hashed now: what is edited during the hours of a stage is not the code that it ran.
    return StageRecord(stage, manifest_path, run_name, dict(parameters), code_hash(stage), git_commit(), start_s)


def _root_of(manifest_path: Path) -> Path:
    """The folder of all runs; a run's manifest lies one level deeper than that of 05."""
    above = manifest_path.parent.parent
    return above if manifest_path.parent.name == COMPARE_STAGE else above.parent


def _stamps(paths: Iterable[Path], base: Path) -> dict[str, dict[str, Any]]:
    # A missing file that may appear is an input too: when it does, the stage has to run again.
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    files = [file for file in files if not file.is_dir()]
    return {_stamp_name(file, base): file_stamp(file) if file.is_file() else dict(ABSENT) for file in files}


def _stamp_name(file: Path, base: Path) -> str:
    """``file`` relative to the manifest, so that a run folder can be moved; below ``~/`` if that would name a home."""
    name = os.path.relpath(file, base)
    home = home_folder()
    in_home = home and clean(name) != name and file.is_relative_to(home)
    return f"~/{file.relative_to(home).as_posix()}" if in_home else name


def stale_reason(manifest_path: Path, stage: str, parameters: Mapping[str, Any]) -> str:
    """Why a stage has to run again: what changed of parameters it used, code, inputs and outputs; "" if nothing."""
    if not manifest_path.exists():
        return NOT_RUN
    manifest = _read_manifest(manifest_path)
    if not manifest:
        return "its manifest cannot be read"
    if manifest["status"] != "complete":
        return f"it was skipped: {manifest['skipped_because']}"
    before, after, absent = manifest["parameters"], clean_value(dict(parameters)), object()
    counted = (before.keys() | after.keys()) - LOCATION_PARAMETERS - {*manifest["facts"].get("unused_parameters", [])}
    changed = [name for name in sorted(counted) if before.get(name, absent) != after.get(name, absent)]
    if changed:
        return "parameters changed: " + ", ".join(changed)
    if manifest["code_sha256"] != code_hash(stage):
        return "the code changed"
    for kind in ("input", "output"):
        for name, stamp in manifest[f"{kind}s"].items():
            file = Path(home_folder(), name[2:]) if name.startswith("~/") else manifest_path.parent / name
            if not same_file(file, stamp):
                return f"{kind} {display_path(file)} changed or is gone"
    return ""


def is_redacted(manifest_path: Path) -> bool:
    """Whether the manifest says that a stage filled its notebook under ``--redact``."""
    return _read_manifest(manifest_path).get("parameters", {}).get("redact") is True


def recorded_outputs(manifest_path: Path) -> dict[str, dict[str, Any]]:
    """Stamps of the files that a stage wrote, by their name relative to the manifest; {} without a manifest."""
    return _read_manifest(manifest_path).get("outputs", {})


def _read_manifest(path: Path) -> dict[str, Any]:
    """A stage's manifest; empty if the file is malformed: the stage then runs again and replaces it."""
    try:
        manifest = read_json(path)
    except ArtifactError:
        return {}
    return {} if schema.find_faults(display_path(path), schema.Manifest, manifest) else manifest


def facts_of(paths: RunPaths, stage: str) -> Row:
    """The facts of a stage's manifest; empty without one."""
    path = paths.manifest(stage)
    return read_json(path)["facts"] if path.exists() else {}
