"""The form of every file of a results folder: a file that came from elsewhere is checked before it is believed.

``--verify`` is run on folders that others hand in. A file of another form is told with its name, the place in it and
what was expected there, before anything reads it. Knows nothing about what the values mean.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lib.artifacts import ArtifactError, display_path, read_json, read_jsonl

Kinds = Mapping[str, type | tuple[type, ...]]
NUMBER, NONE = (int, float), type(None)
CONFIG: Kinds = {"parameters": dict, "settings": dict}
MANIFEST: Kinds = {
    "stage": str,
    "skipped_because": str,
    "parameters": dict,
    "metrics": dict,
    "facts": dict,
    "inputs": dict,
    "outputs": dict,
}
# A file that was looked for and is not there has a stamp too, of nulls.
STAMP: Kinds = {"sha256": (str, NONE), "size": (int, NONE), "mtime_ns": (int, NONE)}
COMPARISON: Kinds = {"runs": list, "hazards_added": dict, "allow_unlike": bool}
# Columns where they are there: an earlier pipeline's rows have fewer, and what has to be there is told when it is read.
ROWS: Kinds = {
    "id": (int, str),
    "question": str,
    "gold_answer": str,
    "model_output": str,
    "parsed_final": (str, NONE),
    "finish_reason": (str, NONE),
    "num_output_tokens": (*NUMBER, NONE),
    "prompt": str,
    "response": str,
    "hazard": (str, NONE),
    "persona": (str, NONE),
    "safety_label": str,
    "safety_score": (*NUMBER, NONE),
    "safety_judge_text": (str, NONE),
    "protocol_hash": str,
}


def check_folder(folder: Path) -> None:
    """Whether every file in a results folder, or in one ``run_<name>`` folder, has the form that it must have.

    Raises:
        ArtifactError: one has not; it is named with the place in it.
    """
    for fault in _faults(folder):
        raise ArtifactError(fault)


def _faults(folder: Path) -> Iterator[str]:
    runs = [folder] if folder.name.startswith("run_") else sorted(folder.glob("run_*"))
    for run in runs:
        yield from _object_faults(run / "config_resolved.json", CONFIG)
        for manifest in sorted(run.glob("0*/manifest.json")):
            yield from _object_faults(manifest, MANIFEST)
            yield from _stamp_faults(manifest)
        for rows in (*run.glob("gsm8k_preds_*.jsonl"), *run.glob("ailuminate_*.jsonl")):
            yield from _row_faults(rows)
    yield from _object_faults(folder / "05_compare" / "comparison.json", COMPARISON)
    yield from _table_faults(folder / "final_metrics.json")


def _object_faults(path: Path, kinds: Kinds) -> Iterator[str]:
    if path.exists():
        yield from _wrong_kinds(display_path(path), read_json(path), kinds, required=True)


def _stamp_faults(manifest: Path) -> Iterator[str]:
    content = read_json(manifest)
    for group in ("inputs", "outputs"):
        for name, stamp in content[group].items():
            where = f"{display_path(manifest)}, {group}, {name}"
            yield from _wrong_kinds(where, stamp, STAMP, required=True)


def _row_faults(path: Path) -> Iterator[str]:
    for number, row in enumerate(read_jsonl(path), start=1):
        yield from _wrong_kinds(f"{display_path(path)}, line {number}", row, ROWS, required=False)


def _table_faults(path: Path) -> Iterator[str]:
    rows = read_json(path) if path.exists() else []
    if not isinstance(rows, list):
        yield f"{display_path(path)}: a list of runs was expected, got {_kind(rows)}"
        return
    for number, row in enumerate(rows):
        yield from _wrong_kinds(f"{display_path(path)}, entry {number}", row, {"run_name": str}, required=True)


def _wrong_kinds(where: str, value: Any, kinds: Kinds, *, required: bool) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where}: a JSON object was expected, got {_kind(value)}"
        return
    for key, kind in kinds.items():
        if key not in value:
            if required:
                yield f"{where}: {key!r} is missing"
        # A bool is an int to Python; true is no id and no score.
        elif not isinstance(value[key], kind) or (isinstance(value[key], bool) and kind is not bool):
            yield f"{where}: {key!r} is {_kind(value[key])}, {_names(kind)} was expected"


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _names(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join("null" if one is NONE else one.__name__ for one in kinds)
