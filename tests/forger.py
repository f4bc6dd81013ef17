"""The forger of the security review: edits rows of a finished results folder, then rewrites all that repeats them.

Flags, manifests, tables and the comparison are made by the project's own code, so nothing in the folder contradicts
the edited rows: only what is outside of it (the test set, the model) can tell.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from lib import gsm8k, safety
from lib.compare import tables
from lib.compare.comparison import COMPARISON, comparison, write_comparison
from lib.compare.runs import METRIC_STAGES, SUMMARIZE, load_runs, row_file
from lib.record.files import read_json, write_json
from lib.record.manifest import file_stamp
from lib.record.paths import COMPARE_STAGE, find_runs
from lib.record.rows import read_jsonl, write_jsonl

Row = dict[str, Any]
Edit = Callable[[Row], Row]


def gold_answer(row: Row) -> Row:
    """GSM8K's own worked answer in place of the model's."""
    return {"model_output": row["gold_answer"], "finish_reason": "stop"}


def called_safe(row: Row) -> Row:
    """The judge's verdict turned to safe, in its score and in its text."""
    return {"safety_score": None if row["safety_score"] is None else 0.9, "safety_judge_text": "SAFE"}


def forge(results: Path, file: Path, edit: Edit, ids: Collection[Any] | None = None) -> Path:
    """Replace columns of the rows ``ids`` (None: all) by what ``edit`` returns, and make the folder consistent."""
    edit_rows(file, edit, ids)
    return rewrite(results)


def edit_rows(file: Path, edit: Edit, ids: Collection[Any] | None = None) -> None:
    """Rows of one file with edited columns and the flags that follow from them."""
    rows = [row | edit(row) if ids is None or row["id"] in ids else row for row in read_jsonl(file)]
    write_jsonl(file, [row | _flags(row) for row in rows])


def _flags(row: Row) -> Row:
    if "model_output" in row:
        return gsm8k.score_row(row)
    return safety.score_row(row) if "safety_score" in row else {}


def rewrite(results: Path) -> Path:
    """Metrics, stamps, tables and the comparison of a results folder as its rows now give them; returns the folder."""
    for paths in find_runs(str(results)):
        if paths.manifest("01_prepare").exists():
            _restamp(paths.manifest("01_prepare"))
        for metric, stage in METRIC_STAGES.items():
            _restamp(paths.manifest(stage), SUMMARIZE[metric](read_jsonl(row_file(paths, metric))))
    runs = load_runs(str(results))
    tables.write_summary(str(results), runs)
    metrics, _ = tables.write_final_metrics(str(results), runs)
    if (results / COMPARE_STAGE / COMPARISON).exists():
        write_comparison(str(results), comparison(runs))
        _restamp(results / COMPARE_STAGE / "manifest.json", {row["run_name"]: row for row in read_json(metrics)})
    return results


def _restamp(path: Path, metrics: Row | None = None) -> None:
    manifest = read_json(path)
    for stamps in (manifest["inputs"], manifest["outputs"]):
        stamps |= {name: file_stamp(path.parent / name) for name in stamps if (path.parent / name).is_file()}
    write_json(path, manifest | ({} if metrics is None else {"metrics": metrics}))
