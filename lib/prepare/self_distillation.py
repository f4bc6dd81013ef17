"""Self-distilled training data: the model's own correct answers to the training questions, row by row and resumable.

Training on answers that the model itself would write, of which only the correct ones are kept, moves it less than a
person's solutions do (rejection sampling: Yuan et al. 2023, arXiv 2308.01825; self-distillation: Yang et al. 2024,
arXiv 2402.13669). Knows nothing about models: the generator is an argument, so that a fake tests everything here.

**An interrupted run ends in the same bytes as an unbroken one** on the same machine. A batch's shape decides how its
sums are rounded, and a near tie can turn on that; so questions are asked in chunks whose rows never depend on what is
already answered, and a chunk that a kill cut is asked again whole, of which only the missing rows are appended. Another
number of threads, or a batch that was halved for want of memory (the engine warns), may round otherwise.
"""

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from lib import gsm8k
from lib.record.files import sha256_json
from lib.record.protocol import UNTUNED

if TYPE_CHECKING:  # for the reader only: generate imports torch
    from transformers import PreTrainedTokenizerBase

    from lib.engine.generator import Completion, LazyGenerator, Sampling
    from lib.record.rows import RowLog

Row = dict[str, Any]
Choice = Literal["shortest", "random"]
Fallback = Literal["drop", "gold"]

# Rows of one call by device: enough to fill a batch, few enough that a kill costs a minute at most.
ROWS_PER_CALL = {"cpu": 64, "cuda": 256}
# Right, but without an end of turn of its own: training on it would teach to stop in the middle.
CUT_OFF = "correct, cut off"
FATES = (*get_args(gsm8k.Outcome), CUT_OFF)


# --- asking -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asking:
    """How the questions are asked: everything but the model and the words.

    Args:
        sampling: temperature and seed; the draws of an answer depend on them, its question and its number alone. The
            seed is ``data_seed``, which repeats of a training have in common: they train on the same answers.
        num_samples: answers a question.
        max_new_tokens: tokens of an answer at most.
        device: cpu or cuda, which decides how many rows a call has.
        batch_size: rows at once; 0: as many as a call has. Never from free memory, which another time could differ.
    """

    sampling: "Sampling"
    num_samples: int
    max_new_tokens: int
    device: str
    batch_size: int = 0

    @property
    def questions_per_call(self) -> int:
        return max(1, ROWS_PER_CALL[self.device] // self.num_samples)

    @property
    def rows_at_once(self) -> int:
        return self.batch_size or self.questions_per_call * self.num_samples


def protocol(
    base_identity: str,
    quantization: str,
    dtype: str,
    questions: Sequence[Row],
    fewshot: Sequence[Row],
    template: str,
    asking: Asking,
) -> dict[str, str]:
    """Everything that can change an answer, in words and hashes, under the names that 03 uses.

    Args:
        base_identity: see ``lib.engine.sources.ModelSource``.
        quantization: of the weights, nf4 or none.
        dtype: that they compute in.
        template: chat template of the tokenizer.
    """
    sampling, rows = asking.sampling, asking.questions_per_call * asking.num_samples
    return {
        "base model": base_identity,
        "adapter": UNTUNED,
        "quantization": quantization,
        "dtype": dtype,
        "questions": sha256_json(questions),
        "few-shot examples": sha256_json(fewshot),
        "system message": sha256_json(gsm8k.SYSTEM_PROMPT),
        "chat template": sha256_json(template),
        "decoding": f"temperature {sampling.temperature}, seed {sampling.seed}, at most {asking.max_new_tokens} tokens",
        "answers": f"{asking.num_samples} a question",
        "batches": f"{rows} rows a call, {asking.rows_at_once} at once, on {asking.device}",
    }


@dataclass(frozen=True)
class Sampled:
    """All sampled answers, ``num_samples`` a question in the order of the questions.

    ``num_new`` rows of ``num_new_tokens`` are of this call, in which the generator worked ``wall_s`` seconds.
    """

    rows: list[Row]
    num_samples: int
    num_new: int
    num_new_tokens: int
    wall_s: float


def sample_answers(
    questions: Sequence[Row], fewshot: Sequence[Row], generator: "LazyGenerator", asking: Asking, log: "RowLog"
) -> Sampled:
    """Answer every question ``num_samples`` times, going on from what ``log`` already holds.

    Args:
        questions: rows ``question, answer`` of GSM8K train; a question's number is its position here.
        fewshot: examples shown before each question.
        generator: its engine has the batch size ``asking.rows_at_once``.
        log: row file of this protocol, keyed by ``id`` = question number * num_samples + sample.

    Raises:
        ValueError: ``log`` holds another question under an id, or a gold answer has no number.
    """
    _check_kept(questions, asking.num_samples, log)
    kept, before_s = set(log.rows), generator.wall_s
    asked = [(place, sample) for place in range(len(questions)) for sample in range(asking.num_samples)]
    with log.complete_rows("samples", len(asked)):
        for chunk in _chunks(asked, asking.questions_per_call * asking.num_samples):
            ids = [place * asking.num_samples + sample for place, sample in chunk]
            if not kept.issuperset(ids):
                generator.generate(
                    [gsm8k.build_messages(questions[place]["question"], fewshot) for place, _ in chunk],
                    max_new_tokens=asking.max_new_tokens,
                    on_completion=_recorder(ids, chunk, questions, log),
                    sampling=asking.sampling,
                    # By its text and not by its place: a question draws the same whatever else a run asks.
                    keys=[f"{sample}:{questions[place]['question']}" for place, sample in chunk],
                )
    rows = log.finish(range(len(asked)))
    new = [row["num_output_tokens"] for row in rows if row["id"] not in kept]
    return Sampled(rows, asking.num_samples, len(new), sum(new), generator.wall_s - before_s)


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _recorder(
    ids: Sequence[int], chunk: Sequence[tuple[int, int]], questions: Sequence[Row], log: "RowLog"
) -> Callable[[int, "Completion"], None]:
    def record(index: int, completion: "Completion") -> None:
        # The whole chunk was asked, for its shapes; what a run before the interruption wrote stays as it is.
        if ids[index] not in log.rows:
            place, sample = chunk[index]
            log.append(_scored_row(ids[index], place, sample, questions[place], completion))

    return record


def _scored_row(row_id: int, place: int, sample: int, question: Row, completion: "Completion") -> Row:
    answered = {
        "id": row_id,
        "question_number": place,
        "sample": sample,
        "question": question["question"],
        "gold_answer": question["answer"],
        "model_output": completion.text,
        "finish_reason": completion.finish_reason,
        "num_prompt_tokens": completion.num_prompt_tokens,
        "num_output_tokens": completion.num_output_tokens,
    }
    return {**answered, **gsm8k.score_row(answered)}


def _check_kept(questions: Sequence[Row], num_samples: int, log: "RowLog") -> None:
    for row_id, kept in log.rows.items():
        place = row_id // num_samples
        expected = (questions[place]["question"], questions[place]["answer"]) if place < len(questions) else None
        if (kept["question"], kept["gold_answer"]) != expected:
            raise ValueError(f"{log.path.name} holds another question under id {row_id}; delete it, or hash its rows")
        # Scored again from its text: the rules that read an answer may be newer than the kept row.
        log.rows[row_id] = {**kept, **gsm8k.score_row(kept)}


# --- choosing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distilled:
    """Rows to train on, ``question, answer``, in the order of the questions.

    ``chosen`` are the sampled answers among them; ``num_gold`` questions fell back on GSM8K's own answer, and
    ``num_dropped`` have no row.
    """

    rows: list[Row]
    chosen: list[Row]
    num_gold: int
    num_dropped: int


def fate(row: Mapping[str, Any]) -> str:
    """What becomes of a sampled answer: ``correct`` (may be trained on), or why it is rejected, one of ``FATES``."""
    return CUT_OFF if row["correct"] and row["finish_reason"] != "stop" else row["outcome"]


def choose_training_rows(sampled: Sampled, *, keep: int, choice: Choice, fallback: Fallback, seed: int) -> Distilled:
    """Correct answers to train on, at most ``keep`` different ones a question.

    Args:
        choice: ``shortest`` takes those of the fewest tokens, ``random`` any, by a seeded draw a question.
        fallback: for a question without a correct answer: ``drop`` it, or train on its ``gold`` answer.

    Raises:
        ValueError: no question has a row.
    """
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
            f"none of the model's {len(sampled.rows)} answers to {num_dropped} questions is correct and whole: raise "
            "distil_num_samples or gsm8k_max_new_tokens, set distil_fallback to gold, or train_source to gsm8k"
        )
    return Distilled(rows, chosen, num_gold, num_dropped)


def _choose(samples: Sequence[Row], keep: int, choice: Choice, seed: int) -> list[Row]:
    distinct: dict[str, Row] = {}
    for row in samples:
        if fate(row) == "correct":
            distinct.setdefault(row["model_output"].strip(), row)
    ranks = {
        "shortest": [(row["num_output_tokens"], row["sample"]) for row in distinct.values()],
        "random": [(_rank(seed, row), row["sample"]) for row in distinct.values()],
    }[choice]
    order = sorted(zip(ranks, distinct.values(), strict=True), key=lambda pair: pair[0])
    return [row for _, row in order[:keep]]


def _rank(seed: int, row: Row) -> str:
    # A hash and not a generator: the choice for a question does not depend on the questions before it.
    return hashlib.sha256(json.dumps([seed, row["question"], row["sample"]]).encode()).hexdigest()


# --- telling ------------------------------------------------------------------------------------------------------


def coverage(sampled: Sampled) -> dict[int, tuple[int, int]]:
    """Number of samples -> (questions with a usable answer among their first so many, all questions)."""
    groups = list(_chunks(sampled.rows, sampled.num_samples))
    # Samples needed until the first usable answer.
    needed = [next((at for at, row in enumerate(group, 1) if fate(row) == "correct"), None) for group in groups]
    return {
        number: (sum(at is not None and at <= number for at in needed), len(groups))
        for number in range(1, sampled.num_samples + 1)
    }


def fates(sampled: Sampled) -> dict[str, tuple[int, int]]:
    """Fate -> (answers, all answers); each of ``FATES``."""
    counts = Counter(map(fate, sampled.rows))
    return {name: (counts[name], len(sampled.rows)) for name in FATES}


def length_rows(sampled: Sampled, distilled: Distilled, tokenizer: "PreTrainedTokenizerBase") -> list[dict[str, Any]]:
    """Rows of a table: how long answers are, in tokens; dashes where there are none.

    GSM8K's answers hold calculator marks, those of a model that was shown examples with them often do too: only texts
    without marks are alike.
    """
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
    """What the record of a run keeps: counts, of which every shown rate is made."""
    num_covered, num_questions = coverage(sampled)[sampled.num_samples]
    return {
        "num_questions": num_questions,
        "num_covered": num_covered,
        "coverage": num_covered / num_questions,
        "num_answers": len(sampled.rows),
        "fates": {name: count for name, (count, _) in fates(sampled).items()},
        "num_own": len(distilled.chosen),
        "num_gold": distilled.num_gold,
        "num_dropped": distilled.num_dropped,
    }


def told(counts: Mapping[str, Any] | None, source: str) -> str:
    """What was trained on, in words.

    Args:
        counts: of ``summarize``; None where they are not known.
        source: where the questions come from.
    """
    counts = counts or {}
    num_covered, num_questions, num_gold = (counts.get(f"num_{name}") for name in ("covered", "questions", "gold"))
    if num_covered is None or num_questions is None:
        return f"own answers to {source}"
    own = f"own answers to {num_covered} of {num_questions} questions of {source}"
    return f"{own}, GSM8K's to {num_gold}" if num_gold else own
