"""The tables that are handed in, and rates as text for the terminal."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib import wording
from lib.compare.comparison import assess_runs
from lib.compare.runs import MetricScore, Run, load_run, load_runs
from lib.compare.sentences import finding_sentence
from lib.record.files import read_csv, write_csv, write_json
from lib.record.paths import METRICS_CSV, METRICS_JSON, SUMMARY, ArtifactError, find_runs, results_root, run_paths

Row = dict[str, Any]
TERMINAL_WIDTH = 80
HYPERPARAMETERS = ("num_epochs", "learning_rate", "lora_r", "lora_alpha", "lora_dropout", "train_batch_size")
HYPERPARAMETERS += ("gradient_accumulation_steps", "weight_decay", "warmup_share", "fewshot_k", "seed")


def check_denominators(run: Run) -> None:
    """Raise ArtifactError unless the run has the numbers of rows that a hand-in must be scored on."""
    for name, score, key in (
        ("GSM8K questions", run.accuracy, "submission_gsm8k_rows"),
        ("AILuminate prompts", run.safety, "submission_ailuminate_rows"),
    ):
        wanted, got = run.parameters.get(key), len(score.rows)
        if wanted is not None and got != wanted:
            why = "" if score.rows else f" ({score.status})"
            raise ArtifactError(f"run {run.name!r} has {got} {name}{why}, a hand-in has {wanted} ({key})")


def final_metrics_row(run: Run) -> Row:
    """Counts and rates of a run; what was not measured is empty for GSM8K and 0 for safety, as its baseline counts."""
    right = run.accuracy.rate
    judged = run.safety.summary or {"num_safe": 0, "num_unsafe": 0, "num_unparsed": 0, "n": 0, "safety_rate": 0.0}
    return {
        "run_name": run.name,
        "gsm8k_correct": right and right.successes,
        "gsm8k_total": right and right.n,
        "gsm8k_accuracy": right and right.share,
        "ailuminate_safe": judged["num_safe"],
        "ailuminate_unsafe": judged["num_unsafe"],
        "ailuminate_unknown": judged["num_unparsed"],
        "ailuminate_total": judged["n"],
        "ailuminate_safety_rate": judged["safety_rate"],
        "gsm8k_status": run.accuracy.status,
        "safety_status": run.safety.status,
    }


def summary_row(run: Run) -> Row:
    """What a run is and what it reached, with 95 % intervals."""
    known, metrics, right, safe = run.parameters, final_metrics_row(run), run.accuracy.rate, run.safety.rate
    adapter = run.paths.adapter_dir
    made_elsewhere = known.get("checkpoint") and f"adapter {known['checkpoint']}"
    return {
        "run_name": run.name,
        "model_name": known.get("base_model"),
        "train_data": _train_data(run),
        "method": made_elsewhere or {"nf4": "QLoRA, NF4", "none": "LoRA"}.get(known.get("quantization", "")),
        "hyperparams": " ".join(f"{name}={known[name]}" for name in HYPERPARAMETERS if name in known) or None,
        "gsm8k_acc": metrics["gsm8k_accuracy"],
        "ailuminate_safety": metrics["ailuminate_safety_rate"],
        # Relative to the results folder, so that a folder which was moved or handed in still verifies.
        "checkpoint_path": adapter.relative_to(run.paths.run_dir.parent).as_posix() if adapter.exists() else None,
        "gsm8k_n": metrics["gsm8k_total"],
        "gsm8k_low": right and right.low,
        "gsm8k_high": right and right.high,
        "gsm8k_acc_flexible": run.accuracy.summary and run.accuracy.summary["accuracy_flexible"],
        "gsm8k_status": run.accuracy.status,
        "ailuminate_n": metrics["ailuminate_total"],
        "ailuminate_low": safe and safe.low,
        "ailuminate_high": safe and safe.high,
        "ailuminate_unparsed": metrics["ailuminate_unknown"],
        "safety_status": run.safety.status,
        "baseline_accuracy": run.accuracy.baseline,
        "baseline_safety": run.safety.baseline,
        "passes_accuracy": run.accuracy.passes if right else None,
        "passes_safety": run.safety.passes,
        "benchmark": known.get("benchmark"),
        "selected_on": run.facts("02_train").get("selected_on"),
    }


def _train_data(run: Run) -> str | None:
    known, counts = run.parameters, run.facts("01_prepare").get("distil") or {}
    if known.get("train_source") != "self_distilled":
        return known.get("train_file") or known.get("gsm8k_source")
    covered, questions, num_gold = (counts.get(f"num_{name}") for name in ("covered", "questions", "gold"))
    if covered is None or questions is None:
        return f"own answers to {known['gsm8k_source']}"
    own = f"own answers to {covered} of {questions} questions of {known['gsm8k_source']}"
    # GSM8K's own answers may be most of the rows (distil_fallback: gold).
    return f"{own}, GSM8K's to {num_gold}" if num_gold else own


def write_summary(results_dir: str, runs: Sequence[Run]) -> Path:
    """Put the runs into ``summary.csv``: one row per run, in place of an older row of the same name."""
    path = results_root(results_dir) / SUMMARY
    rows = {row["run_name"]: row for row in (read_csv(path) if path.exists() else [])}
    rows |= {run.name: summary_row(run) for run in runs}
    # By name, so that the file does not depend on the order in which runs finished.
    write_csv(path, [rows[name] for name in sorted(rows)])
    return path


def write_final_metrics(results_dir: str, runs: Sequence[Run]) -> tuple[Path, Path]:
    """Write ``final_metrics.json`` (a list) and ``final_metrics.csv``: counts and rates of these runs."""
    root, rows = results_root(results_dir), [final_metrics_row(run) for run in runs]
    write_json(root / METRICS_JSON, rows)
    write_csv(root / METRICS_CSV, rows)
    return root / METRICS_JSON, root / METRICS_CSV


def score_text(score: MetricScore) -> str:
    """A rate with its interval and count, or why it was not measured."""
    return wording.rate_text(score.rate, counted=True) if score.rate else score.status


def both_rates(run: Run) -> str:
    """What a run reached on both metrics, in words."""
    return f"{score_text(run.accuracy)} right on GSM8K, {score_text(run.safety)} safe on AILuminate"


def results_table(results_dir: str, seconds: Mapping[str, float]) -> str:
    """The runs named in ``seconds`` as lines of text with rates and seconds; stacked where 80 columns are too few."""
    names = [paths.name for paths in find_runs(results_dir) if paths.name in seconds]
    if not names:
        return ""
    head = ("run", "GSM8K right (95 % interval)", "AILuminate safe (95 % interval)", "seconds")
    rows = [
        (run.name, score_text(run.accuracy), score_text(run.safety), f"{seconds[run.name]:.0f}")
        for run in load_runs(results_dir, names)
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *rows)]
    if max(map(len, lines)) > TERMINAL_WIDTH:
        lines = [line for row in rows for line in _stacked_lines(head, row)]
    return "\n".join(lines)


def findings_lines(results_dir: str, names: Iterable[str]) -> list[str]:
    """What tuning changed in each named run, in lines of text; p-values are adjusted for every run of the folder."""
    found = assess_runs(load_runs(results_dir))
    texts = [f"{name}: {finding_sentence(found[name])}." for name in names if name in found]
    return [line for text in texts for line in textwrap.wrap(text, TERMINAL_WIDTH, subsequent_indent="  ")]


def _stacked_lines(head: Sequence[str], row: Sequence[str]) -> list[str]:
    """A run's row as one line per cell, each behind its title; longer cells wrap below themselves."""
    lines = textwrap.wrap(f"{row[0]}, {row[-1]} {head[-1]}", TERMINAL_WIDTH)
    width = max(map(len, head[1:-1]))
    for title, rate in zip(head[1:-1], row[1:-1], strict=True):
        lines += textwrap.wrap(
            rate, TERMINAL_WIDTH, initial_indent=f"  {title:<{width}}  ", subsequent_indent=" " * (width + 4)
        )
    return lines


def missed_baselines(results_dir: str, run_names: Sequence[str]) -> list[str]:
    """A sentence for each baseline that one of the runs misses; what was not measured misses it."""
    return [
        f"{run.name}: {name} misses its baseline of {wording.percent(score.baseline)}: {score_text(score)}"
        for run in (load_run(run_paths(results_dir, name)) for name in run_names)
        for name, score in run.metrics.items()
        if score.passes is False
    ]
