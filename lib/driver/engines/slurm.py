"""The tasks of a plan on Slurm: one array for each level of the plan, which waits for the one before."""

import shlex
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

from lib.driver.cli import UsageError
from lib.driver.engines.engine import say
from lib.driver.kernel import Interrupts
from lib.driver.tasks import DONE, FAILED, LOST, WAITING, Tasks, levels
from lib.driver.worker import keep_unchanged
from lib.record.paths import ENGINE_VARIABLE, PROJECT_ROOT
from lib.record.terminal import fail, tell

LOOK_AGAIN_S = 5.0
# A shared folder may show a task's first file this late (NFS: acdirmax).
SEEN_AFTER_S = 60.0
# Of a task that was lost, or stopped before its time limit; what Slurm itself requeued counts too.
MAX_RESTARTS = 5
WARNING_S = 120
SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array={numbers}
#SBATCH --requeue
#SBATCH --signal=B:USR1@{warning}
#SBATCH --open-mode=append
#SBATCH --output={log}
cd {project} || exit 2
export {engine}=slurm
{python} run_all.py --worker {plan} --task "$SLURM_ARRAY_TASK_ID" &
# USR1 comes to this shell alone: the time is nearly over. TERM comes to every process: Slurm ends or requeues the task.
trap 'again=yes; kill -TERM $!' USR1
trap 'ended=yes' TERM
while kill -0 $! 2> /dev/null; do wait $!; done  # a trap ends a wait
wait $!; status=$?
# 75: the kernel was lost; above 130: the worker itself.
if [ $status -eq 75 ] || [ $status -gt 130 ]; then again=yes; fi
if [ $status -gt 1 ] && [ "$again" ] && [ ! "$ended" ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit $status
"""


class SlurmEngine:
    """``options`` of sbatch, as a person types them: ``--gres=gpu:1 --time=4:00:00``."""

    runs_several = True

    def __init__(self, options: str) -> None:
        try:
            self._options = shlex.split(options)
        except ValueError as error:
            raise UsageError(f"--sbatch {options}: {error}") from None

    def is_at_work(self, tasks: Tasks) -> bool:
        """Whether tasks wait or run: they outlive the driver that submitted them."""
        return bool(queued(tasks.folder))

    def run(self, tasks: Tasks) -> None:
        """Submit what was not submitted, and follow it to its end."""
        self._submit(tasks)
        if not tasks.plan(tasks.all[0]).quiet:
            tell(f"{len(queued(tasks.folder))} tasks in Slurm: squeue --name={tasks.folder.name}")
        _follow(tasks)

    def _submit(self, tasks: Tasks) -> None:
        there = queued(tasks.folder)
        if not there:
            keep_unchanged(tasks)
        before = {*there.values()}
        try:
            for path in scripts(tasks, there):
                # Not afterok: a cell's error must not keep other runs from going on; a task looks at those it needs.
                wait = [f"--dependency=afterany:{':'.join(sorted(before))}"] if before else []
                before = {_slurm("sbatch", "--parsable", *wait, *self._options, str(path)).partition(";")[0].strip()}
        except UsageError:
            if before and not there:
                _cancel(tasks.folder)
            raise


def _follow(tasks: Tasks) -> None:
    """Wait until every task has left the queue; name those that ended undone: cancelled, or lost too often."""
    waiting = {task.number: 0.0 for task in tasks.all}
    with Interrupts(tell) as interrupts:
        while waiting:
            time.sleep(LOOK_AGAIN_S)
            try:
                if interrupts.count > tasks.stop_wanted():
                    _cancel(tasks.folder, *(["--state=PENDING"] if interrupts.count == 1 else []))
                    tasks.want_stop(interrupts.count)
                # In this order: what has just ended stands in its file before it leaves the queue.
                gone, states = waiting.keys() - queued(tasks.folder).keys(), tasks.states()
            except UsageError as error:
                fail(f"{error}\n  looking again; the tasks do not need this command")
                continue
            for task in (tasks.all[number] for number in sorted(gone)):
                state = states[task.number]
                left_at = waiting[task.number] = waiting[task.number] or time.monotonic()
                if interrupts.count or state.state in (DONE, FAILED) or tasks.is_blocked(task, states):
                    del waiting[task.number]
                    say(tasks, task, state.state)
                elif time.monotonic() - left_at >= SEEN_AFTER_S:
                    why = f"given up, begun {state.tries} times: {state.failure or 'ended by Slurm'}"
                    tasks.write(task, 0, state=LOST, failure=f"{task.name}: {why}\n  its log: {tasks.log(task)}")
                    states[task.number] = tasks.state(task)
                    del waiting[task.number]


def scripts(tasks: Tasks, queued: Collection[int] = ()) -> list[Path]:
    """Write a script for each level, of the tasks that wait to be submitted, into the plan's folder."""
    paths, states = [], tasks.states()
    for level, group in enumerate(levels(tasks.all)):
        due = [task for task in group if states[task.number].state == WAITING and task.number not in queued]
        if numbers := [task.number for task in due if not tasks.is_blocked(task, states)]:
            paths.append(tasks.folder / f"level-{level}.sh")
            paths[-1].write_text(script(tasks.folder, numbers), encoding="utf-8")
    return paths


def script(plan: Path, numbers: Collection[int]) -> str:
    """A batch script that runs the tasks ``numbers`` of ``plan``, each as a job of an array named like the plan."""
    # sbatch takes % in a file's name for a field.
    log = f"{str(plan).replace('%', '%%')}/%a.log"
    quoted = {"name": plan.name, "log": log, "project": PROJECT_ROOT, "python": sys.executable, "plan": plan}
    return SCRIPT.format(
        numbers=",".join(map(str, numbers)),
        warning=WARNING_S,
        engine=ENGINE_VARIABLE,
        restarts=MAX_RESTARTS,
        **{name: shlex.quote(str(value)) for name, value in quoted.items()},
    )


def queued(plan: Path) -> dict[int, str]:
    """The tasks of a plan that wait or run in Slurm, each with the number of its array."""
    # Found by their name: a driver may be killed before it has noted a number. Other engines' plans have no script.
    if not any(plan.glob("level-*.sh")):
        return {}
    # --array: a line for each task.
    lines = _slurm("squeue", "--me", f"--name={plan.name}", "--noheader", "--array", "--format=%K %F").splitlines()
    return {int(task): job for task, job in map(str.split, lines)}


def _cancel(plan: Path, *which: str) -> None:
    _slurm("scancel", f"--name={plan.name}", *which)


def _slurm(*command: str) -> str:
    try:
        # In a new session, so that Ctrl-C reaches the driver alone.
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, start_new_session=True)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"--engine slurm: {command[0]} cannot be run ({error})") from None
    if done.returncode:
        raise UsageError(f"--engine slurm: {command[0]} failed: {done.stderr.strip()[:400]}")
    return done.stdout
