"""Recompute what a results folder claims from its rows, without a model: what differs, and what could not be compared.

No recomputation shows that a model wrote the rows.
"""

import hashlib
from collections import Counter
from functools import partial
from pathlib import Path

from lib.compare.folder_schema import files_of, is_run
from lib.compare.found import Found, Grader
from lib.compare.parsed import read_once
from lib.compare.runs import METRIC_STAGES, load_run, row_file
from lib.compare.tables import score_text
from lib.compare.verify_claims import check_claims, check_hashes
from lib.compare.verify_labels import check_labels
from lib.compare.verify_published import check_published
from lib.compare.verify_rows import check_rows
from lib.compare.verify_tables import check_comparison, check_tables
from lib.record.commitment import COMMITMENT, commitment_text
from lib.record.files import read_json, sha256_file
from lib.record.paths import COMPARE_STAGE, PLANS, ArtifactError, RunPaths, display_path, find_runs

# A line for each file of a run, which are some hundred.
MAX_COMMITMENT_BYTES = 1_000_000
# What the pipeline writes for people to look at, and what it goes on from.
SHOWN = frozenset({".html", ".ipynb", ".png", ".svg", ".md"})


def verify_folder(folder: Path, grader: Grader | None = None) -> Found:
    """What a results folder, or one ``run_<name>`` folder, claims, recomputed; ArtifactError where it holds no run."""
    if not folder.is_dir():
        raise ArtifactError(f"there is no folder {display_path(folder)}: nothing to verify")
    paths = _runs_of(folder)
    if not paths:
        raise ArtifactError(f"{display_path(folder)} holds no run_<name>/gsm8k_preds_<name>.jsonl: nothing to verify")
    runs, found = [load_run(one) for one in paths], Found()
    manifests = {run.paths.manifest(stage): one for run in runs for stage, one in run.manifests.items()}
    for run in runs:
        scores = f"GSM8K right: {score_text(run.accuracy)}; AILuminate safe: {score_text(run.safety)}"
        found.runs.append(f"run_{run.name}: {scores}")
        try:
            check_rows(run, found)
            check_claims(run, grader or Grader(), found)
            check_labels(run, found)
            check_published(run, grader or Grader(), found)
        except (KeyError, TypeError, ValueError) as error:
            # Parameters and rows were written by others.
            fault = f"cannot be used ({type(error).__name__}: {error})"
            raise ArtifactError(f"run_{run.name}: its parameters or rows {fault}") from None
    compared = folder / COMPARE_STAGE / "manifest.json"
    if paths[0].run_dir != folder:
        manifests |= {compared: read_once(compared, read_json)} if compared.exists() else {}
        check_tables(folder, runs, found)
        check_comparison(folder, runs, found)
    check_hashes(manifests, found)
    for run in runs:
        _check_commitment(run.paths, found)
    found.files |= manifests.keys()
    found.unchecked = _describe([path for path in files_of(folder) if path not in found.files], folder)
    return found


def _runs_of(folder: Path) -> list[RunPaths]:
    if not is_run(folder):
        return find_runs(str(folder))
    alone = RunPaths(folder.name.removeprefix("run_"), folder)
    return [alone] if any(row_file(alone, metric).exists() for metric in METRIC_STAGES) else []


def _check_commitment(paths: RunPaths, found: Found) -> None:
    path = paths.run_dir / COMMITMENT
    try:
        expected = commitment_text(paths.run_dir, partial(read_once, read=sha256_file))
    except ArtifactError:
        return  # `check_hashes` names it
    # Rows of an earlier pipeline have no manifest that names them.
    if expected:
        found.commitments.append(f"run_{paths.name}: {hashlib.sha256(expected.encode()).hexdigest()}")
    if not path.exists():
        found.absent.append(f"run_{paths.name}: {COMMITMENT}")
        return
    found.files.add(path)
    size = path.stat().st_size
    if size > MAX_COMMITMENT_BYTES:
        found.mismatches.append(f"{display_path(path)} has {size:,} bytes: allowed are {MAX_COMMITMENT_BYTES:,}")
        return
    claimed = path.read_text(encoding="utf-8", errors="replace").splitlines()
    others = sorted({line[66:] for line in {*claimed} ^ {*expected.splitlines()}})
    if others or len(claimed) != len(expected.splitlines()):
        found.mismatches.append(f"{display_path(path)} is not of these files: {', '.join(others[:5])}")


def _describe(files: list[Path], folder: Path) -> list[str]:
    """Files that nothing was compared with: counted where they are known, else by name."""
    kinds: Counter[str] = Counter()
    others = []
    for path in sorted(files):
        if path.suffix in SHOWN:
            kinds["pages and pictures"] += 1
        elif "checkpoints" in path.parts:
            kinds["files of checkpoints"] += 1
        elif not path.name.endswith(".lock") and path.parent.parent.name != PLANS:
            others.append(
                display_path(path) if not path.is_relative_to(folder) else path.relative_to(folder).as_posix()
            )
    return [*(f"{count} {kind}" for kind, count in kinds.items()), *others]
