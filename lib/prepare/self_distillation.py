"""Self-distilled training data: the model's own correct answers to the training questions, row by row and resumable.

Rejection sampling: Yuan et al. 2023, arXiv 2308.01825; self-distillation: Yang et al. 2024, arXiv 2402.13669.
**An interrupted run ends in the same bytes** on the same machine: a batch's shape decides rounding, so chunks never
depend on what is answered, and a chunk that was cut short is generated again completely. Other numbers of threads or a
halved batch (the engine warns) may round otherwise.
"""

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lib import gsm8k
from lib.engine.generator import Completion, Generator, LazyGenerator, Sampling
from lib.engine.sources import ModelSource
from lib.record.paths import RunPaths
from lib.record.protocol import answer_protocol, model_protocol, without_adapter
from lib.record.rows import RowLog, fill_rows, open_untuned_log

if TYPE_CHECKING:  # these import torch
    from transformers import PreTrainedTokenizerBase


Row = dict[str, Any]
Choice = Literal["shortest", "random"]
Fallback = Literal["drop", "gold"]

# Rows per call by device: enough to fill a batch, few enough that a kill costs a minute at most.
ROWS_PER_CALL = {"cpu": 64, "cuda": 256, "mps": 64}
# Right, but without an end of turn: training on it would teach to stop in the middle.
CUT_OFF = "correct, cut off"
OUTCOMES = (*get_args(gsm8k.Outcome), CUT_OFF)
OWN_ANSWERS = "the model's own answers"


@dataclass(frozen=True)
class Asking:
    """How questions are answered; ``batch_size`` 0: as many rows as a call has, not from free memory, which varies."""

    sampling: Sampling
    num_samples: int
    max_new_tokens: int
    device: str
    batch_size: int = 0
    system: str = gsm8k.SYSTEM_PROMPT

    @property
    def rows_per_call(self) -> int:
        return max(1, ROWS_PER_CALL[self.device] // self.num_samples) * self.num_samples

    @property
    def rows_at_once(self) -> int:
        return self.batch_size or self.rows_per_call


def protocol(
    base_identity: str,
    quantization: str,
    dtype: str,
    questions: Sequence[Row],
    fewshot: Sequence[Row],
    template: str,
    asking: Asking,
) -> dict[str, str]:
    """Everything that can change an answer, in words and hashes, under the names that 03 uses."""
    sampling = asking.sampling
    decoding = f"temperature {sampling.temperature}, seed {sampling.seed}, at most {asking.max_new_tokens} tokens"
    model = model_protocol(base_identity, quantization, dtype, template)
    return {
        **without_adapter(answer_protocol(model, [], questions, fewshot, asking.system, decoding)),
        "answers": f"{asking.num_samples} a question",
        "batches": f"{asking.rows_per_call} rows a call, {asking.rows_at_once} at once, on {asking.device}",
    }


@dataclass(frozen=True)
class Sampled:
    """All answers in the order of the questions; ``num_new``, ``num_new_tokens`` and ``wall_s`` are this call's."""

    rows: list[Row]
    num_samples: int
    num_new: int
    num_new_tokens: int
    wall_s: float


def sample_answers(
    questions: Sequence[Row], fewshot: Sequence[Row], generator: LazyGenerator, asking: Asking, log: RowLog
) -> Sampled:
    """Answer each question ``num_samples`` times, but for answers in ``log`` (id: number * num_samples + sample)."""
    rows = [
        {"id": place * asking.num_samples + sample, "question_number": place, "sample": sample, **question}
        for place, question in enumerate(questions)
        for sample in range(asking.num_samples)
    ]
    no_question = {"question": None, "answer": None}
    gsm8k.check_kept({row_id: no_question for row_id in log.rows} | {row["id"]: row for row in rows}, log)
    kept, before_s = set(log.rows), generator.wall_s

    def generate(missing: list[Row], record: Callable[[int, Completion], None]) -> None:
        positions = {row["id"]: position for position, row in enumerate(missing)}
        for chunk in _chunks(rows, asking.rows_per_call):
            places = [positions.get(row["id"]) for row in chunk]
            if places.count(None) < len(places):
                _answer_chunk(chunk, places, fewshot, generator, asking, record)

    answered = fill_rows(log, rows, generate, _scored_row, kind="own answers")
    new = [row["num_output_tokens"] for row in answered if row["id"] not in kept]
    return Sampled(answered, asking.num_samples, len(new), sum(new), generator.wall_s - before_s)


def _answer_chunk(
    chunk: Sequence[Row],
    places: Sequence[int | None],
    fewshot: Sequence[Row],
    generator: Generator,
    asking: Asking,
    record: Callable[[int, Completion], None],
) -> None:
    """Answer a complete chunk, for its shapes' sake, and record the rows that have a place among the missing ones."""

    def record_missing(index: int, completion: Completion) -> None:
        if places[index] is not None:
            record(places[index], completion)

    generator.generate(
        [gsm8k.build_messages(row["question"], fewshot, asking.system) for row in chunk],
        max_new_tokens=asking.max_new_tokens,
        on_completion=record_missing,
        sampling=asking.sampling,
        # By its text and not by its place: a question draws the same whatever else a run asks.
        keys=[f"{row['sample']}:{row['question']}" for row in chunk],
    )


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _scored_row(row: Row, completion: Completion) -> Row:
    answered = {name: row[name] for name in ("id", "question_number", "sample", "question")}
    answered |= {"gold_answer": row["answer"], "model_output": completion.text}
    counts = ("finish_reason", "num_prompt_tokens", "num_output_tokens")
    answered |= {name: getattr(completion, name) for name in counts}
    return {**answered, **gsm8k.score_row(answered)}


@dataclass(frozen=True)
class Distilled:
    """Rows to train on and the sampled answers ``chosen`` among them; questions with GSM8K's own answer and without."""

    rows: list[Row]
    chosen: list[Row]
    num_gold: int
    num_dropped: int


def outcome(row: Mapping[str, Any]) -> str:
    """Of a sampled answer: ``correct`` (may be trained on), or why it is rejected; one of ``OUTCOMES``."""
    return CUT_OFF if row["correct"] and row["finish_reason"] != "stop" else row["outcome"]


def choose_training_rows(sampled: Sampled, *, keep: int, choice: Choice, fallback: Fallback, seed: int) -> Distilled:
    """At most ``keep`` different correct answers per question, the shortest or by a seeded draw; ValueError if none."""
    rows, chosen, num_gold, num_dropped = [], [], 0, 0
    for samples in _chunks(sampled.rows, sampled.num_samples):
        best = _choose(samples, keep, choice, seed)
        chosen += best
        rows += [{"question": row["question"], "answer": row["model_output"].strip()} for row in best]
        if not best and fallback == "gold":
            rows.append({"question": samples[0]["question"], "answer": samples[0]["gold_answer"]})
            num_gold += 1
        num_dropped += not best and fallback == "drop"
    if not rows:
        raise ValueError(
            f"none of the model's {len(sampled.rows)} answers to {num_dropped} questions is correct and complete: "
            "raise distil_num_samples or gsm8k_max_new_tokens, set distil_fallback to gold, or train_source to gsm8k"
        )
    return Distilled(rows, chosen, num_gold, num_dropped)


def _choose(samples: Sequence[Row], keep: int, choice: Choice, seed: int) -> list[Row]:
    distinct: dict[str, Row] = {}
    for row in samples:
        if outcome(row) == "correct":
            distinct.setdefault(row["model_output"].strip(), row)

    def rank(row: Row) -> tuple[int | str, int]:
        if choice == "shortest":
            return row["num_output_tokens"], row["sample"]
        # A hash and not a generator: the choice for a question does not depend on the questions before it.
        return hashlib.sha256(json.dumps([seed, row["question"], row["sample"]]).encode()).hexdigest(), row["sample"]

    return sorted(distinct.values(), key=rank)[:keep]


def coverage(sampled: Sampled) -> dict[int, tuple[int, int]]:
    """Number of samples -> (questions with a usable answer among their first so many, all questions)."""
    groups = list(_chunks(sampled.rows, sampled.num_samples))
    # Samples needed until the first usable answer.
    needed = [next((at for at, row in enumerate(group, 1) if outcome(row) == "correct"), None) for group in groups]
    return {
        number: (sum(at is not None and at <= number for at in needed), len(groups))
        for number in range(1, sampled.num_samples + 1)
    }


def count_outcomes(sampled: Sampled) -> dict[str, int]:
    """Answers with each of ``OUTCOMES``."""
    counts = Counter(map(outcome, sampled.rows))
    return {name: counts[name] for name in OUTCOMES}


def length_rows(sampled: Sampled, distilled: Distilled, tokenizer: "PreTrainedTokenizerBase") -> list[dict[str, Any]]:
    """Rows of a table: answer lengths in tokens, with and without calculator marks, which only some answers hold."""
    kept = [row["model_output"] for row in distilled.chosen]
    golds = [row["gold_answer"] for row in distilled.chosen]
    lengths = {
        "the model's own, kept": [row["num_output_tokens"] for row in distilled.chosen],
        "the same without calculator marks": _num_tokens(map(gsm8k.without_calculator_marks, kept), tokenizer),
        "GSM8K's, to the same questions": _num_tokens(golds, tokenizer),
        "GSM8K's without calculator marks": _num_tokens(map(gsm8k.without_calculator_marks, golds), tokenizer),
        "the model's, all": [row["num_output_tokens"] for row in sampled.rows],
    }
    return [{"answers": name, "n": len(values), **_spread(values)} for name, values in lengths.items()]


def _num_tokens(texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    return [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def _spread(values: Sequence[int]) -> dict[str, float | None]:
    if not values:
        return dict.fromkeys(("shortest", "median", "mean", "longest"))
    middle = {"median": statistics.median(values), "mean": round(statistics.fmean(values), 1)}
    return {"shortest": min(values), **middle, "longest": max(values)}


def summarize(sampled: Sampled, distilled: Distilled) -> dict[str, Any]:
    """What the record of a run keeps: the counts behind every shown rate."""
    covered, total = coverage(sampled)[sampled.num_samples]
    counts = {"num_questions": total, "num_covered": covered, "coverage": covered / total}
    counts |= {"num_answers": len(sampled.rows), "fates": count_outcomes(sampled), "num_own": len(distilled.chosen)}
    return counts | {"num_gold": distilled.num_gold, "num_dropped": distilled.num_dropped}


@dataclass(frozen=True)
class Distillation:
    """The model's own answers of a run: what made them, all of them, the chosen ones, and the row file."""

    protocol: dict[str, str]
    sampled: Sampled
    distilled: Distilled
    file: Path
    load_s: float = 0.0

    @property
    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        return {"protocol": self.protocol, **summarize(self.sampled, self.distilled)}


def distil(
    parameters: Mapping[str, Any],
    paths: RunPaths,
    base: ModelSource,
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[Row],
    fewshot: Sequence[Row],
) -> Distillation | None:
    """Sample the base model's answers, shared by runs of one protocol, and choose rows; None unless wanted."""
    if parameters["train_source"] != "self_distilled":
        return None
    # Imports torch, which other training sources do not need this module for.
    from lib.engine.generate import load_engine
    from lib.engine.load import resolve_runtime

    runtime = resolve_runtime(parameters["device"], parameters["compute_dtype"])
    sampling = Sampling(parameters["distil_temperature"], parameters["data_seed"])
    sizes = (parameters["distil_num_samples"], parameters["gsm8k_max_new_tokens"])
    system = gsm8k.read_system_prompt(parameters["system_prompt_file"])
    asking = Asking(sampling, *sizes, runtime.device, parameters["eval_batch_size"], system)
    quantization, template = parameters["quantization"], tokenizer.chat_template
    made_by = protocol(base.identity, quantization, str(runtime.dtype), questions, fewshot, template, asking)
    log = open_untuned_log(paths, "distil_samples", made_by)
    generator = LazyGenerator(load_engine, base.folder, runtime, quantization, asking.rows_at_once)
    sampled = sample_answers(questions, fewshot, generator, asking, log)
    how = {"keep": parameters["distil_keep"], "choice": parameters["distil_choice"], "seed": parameters["data_seed"]}
    distilled = choose_training_rows(sampled, **how, fallback=parameters["distil_fallback"])
    return Distillation(made_by, sampled, distilled, log.path, generator.load_s)
