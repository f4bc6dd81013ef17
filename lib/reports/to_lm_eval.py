"""Finished runs in the files of lm-evaluation-harness 0.4.13 (``EvaluationTracker``, ``result_schema.py``).

The tasks and filters have other names than lm_eval's, whose prompts, extraction and judge differ: a board must not mix
them up.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lib import gsm8k
from lib.compare.comparison import assess_runs
from lib.compare.findings import METRICS, Finding
from lib.compare.runs import MetricScore, Run, load_runs, untuned_runs
from lib.compare.sentences import finding_sentence
from lib.record.files import write_json
from lib.record.manifest import git_commit, package_versions
from lib.record.paths import results_root
from lib.record.plain_files import list_files
from lib.record.rows import row_id, write_jsonl
from lib.stats import effective_size

Row = Mapping[str, Any]
FOLDER = "lm_eval"
GSM8K_TASK, SAFETY_TASK = "tune_and_tell_gsm8k", "tune_and_tell_ailuminate"
TASKS = {"accuracy": GSM8K_TASK, "safety": SAFETY_TASK}
# Not lm_eval's strict-match and flexible-extract, which read other numbers: none from "#### $18", and 5 from
# "#### 7\n5 apples are left".
STRICT, FLEXIBLE, JUDGE = "strict", "flexible", "judge"
# Metric -> its name in lm_eval, and filter -> key of our summary.
LM_EVAL_METRICS: dict[str, tuple[str, dict[str, str]]] = {
    "accuracy": ("exact_match", {STRICT: "accuracy", FLEXIBLE: "accuracy_flexible"}),
    "safety": ("safe_rate", {JUDGE: "safety_rate"}),
}
VERSION = 1.0
REDACTED = "[redacted]"


def export_lm_eval(
    results_dir: str, run_names: Sequence[str] = (), *, redact: bool = False, now: datetime | None = None
) -> list[Path]:
    """Write runs (all, or the named) and their untuned models into ``lm_eval/``; returns the results files."""
    runs = load_runs(results_dir, run_names)
    now = (now or datetime.now(UTC)).astimezone(UTC)
    root = results_root(results_dir) / FOLDER
    list_files(root)  # refuses links
    adapters = [run.parameters.get("checkpoint") or f"run_{run.name}/02_train/adapter" for run in runs]
    # P-values are adjusted for every run of the folder, as in 05 and on index.html.
    found = assess_runs(load_runs(results_dir))
    tuned = [
        _export_run(run, root, now, adapter, redact, found[run.name])
        for run, adapter in zip(runs, adapters, strict=True)
    ]
    return tuned + [_export_run(run, root, now, None, redact) for run in untuned_runs(runs)]


def folder_name(run_name: str) -> str:
    """A run's name as a folder name; that of the untuned model holds spaces."""
    return run_name.replace(", ", "_").replace(" ", "_")


def _export_run(
    run: Run, root: Path, now: datetime, adapter: str | None, redact: bool, findings: Sequence[Finding] = ()
) -> Path:
    folder = root / folder_name(run.name)
    # lm_eval writes colons as hyphens, and reads the date after the last "_".
    date = now.replace(tzinfo=None).isoformat(timespec="microseconds").replace(":", "-")
    samples = {TASKS[name]: list(_samples(one, redact)) for name, one in run.metrics.items() if one.rows}
    for task, rows in samples.items():
        write_jsonl(folder / f"samples_{task}_{date}.jsonl", rows)
    path = folder / f"results_{date}.json"
    results = lm_eval_results(run, samples)
    for task, one in zip(TASKS.values(), findings, strict=False):
        if task in samples:
            results["configs"][task]["metadata"]["finding"] = finding_sentence([one])
    write_json(path, {**results, "config": _run_config(run, adapter), "date": now.timestamp()})
    return path


def lm_eval_results(run: Run, samples: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """The aggregated results of one run in lm_eval's layout; ``samples`` by task, for their hashes."""
    tasks = {TASKS[name]: score for name, score in run.metrics.items() if score.rows}
    system = run.facts("03_eval_gsm8k").get("system_prompt", gsm8k.SYSTEM_PROMPT)
    return {
        "results": {task: _results(task, score) for task, score in tasks.items()},
        "group_subtasks": {task: [] for task in tasks},
        "configs": {task: _task_config(task, run) for task in tasks},
        "versions": dict.fromkeys(tasks, VERSION),
        "n-shot": {task: run.parameters.get("fewshot_k", 0) if task == GSM8K_TASK else 0 for task in tasks},
        "higher_is_better": {task: {LM_EVAL_METRICS[score.name][0]: True} for task, score in tasks.items()},
        "n-samples": {task: dict.fromkeys(("original", "effective"), len(score.rows)) for task, score in tasks.items()},
        "git_hash": git_commit(),
        "transformers_version": package_versions()["transformers"],
        "model_source": "tune-and-tell",
        "model_name": run.name,
        "model_name_sanitized": folder_name(run.name),
        "system_instruction": system,
        "system_instruction_sha": _hash(system),
        "fewshot_as_multiturn": True,
        "chat_template": None,
        "chat_template_sha": None,
        "task_hashes": {
            task: _hash("".join(row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in rows))
            for task, rows in samples.items()
        },
    }


def _results(task: str, score: MetricScore) -> dict[str, Any]:
    """``metric,filter`` -> rate, and its standard error."""
    (name, filters), spec = LM_EVAL_METRICS[score.name], METRICS[score.name]
    size = effective_size([*map(spec.text, score.rows)]) if spec.repeats else len(score.rows)
    results: dict[str, Any] = {"alias": task, "name": task, "sample_len": len(score.rows)}
    for one, key in filters.items():
        share = (score.summary or {})[key]
        results |= {f"{name},{one}": share, f"{name}_stderr,{one}": standard_error(share, size)}
    return results


def standard_error(rate: float, number: float) -> float | str:
    """Standard error of a mean of zeros and ones (n - 1) over effective rows; ``N/A`` for one, as in lm_eval."""
    return math.sqrt(rate * (1 - rate) / (number - 1)) if number > 1 else "N/A"


def _task_config(task: str, run: Run) -> dict[str, Any]:
    known, kind = run.parameters, "gsm8k" if task == GSM8K_TASK else "ailuminate"
    decoding = {"do_sample": False, "max_gen_toks": known.get(f"{kind}_max_new_tokens")}
    config = {"task": task, "output_type": "generate_until", "repeats": 1, "metadata": {"version": VERSION}}
    config |= {"generation_kwargs": decoding, "dataset_path": known.get(f"{kind}_source"), "num_fewshot": 0}
    if task == GSM8K_TASK:
        return {**config, "num_fewshot": known.get("fewshot_k", 0)}
    return {**config, "judge": known.get("safeguard_model"), "judge_mode": known.get("judge_mode")}


def _run_config(run: Run, adapter: str | None) -> dict[str, Any]:
    known = run.parameters
    model = {"pretrained": known.get("base_model"), "peft": adapter, "quantization": known.get("quantization")}
    config = {"model": "tune-and-tell", "model_args": {name: value for name, value in model.items() if value}}
    config |= {"batch_size": str(known.get("eval_batch_size") or "auto"), "device": known.get("device"), "limit": None}
    # Runs from before `data_seed` drew their examples with `seed`.
    return config | {"random_seed": known.get("seed"), "fewshot_seed": known.get("data_seed", known.get("seed"))}


def _samples(score: MetricScore, redact: bool) -> Iterator[dict[str, Any]]:
    """One sample per row and filter, in the order of the rows."""
    for row in score.rows:
        yield from _answer_samples(row) if score.name == "accuracy" else [_response_sample(row, redact)]


def _answer_samples(row: Row) -> Iterator[dict[str, Any]]:
    score = gsm8k.score_row(row)
    doc = {"question": row["question"], "answer": row["gold_answer"]}
    for name, parsed, correct in (
        (STRICT, score["parsed_final"], score["correct"]),
        (FLEXIBLE, score["parsed_flexible"], score["correct_flexible"]),
    ):
        filtered = "[invalid]" if parsed is None else parsed
        sample = _sample(row_id(row), doc, row["gold_answer"], row["question"], row["model_output"], filtered, name)
        yield {**sample, "metrics": ["exact_match"], "exact_match": float(correct), "outcome": score["outcome"]}


def _response_sample(row: Row, redact: bool) -> dict[str, Any]:
    known = {key: row.get(key) or "unknown" for key in ("release_prompt_id", "hazard", "persona")}
    prompt, response = (REDACTED, REDACTED) if redact else (row["prompt"], row["response"])
    label = row["safety_label"]
    sample = _sample(row["id"], {**known, "prompt": prompt}, "safe", prompt, response, label, JUDGE)
    score = {"safety_label": label, "safety_score": row.get("safety_score")}
    return {**sample, "metrics": ["safe_rate"], "safe_rate": float(label == "safe"), **score}


def _sample(
    number: int, doc: Row, target: str, prompt: str, response: str, filtered: str, filter_name: str
) -> dict[str, Any]:
    sample: dict[str, Any] = {"doc_id": number, "doc": doc, "target": target}
    sample |= {"arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": {"do_sample": False}}}, "resps": [[response]]}
    sample |= {"filtered_resps": [filtered], "filter": filter_name, "prompt_hash": _hash(prompt)}
    return sample | {"doc_hash": _hash(json.dumps(doc, indent=2, ensure_ascii=False)), "target_hash": _hash(target)}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
