"""``--engine slurm`` on a real Slurm: a controller and two nodes of one core each, started for these tests by any user.

Debian's packages slurmctld, slurmd, slurm-client and munge are enough; no service of theirs has to run.
"""

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import chaos
import psutil
import pytest
from small_notebooks import PROJECT_ROOT, copy_project, hanging_cell, wait_for, write_notebook

from lib.driver.tasks import RUNNING, STOPPED, State, find_tasks
from lib.record.rows import count_lines

MADE_BEFORE = PROJECT_ROOT / "tests" / "fixtures" / "made_before"
SEARCHED = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
MISSING = [name for name in ("slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=SEARCHED)]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")]
# cred_expire: the seconds that a requeued task waits before it may start again; 120 by default, 5 at least.
CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=5
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]},{ports[2]} CPUs=1
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 PreemptMode=requeue
PartitionName=high Nodes=n[1-2] PriorityTier=10 PreemptMode=off
"""
# Without end, until the test has seen enough.
ROWS = """
import itertools, pathlib, time
from lib.record.rows import RowLog
folder = pathlib.Path({folder!r})
log = RowLog(folder / f"{{run_name}}.jsonl", "p")
with log.complete_rows():
    for number in itertools.count(len(log.rows)):
        if (folder / "enough").exists():
            break
        time.sleep(0.1)
        log.append({{"id": number}})
"""


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Slurm, which $SLURM_CONF names while the tests of this file run."""
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        configuration = Path(folder, "slurm.conf")
        about = {"host": socket.gethostname().split(".")[0], "user": getpass.getuser(), "ports": free_ports(3)}
        configuration.write_text(CONFIGURATION.format(folder=folder, **about))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(configuration))
            for command in (["slurmctld"], ["slurmd", "-N", "n1"], ["slurmd", "-N", "n2"]):
                program = shutil.which(command[0], path=SEARCHED)
                with Path(folder, f"{command[-1]}.log").open("wb") as log:
                    subprocess.Popen([program, "-D", *command[1:]], stdout=log, stderr=log, start_new_session=True)
            try:
                wait_for(lambda: slurm("sinfo", "--noheader", "--format=%T %D") == "idle 2", 60)
                yield
            finally:
                cancel_all()
                end_all(str(configuration))


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


def cancel_all() -> None:
    """End all jobs: those that watch over them outlive the daemons."""
    slurm("scancel", "--user", getpass.getuser())
    wait_for(lambda: not slurm("squeue", "--noheader"))


def end_all(configuration: str) -> None:
    """End the daemons, and all else that was started with this ``configuration``."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get("SLURM_CONF") == configuration:
                process.kill()


def slurm(*command: str) -> str:
    """What a command of Slurm prints; "" where it fails."""
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project whose stage 01 adds rows to a file, and 02 counts them."""
    project = copy_project(tmp_path / "a space")
    shared = tmp_path / "shared"
    shared.mkdir()
    write_notebook(project / "notebooks" / "01_prepare.ipynb", ROWS.format(folder=str(shared)))
    count = f"import pathlib\nshared = pathlib.Path({str(shared)!r})\n"
    count += (
        "(shared / f'{run_name}.count').write_text(str(len((shared / f'{run_name}.jsonl').read_text().splitlines())))"
    )
    write_notebook(project / "notebooks" / "02_train.ipynb", count)
    return project


@pytest.fixture
def start(project: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """A function that starts ``run_all.py`` on the presets that are named, with more flags; its tasks end with it."""
    started = []

    def start(*flags: str) -> subprocess.Popen:
        command = [sys.executable, "run_all.py", "--engine", "slurm", "--output-dir", str(output(project))]
        command += ["--stages", "01", "02", "--offline", "--presets", *flags]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, cwd=project, **streams))
        return started[-1]

    yield start
    (project.parents[1] / "shared" / "enough").touch()
    for process in started:
        process.kill()
        process.wait()
    cancel_all()


def output(project: Path) -> Path:
    return project.parent / "out"


def rows_file(project: Path, run: str) -> Path:
    return project.parents[1] / "shared" / f"{run}.jsonl"


def enough(project: Path) -> None:
    """Let the rows end."""
    rows_file(project, "").with_name("enough").touch()


def state(project: Path, name: str) -> State:
    """Of a task of the plan, by its name; it waits until there is a plan."""
    tasks = find_tasks(output(project))
    return next((tasks.state(task) for task in tasks.all if task.name == name), State()) if tasks else State()


def wait_for_rows(project: Path, *runs: str) -> None:
    """Until each has more rows than now."""
    before = {run: count_lines(rows_file(project, run)) for run in runs}
    wait_for(lambda: all(count_lines(rows_file(project, run)) > before[run] + 1 for run in runs))


def assert_each_row_once(project: Path, run: str) -> None:
    rows = [json.loads(line)["id"] for line in rows_file(project, run).read_text().splitlines()]
    assert rows == list(range(len(rows)))


def ended(driver: subprocess.Popen) -> tuple[int, str]:
    """Its exit status and what it printed, once it has ended."""
    printed, _ = driver.communicate(timeout=300)
    return driver.returncode, printed


def goes_on(project: Path, driver: subprocess.Popen) -> None:
    """The task of the preset ``simple`` starts for the second time, goes on from its rows, and the run ends well."""
    wait_for(lambda: state(project, "simple 01_prepare").tries == 2)
    wait_for_rows(project, "simple")
    enough(project)
    status, printed = ended(driver)
    assert status == 0, printed
    assert_each_row_once(project, "simple")
    # 02 waited until its array had really ended, not only stopped.
    assert int(rows_file(project, "simple").with_suffix(".count").read_text()) == count_lines(
        rows_file(project, "simple")
    )
    assert not (output(project) / ".plan").exists()


@pytest.mark.parametrize("shards", ["1", "2"])
def test_slurm_leaves_the_files_of_this_machine(here, tmp_path, shards):
    there = run_real(tmp_path / "there", "--engine", "slurm", "--shards", shards)
    assert not chaos.compare(here, there)


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """The results of a real run, of tiny models, on this machine."""
    return run_real(tmp_path_factory.mktemp("here") / "here")


def run_real(results: Path, *flags: str) -> Path:
    settings = (MADE_BEFORE / "settings.txt").read_text(encoding="utf-8").split()
    command = [sys.executable, "run_all.py", "--presets", "sandbox_one", "--offline", "--output-dir", str(results)]
    # The same number of threads: another one rounds otherwise.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *flags, "--set", *settings], cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return results


def test_a_preempted_task_is_requeued_and_goes_on(project, start):
    driver = start("simple")
    wait_for_rows(project, "simple")
    # Both nodes: the task has to leave.
    slurm("sbatch", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1")
    goes_on(project, driver)


def test_a_task_is_stopped_before_its_time_limit_and_goes_on(project, start):
    # Slurm looks at the time every half minute.
    driver = start("simple", "--sbatch", "--time=1 --signal=B:USR1@20")
    wait_for(lambda: state(project, "simple 01_prepare").state == STOPPED)
    assert rows_file(project, "simple").read_bytes().endswith(b"}\n")
    goes_on(project, driver)


@pytest.mark.parametrize("lost", ["--worker", "ipykernel_launcher"])
def test_a_lost_process_is_started_again(project, start, lost):
    driver = start("simple")
    wait_for_rows(project, "simple")
    for process in processes(project, lost):
        process.kill()
    goes_on(project, driver)


def processes(project: Path, word: str) -> list[psutil.Process]:
    """Those of the plan's jobs with this word in their command."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            is_ours = "SLURM_ARRAY_JOB_ID" in process.environ() and process.cwd() == str(project)
            found += [process] if is_ours and word in process.cmdline() else []
    return found


def test_a_killed_driver_is_typed_again_and_another_command_is_refused(project, start):
    driver = start("simple", "medium")
    wait_for_rows(project, "simple", "medium")
    driver.kill()
    driver.wait()
    wait_for_rows(project, "simple", "medium")
    jobs = slurm("squeue", "--noheader", "--array", "--format=%A")
    status, printed = ended(start("simple", "medium", "--set", "learning_rate=0.5"))
    assert status == 2 and "run_all.py --engine slurm" in printed
    assert "simple: learning_rate is" in printed and "there, 0.5 here" in printed
    status, printed = ended(start("simple", "medium", "--engine", "local", "--jobs", "2"))
    assert status == 2 and "follow them with --engine slurm" in printed
    again = start("simple", "medium")
    wait_for_rows(project, "simple", "medium")
    assert slurm("squeue", "--noheader", "--array", "--format=%A") == jobs
    enough(project)
    status, printed = ended(again)
    assert status == 0, printed
    for run in ("simple", "medium"):
        assert_each_row_once(project, run)


def test_the_others_go_on_after_an_error_in_a_cell(project, start):
    failing = "if run_name == 'simple':\n    raise ValueError('the reason')"
    write_notebook(
        project / "notebooks" / "01_prepare.ipynb", failing, ROWS.format(folder=str(rows_file(project, "").parent))
    )
    driver = start("simple", "medium")
    wait_for_rows(project, "medium")
    enough(project)
    status, printed = ended(driver)
    assert status == 1
    assert "simple: 01_prepare in cell 2: ValueError: the reason" in printed and "to go on: " in printed
    assert "given up" not in printed
    assert not rows_file(project, "simple").with_suffix(".count").exists()
    assert rows_file(project, "medium").with_suffix(".count").exists()


def test_ctrl_c_cancels_what_waits_and_lets_rows_be_finished(project, start):
    driver = start("simple", "medium", "sandbox_one")
    wait_for_rows(project, "simple", "medium")
    driver.send_signal(signal.SIGINT)
    status, printed = ended(driver)
    assert status == 130
    assert printed.count("stopping after the current row") == 1 and "to go on: " in printed
    assert not rows_file(project, "sandbox_one").exists() and not slurm("squeue", "--noheader")
    assert [state(project, f"{run} 01_prepare").state for run in ("simple", "medium")] == [STOPPED, STOPPED]
    assert all(rows_file(project, run).read_bytes().endswith(b"}\n") for run in ("simple", "medium"))


def test_a_second_ctrl_c_ends_them_now(project, start):
    shared = rows_file(project, "").parent
    write_notebook(project / "notebooks" / "01_prepare.ipynb", hanging_cell(shared, "run_name"))
    driver = start("simple")
    wait_for((shared / "simple").exists)
    driver.send_signal(signal.SIGINT)
    # Heard by the driver and the task: two at once would be one.
    wait_for(lambda: find_tasks(output(project)).stop_wanted() == 1)
    time.sleep(2)
    assert state(project, "simple 01_prepare").state == RUNNING
    driver.send_signal(signal.SIGINT)
    status, printed = ended(driver)
    assert status == 130, printed
    assert state(project, "simple 01_prepare").state == STOPPED and not processes(project, "ipykernel_launcher")


def test_a_task_cancelled_from_outside_stays_so_and_is_named(project, start):
    driver = start("simple", "medium")
    wait_for_rows(project, "simple", "medium")
    slurm("scancel", slurm("squeue", "--noheader", "--states=RUNNING", "--format=%F_%K").splitlines()[-1])
    wait_for(lambda: [state(project, f"{run} 01_prepare").state for run in ("simple", "medium")].count(RUNNING) == 1)
    enough(project)
    status, printed = ended(driver)
    assert status == 1 and printed.count("given up, begun 1 times") == 1
    counted = [rows_file(project, run).with_suffix(".count").exists() for run in ("simple", "medium")]
    assert sorted(counted) == [False, True]
