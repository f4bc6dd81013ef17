"""What runs the tasks of a plan: this machine, Ray or Slurm."""

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from typing import Protocol

from lib.driver.kernel import Interrupts
from lib.driver.tasks import DONE, LOST, STOPPED, Task, Tasks

LOOK_AGAIN_S = 0.5


class Engine(Protocol):
    """``runs_several``: several tasks at once, so that untuned rows are better made apart."""

    runs_several: bool

    def is_at_work(self, tasks: Tasks) -> bool:
        """Whether tasks of an earlier driver still run or wait to."""

    def run(self, tasks: Tasks) -> None:
        """Run every task that is not done, each after those that it needs; Ctrl-C lets each finish its row."""


def work_off(tasks: Tasks, submit: Callable[[Task], Future[str]], interrupts: Interrupts, at_once: int) -> None:
    """Submit each task when its turn has come, ``at_once`` at most; the first interrupt submits no more."""
    running: dict[Future[str], Task] = {}
    begun = {number for number, state in tasks.states().items() if state.state == DONE}
    ended: dict[int, str] = {}
    stopped = False
    while True:
        # What a task returned counts also where a shared folder does not show its file yet.
        states = {
            number: replace(state, state=ended.get(number, state.state)) for number, state in tasks.states().items()
        }
        for task in tasks.ready(states, begun)[: 0 if stopped else at_once - len(running)]:
            begun.add(task.number)
            running[submit(task)] = task
        if not running:
            return
        for future in wait(running, LOOK_AGAIN_S, FIRST_COMPLETED).done:
            task = running.pop(future)
            if error := future.exception():
                why = f"{task.name}: given up: {error}\n  its log: {tasks.log(task)}"
                tasks.write(task, 0, state=LOST, failure=why)
            ended[task.number] = LOST if error else future.result()
        # A cell may also be stopped by hand: nobody wants the others then.
        stopped = bool(interrupts.count) or STOPPED in ended.values()
        if interrupts.count != tasks.stop_wanted():
            tasks.want_stop(interrupts.count)
