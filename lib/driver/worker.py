"""One task, run where it is typed or started: the same for every engine."""

import argparse
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib.driver.cli import UsageError
from lib.driver.display import final_lines
from lib.driver.environment import set_kernel_environment
from lib.driver.kernel import Interrupts
from lib.driver.kernel_server import die_with
from lib.driver.notebook import declared_parameters, execute, is_complete
from lib.driver.plan import Plan
from lib.driver.tasks import DONE, FAILED, GSM8K, LOST, RUNNING, SAFETY, STOPPED, Task, Tasks, read_tasks
from lib.record import shards
from lib.record.files import error_text
from lib.record.locks import hold_file, release_file
from lib.record.manifest import NOT_RUN, stale_reason
from lib.record.paths import COMPARE_STAGE, ENGINE_VARIABLE, PROJECT_ROOT, ArtifactError, find_runs, results_root
from lib.record.progress import FILE_VARIABLE, read_file
from lib.record.redaction import clean
from lib.record.terminal import as_typed, fail, tell

LOOK_AGAIN_S = 1.0
# What the names of a stage's row files begin with.
ROWS_OF = {GSM8K: "gsm8k", SAFETY: "ailuminate"}
# How late a shared folder may show what another machine wrote: on NFS after up to 60 s, the mount's acdirmax.
SEEN_WITHIN_S = 90.0
STATUS = {DONE: 0, FAILED: 1, LOST: 75, STOPPED: 130}
# The process that a worker must not outlive.
PARENT_VARIABLE = "RUN_PARENT"


def stage_parameters(stage: str, plan: Plan, part: str = "") -> dict[str, Any]:
    """The values of exactly the names that the notebook declares."""
    known = {**plan.params.model_dump(), **plan.settings, "part": part}
    return {name: known[name] for name in declared_parameters(stage)}


def due_reason(plan: Plan, stage: str, folder: Path, rerun: bool = False) -> str:
    """Why a stage would run; "" where it is kept."""
    reason = "--rerun-all" if rerun else stale_reason(folder / "manifest.json", stage, stage_parameters(stage, plan))
    is_filled = is_complete(plan.reports_dir / f"{stage}.ipynb")
    return reason or ("" if is_filled else "its filled notebook is incomplete")


def comparison_plan(first: Plan) -> Plan | None:
    """The plan of 05 over every run of the folder; ``None`` if it was not chosen or has nothing to compare."""
    runs = find_runs(str(results_root(first.settings["results_dir"])))
    if COMPARE_STAGE not in first.stages or not runs:
        return None
    # By name, so that a run folder that was copied in makes the comparison run again.
    settings = {**first.settings, "run_names": [run.name for run in runs]}
    return replace(first, preset="all runs", settings=settings, reports_dir=first.reports_dir.parent)


def task_reason(tasks: Tasks, task: Task) -> str:
    """Why a task would run; "" where what it makes is there."""
    plan = tasks.plan(task)
    if task.part:
        users = [one for one in tasks.all if task.number in one.after and not one.part]
        is_due = any(task_reason(tasks, one) for one in users) and tasks.state(task).state != DONE
        return NOT_RUN if is_due else ""
    if task.stage == COMPARE_STAGE:
        compared = comparison_plan(plan)
        folder = results_root(plan.settings["results_dir"]) / COMPARE_STAGE
        return due_reason(compared, task.stage, folder) if compared else ""
    return due_reason(plan, task.stage, plan.paths.stage_dir(task.stage))


def keep_unchanged(tasks: Tasks) -> None:
    """Mark as done what would only be looked at and kept: no other machine has to start for it."""
    for task in tasks.all:
        if all(tasks.state(tasks.all[one]).state == DONE for one in task.after) and not task_reason(tasks, task):
            tasks.write(task, os.getpid(), state=DONE)


def work(args: argparse.Namespace) -> int:
    """``--worker PLAN --task N``: run one task of a frozen plan, until a signal or the plan's stop file ends it.

    Returns 0 when it is done, 1 after a cell's error, 75 if the kernel was lost, 130 when stopped.
    """
    tasks = read_tasks(args.worker)
    if not 0 <= args.task < len(tasks.all):
        raise UsageError(f"--task {args.task}: the plan has tasks 0 to {len(tasks.all) - 1}")
    task = tasks.all[args.task]
    if why := _why_not(tasks, task):
        fail(f"{task.name}: not run: {why}")
        return STATUS[FAILED]
    if parent := os.environ.pop(PARENT_VARIABLE, ""):
        die = die_with(int(parent))
        _ = die and die()
        # Ray blocks it in all that it starts: a kernel would never hear of Ctrl-C.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    set_kernel_environment(tasks.plan(task).settings["offline"])
    os.chdir(PROJECT_ROOT)
    with Interrupts(tell) as interrupts, ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_task, tasks, task, interrupts)
        while not wait([running], LOOK_AGAIN_S).done:
            if interrupts.count < tasks.stop_wanted():
                interrupts.stop()
    return STATUS[running.result()]


def _why_not(tasks: Tasks, task: Task) -> str:
    """Which task that it needs keeps a task from running; "" when all are over."""
    # An engine starts a task when the others have ended, perhaps on other machines.
    deadline = time.monotonic() + (SEEN_WITHIN_S if os.environ.get(ENGINE_VARIABLE) else 0)
    while True:
        states = tasks.states()
        missing = [tasks.all[one].name for one in task.after if not tasks.is_over(tasks.all[one], states, task)]
        is_blocked = tasks.is_blocked(task, states)
        if not missing or is_blocked or time.monotonic() >= deadline:
            return f"{missing[0]} {'failed' if is_blocked else 'is not done'}" if missing else ""
        time.sleep(LOOK_AGAIN_S)


def run_task(tasks: Tasks, task: Task, interrupts: Interrupts, environment: Mapping[str, str] | None = None) -> str:
    """Run a task unless what it makes is there, and keep how it ended in its file, which is returned as a word."""
    try:
        with _held(tasks, task):
            return _run_held(tasks, task, interrupts, environment or {})
    except (ArtifactError, OSError) as error:
        tasks.write(task, os.getpid(), state=FAILED, failure=f"{task.stage}: {clean(error_text(error))}")
        return FAILED


@contextmanager
def _held(tasks: Tasks, task: Task) -> Iterator[None]:
    # One process on any machine: a worker that was given up as lost may still write a row.
    hold_file(tasks.file(task), beside=True)
    try:
        yield
    finally:
        release_file(tasks.file(task))


def _run_held(tasks: Tasks, task: Task, interrupts: Interrupts, environment: Mapping[str, str]) -> str:
    reason, say = task_reason(tasks, task), (lambda _: None) if tasks.plan(task).quiet else tell
    if not reason:
        if not task.part and (task.run or comparison_plan(tasks.plan(task))):
            say(f"{task.name}: unchanged, kept")
        tasks.write(task, os.getpid(), state=DONE)
        return DONE
    say(f"{task.name}: running" + (f" ({reason})" if reason != NOT_RUN else ""))
    tries = tasks.state(task).tries + 1
    about = {"state": RUNNING, "where": socket.gethostname(), "started": time.time(), "tries": tries}
    tasks.write(task, os.getpid(), work=[], failure="", **about)
    plan = (comparison_plan(tasks.plan(task)) if not task.run else None) or tasks.plan(task)
    check_gpus(plan, task)
    notebook = (tasks.folder / f"{task.number}.ipynb") if task.part else plan.reports_dir / f"{task.stage}.ipynb"
    outcome = execute(
        task.stage,
        notebook,
        stage_parameters(task.stage, plan, task.part),
        interrupts,
        cell_timeout_s=plan.cell_timeout_s,
        go_on=plan.go_on,
        environment={**environment, FILE_VARIABLE: str(tasks.file(task))},
    )
    state = STOPPED if outcome.interrupted else LOST if outcome.died else FAILED if outcome.error else DONE
    failure = ""
    if outcome.error:
        cell = f" in cell {outcome.cell}" if outcome.cell else ""
        failure = f"{task.stage}{cell}: {clean(outcome.error)}\n  notebook: {as_typed(outcome.notebook)}"
    tasks.write(task, os.getpid(), state=state, failure=failure, wall_s=outcome.wall_s)
    if state == DONE:
        lines = final_lines(read_file(tasks.file(task)).get("work", []))
        say("\n  ".join([f"{task.name}: done in {outcome.wall_s:.0f} s", *lines]))
    else:
        say(f"{task.name}: {'interrupted' if outcome.interrupted else 'failed'} after {outcome.wall_s:.0f} s")
    return state


def check_gpus(plan: Plan, task: Task) -> None:
    """ArtifactError where shares that this task joins were made by GPUs of several kinds, unless that was allowed."""
    if task.part or task.stage not in ROWS_OF or plan.settings["allow_unlike"]:
        return
    for folder in (plan.paths.run_dir, plan.paths.untuned_dir):
        for path in sorted(folder.glob(f"{ROWS_OF[task.stage]}*{shards.FOLDER_ENDING}")):
            kinds = shards.gpus_of(path.with_name(path.name.removesuffix(shards.FOLDER_ENDING)))
            if len(kinds) > 1:
                raise ArtifactError(
                    f"{path.name}: shares of one evaluation were made by {' and '.join(sorted(kinds))}, whose rounding "
                    "differs; delete those of one kind and type the command again, or allow it with --allow-unlike"
                )
