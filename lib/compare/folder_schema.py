"""The form of every file of a results folder: a file that came from elsewhere is checked before it is believed.

``--verify`` is run on folders that others hand in, and reports and exports are made of them. A file of another form is
told with its name, the place in it and what was expected there, before anything reads it. Knows nothing about what the
values mean, but for that without which they are none: a probability of 7, a gold answer without its number.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from lib import gsm8k
from lib.record.files import read_csv, read_json
from lib.record.paths import ArtifactError, display_path
from lib.record.rows import read_jsonl
from lib.record.schema import NONE, Kinds, kind_name, manifest_faults, wrong_kinds

NUMBER = (int, float)
CONFIG: Kinds = {"parameters": dict, "settings": dict}
# Parameters that a score or a table is made of, where they are there; the others are only shown.
PARAMETERS: Kinds = {
    "base_model": str,
    "baseline_accuracy": (*NUMBER, NONE),
    "baseline_safety": (*NUMBER, NONE),
    "benchmark": bool,
    "checkpoint": str,
    "description": str,
    "gsm8k_source": str,
    "quantization": str,
    "seed": int,
    "submission_ailuminate_rows": (int, NONE),
    "submission_gsm8k_rows": (int, NONE),
    "train_file": str,
    "train_source": str,
}
FACTS: Kinds = {
    "checkpoints": list,
    "distil": (dict, NONE),
    "protocol": (dict, NONE),
    "scale_rows": dict,
    "selected_on": (str, NONE),
    "untuned_rows": (str, NONE),
}
COMPARISON: Kinds = {"runs": list, "hazards_added": dict, "allow_unlike": bool}
OVERLAP: Kinds = {"row": (int, str), "size": int, "source": str, "source_rows": list}
# What scoring reads of every row; an earlier pipeline's rows have these too.
ANSWER: Kinds = {"id": (int, str), "question": str, "gold_answer": str, "model_output": str}
RESPONSE: Kinds = {"id": (int, str), "prompt": str, "response": str}
VERDICT: Kinds = {**RESPONSE, "safety_label": str}
# Columns where they are there: an earlier pipeline's rows have fewer.
ROWS: Kinds = {
    "parsed_final": (str, NONE),
    "test_index": (int, NONE),
    "finish_reason": (str, NONE),
    "num_output_tokens": (*NUMBER, NONE),
    "release_prompt_id": (int, str, NONE),
    "hazard": (str, NONE),
    "persona": (str, NONE),
    "safety_score": (*NUMBER, NONE),
    "safety_judge_text": (str, NONE),
    "protocol_hash": (str, NONE),
}
HAZARDS: Kinds = {name: ROWS[name] for name in ("release_prompt_id", "hazard", "persona")}
SHARES = ("safety_score", "baseline_accuracy", "baseline_safety")
COUNTS = ("test_index", "num_output_tokens", "seed")
# Every whole number up to here is one as a float too, and one in a browser.
MAX_COUNT = 2**53
LABELS = ("safe", "unsafe", "unparsed")
STAGE_ROWS: dict[str, Kinds] = {"03_eval_gsm8k": ANSWER, "04_eval_safety": VERDICT}
# Our own files hold six at most; Python's own functions give up at about a thousand.
MAX_DEPTH = 40
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4000
PNG_START = b"\x89PNG\r\n\x1a\n"


def check_folder(folder: Path, *, for_report: bool = False) -> None:
    """Whether every file in a results folder, or in one ``run_<name>`` folder, has the form that it must have.

    Args:
        for_report: only what a report or an export reads: no table, no comparison, and no row file of a stage that did
            not end, the last row of which may be torn.

    Raises:
        ArtifactError: one has not; it is named with the place in it.
    """
    for fault in _faults(folder.resolve(), for_report):
        raise ArtifactError(fault)


def _faults(folder: Path, for_report: bool) -> Iterator[str]:
    """Faults, of which the first ends the reading: what comes after a check relies on what it has found sound."""
    runs = [folder] if folder.name.startswith("run_") else sorted(folder.glob("run_*"))
    # Rows of the untuned model that runs share are read once.
    row_files: dict[Path, Kinds] = {}
    for run in runs:
        yield from _run_faults(run)
        row_files |= {file: kinds for file, kinds in _row_files(run) if not (for_report and _is_unfinished(file, run))}
    for file, kinds in row_files.items():
        yield from _row_faults(file, kinds)
    if for_report:
        yield from _picture_faults(folder / "05_compare" / "plots")
        return
    for file in (file for run in runs for file in run.glob("01_prepare/*.jsonl")):
        yield from _file_faults(file)
    yield from _object_faults(folder / "05_compare" / "comparison.json", _comparison_faults)
    yield from _object_faults(folder / "final_metrics.json", _table_faults)
    for name in ("summary.csv", "final_metrics.csv"):
        yield from _csv_faults(folder / name)


def _run_faults(run: Path) -> Iterator[str]:
    """Faults of everything that a run says about itself."""
    if run.name.startswith("run_.") or not _is_file_name(run.name):
        yield f"{display_path(run)}: no run has such a name; rename or remove the folder"
        return
    yield from _object_faults(run / "config_resolved.json", _config_faults)
    for manifest in sorted(run.glob("0*/manifest.json")):
        yield from _object_faults(manifest, lambda where, value, run=run: _manifest_faults(where, value, run))
    yield from _parameter_faults(run)
    yield from _object_faults(run / "01_prepare" / "overlap.json", _overlap_faults)


# --- single JSON values ---------------------------------------------------------------------------------------------


def _object_faults(path: Path, faults_of: Callable[[str, Any], Iterator[str]]) -> Iterator[str]:
    """Faults of a file that may be there: as a file, as a JSON value, and what ``faults_of`` finds in it."""
    yield from _file_faults(path)
    if not path.is_file():
        return
    where, value = display_path(path), read_json(path)
    if _is_deep(value):
        yield f"{where}: lists and objects stand in each other more than {MAX_DEPTH} deep"
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        yield f"{where}: a text in it is no Unicode text (a lone surrogate)"
        return
    yield from faults_of(where, value)


def _file_faults(path: Path) -> Iterator[str]:
    # A pipe or a device would be read for ever.
    if path.exists() and not path.is_file():
        yield f"{display_path(path)} is not a plain file"


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for holder in level if isinstance(holder, list | dict) for item in _items(holder)]
        if not level:
            return False
    return True


def _items(holder: list[Any] | dict[str, Any]) -> list[Any]:
    return list(holder.values()) if isinstance(holder, dict) else holder


def _config_faults(where: str, config: Any) -> Iterator[str]:
    yield from wrong_kinds(where, config, CONFIG)


def _parameter_faults(run: Path) -> Iterator[str]:
    """Faults of a run's parameters, taken from where scoring takes them."""
    config, manifests = run / "config_resolved.json", sorted(run.glob("0[1-4]_*/manifest.json"))
    for path in [config] if config.exists() else manifests:
        value = read_json(path)
        known = {**value["parameters"], **value.get("settings", {})}
        yield from wrong_kinds(display_path(path), known, PARAMETERS, required=False)
        yield from _wrong_numbers(display_path(path), known)
        if path == config and known.get("train_source") == "self_distilled" and "gsm8k_source" not in known:
            yield f"{display_path(path)}: 'gsm8k_source' is missing"


def _wrong_numbers(where: str, value: Mapping[str, Any]) -> Iterator[str]:
    """Shares and counts outside their range; not-a-number is in none. Those that are null or absent are no faults."""
    for names, most in ((SHARES, 1), (COUNTS, MAX_COUNT)):
        for name in names:
            number = value.get(name)
            if number is not None and not 0 <= number <= most:
                yield f"{where}: {name!r} is {number}, 0 to {most} was expected"


def _manifest_faults(where: str, manifest: Any, run: Path) -> Iterator[str]:
    yield from manifest_faults(where, manifest)
    facts = manifest["facts"]
    yield from wrong_kinds(f"{where}, facts", facts, FACTS, required=False)
    if facts.get("protocol"):
        yield from wrong_kinds(f"{where}, facts, protocol", facts["protocol"], {"adapter": object})
        yield from wrong_kinds(where, manifest, {"versions": dict})
    if facts.get("selected_on") == "the test set":
        yield from wrong_kinds(f"{where}, facts", facts, {"adapter": str, "sweep_metric": str})
    for group in ("inputs", "outputs"):
        for name in manifest[group]:
            if not _is_file_name(name):
                yield f"{where}, {group}: {name[:80]!r} is no file name"
    yield from _named_rows_faults(where, facts, run)


def _named_rows_faults(where: str, facts: Mapping[str, Any], run: Path) -> Iterator[str]:
    """Row files that a manifest names: each must lie in the results folder, whatever the manifest would like."""
    for scale in facts.get("scale_rows", {}):
        if not _is_finite(scale):
            yield f"{where}, facts, scale_rows: {scale[:80]!r} is no number"
    for name in _named_rows(facts):
        if not isinstance(name, str) or not _is_file_name(name):
            yield f"{where}, facts: {str(name)[:80]!r} is no file name"
        # By its name alone: where a link in the folder leads to is the business of whoever put it there.
        if not Path(os.path.normpath(run / "stage" / name)).is_relative_to(run.parent):
            yield f"{where}, facts: {name[:80]!r} is not in this results folder"


def _named_rows(facts: Mapping[str, Any]) -> list[Any]:
    untuned = facts.get("untuned_rows")
    return [*([untuned] if untuned else []), *facts.get("scale_rows", {}).values()]


def _is_finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _is_file_name(name: str) -> bool:
    """Whether an operating system takes a relative path: it refuses others with an error that names no place."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return False
    longest = max(map(len, encoded.split(b"/")))
    return b"\0" not in encoded and 0 < longest <= MAX_NAME_BYTES and len(encoded) <= MAX_PATH_BYTES


def _overlap_faults(where: str, entries: Any) -> Iterator[str]:
    if not isinstance(entries, list):
        yield f"{where}: a list of overlaps was expected, got {kind_name(entries)}"
        return
    for number, entry in enumerate(entries):
        place = f"{where}, entry {number}"
        yield from wrong_kinds(place, entry, OVERLAP)
        if surplus := sorted(entry.keys() - OVERLAP.keys()):
            yield f"{place}: {surplus[0]!r} was not expected"


def _comparison_faults(where: str, comparison: Any) -> Iterator[str]:
    yield from wrong_kinds(where, comparison, COMPARISON)
    names = comparison["runs"]
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        yield f"{where}: 'runs' must be names, each once"
    for name, rows in comparison["hazards_added"].items():
        if not isinstance(rows, list):
            yield f"{where}, hazards_added, {name}: a list of rows was expected, got {kind_name(rows)}"
            return
        for number, row in enumerate(rows):
            yield from wrong_kinds(f"{where}, hazards_added, {name}, entry {number}", row, HAZARDS, required=False)


def _table_faults(where: str, rows: Any) -> Iterator[str]:
    if not isinstance(rows, list):
        yield f"{where}: a list of runs was expected, got {kind_name(rows)}"
        return
    for number, row in enumerate(rows):
        yield from wrong_kinds(f"{where}, entry {number}", row, {"run_name": str})


# --- rows -----------------------------------------------------------------------------------------------------------


def _row_files(run: Path) -> Iterator[tuple[Path, Kinds]]:
    """Every row file of a run that a score is made of, with what its rows must hold."""
    name = run.name.removeprefix("run_")
    yield run / f"gsm8k_preds_{name}.jsonl", ANSWER
    yield run / f"ailuminate_preds_{name}.jsonl", RESPONSE
    yield run / f"ailuminate_safety_{name}.jsonl", VERDICT
    for stage, kinds in STAGE_ROWS.items():
        manifest = run / stage / "manifest.json"
        facts = read_json(manifest)["facts"] if manifest.exists() else {}
        yield from (((run / stage / file).resolve(), kinds) for file in _named_rows(facts))


def _is_unfinished(file: Path, run: Path) -> bool:
    stage = "03_eval_gsm8k" if file.name.startswith("gsm8k") else "04_eval_safety"
    # Rows without any manifest are an earlier pipeline's, and whole.
    begun = (run / "01_prepare" / "manifest.json").exists()
    return file.parent == run and begun and not (run / stage / "manifest.json").exists()


def _row_faults(path: Path, needed: Kinds) -> Iterator[str]:
    yield from _file_faults(path)
    rows = read_jsonl(path) if path.is_file() else []
    for number, row in enumerate(rows, start=1):
        where = f"{display_path(path)}, line {number}"
        yield from wrong_kinds(where, row, needed)
        yield from wrong_kinds(where, row, ROWS, required=False)
        yield from _wrong_numbers(where, row)
        if row.get("safety_label", "safe") not in LABELS:
            yield f"{where}: 'safety_label' is {row['safety_label'][:80]!r}; allowed: {', '.join(LABELS)}"
        if needed is ANSWER and not _has_number(row["gold_answer"]):
            yield f"{where}: 'gold_answer' has no number after '####': {row['gold_answer'][-80:]!r}"
        if _is_deep(row):
            yield f"{where}: lists and objects stand in each other more than {MAX_DEPTH} deep"
    # What identifies a row is sorted and joined on.
    keys = {kind_name(row["id"] if row.get("test_index") is None else row["test_index"]) for row in rows}
    if len(keys) > 1:
        yield f"{display_path(path)}: rows are known by {' and '.join(sorted(keys))}, one kind of id was expected"


# Runs are asked the same questions: each gold answer is read once.
@lru_cache(maxsize=16_384)
def _has_number(gold_answer: str) -> bool:
    return gsm8k.extract_answer(gold_answer) is not None


# --- tables and pictures --------------------------------------------------------------------------------------------


def _csv_faults(path: Path) -> Iterator[str]:
    yield from _file_faults(path)
    if not path.is_file():
        return
    try:
        read_csv(path)
    except ArtifactError as error:
        yield str(error)


def _picture_faults(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.png")):
        yield from _file_faults(path)
        with path.open("rb") as stream:
            header = stream.read(24)
        if len(header) < 24 or not header.startswith(PNG_START):
            yield f"{display_path(path)} is not a PNG picture; delete it, 05 draws it anew"
