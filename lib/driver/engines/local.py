"""The tasks of a plan on this machine: one after the other, or several at once, each in a thread with its kernel."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

from lib.driver import kernel_server
from lib.driver.engines.engine import work_off
from lib.driver.kernel import Interrupts
from lib.driver.tasks import Task, Tasks
from lib.driver.worker import run_task, task_reason
from lib.record.locks import held_descriptors
from lib.record.paths import COMPARE_STAGE
from lib.record.terminal import tell


class LocalEngine:
    """As many tasks at once as there are ``environments``: variables of a kernel, such as its GPU."""

    def __init__(self, environments: Sequence[Mapping[str, str]]) -> None:
        self._environments, self.runs_several = environments, len(environments) > 1

    def is_at_work(self, _tasks: Tasks) -> bool:
        """Never: kernels end with their driver."""
        return False

    def run(self, tasks: Tasks) -> None:
        """As ``Engine``'s."""
        # Where all have the same, a forked kernel has the thread pools of the server that it is forked from.
        os.environ |= self._environments[0]
        free: SimpleQueue[Mapping[str, str]] = SimpleQueue()
        for environment in self._environments:
            free.put(environment)

        def run_in_place(task: Task) -> str:
            environment = free.get()
            try:
                return run_task(tasks, task, interrupts, environment)
            finally:
                free.put(environment)

        def submit(task: Task) -> Future[str]:
            # 05 imports no torch: alone it starts faster without. From the main thread, which outlives the others.
            if task.stage != COMPARE_STAGE and task_reason(tasks, task):
                kernel_server.start(held_descriptors())
            return pool.submit(run_in_place, task)

        try:
            # Linux ends a kernel with the thread that started it: those of a pool live as long as the pool.
            with Interrupts(tell) as interrupts, ThreadPoolExecutor(len(self._environments)) as pool:
                work_off(tasks, submit, interrupts, len(self._environments))
        finally:
            # It inherited the lock on the folder.
            kernel_server.stop()
