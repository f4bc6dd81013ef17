"""A Ray cluster of a head and two raylets on this machine, whose parts are killed: the rows are those of a local run.

    CHAOS_KILLS=20 python -m pytest tests/slow/test_ray.py -m slow -s

Three presets with two seeds each; raylets, Ray's workers, workers of tasks, kernels and the command are killed at
seeded random moments, and a command that ended is typed again. By default light notebooks are killed that write rows as
slowly as a model; CHAOS_KILLS kills the real ones that often, with tiny random models.
"""

import os
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import chaos
import psutil
import pytest
import test_kills
from chaos import Driver
from small_notebooks import copy_project, is_gone, wait_for, write_notebook

from lib.record.paths import PROJECT_ROOT, STAGES
from lib.record.rows import write_jsonl

NUM_KILLS = int(os.environ.get("CHAOS_KILLS", "0"))
LIGHT_KILLS = 10
KINDS = ("raylet", "ray worker", "worker", "kernel", "driver")
PRESETS = ("one", "two", "three")
FIXTURE = "tests/fixtures/made_before"
# Each core is a machine with one task at a time.
ON_ONE_CORE = {"OMP_NUM_THREADS": "1"}
# From one kill to the next: some hit a worker as it starts, others in the middle of its rows.
LEAST_S, MOST_S = 1.0, 15.0

# What each machine of the cluster is started with.
SMALL = {"object_store_memory": 80_000_000, "include_dashboard": False}


@pytest.fixture
def project(tmp_path):
    """A copy of the project with three presets, which have light notebooks or tiny models."""
    project = copy_project(tmp_path)
    for preset in PRESETS:
        shutil.copy2(project / "params/sandbox_one.yaml", project / f"params/{preset}.yaml")
    shutil.copytree(PROJECT_ROOT / FIXTURE, project / FIXTURE)
    if not NUM_KILLS:
        rows = [{"question": f"{number}?", "answer": f"{number}\n#### {number}"} for number in range(25)]
        write_jsonl(project / "questions/gsm8k_test.jsonl", rows)
        slow_rows = test_kills.ROWS.replace("sleep(0.03)", "sleep(0.2)")
        write_notebook(project / "notebooks/03_eval_gsm8k.ipynb", slow_rows, test_kills.FINISH, "print('summary')")
        names = 'results_dir: str = ""  # folder\nrun_names: list = []  # runs'
        write_notebook(project / "notebooks/05_compare.ipynb", test_kills.COMPARE, parameters=names)
    return project


@pytest.fixture
def cluster(monkeypatch):
    """A head that takes no tasks and two machines of one core each."""
    # Ray's sockets need a short path.
    place = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    for name, value in {"RAY_TMPDIR": place, "RAY_USAGE_STATS_ENABLED": "0"}.items():
        monkeypatch.setenv(name, value)
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={**SMALL, "num_cpus": 0})
    for _ in range(2):
        cluster.add_node(**SMALL, num_cpus=1)
    yield cluster
    cluster.shutdown()
    shutil.rmtree(place, ignore_errors=True)


def driver(project: Path, name: str, *flags: str) -> Driver:
    settings = (project / FIXTURE / "settings.txt").read_text().split()
    if not NUM_KILLS:
        settings = ["device=cpu", "gsm8k_source=questions", "max_gsm8k_rows=0", "evaluate_untuned=false"]
    stages = STAGES if NUM_KILLS else test_kills.LIGHT_STAGES
    flags = ("--presets", *PRESETS, "--seeds", "1", "2", "--set", *settings, *flags)
    return Driver(project, project.parent / name, stages, flags, ON_ONE_CORE)


def running(output: Path) -> dict[str, list[psutil.Process]]:
    """Kind -> the processes that work for ``output`` now."""
    workers, kernels, parents = [], [], []
    for process in psutil.process_iter(["cmdline"]):
        if "--worker" in (process.info["cmdline"] or []) and str(output) in " ".join(process.info["cmdline"]):
            try:
                below = process.children()
                kernels += [child for child in below if "ipykernel" in " ".join(child.cmdline())]
                parents.append(process.parent())
                workers.append(process)
            except psutil.NoSuchProcess:
                continue
    return {"worker": workers, "kernel": kernels, "ray worker": parents}


class Killer:
    """Kills parts of a run on ``cluster``, and types its command again when it has ended."""

    def __init__(self, cluster, run: Driver, draw: random.Random) -> None:
        self.cluster, self.run, self.draw = cluster, run, draw
        self.killed, self.ended, self.seen = Counter(), Counter(), set()

    def look(self) -> bool:
        """Whether the run is done; a command that ended in another way is typed again."""
        now = running(self.run.output)
        self.seen |= {*now["worker"], *now["kernel"]}
        if not self.run.is_running():
            if self.run.process:
                status = self.run.finish()
                self.ended[status] += 1
                text = self.run.output_text()
                assert status in (0, 1, -9) and "Traceback" not in text, text[-2000:]
                if status == 0:
                    return True
                assert status == -9 or "given up" in text, text[-2000:]
            self.run.start()
        time.sleep(0.2)
        return False

    def strike(self, kind: str) -> None:
        """Kill one of a kind with SIGKILL, if there is one now."""
        if kind == "raylet":
            node = self.draw.choice([node for node in self.cluster.list_all_nodes() if not node.head])
            self.cluster.remove_node(node, allow_graceful=False)
            self.cluster.add_node(**SMALL, num_cpus=1)
        elif kind == "driver":
            below = running(self.run.output)
            self.run.process.kill()
            self.run.finish()
            # Typed again at once, or when Ray has ended what it started.
            if self.draw.random() < 0.5:
                wait_for(lambda: all(map(is_gone, below["worker"] + below["kernel"])), 30)
        else:
            targets = running(self.run.output)[kind]
            if not targets:
                return
            self.draw.choice(targets).kill()
        self.killed[kind] += 1

    def work(self, kinds: list[str]) -> None:
        """Kill each of ``kinds`` in turn until the run is done."""
        due = 0.0
        while not self.look():
            if not running(self.run.output)["kernel"] or not kinds:
                continue
            due = due or time.monotonic() + self.draw.uniform(LEAST_S, MOST_S)
            if time.monotonic() >= due:
                before = self.killed.total()
                self.strike(kinds[-1])
                if self.killed.total() > before:
                    kinds.pop()
                due = 0.0


@pytest.mark.slow
def test_whatever_is_killed_the_rows_are_those_of_a_local_run(project, cluster):
    began = time.monotonic()
    alone = driver(project, "alone", "--jobs", "2")
    chaos.run_undisturbed(alone)
    local_s, wanted = time.monotonic() - began, NUM_KILLS or LIGHT_KILLS
    draw, rounds, killed, ended = random.Random(0), 0, Counter(), Counter()
    kinds = draw.sample([KINDS[place % len(KINDS)] for place in range(wanted)], wanted)
    while kinds:
        run = driver(project, f"round-{rounds}", "--engine", "ray", "--address", cluster.address)
        killer = Killer(cluster, run, draw)
        killer.work(kinds)
        wait_for(lambda seen=killer.seen: all(map(is_gone, seen)), 30)
        assert not chaos.faults(alone.output, run.output, project)
        assert killer.killed, "runs end before they are killed"
        killed, ended, rounds = killed + killer.killed, ended + killer.ended, rounds + 1
    print(f"\n{dict(killed)} in {rounds} runs, statuses {dict(ended)}; local {local_s:.0f} s,", end=" ")
    print(f"all {time.monotonic() - began:.0f} s")
    assert killed.total() == wanted
