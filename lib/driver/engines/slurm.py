"""The tasks of a plan on Slurm: one array for each level of the plan, which waits for the one before."""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lib.driver.cli import UsageError
from lib.driver.kernel import Interrupts
from lib.driver.tasks import DONE, LOST, RUNNING, WAITING, Tasks, levels
from lib.driver.worker import keep_unchanged
from lib.record.files import write_json
from lib.record.paths import ENGINE_VARIABLE, PROJECT_ROOT
from lib.record.terminal import tell

LOOK_AGAIN_S = 5.0
JOBS_FILE = "slurm.json"
# Of a task that was preempted, or stopped before its time limit; Slurm itself counts lost nodes.
MAX_RESTARTS = 5
WARNING_S = 120
# Not afterok: a cell's error must not keep the other runs from going on; a task looks at those that it needs itself.
SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=level-{level}
#SBATCH --array={numbers}
#SBATCH --requeue
#SBATCH --signal=B:TERM@{warning}
#SBATCH --open-mode=append
#SBATCH --output={folder}/%a.log
cd {project}
export {engine}=slurm
{python} run_all.py --worker {plan} --task "$SLURM_ARRAY_TASK_ID" &
trap 'kill -TERM $!' TERM INT
wait $!; status=$?
# A trap ends the first wait.
while kill -0 $! 2> /dev/null; do wait $!; status=$?; done
if [ $status -eq 130 ] && [ ! -e {plan}/stop ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit $status
"""


class SlurmEngine:
    """``options`` of sbatch, as a person types them: ``--gres=gpu:1 --time=4:00:00``."""

    runs_several = True

    def __init__(self, options: str) -> None:
        self._options = shlex.split(options)

    def is_at_work(self, tasks: Tasks) -> bool:
        """Whether Slurm still knows jobs of the plan: they outlive the driver that submitted them."""
        return bool(queued(tasks.folder))

    def run(self, tasks: Tasks) -> None:
        """Submit what is not done, unless it was, and follow it to its end."""
        if not self.is_at_work(tasks):
            self._submit(tasks)
        waiting = {task.number for task in tasks.all}
        with Interrupts(tell) as interrupts:
            while waiting:
                time.sleep(LOOK_AGAIN_S)
                if interrupts.count > tasks.stop_wanted():
                    tasks.want_stop(interrupts.count)
                    _slurm("scancel", *(["--state=PENDING"] if interrupts.count == 1 else []), *jobs_of(tasks.folder))
                # In this order: what has just ended stands in its file before it leaves the queue.
                ended = waiting - queued(tasks.folder)
                states = tasks.states()
                for task in (tasks.all[number] for number in ended):
                    state = states[task.number]
                    is_over = state.state not in (WAITING, RUNNING) or tasks.is_blocked(task, states)
                    if not is_over and not interrupts.count:
                        why = f"{task.name}: Slurm ended it, begun {state.tries} times\n  its log: {tasks.log(task)}"
                        tasks.write(task, 0, state=LOST, failure=why)
                waiting -= ended

    def _submit(self, tasks: Tasks) -> None:
        keep_unchanged(tasks)
        before: list[str] = []
        for path in scripts(tasks):
            wait = [f"--dependency=afterany:{before[-1]}"] if before else []
            before.append(_slurm("sbatch", "--parsable", *wait, *self._options, str(path)).partition(";")[0].strip())
            write_json(tasks.folder / JOBS_FILE, before)


def scripts(tasks: Tasks) -> list[Path]:
    """Write the script of each level's array, of what is not done, into the plan's folder."""
    paths, states = [], tasks.states()
    for level, group in enumerate(levels(tasks.all)):
        numbers = [task.number for task in group if states[task.number].state != DONE]
        if numbers:
            paths.append(tasks.folder / f"level-{level}.sh")
            paths[-1].write_text(script(tasks.folder, level, numbers), encoding="utf-8")
    return paths


def script(plan: Path, level: int, numbers: Sequence[int]) -> str:
    """A batch script that runs the tasks ``numbers`` of ``plan``, each as a job of an array."""
    quoted = {"project": PROJECT_ROOT, "python": sys.executable, "plan": plan}
    return SCRIPT.format(
        level=level,
        numbers=",".join(map(str, numbers)),
        warning=WARNING_S,
        folder=plan,
        engine=ENGINE_VARIABLE,
        restarts=MAX_RESTARTS,
        **{name: shlex.quote(str(value)) for name, value in quoted.items()},
    )


def jobs_of(plan: Path) -> list[str]:
    """The numbers of the arrays that were submitted for a plan."""
    path = plan / JOBS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def queued(plan: Path) -> set[int]:
    """The tasks of a plan that wait or run in Slurm."""
    jobs = jobs_of(plan)
    if not jobs:
        return set()
    # -r: a line for each task of an array. An array that is long gone is an error to squeue.
    lines = _slurm("squeue", "--noheader", "--array", "--format=%F %K", "--me").splitlines()
    return {int(task) for job, task in (line.split() for line in lines) if job in jobs and task.isdigit()}


def _slurm(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"--engine slurm: {command[0]} cannot be run ({error})") from None
    if done.returncode:
        raise UsageError(f"--engine slurm: {command[0]} failed: {done.stderr.strip()[:400]}")
    return done.stdout
