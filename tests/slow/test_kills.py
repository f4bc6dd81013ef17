"""Runs that are killed at seeded random moments and started again end as the undisturbed run, with nothing lost.

    CHAOS_KILLS=100 python -m pytest tests/slow/test_kills.py -m slow

Row files, adapters, tables and metrics are compared byte for byte, but for times, paths and versions. By default light
notebooks are killed that write rows as slowly as a model, and the real ones once in each stage; CHAOS_KILLS kills the
real ones that often in every test, at 20 s per kill.
"""

import json
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import chaos
import pytest
from chaos import Driver
from small_notebooks import copy_project, write_notebook

from lib.record.paths import STAGES
from lib.record.rows import write_jsonl

NUM_KILLS = int(os.environ.get("CHAOS_KILLS", "0"))
LIGHT_STAGES = ("03_eval_gsm8k", "05_compare")
SEEDS = ("--seeds", "1", "2")
MOST_DAYS = 400
SECONDS_BETWEEN_JUMPS = 0.5
# Rows of the run and of the untuned model, which runs share: the second one to want them waits and finds them.
ROWS = """
import time
from lib.record.manifest import start_stage
from lib.record.paths import run_paths
from lib.record.rows import RowLog, open_untuned_log
paths = run_paths(results_dir, run_name)
parameters = {"run_name": run_name, "results_dir": results_dir}
record = start_stage(paths.manifest("03_eval_gsm8k"), "03_eval_gsm8k", run_name, parameters)
log = RowLog(paths.gsm8k_preds, "p")
untuned = open_untuned_log(paths, "gsm8k_preds", {"model": "untuned"})
for rows in (log, untuned):
    with rows.complete_rows():
        for number in range(25):
            if number not in rows.rows:
                time.sleep(0.03)
                gold = f"{number}\\n#### {number}"
                rows.append({"id": number, "test_index": number, "question": f"{number}?", "gold_answer": gold,
                             "model_output": f"#### {number % 7}", "parsed_final": str(number % 7),
                             "correct": number < 7, "finish_reason": "stop", "num_output_tokens": 3})
    rows.finish(range(25))
"""
FINISH = """
from lib import gsm8k
metrics = gsm8k.summarize(list(log.rows.values()))
record.finish(inputs=[], outputs=[log.path, untuned.path], facts={}, metrics=metrics)["status"]
"""
# Counts what the stage before it wrote, as the real comparison does, and writes its manifest.
COMPARE = """
import time
from lib.record.files import write_json
from lib.record.manifest import start_stage
from lib.record.paths import results_root, run_paths
from lib.record.rows import read_jsonl
root = results_root(results_dir)
parameters = {"results_dir": results_dir, "run_names": run_names}
record = start_stage(root / "05_compare" / "manifest.json", "05_compare", "all runs", parameters)
rows = [row for name in run_names for row in read_jsonl(run_paths(results_dir, name).gsm8k_preds)]
time.sleep(0.5)
write_json(root / "counts.json", {"rows": len(rows), "right": sum(row["correct"] for row in rows)})
time.sleep(0.5)
record.finish(inputs=[], outputs=[root / "counts.json"], facts={})["status"]
"""


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """A copy of the project whose preset is a run of tiny random models."""
    project = copy_project(tmp_path_factory.mktemp("real"))
    chaos.write_preset(project)
    chaos.save_models(project)
    return project


@pytest.fixture
def light(tmp_path: Path) -> Path:
    """A copy of the project whose stage 03 writes 50 rows in about two seconds."""
    project = copy_project(tmp_path)
    # `--verify` compares the rows with it.
    rows = [{"question": f"{number}?", "answer": f"{number}\n#### {number}"} for number in range(25)]
    write_jsonl(project / "questions" / "gsm8k_test.jsonl", rows)
    chaos.write_preset(project, gsm8k_source="questions", max_gsm8k_rows=0)
    write_notebook(project / "notebooks" / "03_eval_gsm8k.ipynb", ROWS, FINISH, "print('summary')")
    names = 'results_dir: str = ""  # folder\nrun_names: list = []  # runs'
    write_notebook(project / "notebooks" / "05_compare.ipynb", COMPARE, parameters=names)
    return project


@pytest.fixture
def project(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("real" if NUM_KILLS else "light")


class JumpingClock(threading.Thread):
    """While its ``with`` block runs, the time of day jumps twice a second, as when a laptop wakes, only further."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(daemon=True)
        self.file, self._draw, self._done = folder / "offset", random.Random(seed), threading.Event()
        library, source = folder / "jumping_clock.so", Path(__file__).with_name("jumping_clock.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(self.file)}

    def __enter__(self) -> "JumpingClock":
        self._jump()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()

    def run(self) -> None:
        while not self._done.wait(SECONDS_BETWEEN_JUMPS):
            self._jump()

    def _jump(self) -> None:
        seconds = self._draw.uniform(-MOST_DAYS, MOST_DAYS) * 86_400
        beside = self.file.with_suffix(".new")
        beside.write_text(f"{seconds:+.0f}\n", encoding="ascii")
        beside.replace(self.file)


def shake_times(output: Path, draw: random.Random) -> None:
    """Give every file a random time within ``MOST_DAYS`` of now."""
    for path in output.rglob("*"):
        at = time.time() + draw.uniform(-MOST_DAYS, MOST_DAYS) * 86_400
        os.utime(path, (at, at))


def kill_in_stages(driver: Driver, seconds: dict[str, float], stages: Sequence[str], seed: int) -> Iterator[list[str]]:
    """Kill a run once for each of ``stages``, in order, and let it end; yields what each kill broke."""
    draw = random.Random(seed)
    for stage in sorted(stages):
        # Up to its end and a little past it, so that what happens between two stages is hit too.
        after_s = draw.uniform(0, seconds[stage] + 1.0)
        broken = chaos.kill_in_stage(driver, stage, draw.choice(("driver", "kernel", "all")), after_s, draw)
        if broken is None:
            break
        yield broken + chaos.torn_files(driver.output)
        shake_times(driver.output, draw)
    assert not driver.run_to_its_end()


@pytest.mark.slow
def test_a_killed_run_loses_nothing(project):
    undisturbed, stages = project.parent / "undisturbed", STAGES if NUM_KILLS else LIGHT_STAGES
    seconds = chaos.run_undisturbed(Driver(project, undisturbed, stages))
    num_kills = num_rounds = 0
    while num_kills < (NUM_KILLS or 6):
        driver = Driver(project, project.parent / f"round-{num_rounds}", stages)
        broken = list(kill_in_stages(driver, seconds, stages * 3, num_rounds))
        assert not sum(broken, chaos.faults(undisturbed, driver.output, project))
        shutil.rmtree(driver.output)
        num_kills, num_rounds = num_kills + len(broken), num_rounds + 1
        assert num_kills >= num_rounds, "runs end before they are killed"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cc"), reason="the clock needs a C compiler")
def test_every_real_stage_is_killed_while_the_clock_jumps(real):
    undisturbed, output = real.parent / "honest", real.parent / "jumping"
    seconds = chaos.run_undisturbed(Driver(real, undisturbed))
    with JumpingClock(real.parent, seed=0) as clock:
        driver = Driver(real, output, environment=clock.environment)
        broken = list(kill_in_stages(driver, seconds, STAGES, seed=0))
        shake_times(output, random.Random(0))
        assert not driver.run_to_its_end()
    assert "running (" not in driver.output_text(), "a finished stage was run again"
    assert len(broken) >= 3 and not sum(broken, chaos.faults(undisturbed, output, real))


@pytest.mark.slow
def test_two_presets_at_once_are_killed_and_end_as_one_after_the_other(project):
    in_turn, stages = project.parent / "in-turn", STAGES if NUM_KILLS else LIGHT_STAGES
    chaos.run_undisturbed(Driver(project, in_turn, stages, SEEDS))
    started = time.monotonic()
    num_kills = num_rounds = 0
    at_once = Driver(project, project.parent / "at-once", stages, [*SEEDS, "--jobs", "2"])
    chaos.run_undisturbed(at_once)
    usual_s = time.monotonic() - started
    assert not chaos.compare(in_turn, at_once.output)
    while num_kills < (wanted := NUM_KILLS or 3):
        draw = random.Random(num_rounds)
        driver = Driver(project, project.parent / f"jobs-{num_rounds}", stages, at_once.flags)
        killed, broken = kill_at_once(driver, usual_s, draw, most=min(4, wanted - num_kills))
        broken += driver.run_to_its_end()
        assert not broken + chaos.faults(in_turn, driver.output, project)
        shutil.rmtree(driver.output)
        num_kills, num_rounds = num_kills + killed, num_rounds + 1
        assert num_kills >= num_rounds, "runs end before they are killed"


def kill_at_once(driver: Driver, usual_s: float, draw: random.Random, most: int) -> tuple[int, list[str]]:
    """Kill a run of several presets up to ``most`` times, or until it ends first; how often, and what was broken."""
    broken: list[str] = []
    for num_kills in range(most):
        driver.start()
        # A fresh run is hit in its first half: on a machine less busy than before it may end long before ``usual_s``.
        due = time.monotonic() + draw.uniform(0.5, usual_s if num_kills else usual_s / 2)
        while driver.is_running() and time.monotonic() < due:
            time.sleep(0.02)
        if not driver.is_running():
            return num_kills, broken
        broken += chaos.strike(driver, draw.choice(("driver", "kernel", "server", "all")), draw)
        broken += chaos.torn_files(driver.output)
    return most, broken


def test_what_is_lost_doubled_or_different_is_counted(tmp_path):
    rows = [{"id": number, "model_output": "x", "wall_s": number} for number in range(4)]
    for name, kept in (("ours", rows), ("theirs", [rows[0], rows[0], {**rows[1], "model_output": "y"}, rows[3]])):
        (tmp_path / name / "run_x").mkdir(parents=True)
        text = "".join(json.dumps(row) + "\n" for row in kept)
        (tmp_path / name / "run_x" / "gsm8k_preds_x.jsonl").write_text(text)
    (tmp_path / "theirs" / "summary.csv").touch()
    file = "run_x/gsm8k_preds_x.jsonl"
    assert chaos.compare(tmp_path / "ours", tmp_path / "theirs") == [
        "summary.csv is only in one of the runs",
        *(f"{file}: 1 rows {what}" for what in ("lost", "duplicated", "differing")),
    ]


def test_a_file_that_a_kill_tore_is_found(tmp_path):
    (tmp_path / "run_x").mkdir()
    (tmp_path / "run_x" / "manifest.json").write_text('{"stage": ')
    (tmp_path / "run_x" / "rows.jsonl").write_text('{"id": 1}\n{"id": 2, "torn')
    assert [fault.split()[0] for fault in chaos.torn_files(tmp_path)] == ["run_x/manifest.json"]
