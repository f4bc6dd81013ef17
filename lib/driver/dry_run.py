"""``--dry-run``: what a command would run, fetch and write, found without the network and without writing anything."""

import argparse
from collections.abc import Collection, Iterator
from math import ceil
from operator import attrgetter
from pathlib import Path

from lib.driver.cli import UsageError
from lib.driver.engines.slurm import script
from lib.driver.plan import Plan, output_folders, sweeps_safety
from lib.driver.tasks import GSM8K, SAFETY, Task, levels, make_tasks
from lib.driver.worker import comparison_plan, due_reason
from lib.engine.bundled import MODELS_DIR
from lib.engine.sources import find_model
from lib.prepare.datasets import find_prompts, find_questions
from lib.record.commitment import COMMITMENT
from lib.record.files import read_json
from lib.record.lookup import AssetError, Place, hub_is_offline, own_path, place_of
from lib.record.paths import COMPARE_STAGE, METRICS_CSV, METRICS_JSON, PLANS, SUMMARY, find_runs
from lib.record.rows import count_lines
from lib.record.terminal import as_typed, tell

FOLLOWS = "complete; runs again where an earlier stage changes its inputs"


def dry_run(args: argparse.Namespace, plans: list[Plan]) -> int:
    """Print the stages, sources and files of each preset, then of the comparison; UsageError for an unfit model."""
    results, reports = output_folders(args)
    due = {plan.preset: _stages(plan, args.rerun_all) for plan in plans}
    for plan in plans:
        tell(f"{plan.preset}: {plan.params.description}")
        try:
            lines = [*_lines(plan, due[plan.preset])]
        except AssetError as error:
            raise UsageError(f"preset {plan.preset!r}: {error}") from None
        tell("\n".join(f"  {line}" for line in lines))
    files = [reports / "index.html"]
    if COMPARE_STAGE in plans[0].stages:
        state, runs = _comparison(
            plans[0], args.rerun_all, {stage for states in due.values() for stage in _runs(states)}
        )
        tell(f"all runs\n  {COMPARE_STAGE:<15} {state}")
        tables = [results / name for name in (SUMMARY, METRICS_JSON, METRICS_CSV)]
        files = [results / COMPARE_STAGE, *tables, *_notebooks(reports, COMPARE_STAGE), *files] if runs else files
    tell("\n".join(_written(files, "  ")))
    if args.shards > 1 or args.jobs > 1 or args.engine != "local":
        tell("\n".join(_tasks(args, plans)))
    tell("dry run: nothing was run, fetched or written")
    return 0


def _tasks(args: argparse.Namespace, plans: list[Plan]) -> Iterator[str]:
    """A line for each task that may run, with its rows and rough seconds; the scripts that Slurm would get."""
    tasks = make_tasks(plans, args.shards, apart=args.jobs > 1 or args.engine != "local")
    by_name = {plan.preset: plan for plan in plans}
    yield "tasks, those of a level at once; seconds as runs of this folder took"
    groups = levels(tasks)
    for level, group in enumerate(groups):
        for task in group:
            yield f"  {level}  {task.number:>3}  {task.name:<44} {_extent(by_name.get(task.run, plans[0]), task)}"
    if args.engine == "slurm":
        folder = output_folders(args)[0] / PLANS / "<hash>"
        yield from (script(folder, [task.number for task in group]) for group in groups)


def _extent(plan: Plan, task: Task) -> str:
    """Rows of a task where 01 has fixed them, and seconds where a run of the folder has done the same stage."""
    asked = {GSM8K: attrgetter("gsm8k_eval_rows"), SAFETY: attrgetter("ailuminate_rows")}.get(task.stage)
    share = int(task.part.partition("-of-")[2]) if task.part else 1
    num_rows = ceil(count_lines(asked(plan.paths)) / share) if asked else 0
    words = [f"{num_rows} rows" if num_rows else "rows as 01 fixes them"] if asked else []
    for paths in [plan.paths, *find_runs(str(plan.paths.run_dir.parent))] if task.run else []:
        if paths.manifest(task.stage).exists():
            took_s = read_json(paths.manifest(task.stage))["wall_s"]
            done = count_lines(asked(paths)) if asked else 0
            return ", ".join([*words, f"about {took_s * (num_rows / done if num_rows and done else 1):.0f} s"])
    return ", ".join(words)


def _stages(plan: Plan, rerun: bool) -> dict[str, str]:
    """Stage -> why it would run, or that it is complete."""
    states: dict[str, str] = {}
    for stage in (stage for stage in plan.stages if stage != COMPARE_STAGE):
        reason = due_reason(plan, stage, plan.paths.stage_dir(stage), rerun)
        states[stage] = reason or (FOLLOWS if _runs(states) else "complete")
    return states


def _runs(states: dict[str, str]) -> list[str]:
    """The stages that run or may run."""
    return [stage for stage, state in states.items() if state != "complete"]


def _comparison(first: Plan, rerun: bool, before: Collection[str]) -> tuple[str, bool]:
    """The state of 05 after the stages that run before, and whether it runs."""
    plan = comparison_plan(first)
    if {"03_eval_gsm8k", "04_eval_safety"} & {*before} or (plan and before):
        return "after the stages above, over every run of the folder", True
    if not plan:
        return "no run has rows to compare", False
    reason = due_reason(plan, COMPARE_STAGE, plan.paths.run_dir.parent / COMPARE_STAGE, rerun)
    return reason or "complete", bool(reason)


def _lines(plan: Plan, states: dict[str, str]) -> Iterator[str]:
    yield from (f"{stage:<15} {state}" for stage, state in states.items())
    if plan.settings["require_rows"]:
        questions, prompts = plan.params.submission_gsm8k_rows, plan.params.submission_ailuminate_rows
        yield f"{'required rows':<15} {questions} GSM8K questions, {prompts} AILuminate prompts; others fail 05"
    runs = _runs(states)
    for kind, place in _sources(plan, runs):
        yield f"{kind:<15} {place.name}: {_origin(place, plan.settings['offline'])}"
    files = [file for stage in runs for file in _stage_files(plan, stage)]
    yield from _written([plan.paths.config_resolved, plan.paths.run_dir / COMMITMENT, *files])


def _sources(plan: Plan, runs: Collection[str]) -> Iterator[tuple[str, Place]]:
    """What each model and data set of these stages is for, and where it lies."""
    params, assets_dir, adapter = plan.params, plan.settings["assets_dir"], plan.settings["checkpoint"]
    prompts = (params.ailuminate_source, params.ailuminate_prompt_set, assets_dir)
    trains = "02_train" in runs and not adapter
    if runs:
        yield "base model", find_model(params.base_model, params.base_model_revision, assets_dir)
    if "02_train" in runs and adapter:
        yield "adapter", find_model(adapter, "main", assets_dir, params.base_model)
    if "04_eval_safety" in runs or (trains and sweeps_safety(params)):
        yield "judge", find_model(params.safeguard_model, params.safeguard_revision, assets_dir)
    if "01_prepare" in runs:
        for place in find_questions({**params.model_dump(), "assets_dir": assets_dir}):
            yield "data", place
        yield "data", find_prompts(*prompts)
        if params.fewshot_file and (file := own_path(params.fewshot_file)).exists():
            yield "examples", place_of(file)
    # The class CSV holds evaluation prompts alone.
    if trains and params.dev_safety_rows and ("01_prepare" not in runs or prompts[0] == "class"):
        yield "data", find_prompts("mlcommons" if prompts[0] == "class" else prompts[0], "all", assets_dir)


def _origin(place: Place, offline: bool) -> str:
    if place.found and place.found.suffix == ".gguf":
        return f"bundled, converted once into {as_typed(MODELS_DIR / place.name)}"
    if place.found:
        return f"found in {'the hub cache' if place.origin == 'hub' else as_typed(place.found)} ({place.origin})"
    if not place.address:
        return (
            f"missing{f' ({as_typed(place.target)})' if place.target else ''}; there is no address to download it from"
        )
    if offline or (place.address.startswith("the hub") and hub_is_offline()):
        return f"missing, and the network is switched off (offline); it would come from {place.address}"
    return f"to be downloaded from {place.address} to {as_typed(place.target) if place.target else 'the hub cache'}"


def _stage_files(plan: Plan, stage: str) -> Iterator[Path]:
    paths, params = plan.paths, plan.params
    yield paths.stage_dir(stage)
    yield from {
        "02_train": [paths.checkpoint_scores] * (params.checkpoint_sweep and not plan.settings["checkpoint"]),
        "03_eval_gsm8k": [paths.gsm8k_preds],
        "04_eval_safety": [paths.ailuminate_preds, paths.ailuminate_safety],
    }.get(stage, [])
    if stage in ("03_eval_gsm8k", "04_eval_safety") and params.evaluate_untuned:
        yield paths.untuned_dir
    if stage == "01_prepare" and params.fewshot_file and not own_path(params.fewshot_file).exists():
        yield own_path(params.fewshot_file)
    yield from _notebooks(plan.reports_dir, stage)


def _notebooks(folder: Path, stage: str) -> list[Path]:
    return [folder / f"{stage}.ipynb", folder / f"{stage}.html"]


def _written(files: list[Path], indent: str = "") -> list[str]:
    return [f"{indent}{'would write':<15} {as_typed(file)}" for file in dict.fromkeys(files)]
