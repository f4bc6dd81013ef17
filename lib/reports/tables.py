"""Tables of the stages."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib import wording
from lib.record.files import read_json
from lib.record.manifest import git_commit, package_versions
from lib.record.paths import PROJECT_ROOT
from lib.reports.html import Html, fold, table
from lib.stats import Rate
from lib.wording import percent

SCALE_NOTE = (
    "A scale that is picked here is picked on these rows: its rates are too high by the luck of the choice. Choose a "
    "scale on development rows."
)


def full_table(rows: Sequence[Mapping[str, Any]], caption: str = "") -> Html | None:
    """A table of all rows; None without rows, so that a cell shows nothing."""
    return table(rows, caption, max_rows=len(rows)) if rows else None


def rate_cells(rate: Rate) -> dict[str, str]:
    """A rate as cells of a table: rate, 95 % interval, and the count it comes from."""
    interval = f"{wording.interval(rate.low, rate.high)} %"
    return {"rate": percent(rate.share), "95 % interval": interval, "rows": wording.count(rate.successes, rate.n)}


def rates_table(rates: Mapping[str, Rate], what: str, caption: str = "") -> Html | None:
    """One row per rate, named in the column ``what``."""
    return full_table([{what: name, **rate_cells(rate)} for name, rate in rates.items()], caption)


def setup_tables(stage: str, parameters: Mapping[str, Any], device: str) -> list[Html]:
    """What a stage runs with, folded: parameters and versions; ``device`` says where it runs and why."""
    versions = [{"package": name, "version": version} for name, version in package_versions().items()]
    versions.append({"package": "commit", "version": git_commit()[:12]})
    shown = table(versions, "Versions of what can change a number")
    return [parameters_table(stage, parameters), fold(f"Device: {device}. Versions of its packages", shown)]


def parameters_table(stage: str, parameters: Mapping[str, Any]) -> Html:
    """Every parameter with its value and meaning, folded."""
    meanings = parameter_meanings(stage)
    known = parameters.items()
    rows = [{"parameter": name, "value": repr(value), "meaning": meanings.get(name, "")} for name, value in known]
    return fold(f"{len(rows)} parameters of this run, with their meaning", table(rows, max_rows=len(rows)))


def parameter_meanings(stage: str) -> dict[str, str]:
    """What each parameter means: the comments of the source notebook's parameters cell."""
    cells = read_json(PROJECT_ROOT / "notebooks" / f"{stage}.ipynb")["cells"]
    sources = ["".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    return dict(re.findall(r"^(\w+): .*?  # (.*)$", "\n".join(sources), flags=re.MULTILINE))


def settings_table(settings: Mapping[str, Any], caption: str) -> Html:
    """One row per setting, with its value."""
    return table([{"setting": name, "value": value} for name, value in settings.items()], caption, len(settings))


def sources_table(sources: Mapping[str, Mapping[str, Any]]) -> Html:
    """Provenance of data sets (use -> ``table_row()`` of its source); hashes by their first 12 digits."""
    columns = {"origin": "found in", "path": "file", "num_rows": "rows", "sha256": "SHA-256 of the rows"}
    columns |= {"licence": "licence", "home": "published at"}
    short = {name: {**source, "sha256": source["sha256"][:12]} for name, source in sources.items()}
    rows = [{"data": name, **{shown: one[key] for key, shown in columns.items()}} for name, one in short.items()]
    return table(rows, "Provenance")


def prompt_language(prepared: Mapping[str, Any]) -> str:
    """Language of the AILuminate prompts, from the facts of 01; empty where they do not record it."""
    return prepared.get("data", {}).get("AILuminate", {}).get("language", "")


def prompts_text(num_prompts: int, language: str) -> str:
    """How many AILuminate prompts, and their language where it is recorded."""
    return f"{num_prompts:,} AILuminate prompts{language and f', language: {language}'}."


def files_table(paths: Sequence[Path], folder: Path) -> Html:
    """Files and folders that a stage leaves, relative to ``folder``, with their sizes."""
    rows = []
    for path in paths:
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        size_kib = sum(file.stat().st_size for file in files) / 1024
        rows.append({"file": path.relative_to(folder).as_posix(), "files": len(files), "KiB": f"{size_kib:,.1f}"})
    return table(rows, f"Written by this stage, in {folder.name}/", max_rows=len(rows))
