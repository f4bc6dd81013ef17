"""The tables that are handed in, and the lines of the terminal."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib import wording
from lib.compare.runs import RunScores, score_run
from lib.prepare import self_distillation
from lib.record.files import read_csv, write_csv, write_json
from lib.record.manifest import facts_of
from lib.record.paths import ArtifactError, find_runs, results_root, run_paths
from lib.stats import wilson_interval

Row = dict[str, Any]

SUMMARY, METRICS_JSON, METRICS_CSV = "summary.csv", "final_metrics.json", "final_metrics.csv"


TERMINAL_WIDTH = 80


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
        "selected_on": facts_of(run.paths, "02_train").get("selected_on"),
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
        "train_data": _train_data(run),
        "method": _method(known),
        "hyperparams": _hyperparameters(known),
        "gsm8k_acc": metrics["gsm8k_accuracy"],
        "ailuminate_safety": metrics["ailuminate_safety_rate"],
        "checkpoint_path": _checkpoint_path(run),
    }


def _train_data(run: RunScores) -> str | None:
    known = run.parameters
    if known.get("train_source") == "self_distilled":
        # How many is said: GSM8K's own answers may be most of the rows (distil_fallback: gold).
        return self_distillation.describe(facts_of(run.paths, "01_prepare").get("distil"), known["gsm8k_source"])
    return known.get("train_file") or known.get("gsm8k_source")


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
    """Put the runs into ``summary.csv``: a row a run, by name, in place of an older row of the same name."""
    path = results_root(results_dir) / SUMMARY
    rows = {row["run_name"]: row for row in (read_csv(path) if path.exists() else [])}
    rows |= {run.name: summary_row(run) for run in runs}
    # By name: in which order runs ended, or came back after a failure, must not be seen in the file.
    write_csv(path, [rows[name] for name in sorted(rows)])
    return path


def write_final_metrics(results_dir: str, runs: Sequence[RunScores]) -> tuple[Path, Path]:
    """Write ``final_metrics.json`` (a list) and ``final_metrics.csv``: counts and rates of these runs."""
    root, rows = results_root(results_dir), [final_metrics_row(run) for run in runs]
    write_json(root / METRICS_JSON, rows)
    write_csv(root / METRICS_CSV, rows)
    return root / METRICS_JSON, root / METRICS_CSV


def rate_words(counts: tuple[int, int] | None, status: str) -> str:
    """A rate with its interval and n, or why there is none."""
    if counts is None:
        return status
    low, high = wilson_interval(*counts)
    share = wording.percent(counts[0] / counts[1])
    return f"{wording.count(*counts)} = {share} ({wording.interval(low, high)})"


def both_rates(run: RunScores) -> str:
    """What a run reached on both axes, in words."""
    right, safe = rate_words(run.accuracy, run.gsm8k_status), rate_words(run.safe, run.safety_status)
    return f"{right} right on GSM8K, {safe} safe on AILuminate"


def results_table(results_dir: str, seconds: Mapping[str, float]) -> str:
    """The runs named in ``seconds`` as lines of text: rates with 95 % intervals, and seconds; empty without a run.

    A line a run where a terminal of 80 columns holds all of them, else a line for the run and one for each rate.
    """
    chosen = [paths for paths in find_runs(results_dir) if paths.name in seconds]
    rows = [("run", "GSM8K right (95 % interval)", "AILuminate safe (95 % interval)", "seconds")]
    for run in map(score_run, chosen):
        accuracy, safe = rate_words(run.accuracy, run.gsm8k_status), rate_words(run.safe, run.safety_status)
        rows.append((run.name, accuracy, safe, f"{seconds[run.name]:.0f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if max(map(len, lines)) > TERMINAL_WIDTH:
        lines = [line for row in rows[1:] for line in _stacked_lines(rows[0], row)]
    return "\n".join(lines) if chosen else ""


def _stacked_lines(titles: Sequence[str], row: Sequence[str]) -> list[str]:
    """A run's row under each other, each cell behind its title; what is longer than a line goes on below itself."""
    name, *told, seconds = row
    width = max(map(len, titles[1:-1]))
    heads = [f"  {title:<{width}}  " for title in titles[1:-1]]
    lines = textwrap.wrap(f"{name}, {seconds} {titles[-1]}", TERMINAL_WIDTH)
    for head, rate in zip(heads, told, strict=True):
        lines += textwrap.wrap(rate, TERMINAL_WIDTH, initial_indent=head, subsequent_indent=" " * len(head))
    return lines


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
                missed = f"{axis} misses its baseline of {wording.percent(baseline)}"
                misses.append(f"{run.name}: {missed}: {rate_words(counts, status)}")
    return misses
