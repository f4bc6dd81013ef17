"""The rows that a checkpoint is chosen on, and the sentence about the choice. No torch: reports read both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.prepare.datasets import CLASS240_IDS
from lib.record.paths import RunPaths, require
from lib.record.rows import read_jsonl
from lib.record.text_files import read_text

Row = dict[str, Any]

ON_DEV, ON_TEST, NOT_SELECTED = "development rows", "the test set", "not selected"


class SweepError(Exception):
    """No checkpoint can be chosen; the text says why and what to do."""


@dataclass(frozen=True)
class SelectionRows:
    """What every candidate gets."""

    questions: list[Row]  # test_index (position among the development rows, or in the test split), question, answer
    prompts: list[Row]  # empty where safety is not measured
    selected_on: str  # ``ON_DEV`` or ``ON_TEST``
    files: list[Path]  # what was read


def development_rows(paths: RunPaths, prompts: Sequence[Row] = ()) -> SelectionRows:
    """Development rows of the run and the prompts drawn for it."""
    rows = read_jsonl(require(paths.dev_rows, "01_prepare", paths.name))
    questions = [{"test_index": number, **row} for number, row in enumerate(rows)]
    return SelectionRows(questions, list(prompts), ON_DEV, [paths.dev_rows])


def evaluation_rows(paths: RunPaths, metric: str) -> SelectionRows:
    """The rows that 03 and 04 report on; SweepError where the metric needs prompts and 01_prepare left none."""
    questions = read_jsonl(require(paths.gsm8k_eval_rows, "01_prepare", paths.name))
    files = [paths.gsm8k_eval_rows]
    if not needs_safety(metric):
        return SelectionRows(questions, [], ON_TEST, files)
    prompts = evaluated_prompts(paths)
    require_safety(metric, "" if prompts else "01_prepare found no AILuminate prompts")
    return SelectionRows(questions, prompts, ON_TEST, [*files, paths.ailuminate_rows])


def needs_safety(metric: str) -> bool:
    """Whether the metric cannot be computed without verdicts."""
    return metric != "accuracy"


def require_safety(metric: str, why_not: str) -> None:
    """Raise SweepError if ``metric`` needs safety and ``why_not`` says why it cannot be measured."""
    if why_not and needs_safety(metric):
        raise SweepError(
            f"sweep_metric is {metric!r} but safety cannot be measured here: {why_not}. Put the file or the model into "
            "the folder that --assets names, or choose without it: --set sweep_metric=accuracy dev_safety_rows=0"
        )


def evaluated_prompts(paths: RunPaths) -> list[Row]:
    """The prompts that 04 evaluates, read to be left out; empty where 01_prepare found none."""
    path = require(paths.ailuminate_rows, "01_prepare", paths.name)
    return read_jsonl(path) if path.stat().st_size else []


def draw_prompts(
    pool: Sequence[Row], evaluated: Sequence[Row], num_prompts: int, seed: int, class_ids: Sequence[str] | None = None
) -> list[Row]:
    """A seeded draw of ``num_prompts`` of ``pool``, in its order, neither in the class set nor evaluated by this run.

    Left out by id and by text: some prompts stand in the public file twice. ``class_ids`` None: the 240 of ``params/``.
    """
    class_ids = read_text(CLASS240_IDS).split() if class_ids is None else class_ids
    # A CSV may have no ids: its prompts are identified by their texts alone.
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


def selection_text(chosen: str, selected_on: str, metric: str = "", num_candidates: int = 0, most: int = 0) -> str:
    """How the adapter was chosen; 0 ``num_candidates`` or ``most`` (``max_sweep_checkpoints``) is unknown."""
    if selected_on == NOT_SELECTED:
        return f"Kept is {chosen}; it was not selected among checkpoints."
    if num_candidates == most == 1:
        return f"Kept is {chosen}, the only one compared (max_sweep_checkpoints: 1): nothing was selected."
    if num_candidates == 1:
        wanted = f" (max_sweep_checkpoints is {most})" if most else ""
        return f"Kept is {chosen}, the only checkpoint: a smaller save_steps leaves more to select among{wanted}."
    text = f"Kept is {chosen}, selected on {selected_on} by {metric}."
    if 0 < num_candidates < most:
        text += f" Compared were {num_candidates} checkpoints, which is all that were saved, and fewer than "
        text += f"max_sweep_checkpoints ({most}): a smaller save_steps leaves more."
    if selected_on == ON_TEST:
        text += " The rates that this run reports on those rows are a winner's: too high by the luck of the choice."
    return text


def selected_on_test(facts: Mapping[str, Any]) -> str:
    """How the adapter was chosen, by 02's facts, where that was done on the rows that are reported; else ""."""
    if not selection_note(facts):
        return ""
    return selection_text(facts["adapter"], ON_TEST, facts["sweep_metric"], len(facts.get("checkpoints", [])))


def selection_note(facts: Mapping[str, Any]) -> str:
    """``selected_on_test`` in the few words that each finding carries."""
    # Of one checkpoint none is the winner.
    if facts.get("selected_on") != ON_TEST or len(facts.get("checkpoints", [])) == 1:
        return ""
    return f"checkpoint selected on {ON_TEST} by {facts['sweep_metric']}"
