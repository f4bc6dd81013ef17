"""What runs the tasks of a plan: this machine, Ray or Slurm."""

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Protocol

from lib.driver.kernel import Interrupts
from lib.driver.tasks import DONE, LOST, STOPPED, WAITING, State, Task, Tasks
from lib.record.terminal import as_typed, tell

LOOK_AGAIN_S = 0.5


class Engine(Protocol):
    """``runs_several``: several tasks at once, so that untuned rows are better made apart."""

    runs_several: bool

    def is_at_work(self, tasks: Tasks) -> bool:
        """Whether tasks of an earlier driver still run or wait to."""

    def run(self, tasks: Tasks) -> None:
        """Run every task that is not done, each after those that it needs; Ctrl-C lets each finish its row."""


def say(tasks: Tasks, task: Task, state: str) -> None:
    """A line on a task that ended on another machine, where its log is."""
    if not tasks.plan(task).quiet:
        tell(f"{task.name}: {state}")


def work_off(tasks: Tasks, submit: Callable[[Task], Future[str]], interrupts: Interrupts, at_once: int) -> None:
    """Submit each task when its turn has come, ``at_once`` at most; the first interrupt submits no more."""
    running: dict[Future[str], Task] = {}
    ended = {number: DONE for number, state in tasks.states().items() if state.state == DONE}
    begun, stopped = set(ended), False
    while True:
        # Not what the files say: one that Ray tries again reads as lost, and a shared folder shows some late.
        states = {task.number: State(ended.get(task.number, WAITING)) for task in tasks.all}
        for task in tasks.ready(states, begun)[: 0 if stopped else at_once - len(running)]:
            begun.add(task.number)
            running[submit(task)] = task
        if not running:
            return
        for future in wait(running, LOOK_AGAIN_S, FIRST_COMPLETED).done:
            task = running.pop(future)
            if error := future.exception():
                # Ray wraps what a task raised.
                cause = str(getattr(error, "cause", None) or error).partition("\n")[0]
                why = f"{task.stage}: given up: {cause}\n  its log: {as_typed(tasks.log(task))}"
                tasks.write(task, 0, state=LOST, failure=why)
            ended[task.number] = LOST if error else future.result()
        # A cell may also be stopped by hand: nobody wants the others then.
        stopped = bool(interrupts.count) or STOPPED in ended.values()
        if interrupts.count != tasks.stop_wanted():
            tasks.want_stop(interrupts.count)
