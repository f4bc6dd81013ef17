"""The tasks of a plan on Ray Core: machines that ``ray start`` joined, or this one alone (requirements-ray.txt)."""

import os
import sys
from collections.abc import Callable
from concurrent.futures import Future

from lib.driver.cli import UsageError
from lib.driver.devices import THREADS_VARIABLE
from lib.driver.engines.engine import work_off
from lib.driver.kernel import Interrupts
from lib.driver.tasks import LOST, Task, Tasks
from lib.driver.worker import PARENT_VARIABLE, STATUS, keep_unchanged
from lib.record.paths import COMPARE_STAGE, ENGINE_VARIABLE, PROJECT_ROOT
from lib.record.terminal import tell

# Of a task whose machine or process was lost; a cell's error is never tried again.
MAX_RETRIES = 3


class RayEngine:
    """``address`` of a cluster's head, "" for $RAY_ADDRESS or a cluster of this machine; ``jobs`` at once on a CPU."""

    runs_several = True

    def __init__(self, address: str, jobs: int) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ModuleNotFoundError:
            raise UsageError("--engine ray: Ray is not installed: pip install -r requirements-ray.txt") from None
        self._ray, self._address, self._jobs = ray, address, jobs

    def is_at_work(self, _tasks: Tasks) -> bool:
        """Never: Ray ends the tasks of a driver that is gone."""
        return False

    def run(self, tasks: Tasks) -> None:
        """As ``Engine``'s."""
        ray = self._ray
        keep_unchanged(tasks)
        try:
            ray.init(address=self._address or None, include_dashboard=False, log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UsageError(f"--engine ray: {str(error).splitlines()[0]}") from None
        try:
            work = ray.remote(max_retries=MAX_RETRIES, retry_exceptions=True)(make_work())
            resources = self._resources(tasks)

            def submit(task: Task) -> Future[str]:
                needs = {"num_cpus": 1, "num_gpus": 0} if task.stage == COMPARE_STAGE else resources
                command = [sys.executable, "run_all.py", "--worker", str(tasks.folder), "--task", str(task.number)]
                return work.options(**needs).remote(command, str(PROJECT_ROOT), str(tasks.log(task))).future()

            with Interrupts(tell) as interrupts:
                work_off(tasks, submit, interrupts, len(tasks.all))
        finally:
            ray.shutdown()

    def _resources(self, tasks: Tasks) -> dict[str, int]:
        """A GPU for each task where the cluster has any, else a share of a machine's cores."""
        wants_gpu = any(plan.params.device in ("auto", "cuda") for plan in tasks.runs.values())
        if wants_gpu and self._ray.cluster_resources().get("GPU"):
            return {"num_cpus": 1, "num_gpus": 1}
        cores = [int(node["Resources"].get("CPU", 0)) for node in self._ray.nodes() if node["Alive"]]
        return {"num_cpus": max(1, max(cores) // self._jobs), "num_gpus": 0}


def make_work() -> Callable[[list[str], str, str], str]:
    """The function that Ray sends to its workers, which need nothing of this project to read it."""
    engine, threads, parent = {ENGINE_VARIABLE: "ray"}, THREADS_VARIABLE, PARENT_VARIABLE
    words = {status: word for word, status in STATUS.items() if word != LOST}

    def work(command: list[str], folder: str, log: str) -> str:
        import os
        import subprocess
        import time
        from pathlib import Path

        # Ray sets one thread where a task has a GPU.
        inherited = {name: value for name, value in os.environ.items() if name != threads or value != "1"}
        environment = inherited | engine | {parent: str(os.getpid())}
        with Path(log).open("ab") as stream:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=stream, stderr=stream)
        # Polled: Ray interrupts Python, not a call to the system.
        while process.poll() is None:
            time.sleep(0.2)
        if process.returncode not in words:
            raise RuntimeError(f"its worker ended with status {process.returncode}")
        return words[process.returncode]

    return work
