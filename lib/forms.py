"""The form of every file of a results folder: a file that came from elsewhere is checked before it is believed.

``--verify`` is run on folders that others hand in. A file of another form is told with its name, the place in it and
what was expected there, before anything reads it. Knows nothing about what the values mean.
"""

from collections.abc import Iterator
from pathlib import Path

from lib.artifacts import (
    NONE,
    ArtifactError,
    Kinds,
    display_path,
    kind_name,
    manifest_faults,
    read_json,
    read_jsonl,
    wrong_kinds,
)

NUMBER = (int, float)
CONFIG: Kinds = {"parameters": dict, "settings": dict}
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
            yield from manifest_faults(display_path(manifest), read_json(manifest))
        for rows in (*run.glob("gsm8k_preds_*.jsonl"), *run.glob("ailuminate_*.jsonl")):
            yield from _row_faults(rows)
    yield from _object_faults(folder / "05_compare" / "comparison.json", COMPARISON)
    yield from _table_faults(folder / "final_metrics.json")


def _object_faults(path: Path, kinds: Kinds) -> Iterator[str]:
    if path.exists():
        yield from wrong_kinds(display_path(path), read_json(path), kinds)


def _row_faults(path: Path) -> Iterator[str]:
    for number, row in enumerate(read_jsonl(path), start=1):
        yield from wrong_kinds(f"{display_path(path)}, line {number}", row, ROWS, required=False)


def _table_faults(path: Path) -> Iterator[str]:
    rows = read_json(path) if path.exists() else []
    if not isinstance(rows, list):
        yield f"{display_path(path)}: a list of runs was expected, got {kind_name(rows)}"
        return
    for number, row in enumerate(rows):
        yield from wrong_kinds(f"{display_path(path)}, entry {number}", row, {"run_name": str})
