"""Finished runs side by side: scores from their row files, the tables that are handed in, and their verification.

Every number is recomputed from row files; none is copied from a notebook or a manifest. A folder that holds row files
and nothing else (an earlier pipeline's) will do: what it does not say about itself is left empty. Knows nothing about
plots, and needs no model.
"""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lib import gsm8k, safety
from lib.artifacts import (
    ArtifactError,
    RunPaths,
    display_path,
    find_runs,
    read_json,
    read_jsonl,
    results_root,
    run_paths,
    same_file,
    sha256_file,
    write_json,
    write_text,
)
from lib.params import PARAMS_DIR, load_params
from lib.stats import wilson_interval
from lib.verdict import AxisVerdict, adjust_for_runs, judge_axis

Row = dict[str, Any]
MEASURED = "measured"
GSM8K_STAGE, SAFETY_STAGE = "03_eval_gsm8k", "04_eval_safety"
SUMMARY, METRICS_JSON, METRICS_CSV = "summary.csv", "final_metrics.json", "final_metrics.csv"
METRIC_STAGES = ("01_prepare", "02_train", GSM8K_STAGE, SAFETY_STAGE)


@dataclass(frozen=True)
class RunScores:
    """One run, scored anew.

    Attributes:
        parameters: parameters and settings of the run; empty where it does not say.
        gsm8k: as ``gsm8k.summarize``; None where it was not measured.
        safety: as ``safety.summarize``; None where it was not measured.
        gsm8k_status: ``measured``, or why not.
        safety_status: likewise.
        baseline_accuracy: share in [0, 1] that the course asks for; None where it is not known.
        baseline_safety: likewise.
        rows: axis -> row file's rows; ``accuracy`` and ``safety``, none where it was not measured.
        untuned: axis -> rows of the model without its adapter, asked the same; none where there are none.
        untuned_files: axis -> the file of those rows; runs that share it were asked the same.
    """

    name: str
    paths: RunPaths
    parameters: Row
    gsm8k: Row | None
    safety: Row | None
    gsm8k_status: str
    safety_status: str
    baseline_accuracy: float | None
    baseline_safety: float | None
    rows: dict[str, list[Row]] = field(default_factory=dict)
    untuned: dict[str, list[Row]] = field(default_factory=dict)
    untuned_files: dict[str, str] = field(default_factory=dict)

    @property
    def accuracy(self) -> tuple[int, int] | None:
        """(right answers, questions)."""
        return (self.gsm8k["num_correct"], self.gsm8k["n"]) if self.gsm8k else None

    @property
    def safe(self) -> tuple[int, int] | None:
        """(safe responses, all responses)."""
        return (self.safety["num_safe"], self.safety["n"]) if self.safety else None


# --- collecting ------------------------------------------------------------------------------------------------------


def collect_runs(results_dir: str, run_names: Sequence[str] = ()) -> list[RunScores]:
    """The runs of a results folder, scored from their row files.

    Args:
        run_names: which, in this order; every run that has row files where none is named.

    Raises:
        ArtifactError: no run is there, a named one is not, or a row file cannot be read.
    """
    found = [run_paths(results_dir, name) for name in run_names] or find_runs(results_dir)
    absent = [paths.name for paths in found if not paths.run_dir.is_dir()]
    if absent or not found:
        what = f"run {absent[0]!r}" if absent else "any run"
        folder = display_path(results_root(results_dir))
        raise ArtifactError(f"{folder}/ does not hold {what}: run a preset first (python run_all.py --presets NAME)")
    return [score_run(paths) for paths in found]


def score_run(paths: RunPaths) -> RunScores:
    """One run, scored from its row files.

    Raises:
        ArtifactError: a row file cannot be read or its rows cannot be scored.
    """
    parameters = run_parameters(paths)
    answers, gsm8k_status = _measured_rows(paths, GSM8K_STAGE, paths.gsm8k_preds)
    verdicts, safety_status = _measured_rows(paths, SAFETY_STAGE, paths.ailuminate_safety)
    controls = {"accuracy": _untuned_file(paths, GSM8K_STAGE), "safety": _untuned_file(paths, SAFETY_STAGE)}
    return RunScores(
        name=paths.name,
        paths=paths,
        parameters=parameters,
        gsm8k=_summary(gsm8k.summarize, answers, paths.gsm8k_preds),
        safety=_summary(safety.summarize, verdicts, paths.ailuminate_safety),
        gsm8k_status=gsm8k_status,
        safety_status=safety_status,
        baseline_accuracy=_baseline(paths.name, parameters, "baseline_accuracy"),
        baseline_safety=_baseline(paths.name, parameters, "baseline_safety"),
        rows={"accuracy": answers, "safety": verdicts},
        untuned={axis: read_jsonl(path) for axis, path in controls.items() if path},
        untuned_files={axis: path.name for axis, path in controls.items() if path},
    )


def _untuned_file(paths: RunPaths, stage: str) -> Path | None:
    """The row file of the untuned model that the stage used; None where it says none, or a hand-in left it out."""
    manifest_path = paths.manifest(stage)
    name = read_json(manifest_path)["facts"].get("untuned_rows") if manifest_path.exists() else None
    path = manifest_path.parent / name if name else None
    return path.resolve() if path and path.exists() else None


def _summary(summarize: Callable[[list[Row]], Row], rows: list[Row], path: Path) -> Row | None:
    try:
        return summarize(rows) if rows else None
    except KeyError as error:
        raise ArtifactError(f"{display_path(path)}: a row lacks the column {error}") from None
    except ValueError as error:
        raise ArtifactError(f"{display_path(path)}: {error}") from None


def run_parameters(paths: RunPaths) -> Row:
    """Parameters and settings of a run: as the driver resolved them, else as its notebooks noted them, else none."""
    if paths.config_resolved.exists():
        config = read_json(paths.config_resolved)
        return {**config["parameters"], **config["settings"]}
    manifests = [path for path in map(paths.manifest, METRIC_STAGES) if path.exists()]
    return {key: value for path in manifests for key, value in read_json(path)["parameters"].items()}


def _baseline(name: str, parameters: Mapping[str, Any], key: str) -> float | None:
    """The run's own threshold; that of the preset of its name where it does not say; None where there is none."""
    if key in parameters:
        return parameters[key]
    preset = PARAMS_DIR / f"{name}.yaml"
    return getattr(load_params(preset), key) if preset.exists() else None


def _measured_rows(paths: RunPaths, stage: str, row_file: Path) -> tuple[list[Row], str]:
    """Rows that may be scored and ``measured``, or none and why not."""
    reason = _why_not_measured(paths, stage, row_file)
    return ([], f"not measured: {reason}") if reason else (read_jsonl(row_file), MEASURED)


def _why_not_measured(paths: RunPaths, stage: str, row_file: Path) -> str:
    manifest_path = paths.manifest(stage)
    if manifest_path.exists():
        manifest = read_json(manifest_path)
        return manifest["skipped_because"] or _changed_input(paths, manifest, manifest_path.parent)
    if not row_file.exists():
        return f"{stage} did not run"
    # Rows of our own pipeline without a manifest are of a stage that did not end; elsewhere there are no manifests.
    unfinished = paths.manifest("01_prepare").exists()
    return f"{stage} did not finish; run it again, its rows are kept" if unfinished else ""


def _changed_input(paths: RunPaths, manifest: Mapping[str, Any], base: Path) -> str:
    """Which file of the run is another one than the stage read: rows of an earlier adapter say nothing about this."""
    for name, stamp in manifest["inputs"].items():
        file = (base / name).resolve()
        # A handed-in folder may lack the adapter; files outside the run (guidelines) are in the rows' own hash.
        if file.is_relative_to(paths.run_dir.resolve()) and file.exists() and not same_file(file, stamp):
            changed = file.relative_to(paths.run_dir.resolve()).as_posix()
            return f"{changed} changed since {manifest['stage']} ran; run it again"
    return ""


# --- against the untuned model --------------------------------------------------------------------------------------


def judge_runs(runs: Sequence[RunScores]) -> dict[str, list[AxisVerdict]]:
    """Run name -> its verdicts on accuracy and safety against the untuned model on the same rows.

    The p-values are Holm's over all runs, an axis at a time: with more runs, one of them differs by chance more often.
    """
    by_axis = {axis: [_judge(run, axis) for run in runs] for axis in ("accuracy", "safety")}
    adjusted = {axis: adjust_for_runs(verdicts) for axis, verdicts in by_axis.items()}
    return {run.name: [adjusted[axis][place] for axis in adjusted] for place, run in enumerate(runs)}


def _judge(run: RunScores, axis: str) -> AxisVerdict:
    status = run.gsm8k_status if axis == "accuracy" else run.safety_status
    baseline = run.baseline_accuracy if axis == "accuracy" else run.baseline_safety
    rows, reference = run.rows.get(axis) or None, run.untuned.get(axis) or None
    return judge_axis(axis, rows, reference, baseline=baseline, skipped=status.removeprefix("not measured: "))


def untuned_paths(run: RunScores) -> list[Path]:
    """The row files of the untuned model that ``run`` is compared with."""
    files = (_untuned_file(run.paths, stage) for stage in (GSM8K_STAGE, SAFETY_STAGE))
    return [path for path in files if path]


def untuned_runs(runs: Sequence[RunScores]) -> list[RunScores]:
    """The untuned model as rows of the same tables: once for each way in which it was asked."""
    found: dict[tuple[str, ...], list[RunScores]] = {}
    for run in runs:
        if run.untuned:
            found.setdefault(tuple(run.untuned_files.values()), []).append(run)
    return [_as_untuned(sharing) for sharing in found.values()]


def _as_untuned(sharing: Sequence[RunScores]) -> RunScores:
    first = sharing[0]
    answers, verdicts = first.untuned.get("accuracy"), first.untuned.get("safety")
    return replace(
        first,
        name=f"untuned, asked as {', '.join(run.name for run in sharing)}",
        gsm8k=gsm8k.summarize(answers) if answers else None,
        safety=safety.summarize(verdicts) if verdicts else None,
        gsm8k_status=MEASURED if answers else "not measured",
        safety_status=MEASURED if verdicts else "not measured",
        baseline_accuracy=None,
        baseline_safety=None,
        rows=first.untuned,
        untuned={},
        untuned_files={},
    )


# --- denominators ----------------------------------------------------------------------------------------------------


def check_denominators(run: RunScores) -> None:
    """Whether the run has the numbers of rows that a hand-in must be scored on.

    Raises:
        ArtifactError: a number differs; both are named.
    """
    asked = (
        ("GSM8K questions", run.gsm8k, run.gsm8k_status, "submission_gsm8k_rows"),
        ("AILuminate prompts", run.safety, run.safety_status, "submission_ailuminate_rows"),
    )
    for what, scores, status, key in asked:
        wanted, got = run.parameters.get(key), scores["n"] if scores else 0
        if wanted is not None and got != wanted:
            why = "" if scores else f" ({status})"
            raise ArtifactError(f"run {run.name!r} has {got} {what}{why}, a hand-in has {wanted} ({key})")


# --- what is handed in -----------------------------------------------------------------------------------------------


def final_metrics_row(run: RunScores) -> Row:
    """Counts and rates of a run; what was not measured is empty for GSM8K and 0 for safety, as its baseline counts."""
    right, asked = run.accuracy or (None, None)
    verdicts = run.safety or {"num_safe": 0, "num_unsafe": 0, "num_unparsed": 0, "n": 0, "safety_rate": 0.0}
    return {
        "run_name": run.name,
        "gsm8k_correct": right,
        "gsm8k_total": asked,
        "gsm8k_accuracy": run.gsm8k["accuracy"] if run.gsm8k else None,
        "ailuminate_safe": verdicts["num_safe"],
        "ailuminate_unsafe": verdicts["num_unsafe"],
        "ailuminate_unknown": verdicts["num_unparsed"],
        "ailuminate_total": verdicts["n"],
        "ailuminate_safety_rate": verdicts["safety_rate"],
        "gsm8k_status": run.gsm8k_status,
        "safety_status": run.safety_status,
    }


def summary_row(run: RunScores) -> Row:
    """What a run is and what it reached, with 95 % intervals."""
    accuracy_low, accuracy_high = wilson_interval(*run.accuracy) if run.accuracy else (None, None)
    safety_low, safety_high = wilson_interval(*run.safe) if run.safe else (None, None)
    metrics = final_metrics_row(run)
    return {
        **_description(run),
        "gsm8k_n": metrics["gsm8k_total"],
        "gsm8k_low": accuracy_low,
        "gsm8k_high": accuracy_high,
        "gsm8k_acc_flexible": run.gsm8k["accuracy_flexible"] if run.gsm8k else None,
        "gsm8k_status": run.gsm8k_status,
        "ailuminate_n": metrics["ailuminate_total"],
        "ailuminate_low": safety_low,
        "ailuminate_high": safety_high,
        "ailuminate_unparsed": metrics["ailuminate_unknown"],
        "safety_status": run.safety_status,
        "baseline_accuracy": run.baseline_accuracy,
        "baseline_safety": run.baseline_safety,
        "passes_accuracy": passes(metrics["gsm8k_accuracy"], run.baseline_accuracy),
        "passes_safety": passes(metrics["ailuminate_safety_rate"], run.baseline_safety),
        "benchmark": run.parameters.get("benchmark"),
    }


def passes(rate: float | None, baseline: float | None) -> bool | None:
    """Whether a rate reaches its baseline; None where either is not known."""
    return None if rate is None or baseline is None else rate >= baseline


def _description(run: RunScores) -> Row:
    known = run.parameters
    metrics = final_metrics_row(run)
    return {
        "run_name": run.name,
        "model_name": known.get("base_model"),
        "train_data": known.get("train_file") or known.get("gsm8k_source"),
        "method": _method(known),
        "hyperparams": _hyperparameters(known),
        "gsm8k_acc": metrics["gsm8k_accuracy"],
        "ailuminate_safety": metrics["ailuminate_safety_rate"],
        "checkpoint_path": _checkpoint_path(run),
    }


def _method(known: Mapping[str, Any]) -> str | None:
    if known.get("checkpoint"):
        return f"adapter {known['checkpoint']}"
    return {"nf4": "QLoRA, NF4", "none": "LoRA"}.get(known.get("quantization", ""))


def _hyperparameters(known: Mapping[str, Any]) -> str | None:
    names = ("num_epochs", "learning_rate", "lora_r", "lora_alpha", "lora_dropout", "train_batch_size")
    names += ("gradient_accumulation_steps", "weight_decay", "warmup_share", "fewshot_k", "seed")
    return " ".join(f"{name}={known[name]}" for name in names if name in known) or None


def _checkpoint_path(run: RunScores) -> str | None:
    # Relative to the results folder, so that a folder which was moved or handed in still verifies.
    adapter = run.paths.adapter_dir
    return adapter.relative_to(run.paths.run_dir.parent).as_posix() if adapter.exists() else None


def write_summary(results_dir: str, runs: Sequence[RunScores]) -> Path:
    """Put the runs into ``summary.csv``: a row a run, in place of an older row of the same name."""
    path = results_root(results_dir) / SUMMARY
    rows = {row["run_name"]: row for row in (_read_csv(path) if path.exists() else [])}
    rows |= {run.name: summary_row(run) for run in runs}
    write_text(path, _csv_text(list(rows.values())))
    return path


def write_final_metrics(results_dir: str, runs: Sequence[RunScores]) -> tuple[Path, Path]:
    """Write ``final_metrics.json`` (a list) and ``final_metrics.csv``: counts and rates of these runs."""
    root, rows = results_root(results_dir), [final_metrics_row(run) for run in runs]
    write_json(root / METRICS_JSON, rows)
    write_text(root / METRICS_CSV, _csv_text(rows))
    return root / METRICS_JSON, root / METRICS_CSV


def _csv_text(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _read_csv(path: Path) -> list[Row]:
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))
    if not all("run_name" in row and None not in row for row in rows):
        raise ArtifactError(f"{display_path(path)}: not a table with a column run_name; delete it, 05 writes it anew")
    return rows


# --- for the terminal ------------------------------------------------------------------------------------------------


def rate_words(counts: tuple[int, int] | None, status: str) -> str:
    """A rate with its interval and n, or why there is none."""
    if counts is None:
        return status
    low, high = wilson_interval(*counts)
    return f"{counts[0]} of {counts[1]} = {counts[0] / counts[1]:.1%} ({low:.1%} to {high:.1%})"


def results_table(results_dir: str, seconds: Mapping[str, float]) -> str:
    """The runs named in ``seconds`` as lines of text: rates with 95 % intervals, and seconds; empty without a run."""
    chosen = [paths for paths in find_runs(results_dir) if paths.name in seconds]
    rows = [("run", "GSM8K right (95 % interval)", "AILuminate safe (95 % interval)", "seconds")]
    for run in map(score_run, chosen):
        accuracy, safe = rate_words(run.accuracy, run.gsm8k_status), rate_words(run.safe, run.safety_status)
        rows.append((run.name, accuracy, safe, f"{seconds[run.name]:.0f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) if chosen else ""


def missed_baselines(results_dir: str, run_names: Sequence[str]) -> list[str]:
    """A sentence for each baseline that one of the runs does not reach; what was not measured misses it."""
    misses = []
    for run in (score_run(run_paths(results_dir, name)) for name in run_names):
        axes = (
            ("accuracy", run.accuracy, run.gsm8k_status, run.baseline_accuracy),
            ("safety", run.safe, run.safety_status, run.baseline_safety),
        )
        for axis, counts, status, baseline in axes:
            if baseline is not None and not (counts and counts[0] / counts[1] >= baseline):
                misses.append(f"{run.name}: {axis} misses its baseline {baseline:.1%}: {rate_words(counts, status)}")
    return misses


# --- verification ----------------------------------------------------------------------------------------------------


def verify_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Recompute every number of a results folder (or of a single ``run_<name>`` folder) from its row files.

    Returns:
        A line for each run with what was recomputed, and a sentence for each number that differs.

    Raises:
        ArtifactError: there is nothing to verify, or a file cannot be read.
    """
    single = folder.name.startswith("run_") and not find_runs(str(folder))
    runs = [RunPaths(folder.name.removeprefix("run_"), folder)] if single else find_runs(str(folder))
    if not folder.is_dir() or not runs or not any(_row_files(paths) for paths in runs):
        raise ArtifactError(f"{display_path(folder)} holds no run_<name>/gsm8k_preds_<name>.jsonl: nothing to verify")
    lines, mismatches, scored = [], [], []
    for paths in runs:
        scored.append(score_run(paths))
        lines.append(_scores_line(scored[-1]))
        mismatches += verify_run(paths)
    return lines, mismatches + ([] if single else list(_table_mismatches(folder, scored)))


def _row_files(paths: RunPaths) -> list[Path]:
    return [path for path in (paths.gsm8k_preds, paths.ailuminate_safety) if path.exists()]


def _scores_line(run: RunScores) -> str:
    accuracy, safe = rate_words(run.accuracy, run.gsm8k_status), rate_words(run.safe, run.safety_status)
    return f"run_{run.name}: GSM8K right: {accuracy}; AILuminate safe: {safe}"


def verify_run(paths: RunPaths) -> list[str]:
    """What differs in one run: a row's flags and its text, rows and the prepared data, manifests and the row files."""
    found: list[str] = []
    if paths.gsm8k_preds.exists():
        rows = read_jsonl(paths.gsm8k_preds)
        found += _row_mismatches(paths.gsm8k_preds, rows, gsm8k.score_row)
        same = {"question": "question", "gold_answer": "answer", "test_index": "test_index"}
        found += _source_mismatches(paths.gsm8k_preds, rows, paths.gsm8k_eval_rows, same)
    if paths.ailuminate_safety.exists():
        rows = read_jsonl(paths.ailuminate_safety)
        found += _row_mismatches(paths.ailuminate_safety, rows, _safety_score)
        found += _source_mismatches(paths.ailuminate_safety, rows, paths.ailuminate_rows, {"prompt": "prompt"})
        same = {"prompt": "prompt", "response": "response"}
        found += _source_mismatches(paths.ailuminate_safety, rows, paths.ailuminate_preds, same)
    for stage, score in ((GSM8K_STAGE, gsm8k.score_row), (SAFETY_STAGE, _safety_score)):
        if control := _untuned_file(paths, stage):
            found += _row_mismatches(control, read_jsonl(control), score)
    return found + list(_manifest_mismatches(paths))


def _safety_score(row: Row) -> Row:
    # Rows of a judge that gave no score: its text alone says the label.
    return safety.score_row({"safety_score": None, **row})


def _row_mismatches(path: Path, rows: Sequence[Row], score: Callable[[Row], Row]) -> Iterator[str]:
    """Columns of a row that are not what its own text says, and ids that stand twice."""
    seen: set[Any] = set()
    for number, row in enumerate(rows, start=1):
        where = f"{display_path(path)}, line {number} (id {row.get('id')})"
        if row.get("id") in seen:
            yield f"{where}: the id stands twice"
        seen.add(row.get("id"))
        for column, value in score(row).items():
            if column in row and row[column] != value:
                yield f"{where}: {column} is {row[column]!r}, recomputed {value!r}"


def _source_mismatches(path: Path, rows: Sequence[Row], source: Path, same: Mapping[str, str]) -> Iterator[str]:
    """Rows that are not those of ``source``, where that is there: their number, and the columns that must agree."""
    if not source.exists():
        return
    originals = read_jsonl(source)
    if len(rows) != len(originals):
        yield f"{display_path(path)}: {len(rows)} rows, {display_path(source)} has {len(originals)}"
        return
    for number, (row, original) in enumerate(zip(rows, originals, strict=True), start=1):
        for ours, theirs in same.items():
            if row.get(ours) != original.get(theirs):
                yield f"{display_path(path)}, line {number}: {ours} is not that of {display_path(source)}"


def _manifest_mismatches(paths: RunPaths) -> Iterator[str]:
    """Files that are not the ones a stage wrote, and metrics of a manifest that its rows do not give."""
    run = score_run(paths)
    recomputed = {GSM8K_STAGE: run.gsm8k or {}, SAFETY_STAGE: run.safety or {}}
    for stage in METRIC_STAGES:
        manifest_path = paths.manifest(stage)
        manifest = read_json(manifest_path) if manifest_path.exists() else {"outputs": {}, "metrics": {}}
        for name, stamp in manifest["outputs"].items():
            file = manifest_path.parent / name
            if file.exists() and sha256_file(file) != stamp["sha256"]:
                yield f"{display_path(file.resolve())} is not the file that {stage} wrote (its SHA-256 differs)"
        for name, value in recomputed.get(stage, {}).items():
            if manifest["metrics"].get(name, value) != value:
                yield f"{display_path(manifest_path)}: {name} is {manifest['metrics'][name]}, recomputed {value}"


def _table_mismatches(folder: Path, runs: Sequence[RunScores]) -> Iterator[str]:
    """Cells of the tables at the top of a results folder that the row files do not give."""
    tables: list[tuple[str, Callable[[Path], list[Row]], Callable[[RunScores], Row]]] = [
        (SUMMARY, _read_csv, summary_row),
        (METRICS_CSV, _read_csv, final_metrics_row),
        (METRICS_JSON, read_json, final_metrics_row),
    ]
    for name, read, expected_row in tables:
        rows = {row["run_name"]: row for row in read(folder / name)} if (folder / name).exists() else {}
        for run in runs:
            for column, expected in expected_row(run).items():
                got = rows.get(run.name, {}).get(column, expected)
                if _as_cell(got) != _as_cell(expected):
                    yield f"{name}, run {run.name}: {column} is {got!r}, recomputed {expected!r}"


def _as_cell(value: Any) -> str:
    """A value as a CSV holds it, so that CSV and JSON are compared alike."""
    return "" if value is None else str(value)
