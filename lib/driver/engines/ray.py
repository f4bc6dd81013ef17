"""The tasks of a plan on Ray Core: machines that ``ray start`` joined, or this one alone (requirements-ray.txt)."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from lib.driver.cli import UsageError
from lib.driver.devices import THREADS_VARIABLE
from lib.driver.engines.engine import say, work_off
from lib.driver.kernel import Interrupts
from lib.driver.tasks import DONE, LOST, STOP_FILE, STOPPED, Task, Tasks
from lib.driver.worker import PARENT_VARIABLE, STATUS, keep_unchanged
from lib.record.paths import COMPARE_STAGE, ENGINE_VARIABLE, PROJECT_ROOT
from lib.record.terminal import tell

# Of a task whose machine or process was lost; a cell's error is never tried again.
MAX_RETRIES = 3
CONNECT_S = 10
# Read by Ray as it is imported: it reports nothing to its makers, sends no project of `uv run` to other machines, and
# tries what was ended for its memory as often as the rest, not for ever.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_task_oom_retries": str(MAX_RETRIES),
}


class RayEngine:
    """``address`` of a cluster's head, "" for $RAY_ADDRESS or a cluster of this machine; ``jobs`` at once on a CPU."""

    runs_several = True

    def __init__(self, address: str, jobs: int) -> None:
        os.environ |= ENVIRONMENT
        try:
            import ray
        except ModuleNotFoundError:
            raise UsageError("--engine ray: Ray is not installed: pip install -r requirements-ray.txt") from None
        self._ray, self._jobs = ray, jobs
        # Without an address Ray would join whatever cluster was last started on this machine.
        self._address = address or os.environ.get("RAY_ADDRESS") or "local"

    def is_at_work(self, _tasks: Tasks) -> bool:
        """Never: Ray ends the tasks of a driver that is gone."""
        return False

    def run(self, tasks: Tasks) -> None:
        """As ``Engine``'s."""
        keep_unchanged(tasks)
        if all(state.state == DONE for state in tasks.states().values()):
            return
        ray = self._ray
        # A raylet's words about what it tries again, as Ray itself silences them at a breakpoint: no option does.
        ray._private.worker._worker_logs_enabled = False
        try:
            _check(self._address)
            ray.init(self._address, include_dashboard=False, log_to_driver=False, logging_level="error")
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(f"--engine ray: {self._address}: {str(error).splitlines()[0]}") from None
        try:
            work = ray.remote(max_retries=MAX_RETRIES, retry_exceptions=True)(make_work(tasks))
            resources = self._resources(tasks)

            def submit(task: Task) -> Future[str]:
                needs = {"num_cpus": 1} if task.stage == COMPARE_STAGE else resources
                future = work.options(**needs).remote(task.number, str(tasks.log(task))).future()
                future.add_done_callback(lambda ended: say(tasks, task, LOST if ended.exception() else ended.result()))
                return future

            with Interrupts(tell) as interrupts:
                work_off(tasks, submit, interrupts, len(tasks.all))
        finally:
            ray.shutdown()

    def _resources(self, tasks: Tasks) -> dict[str, int]:
        """A GPU for each task where the cluster has any, and a share of the cores, which Ray makes as many threads."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        wants_gpu = any(plan.params.device in ("auto", "cuda") for plan in tasks.runs.values())
        # The smallest share, so that every machine takes part.
        if shares := [node["CPU"] // node["GPU"] for node in nodes if wants_gpu and node.get("GPU") and "CPU" in node]:
            return {"num_cpus": max(1, int(min(shares))), "num_gpus": 1}
        # Without any, others are yet to join.
        cores = min((int(node["CPU"]) for node in nodes if node.get("CPU")), default=1)
        return {"num_cpus": max(1, cores // self._jobs)}


def _check(address: str) -> None:
    """OSError where nothing listens: Ray itself would look for more than ten minutes."""
    host, _, port = address.rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()


def make_work(tasks: Tasks) -> Callable[[int, str], str]:
    """The function that Ray sends to its workers, which need nothing of this project to read it."""
    command = [sys.executable, "run_all.py", "--worker", str(tasks.folder), "--task"]
    project, stop_file = str(PROJECT_ROOT), tasks.folder / STOP_FILE
    typed = {name: os.environ[name] for name in (THREADS_VARIABLE,) if name in os.environ}
    words = {status: word for word, status in STATUS.items() if word != LOST}

    def work(number: int, log: str) -> str:
        if stop_file.exists():
            return STOPPED
        environment = os.environ | typed | {ENGINE_VARIABLE: "ray", PARENT_VARIABLE: str(os.getpid())}
        with Path(log).open("ab") as stream:
            status = subprocess.call(
                [*command, str(number)], cwd=project, env=environment, stdout=stream, stderr=stream
            )
        if status not in words:
            raise RuntimeError(f"its worker ended with status {status}")
        return words[status]

    return work
