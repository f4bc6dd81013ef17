"""The tasks of a plan on Ray: what is tried again and what is not, stopping, and what a machine is asked for.

Small notebooks in a copy of the project stand in for the real ones; the slow tests start a Ray of their own.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from small_notebooks import copy_project, hanging_cell, is_gone, rows_cell, wait_for, write_notebook

import run_all
from lib.driver import worker
from lib.driver.engines import ray as ray_engine
from lib.driver.engines.engine import work_off
from lib.driver.engines.ray import MAX_RETRIES, RayEngine, make_work
from lib.driver.tasks import DONE, FAILED, LOST, RUNNING, STOPPED, Task, Tasks
from lib.driver.worker import STATUS
from lib.record.paths import COMPARE_STAGE
from lib.record.rows import count_lines

# How many tries a task has.
TRIES = 1 + MAX_RETRIES
DIE = """
import os, pathlib, psutil, signal, time
tries = pathlib.Path({folder!r}, run_name)
with tries.open("a") as stream:
    stream.write(".")
if run_name == "simple":
    raise ValueError("the reason")
if run_name == "medium":
    os.kill(os.getpid(), signal.SIGKILL)
if tries.stat().st_size == 1:
    # The process of Ray that has started the worker of this kernel.
    psutil.Process().parent().parent().kill()
    time.sleep(600)
"""
# Arguments: what was sent, a log, the file with the status that a worker ends with, and such statuses in turn.
RECEIVER = """
import pathlib, pickle, sys
work = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
for status in sys.argv[4:]:
    pathlib.Path(sys.argv[3]).write_text(status)
    try:
        print(work(7, sys.argv[2]))
    except RuntimeError as error:
        print(f"RuntimeError: {error}")
"""


@pytest.fixture
def tasks(tmp_path):
    """Two runs of a stage, then 05."""
    numbered = [Task(0, "a", "01_prepare"), Task(1, "b", "01_prepare"), Task(2, "", COMPARE_STAGE, after=(0, 1))]
    made = Tasks(tmp_path, {"typed": "", "runs": [], "tasks": []})
    made.all = numbered
    return made


# --- without Ray ------------------------------------------------------------------------------------------------------


def test_without_the_package_the_command_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ["--presets", "sandbox_one", "--engine", "ray", "--output-dir", str(tmp_path / "out")]
    assert run_all.main(command) == 2
    assert "pip install -r requirements-ray.txt" in capsys.readouterr().err


def test_what_is_being_tried_again_does_not_count_as_ended(tasks):
    submitted: dict[int, Future] = {}

    def submit(task):
        submitted[task.number] = Future()
        if task.number == 1:
            # As a machine that was lost leaves its file.
            tasks.write(tasks.all[0], 2**22 + 1, state=RUNNING, where=os.uname().nodename)
            assert tasks.state(tasks.all[0]).state == LOST
            submitted[1].set_result(DONE)
        if task.stage == COMPARE_STAGE:
            assert submitted[0].done()
            submitted[2].set_result(DONE)
        return submitted[task.number]

    def end_the_other(*_):
        return submitted[0].done() or submitted[0].set_exception(RuntimeError("lost\nwith a traceback"))

    interrupts = SimpleNamespace(count=0)
    # It is looked at between two looks at the tasks.
    stop_wanted, looks = tasks.stop_wanted, []
    tasks.stop_wanted = lambda: looks.append(1) or (len(looks) == 2 and end_the_other()) or stop_wanted()
    work_off(tasks, submit, interrupts, at_once=3)
    state = tasks.state(tasks.all[0])
    assert state.state == LOST and len(submitted) == 3
    assert state.failure == f"01_prepare: given up: lost\n  its log: {tasks.log(tasks.all[0])}"


def test_a_worker_waits_for_a_folder_that_shows_late_what_another_machine_wrote(tasks, monkeypatch):
    monkeypatch.setenv("RUN_ENGINE", "ray")
    monkeypatch.setattr(worker.time, "sleep", lambda _: tasks.write(tasks.all[0], 0, state=DONE))
    needs_one, needs_another = Task(3, "a", "02_train", after=(0,)), Task(4, "b", "02_train", after=(1,))
    assert worker._why_not(tasks, needs_one) == ""
    tasks.write(tasks.all[1], 0, state=FAILED)
    assert worker._why_not(tasks, needs_another) == "b 01_prepare failed"


def test_what_is_typed_by_hand_does_not_wait(tasks, monkeypatch):
    monkeypatch.delenv("RUN_ENGINE", raising=False)
    assert worker._why_not(tasks, Task(3, "a", "02_train", after=(0,))) == "a 01_prepare is not done"


@pytest.mark.parametrize(
    ("device", "jobs", "nodes", "expected"),
    [
        ("cpu", 1, [{"CPU": 16.0}], {"num_cpus": 16}),
        ("cpu", 3, [{"CPU": 16.0}, {"CPU": 64.0}], {"num_cpus": 5}),
        ("cpu", 8, [{"CPU": 2.0}], {"num_cpus": 1}),
        ("cpu", 1, [{"CPU": 16.0, "GPU": 2.0}], {"num_cpus": 16}),
        # A head that takes no tasks, and one without a GPU.
        ("auto", 1, [{}, {"CPU": 4.0}, {"CPU": 64.0, "GPU": 8.0}], {"num_cpus": 8, "num_gpus": 1}),
        ("cuda", 1, [{"CPU": 2.0, "GPU": 4.0}, {"CPU": 64.0, "GPU": 8.0}], {"num_cpus": 1, "num_gpus": 1}),
        ("auto", 2, [{}, {"CPU": 8.0}], {"num_cpus": 4}),
        ("auto", 2, [{}], {"num_cpus": 1}),
    ],
)
def test_a_task_gets_a_gpu_or_a_share_of_the_smallest_machine(device, jobs, nodes, expected):
    engine = RayEngine.__new__(RayEngine)
    gone = {"Alive": False, "Resources": {"CPU": 1.0}}
    engine._ray = SimpleNamespace(nodes=lambda: [gone, *({"Alive": True, "Resources": node} for node in nodes)])
    engine._jobs = jobs
    plan = SimpleNamespace(params=SimpleNamespace(device=device))
    assert engine._resources(SimpleNamespace(runs={"a": plan})) == expected


def test_an_address_where_nothing_listens_is_named_at_once(capsys, tmp_path):
    pytest.importorskip("ray")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        command = ["--presets", "sandbox_one", "--engine", "ray", "--address", address]
        assert run_all.main([*command, "--output-dir", str(tmp_path / "out")]) == 2
    assert f"--engine ray: {address}: " in capsys.readouterr().err


# --- with Ray, without a cluster --------------------------------------------------------------------------------------


@pytest.fixture
def sent(tmp_path, monkeypatch, tasks):
    """A function that runs what Ray is sent in a process without this project; a script stands in for run_all.py."""
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    project = tmp_path / "project"
    project.mkdir()
    script = "import os, sys; print(*sys.argv[1:], os.environ['OMP_NUM_THREADS'], os.environ['RUN_ENGINE'])\n"
    (project / "run_all.py").write_text(script + "sys.exit(int(open('status').read()))")
    monkeypatch.setattr(ray_engine, "PROJECT_ROOT", project)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    pickled = tmp_path / "work.pickle"
    pickled.write_bytes(cloudpickle.dumps(make_work(tasks)))

    def run(*statuses):
        arguments = [pickled, tmp_path / "7.log", project / "status", *statuses]
        command = [sys.executable, "-c", RECEIVER, *map(str, arguments)]
        return subprocess.run(command, cwd="/", env={}, capture_output=True, text=True).stdout.splitlines()

    return run


def test_what_is_sent_runs_the_worker_and_returns_how_it_ended(sent, tasks, tmp_path):
    lost = [STATUS[LOST], 2]
    errors = [f"RuntimeError: its worker ended with status {status}" for status in lost]
    assert sent(*(STATUS[word] for word in (DONE, FAILED, STOPPED)), *lost) == [DONE, FAILED, STOPPED, *errors]
    assert (tmp_path / "7.log").read_text() == f"--worker {tasks.folder} --task 7 3 ray\n" * 5


def test_a_task_whose_turn_comes_after_ctrl_c_does_not_start(sent, tasks, tmp_path):
    tasks.want_stop(1)
    assert sent(0) == [STOPPED] and not (tmp_path / "7.log").exists()


# --- on a Ray of this machine -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return copy_project(tmp_path_factory.mktemp("ray"))


@pytest.fixture
def shared(tmp_path):
    """A folder that the notebooks write into."""
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared"


@pytest.fixture
def start(project, tmp_path):
    """A function that starts a driver over a notebook of one cell in the place of 01_prepare, two at once."""
    pytest.importorskip("ray")
    # Ray's sockets need a short path.
    place, started = tempfile.mkdtemp(prefix="ray-", dir="/tmp"), []

    def start(code, *presets):
        write_notebook(project / "notebooks" / "01_prepare.ipynb", code)
        command = [sys.executable, "run_all.py", "--presets", *presets, "--stages", "01", "--engine", "ray"]
        command += ["--jobs", "2", "--output-dir", str(tmp_path / "out"), "--set", "device=cpu"]
        dropped = ("RAY_ADDRESS", "OMP_NUM_THREADS")
        environment = {name: value for name, value in os.environ.items() if name not in dropped}
        environment |= {"RAY_TMPDIR": place}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # As on a terminal, whose Ctrl-C reaches all that it started.
        started.append(subprocess.Popen(command, cwd=project, env=environment, start_new_session=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
    shutil.rmtree(place, ignore_errors=True)


def below(driver):
    return psutil.Process(driver.pid).children(recursive=True)


@pytest.mark.slow
def test_what_was_lost_is_tried_again_and_a_cells_error_is_not(start, shared, tmp_path):
    driver = start(DIE.format(folder=str(shared)), "simple", "medium", "distilled")
    out, printed = driver.communicate(timeout=300)
    assert driver.returncode == 1, printed
    tries = {path.name: path.stat().st_size for path in shared.iterdir()}
    assert tries == {"simple": 1, "medium": TRIES, "distilled": 2}
    assert "simple: 01_prepare in cell" in printed and "ValueError: the reason" in printed
    assert f"medium: 01_prepare: given up: its worker ended with status {STATUS[LOST]}\n  its log: " in printed
    log = printed.partition("its log: ")[2].splitlines()[0]
    assert Path(log).stat().st_size and "to go on: python run_all.py" in printed
    assert (tmp_path / "out/reports/run_distilled/01_prepare.html").exists()
    # Nothing of Ray's own words.
    assert not [word for word in ("raylet", "Traceback", "\x1b", "Ray ") if word in out + printed]


@pytest.mark.slow
def test_ctrl_c_lets_each_finish_its_row_and_starts_no_other(start, shared):
    code = rows_cell(f"{str(shared)!r}, run_name + '.jsonl'", pause_s=0.05)
    driver = start(code, "simple", "medium", "strong")
    files = [shared / "simple.jsonl", shared / "medium.jsonl"]
    wait_for(lambda: all(count_lines(path) >= 2 for path in files))
    children = below(driver)
    os.killpg(driver.pid, signal.SIGINT)
    out, printed = driver.communicate(timeout=100)
    assert driver.returncode == 130
    assert out.count("stopping after the current row") == 1 and "to go on: " in printed
    assert all(path.read_bytes().endswith(b"}\n") for path in files) and len(list(shared.iterdir())) == 2
    wait_for(lambda: all(map(is_gone, children)), 30)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_it_now(start, shared):
    driver = start(hanging_cell(shared, "run_name"), "simple", "medium")
    wait_for(lambda: len(list(shared.iterdir())) == 2)
    children = below(driver)
    os.killpg(driver.pid, signal.SIGINT)
    assert any("stopping after the current row" in line for line in iter(driver.stdout.readline, ""))
    time.sleep(2)
    assert driver.poll() is None
    os.killpg(driver.pid, signal.SIGINT)
    _, printed = driver.communicate(timeout=60)
    assert driver.returncode == 130, printed
    wait_for(lambda: all(map(is_gone, children)), 30)


@pytest.mark.slow
def test_a_killed_driver_leaves_no_process_and_the_next_one_goes_on(start, shared):
    rows = f"{str(shared)!r}, run_name + '.jsonl'"
    driver = start(rows_cell(rows, pause_s=0.05), "simple", "medium")
    files = [shared / "simple.jsonl", shared / "medium.jsonl"]
    wait_for(lambda: all(count_lines(path) >= 2 for path in files))
    children = below(driver)
    assert sum("ipykernel" in " ".join(process.cmdline()) for process in children) == 2
    driver.kill()
    driver.communicate()
    # Two agents of Ray itself, which hold nothing, look for their head for another minute.
    wait_for(lambda: all(is_gone(process) or process.name().endswith("Agent") for process in children), 30)
    kept = [count_lines(path) for path in files]
    again = start(rows_cell(rows, pause_s=0.01, num_rows=20), "simple", "medium")
    _, printed = again.communicate(timeout=200)
    assert again.returncode == 0, printed
    assert [count_lines(path) for path in files] == [num_rows + 20 for num_rows in kept]
