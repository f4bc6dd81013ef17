"""A results folder of made-up runs: row files as the pipeline leaves them, and the untuned model's beside them.

What "models" write here is words drawn by a seed; half of the rows are of nobody's knowledge. For tests and for timing
of what reads row files; nothing in it was ever answered by a model.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib import gsm8k, safety
from lib.record.files import write_json
from lib.record.manifest import start_stage
from lib.record.paths import RunPaths, run_paths
from lib.record.rows import write_jsonl

WORDS = ("apples", "boxes", "each", "costs", "dollars", "gives", "half", "hours", "left", "many", "price", "sells")
ENDS = ("\n#### {gold}", "\n#### {wrong}", "\nThe answer is {gold}.", "\n#### {wrong}\nQuestion: what next?", "")
HAZARDS = ("vcr", "ncr", "sxc_prn", "hte", "prv", "spc_hlt")
PARAMETERS = {"description": "made up", "benchmark": False, "base_model": "made/up", "quantization": "nf4"}
PARAMETERS |= {"gsm8k_source": "made up", "train_file": "", "lora_r": 8, "fewshot_k": 3}
PARAMETERS |= {"baseline_accuracy": 0.3, "baseline_safety": 0.5}


def make_results(
    folder: Path, names: Sequence[str] = ("simple", "strong"), *, questions: int = 30, prompts: int = 20, words: int = 8
) -> Path:
    """Runs ``names`` and the untuned model, all asked the same; ``words`` is the length of a question."""
    for number, name in enumerate(names, start=1):
        paths = run_paths(str(folder), name)
        write_json(paths.config_resolved, {"preset": name, "parameters": PARAMETERS, "settings": {"checkpoint": ""}})
        answers = answer_rows(questions, words, model=number)
        _stage(
            paths, "03_eval_gsm8k", paths.gsm8k_preds, answers, "gsm8k_preds", answer_rows(questions, words, model=0)
        )
        verdicts = verdict_rows(prompts, words, model=number)
        untuned = verdict_rows(prompts, words, model=0)
        _stage(paths, "04_eval_safety", paths.ailuminate_safety, verdicts, "ailuminate_safety", untuned)
    return folder


def _stage(paths: RunPaths, stage: str, rows_file: Path, rows: list, kind: str, untuned: list) -> None:
    control = paths.untuned_rows(kind, "0123456789abcdef")
    write_jsonl(rows_file, rows)
    write_jsonl(control, untuned)
    record = start_stage(paths.manifest(stage), stage, paths.name, {})
    facts = {"untuned_rows": record.relative(control)}
    record.finish(inputs=[], outputs=[rows_file], facts=facts)


def answer_rows(number: int, words: int, *, model: int) -> list[dict[str, Any]]:
    """Answers of ``model`` to questions that depend on their number alone."""
    rows = []
    for index in range(number):
        asked, answered = random.Random(index), random.Random(1000 * model + index)
        gold = asked.randint(2, 900)
        end = ENDS[min(answered.randrange(8), 4) if model else answered.randrange(5)]
        text = _sentence(answered, 2 * words) + end.format(gold=gold, wrong=gold + 1)
        row = {
            "id": index,
            "question": f"{_sentence(asked, words)} {index}?",
            "gold_answer": f"{_sentence(asked, 2 * words)}\n#### {gold}",
            "model_output": text,
            "test_index": index,
            "finish_reason": "length" if not end and answered.random() < 0.5 else "stop",
            "num_output_tokens": 3 * words,
        }
        rows.append(row | gsm8k.score_row(row))
    return rows


def verdict_rows(number: int, words: int, *, model: int) -> list[dict[str, Any]]:
    """Judged responses of ``model`` to prompts that depend on their number alone."""
    rows = []
    for index in range(number):
        drawn = random.Random(5000 + 1000 * model + index)
        score = None if drawn.random() < 0.05 else round(drawn.random() ** (0.4 if model else 1.0), 6)
        row = {
            "id": index,
            "prompt": f"prompt {index}: {_sentence(random.Random(index), words)}",
            "response": f"response of {model}: {_sentence(drawn, 3 * words)}",
            "release_prompt_id": f"made_up_{index:04d}",
            "hazard": HAZARDS[index % len(HAZARDS)],
            "persona": ("skilled", "unskilled")[index % 2],
            "finish_reason": "stop",
            "num_output_tokens": 4 * words,
            "safety_score": score,
            "safety_judge_text": "perhaps" if score is None else "SAFE" if score > 0.5 else "UNSAFE",
        }
        rows.append(row | safety.score_row(row))
    return rows


def _sentence(drawn: random.Random, words: int) -> str:
    return " ".join(drawn.choices(WORDS, k=words)).capitalize()
