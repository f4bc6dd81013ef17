"""Which checkpoint to keep: candidates asked the same rows under one protocol, scored with intervals, one chosen.

Chosen on development rows: questions of GSM8K's train split that are not trained on, and public AILuminate prompts that
are not evaluated. Evaluation rows are read by ``evaluation_rows`` alone, for ``sweep_on_test: true``: what is chosen on
them scores too well on them, and every report says so. Knows nothing about models: generators are arguments.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib import gsm8k, safety
from lib.record.files import sha256_file, sha256_json
from lib.record.manifest import facts_of
from lib.record.paths import PROJECT_ROOT, RunPaths, require
from lib.record.rows import RowLog, read_jsonl
from lib.record.text_files import read_text
from lib.stats import wilson_interval

if TYPE_CHECKING:  # for the reader only: generate imports torch
    from lib.engine.generator import LazyGenerator

Row = dict[str, Any]

ON_DEV, ON_TEST, NOT_SELECTED = "development rows", "the test set", "not selected"
# What is highest at the chosen checkpoint; each a share or a sum of shares, so that the number of rows has no weight.
METRICS = {
    "accuracy": "share of questions answered right (strict)",
    "safety": "share of responses judged safe; a verdict that cannot be read is not safe",
    "sum": "accuracy plus safety, both as shares, with equal weight",
}
# What 02 reads only where candidates are asked prompts: otherwise a change of the judge does not run it again.
SAFETY_PARAMETERS = (
    "safeguard_model",
    "safeguard_revision",
    "ailuminate_source",
    "ailuminate_max_new_tokens",
    "judge_mode",
    "judge_context",
    "judge_max_new_tokens",
    "guidelines_file",
)
CLASS240_IDS = PROJECT_ROOT / "params" / "ailuminate_class240_ids.txt"


class SweepError(Exception):
    """A checkpoint cannot be chosen as asked; the text says why and what to do."""


# --- rows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SweepRows:
    """What every candidate is asked.

    Attributes:
        questions: ``test_index`` (position among the development rows, or in the test split), ``question, answer``.
        prompts: as ``safety.parse_prompts_csv``; none where safety is not measured.
        selected_on: ``ON_DEV`` or ``ON_TEST``.
        files: what was read.
    """

    questions: list[Row]
    prompts: list[Row]
    selected_on: str
    files: list[Path]


def development_rows(paths: RunPaths, prompts: Sequence[Row] = ()) -> SweepRows:
    """Development rows of the run and the prompts drawn for it.

    Raises:
        ArtifactError: 01_prepare left no development rows.
    """
    rows = read_jsonl(require(paths.dev_rows, "01_prepare", paths.name))
    questions = [{"test_index": number, **row} for number, row in enumerate(rows)]
    return SweepRows(questions, list(prompts), ON_DEV, [paths.dev_rows])


def evaluation_rows(paths: RunPaths, metric: str) -> SweepRows:
    """The rows that 03 and 04 report on: the old way, in which the choice and the report share their rows.

    Raises:
        ArtifactError: 01_prepare left no questions.
        SweepError: it left no prompts, and the metric needs them.
    """
    questions = read_jsonl(require(paths.gsm8k_eval_rows, "01_prepare", paths.name))
    files = [paths.gsm8k_eval_rows]
    if not needs_safety(metric):
        return SweepRows(questions, [], ON_TEST, files)
    prompts = evaluated_prompts(paths)
    require_safety(metric, "" if prompts else "01_prepare could have no AILuminate prompts")
    return SweepRows(questions, prompts, ON_TEST, [*files, paths.ailuminate_rows])


def needs_safety(metric: str) -> bool:
    """Whether the metric cannot be computed without verdicts."""
    return metric != "accuracy"


def require_safety(metric: str, why_not: str) -> None:
    """Ends a sweep that is to choose by safety where that cannot be measured.

    Args:
        why_not: what is missing; empty where nothing is.

    Raises:
        SweepError: it is missing and needed.
    """
    if why_not and needs_safety(metric):
        raise SweepError(
            f"sweep_metric is {metric!r} but safety cannot be measured here: {why_not}. Put the file or the model into "
            "the folder that --assets names, or choose without it: --set sweep_metric=accuracy dev_safety_rows=0"
        )


def prompt_pool(ailuminate_source: str) -> str:
    """Where development prompts come from: the class CSV holds evaluation prompts alone, the public file more."""
    return "mlcommons" if ailuminate_source == "class" else ailuminate_source


def evaluated_prompts(paths: RunPaths) -> list[Row]:
    """The prompts that 04 evaluates, read to be left out; none where 01_prepare could have none.

    Raises:
        ArtifactError: 01_prepare did not run.
    """
    path = require(paths.ailuminate_rows, "01_prepare", paths.name)
    return read_jsonl(path) if path.stat().st_size else []


def draw_prompts(
    pool: Sequence[Row], evaluated: Sequence[Row], num_prompts: int, seed: int, class_ids: Sequence[str] | None = None
) -> list[Row]:
    """A seeded draw of prompts that are neither in the class set nor evaluated by this run.

    Left out by id and by text, for some prompts stand in the public file twice; of equal texts the first may be drawn.

    Args:
        pool: as ``assets.load_ailuminate`` gives them.
        evaluated: the run's evaluation prompts.
        class_ids: ``release_prompt_id`` of the class set; None: the 240 of ``params/``.

    Returns:
        ``num_prompts`` rows in the order of ``pool``, ``id`` being the position in this list.

    Raises:
        SweepError: fewer are left than asked for.
    """
    class_ids = read_text(CLASS240_IDS).split() if class_ids is None else class_ids
    # A CSV of one's own may have no ids: its prompts are told apart by their texts alone.
    ids = ({row["release_prompt_id"] for row in evaluated} | set(class_ids)) - {""}
    texts = {_text(row) for row in [*evaluated, *(row for row in pool if row["release_prompt_id"] in ids)]}
    distinct = {_text(row): row for row in reversed(pool)}
    free = [row for row in pool if _text(row) not in texts and distinct[_text(row)] is row]
    if len(free) < num_prompts:
        raise SweepError(
            f"dev_safety_rows is {num_prompts} but {len(free)} of {len(pool)} prompts are neither evaluated nor in the "
            "class set: lower dev_safety_rows or max_ailuminate_rows, or use ailuminate_source: mlcommons"
        )
    drawn = np.random.default_rng([seed, len(pool)]).choice(len(free), num_prompts, replace=False)
    return [{**free[place], "id": position} for position, place in enumerate(sorted(drawn.tolist()))]


def _text(row: Mapping[str, Any]) -> str:
    return " ".join(row["prompt"].casefold().split())


# --- asking ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Protocol:
    """What is the same for every candidate; ``model`` and ``judge`` say by which weights and templates.

    ``judge`` is empty where safety is not measured.
    """

    model: Mapping[str, str]
    fewshot: list[Row]
    max_answer_tokens: int
    max_response_tokens: int
    judge: Mapping[str, str]
    guidelines: str
    judge_context: str
    judge_mode: str
    max_verdict_tokens: int

    def sha256(self, rows: SweepRows) -> str:
        """Hash of the protocol and of the rows that are asked under it; it stands beside every score."""
        return sha256_json([asdict(self), gsm8k.SYSTEM_PROMPT, rows.questions, rows.prompts])


@dataclass(frozen=True)
class Asked:
    """A candidate's answers and responses; ``wall_s`` is what they took here."""

    checkpoint: Path
    adapter_sha256: str
    answers: list[Row]
    responses: list[Row]
    wall_s: float


def candidates(checkpoints: Sequence[Path], most: int) -> list[Path]:
    """The last ``most`` checkpoints by the number in their names: checkpoint-1000 comes after checkpoint-200."""
    return sorted(checkpoints, key=step_of)[-most:]


def step_of(checkpoint: Path) -> int:
    """The optimiser step that ``checkpoint-<step>`` was saved at."""
    return int(checkpoint.name.rpartition("-")[2])


def ask(checkpoint: Path, generator: "LazyGenerator", rows: SweepRows, protocol: Protocol, folder: Path) -> Asked:
    """Puts every question and prompt to one candidate, going on from rows that are already in ``folder``.

    Args:
        generator: of this candidate alone; loads the model with it merged in when the first row is missing.
    """
    adapter = sha256_file(checkpoint / "adapter_model.safetensors")
    by = [dict(protocol.model), adapter]
    answer_hash = sha256_json([by, gsm8k.SYSTEM_PROMPT, protocol.fewshot, protocol.max_answer_tokens, rows.questions])
    log = RowLog(folder / f"answers_{checkpoint.name}.jsonl", answer_hash, label=checkpoint.name)
    answers = gsm8k.evaluate(
        rows.questions, protocol.fewshot, generator, max_new_tokens=protocol.max_answer_tokens, log=log
    )
    if not rows.prompts:
        return Asked(checkpoint, adapter, answers, [], generator.wall_s)
    response_hash = sha256_json([by, protocol.max_response_tokens, rows.prompts])
    log = RowLog(folder / f"responses_{checkpoint.name}.jsonl", response_hash, label=checkpoint.name)
    responses = safety.respond(rows.prompts, generator, max_new_tokens=protocol.max_response_tokens, log=log)
    return Asked(checkpoint, adapter, answers, responses, generator.wall_s)


def judge(asked: Asked, generator: "LazyGenerator", protocol: Protocol, folder: Path) -> list[Row]:
    """Verdicts on a candidate's responses by the run's judge; none where there are no responses."""
    if not asked.responses:
        return []
    prompt_hash = safety.judge_prompt_hash(protocol.guidelines, protocol.judge_context, protocol.judge_mode)
    by = [dict(protocol.judge), prompt_hash, protocol.max_verdict_tokens]
    made_of = [row["protocol_hash"] for row in asked.responses[:1]]
    name = asked.checkpoint.name
    log = RowLog(folder / f"verdicts_{name}.jsonl", sha256_json([by, made_of]), label=name)
    return safety.judge(
        asked.responses,
        generator,
        guidelines=protocol.guidelines,
        context=protocol.judge_context,
        mode=protocol.judge_mode,
        max_new_tokens=protocol.max_verdict_tokens,
        log=log,
    )


# --- choosing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """What a candidate reached; ``num_prompts`` is 0 where safety was not measured."""

    checkpoint: str
    step: int
    adapter_sha256: str
    num_questions: int
    num_correct: int
    num_prompts: int = 0
    num_safe: int = 0
    num_unparsed: int = 0

    @property
    def rates(self) -> dict[str, tuple[int, int]]:
        """Axis -> (successes, rows), of the axes that were measured."""
        right = {"right": (self.num_correct, self.num_questions)}
        return right | ({"safe": (self.num_safe, self.num_prompts)} if self.num_prompts else {})

    def value(self, metric: str) -> Fraction:
        """What is compared; exact, so that equal scores are a tie whatever their rows.

        Raises:
            SweepError: the metric is unknown, or needs safety, which was not measured.
        """
        if metric not in METRICS:
            raise SweepError(f"sweep_metric is {metric!r}; allowed: {', '.join(METRICS)}")
        if needs_safety(metric) and not self.num_prompts:
            raise SweepError(
                f"sweep_metric is {metric!r} but {self.checkpoint} was asked no prompt: set dev_safety_rows"
            )
        accuracy = Fraction(self.num_correct, self.num_questions)
        if metric == "accuracy":
            return accuracy
        return Fraction(self.num_safe, self.num_prompts) + (accuracy if metric == "sum" else 0)


def score(asked: Asked, verdicts: Sequence[Row]) -> Score:
    """Counts of a candidate, from its rows."""
    answered = gsm8k.summarize(asked.answers)
    judged = safety.summarize(verdicts) if verdicts else {"n": 0, "num_safe": 0, "num_unparsed": 0}
    return Score(
        checkpoint=asked.checkpoint.name,
        step=step_of(asked.checkpoint),
        adapter_sha256=asked.adapter_sha256,
        num_questions=answered["n"],
        num_correct=answered["num_correct"],
        num_prompts=judged["n"],
        num_safe=judged["num_safe"],
        num_unparsed=judged["num_unparsed"],
    )


def choose(scores: Sequence[Score], metric: str) -> Score:
    """The score with the highest value; of equal ones the latest step, which has seen the most rows.

    Raises:
        SweepError: there is none, they were asked different numbers of rows, or as ``Score.value``.
    """
    if len({(one.num_questions, one.num_prompts) for one in scores}) != 1:
        raise SweepError(f"{len(scores)} checkpoints to choose from, not all asked the same rows: run 02_train again")
    return max(scores, key=lambda one: (one.value(metric), one.step))


def table_rows(scores: Sequence[Score], metric: str, selected_on: str, protocol_sha256: str) -> list[Row]:
    """Rows of ``checkpoint_scores_<name>.csv``, by step: shares with Wilson's 95 % interval, None if unmeasured."""
    chosen = choose(scores, metric)
    rows = []
    for one in sorted(scores, key=lambda one: one.step):
        right, safe = one.rates["right"], one.rates.get("safe")
        columns = {"checkpoint": one.checkpoint, "step": one.step, "n": one.num_questions}
        columns |= {"num_correct": one.num_correct} | _rate_columns(right, "accuracy", "")
        columns |= {"num_prompts": one.num_prompts, "num_safe": one.num_safe, "num_unparsed": one.num_unparsed}
        columns |= _rate_columns(safe, "safety_rate", "safety_")
        columns |= {"metric": metric, "score": float(one.value(metric)), "chosen": one is chosen}
        rows.append({**columns, "selected_on": selected_on, "protocol_sha256": protocol_sha256})
        rows[-1]["adapter_sha256"] = one.adapter_sha256
    return rows


def _rate_columns(counts: tuple[int, int] | None, name: str, prefix: str) -> Row:
    low, high = wilson_interval(*counts) if counts else (None, None)
    return {name: counts[0] / counts[1] if counts else None, f"{prefix}low": low, f"{prefix}high": high}


def selection_text(chosen: str, selected_on: str, metric: str = "", num_candidates: int = 0, most: int = 0) -> str:
    """How the kept adapter was chosen, in a sentence that does not hide a choice on the rows that are reported.

    Args:
        num_candidates: how many checkpoints were compared; 0 for unknown.
        most: how many at most were to be compared (``max_sweep_checkpoints``); 0 for unknown.
    """
    if selected_on == NOT_SELECTED:
        return f"Kept is {chosen}; it was not selected among checkpoints."
    if num_candidates == most == 1:
        return f"Kept is {chosen}, the only one compared (max_sweep_checkpoints: 1): nothing was selected."
    if num_candidates == 1:
        return f"Kept is {chosen}, the only checkpoint: a smaller save_steps leaves more to select among."
    told = f"Kept is {chosen}, selected on {selected_on} by {metric}."
    if selected_on == ON_TEST:
        told += " The rates that this run reports on those rows are a winner's: too high by the luck of the choice."
    return told


def selected_on_test(paths: RunPaths) -> str:
    """How the adapter was chosen, in a sentence, where that was done on the rows that are reported; else ""."""
    facts = facts_of(paths, "02_train")
    compared = facts.get("checkpoints", [])
    # Of one checkpoint none is the winner.
    if facts.get("selected_on") != ON_TEST or len(compared) == 1:
        return ""
    return selection_text(facts["adapter"], ON_TEST, facts["sweep_metric"], len(compared))
