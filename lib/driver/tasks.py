"""What a command has to do, as tasks that any engine runs: frozen in a file before anything starts.

``<results>/.plan/<hash>/tasks.json`` holds the tasks and every parameter of their runs; beside it each task has a file
with how far it is, which its worker and its kernel keep (``lib.record.progress``).
"""

import shutil
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lib.driver.cli import UsageError
from lib.driver.plan import Plan
from lib.params import Params
from lib.record.files import read_json, sha256_json, write_json
from lib.record.locks import is_alive
from lib.record.paths import COMPARE_STAGE, PLANS, ArtifactError, results_root, run_paths
from lib.record.progress import read_file, write_file

FILE = "tasks.json"
# How often a person typed Ctrl-C: workers on other machines look at it.
STOP_FILE = "stop"
GSM8K, SAFETY = "03_eval_gsm8k", "04_eval_safety"
# Parameters that the untuned model's rows depend on: runs that agree in them share these rows.
_MODEL = ("base_model", "base_model_revision", "quantization", "compute_dtype", "device")
SHARED_BY = {
    GSM8K: (
        *(*_MODEL, "gsm8k_source", "gsm8k_eval_fraction", "max_gsm8k_rows", "gsm8k_max_new_tokens", "data_seed"),
        *("fewshot_k", "fewshot_pool_size", "fewshot_file", "fewshot_rows", "system_prompt_file"),
    ),
    SAFETY: (
        *(*_MODEL, "ailuminate_source", "ailuminate_prompt_set", "max_ailuminate_rows", "ailuminate_max_new_tokens"),
    ),
}
# Of a run, written as they are.
FIELDS = ("preset", "of_preset", "settings", "stages", "cell_timeout_s", "quiet")
WAITING, RUNNING, DONE, FAILED, STOPPED, LOST = "waiting", "running", "done", "failed", "stopped", "lost"


@dataclass(frozen=True)
class Task:
    """One notebook of one run, or, where ``part`` says which, one share of a side's rows: ``tuned 2-of-5``."""

    number: int
    run: str  # "" for 05, which is about all runs
    stage: str
    part: str = ""
    after: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return " ".join(filter(None, [self.run or "all runs", self.stage, self.part]))

    @property
    def short_name(self) -> str:
        """For a line with counts."""
        return " ".join(filter(None, [self.run or "all runs", self.stage[:2], self.part]))


@dataclass(frozen=True)
class State:
    """How far a task is; ``tries``: how often it was started; ``where``: the machine."""

    state: str = WAITING
    tries: int = 0
    where: str = ""
    started: float = 0.0
    wall_s: float = 0.0
    failure: str = ""
    num_rows: int = 0


def make_tasks(plans: Sequence[Plan], num_shares: int = 1, *, apart: bool = False) -> list[Task]:
    """The tasks of ``plans``, each after those that it needs; ``apart``: untuned rows are tasks of their own."""
    tasks: list[Task] = []

    def add(run: str, stage: str, after: Sequence[int], part: str = "") -> int:
        tasks.append(Task(len(tasks), run, stage, part, tuple(sorted({*after}))))
        return len(tasks) - 1

    def add_parts(run: str, stage: str, after: Sequence[int], side: str) -> list[int]:
        return [add(run, stage, after, f"{side} {index}-of-{num_shares}") for index in range(1, num_shares + 1)]

    made: dict[str, list[int]] = {}
    last: list[int] = []
    for plan in plans:
        before: list[int] = []
        prepared: list[int] = []
        for stage in (stage for stage in plan.stages if stage != COMPARE_STAGE):
            parts: list[int] = []
            if stage in SHARED_BY:
                if (apart or num_shares > 1) and plan.params.evaluate_untuned:
                    key = sha256_json([stage, *(getattr(plan.params, name) for name in SHARED_BY[stage])])
                    made[key] = made.get(key) or add_parts(plan.preset, stage, prepared, "untuned")
                    parts += made[key]
                if num_shares > 1:
                    parts += add_parts(plan.preset, stage, before, "tuned")
                last.append(add(plan.preset, stage, [*before, *parts]))
            else:
                before = [add(plan.preset, stage, before)]
                prepared = prepared or before
                last.append(before[0])
    if COMPARE_STAGE in plans[0].stages:
        add("", COMPARE_STAGE, last)
    return tasks


class Tasks:
    """A frozen plan in ``folder``; ``runs`` are its runs by name, in order."""

    def __init__(self, folder: Path, content: Mapping[str, Any]) -> None:
        self.folder, self._written = folder, dict[int, dict[str, Any]]()
        self.runs = {run["preset"]: _to_plan(run, content["typed"]) for run in content["runs"]}
        self.all = [Task(**{**task, "after": tuple(task["after"])}) for task in content["tasks"]]

    def file(self, task: Task) -> Path:
        """Where the task's state and counts are."""
        return self.folder / f"{task.number}.json"

    def log(self, task: Task) -> Path:
        """What a worker on another machine printed."""
        return self.folder / f"{task.number}.log"

    def plan(self, task: Task) -> Plan:
        """The run of a task; the first one, whose settings all share, for 05."""
        return self.runs[task.run] if task.run else next(iter(self.runs.values()))

    def state(self, task: Task) -> State:
        """As its file says; a worker of this machine that has ended without a word is lost."""
        content = read_file(self.file(task)) | self._written.get(task.number, {})
        known = {name: content.get(name, value) for name, value in asdict(State()).items()}
        if work := content.get("work"):
            known["num_rows"] = work[-1].done
        state = State(**known)
        is_here = state.where == socket.gethostname()
        gone = state.state == RUNNING and is_here and not is_alive(content.get("driver", 0))
        return replace(state, state=LOST, failure="its process was ended from outside") if gone else state

    def write(self, task: Task, driver: int, **changed: Any) -> None:
        """Change what the task's file says of its state; the counts of its kernel stay."""
        content = {**asdict(State()), "work": [], **read_file(self.file(task)), "driver": driver}
        content |= self._written.get(task.number, {}) | {"driver": driver, **changed}
        write_file(self.file(task), content)
        # Where the disk is full, the file says what it said before: this process knows better.
        self._written[task.number] = {name: value for name, value in content.items() if name != "work"}

    def states(self) -> dict[int, State]:
        return {task.number: self.state(task) for task in self.all}

    def ready(self, states: Mapping[int, State], begun: Collection[int]) -> list[Task]:
        """The tasks that were not begun and whose turn has come: 05 when all others have ended, however they did."""
        return [
            task
            for task in self.all
            if task.number not in begun and all(self.is_over(self.all[one], states, task) for one in task.after)
        ]

    def is_over(self, task: Task, states: Mapping[int, State], for_task: Task) -> bool:
        state = states[task.number].state
        if state == DONE:
            return True
        if for_task.stage != COMPARE_STAGE:
            return False
        return state in (FAILED, LOST) or self.is_blocked(task, states)

    def is_blocked(self, task: Task, states: Mapping[int, State]) -> bool:
        """Whether a task that it needs has failed, or one that this one needs."""
        before = [self.all[one] for one in task.after] if task.stage != COMPARE_STAGE else []
        return any(states[one.number].state in (FAILED, LOST) or self.is_blocked(one, states) for one in before)

    def was_stopped(self, task: Task, states: Mapping[int, State]) -> bool:
        """Whether a task was stopped, or never begun though nothing kept it from that."""
        state = states[task.number].state
        return state == STOPPED or (state == WAITING and not self.is_blocked(task, states))

    def reset(self) -> None:
        """Before a driver starts: nothing has been tried, and of what was done only shares of rows are kept."""
        self._written.clear()
        for task in self.all:
            if not (task.part and self.state(task).state == DONE):
                self.file(task).unlink(missing_ok=True)

    def stop_wanted(self) -> int:
        """How often a person typed Ctrl-C."""
        path = self.folder / STOP_FILE
        try:
            return int(path.read_text())
        except (OSError, ValueError):
            return 0

    def want_stop(self, times: int) -> None:
        with suppress(OSError):
            (self.folder / STOP_FILE).write_text(str(times))


def levels(tasks: Sequence[Task]) -> list[list[Task]]:
    """``tasks`` in groups, each of which needs the earlier ones alone."""
    depth: dict[int, int] = {}
    for task in tasks:
        depth[task.number] = 1 + max((depth[one] for one in task.after), default=-1)
    return [[task for task in tasks if depth[task.number] == level] for level in range(max(depth.values()) + 1)]


def freeze(
    results: Path, plans: Sequence[Plan], tasks: Sequence[Task], typed: str, is_at_work: Callable[[Path], Any]
) -> tuple[Tasks, bool]:
    """The plan of this command in ``results``, and whether it was there before; other plans of the folder go.

    UsageError with the difference where one of these ``is_at_work``.
    """
    content = {"runs": [_from_plan(plan) for plan in plans], "tasks": [asdict(task) for task in tasks]}
    digest = sha256_json(content)
    folder = results / PLANS / digest[:12]
    # A folder that came from elsewhere may hold another plan under this name.
    there = read_json(folder / FILE) if (folder / FILE).exists() else {}
    found = sha256_json({name: there[name] for name in content if name in there}) == digest
    for other in (results / PLANS).glob("*"):
        if other != folder:
            if is_at_work(other):
                raise UsageError(_refusal(other, read_json(other / FILE), content))
            shutil.rmtree(other)
    if not found:
        write_json(folder / FILE, {"typed": typed, **content})
    (folder / STOP_FILE).unlink(missing_ok=True)
    return read_tasks(folder), found


def _refusal(plan: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What the ``plan`` at work has and this command has not, and the ways on."""
    old, new = ({run["preset"]: run for run in content["runs"]} for content in (there, here))
    differences = [f"{name} is only {'there' if name in old else 'here'}" for name in old.keys() ^ new.keys()]
    for name in old.keys() & new.keys():
        for kind in ("parameters", "settings"):
            before, after = old[name][kind], new[name][kind]
            changed = [key for key in before if before[key] != after.get(key)]
            differences += [f"{name}: {key} is {before[key]!r} there, {after.get(key)!r} here" for key in changed]
    numbers = f"{len(there['tasks'])} tasks there, {len(here['tasks'])} here: other stages or shares"
    return (
        f"{plan.parents[1].name}/ is being filled by tasks of another command, which wait or run: {there['typed']}\n"
        + "".join(f"  {line}\n" for line in sorted(differences) or [numbers])
        + f"type that command to follow it, end its tasks (scancel --name={plan.name}), or use another --output-dir"
    )


def read_tasks(folder: Path) -> Tasks:
    """Read a frozen plan; ArtifactError if it is missing or of another version."""
    return Tasks(folder.resolve(), read_json(folder / FILE))


def task_lines(tasks: Tasks) -> list[str]:
    """A line for each task: its number and name, how far it is, where it runs, its rows and how often it was tried."""
    lines = []
    for task in tasks.all:
        state = tasks.state(task)
        rows = f"{state.num_rows} rows" if state.num_rows else ""
        tries = f"begun {state.tries} times" if state.tries > 1 else ""
        where = f"on {state.where}" if state.state == RUNNING else ""
        about = "  ".join(filter(None, [state.state, where, rows, tries]))
        lines.append(f"{task.number:>4}  {task.name:<44} {about}")
    return lines


def find_tasks(results: Path) -> Tasks | None:
    """The plan of a results folder that was not worked off, if there is one."""
    found = next((results / PLANS).glob(f"*/{FILE}"), None)
    return read_tasks(found.parent) if found else None


def _from_plan(plan: Plan) -> dict[str, Any]:
    same = {name: getattr(plan, name) for name in FIELDS}
    made = {"parameters": plan.params.model_dump(), "origin": plan.params.origin}
    return {**same, **made, "reports_dir": str(plan.reports_dir)}


def _to_plan(run: Mapping[str, Any], typed: str) -> Plan:
    try:
        params = Params.model_validate(run["parameters"])
    except ValidationError:
        raise ArtifactError(f"the plan of {run['preset']!r} is of another version: delete {PLANS}/") from None
    params.origin.update(run["origin"])
    results, reports = results_root(run["settings"]["results_dir"]).resolve(), Path(run["reports_dir"])
    paths = run_paths(str(results), run["preset"])
    return Plan(params=params, paths=paths, reports_dir=reports, go_on=typed, **{name: run[name] for name in FIELDS})
