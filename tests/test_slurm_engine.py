"""What ``--engine slurm`` submits and how it follows, with commands that play Slurm's; tests/slow has the real ones."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_notebooks import wait_for

import run_all
from lib.driver.cli import UsageError, build_parser
from lib.driver.engines import slurm
from lib.driver.plan import make_plans
from lib.driver.tasks import DONE, FAILED, LOST, RUNNING, Tasks, freeze, make_tasks

# Its numbers are 1, 2, ...; every task of an array waits from then on.
SBATCH = """
number=$(grep -c ^sbatch calls)
[ -e broken-$number ] && { echo "no such partition" >&2; exit 1; }
for script; do :; done
sed -n 's/^#SBATCH --array=//p' "$script" | tr , '\\n' | sed "s/$/ $number/" >> queue
echo "$number;cluster"
"""
COMMANDS = {"sbatch": SBATCH, "squeue": "[ ! -e broken ] || { rm broken; exit 1; }; cat queue", "scancel": ": > queue"}
COMMANDS["scontrol"] = ":"


@pytest.fixture(autouse=True)
def fake(tmp_path, monkeypatch) -> Path:
    """The folder of commands that note each call as a line of ``calls``; ``queue`` is squeue's answer."""
    folder = tmp_path / "fake"
    folder.mkdir()
    (folder / "queue").touch()
    for name, code in COMMANDS.items():
        (folder / name).write_text(f'#!/bin/sh\ncd {folder}\necho "{name} $*" >> calls\n{code}\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(slurm, "LOOK_AGAIN_S", 0.01)
    monkeypatch.setattr(slurm, "SEEN_AFTER_S", 0.5)
    return folder


@pytest.fixture
def tasks(tmp_path) -> Tasks:
    """01 and 02 of two runs: 0 and 2, then 1 and 3."""
    args = build_parser().parse_args(["--presets", "simple", "medium", "--stages", "01", "02"])
    args.output_dir, args.typed = tmp_path / "out", "typed"
    plans = make_plans(args)
    return freeze(args.output_dir, plans, make_tasks(plans, apart=True), "typed", slurm.queued)[0]


def calls(fake: Path, name: str) -> list[str]:
    lines = (fake / "calls").read_text().splitlines() if (fake / "calls").exists() else []
    return [line.removeprefix(f"{name} ") for line in lines if line.startswith(name)]


# --- what is submitted ------------------------------------------------------------------------------------------------


def submit(tasks: Tasks, options: str = "") -> None:
    slurm.SlurmEngine(options)._submit(tasks)


def test_each_level_is_an_array_that_waits_for_the_one_before(tasks, fake):
    submit(tasks, "--gres=gpu:1 --comment='two words'")
    options = "--gres=gpu:1 --comment=two words"
    assert calls(fake, "sbatch") == [
        f"--parsable {options} {tasks.folder}/level-0.sh",
        f"--parsable --dependency=afterany:1 {options} {tasks.folder}/level-1.sh",
    ]
    assert slurm.queued(tasks.folder) == {0: "1", 2: "1", 1: "2", 3: "2"}


def test_what_is_done_is_not_submitted_and_what_needs_a_failed_task_neither(tasks, fake):
    tasks.write(tasks.all[0], 0, state=DONE)
    tasks.write(tasks.all[2], 0, state=FAILED)
    submit(tasks)
    assert len(calls(fake, "sbatch")) == 1 and slurm.queued(tasks.folder) == {1: "1"}


def test_the_same_command_submits_nothing_twice(tasks, fake):
    submit(tasks)
    assert slurm.SlurmEngine("").is_at_work(tasks)
    submit(tasks)
    assert len(calls(fake, "sbatch")) == 2


def test_what_a_killed_driver_did_not_submit_waits_for_what_it_did(tasks, fake):
    submit(tasks)
    (fake / "queue").write_text("2 1\n0 1\n")
    submit(tasks)
    assert "--dependency=afterany:1 " in calls(fake, "sbatch")[-1]
    assert slurm.queued(tasks.folder) == {0: "1", 2: "1", 1: "3", 3: "3"}


def test_where_one_array_is_refused_the_others_are_cancelled(tasks, fake):
    (fake / "broken-2").touch()
    with pytest.raises(UsageError, match="sbatch failed: no such partition"):
        submit(tasks)
    assert calls(fake, "scancel") == [f"--name={tasks.folder.name}"]


def test_options_that_cannot_be_read_are_refused():
    with pytest.raises(UsageError, match="--sbatch --comment='a: No closing quotation"):
        slurm.SlurmEngine("--comment='a")


def test_plans_of_other_engines_do_not_need_slurm(tasks, fake, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert slurm.queued(tasks.folder) == {}
    with pytest.raises(UsageError, match="sbatch cannot be run"):
        submit(tasks)


def test_a_dry_run_prints_the_scripts(tmp_path, capsys):
    flags = ["--stages", "01", "02", "--output-dir", str(tmp_path / "a b"), "--engine", "slurm", "--offline"]
    assert run_all.main(["--dry-run", "--presets", "sandbox_one", *flags]) == 0
    printed = capsys.readouterr().out
    assert printed.count("#!/bin/bash") == 2 and "#SBATCH --array=1\n" in printed
    assert f"#SBATCH --output='{tmp_path}/a b/.plan/<hash>/%a.log'" in printed


# --- how it follows ---------------------------------------------------------------------------------------------------


def test_tasks_that_end_undone_are_named_and_what_needs_them_is_not(tasks, fake):
    submit(tasks)
    tasks.write(tasks.all[0], 0, state=DONE)
    tasks.write(tasks.all[1], 0, state=DONE)
    tasks.write(tasks.all[2], 0, state=RUNNING, where="elsewhere", tries=6)
    # A controller that does not answer is asked again.
    (fake / "broken").touch()
    (fake / "queue").write_text("")
    slurm._follow(tasks)
    states = tasks.states()
    assert states[2].state == LOST and states[3].failure == ""
    assert states[2].failure == (
        f"medium 01_prepare: given up, begun 6 times: ended by Slurm\n  its log: {tasks.folder}/2.log"
    )


def test_a_file_that_a_shared_folder_shows_late_is_waited_for(tasks, fake, monkeypatch):
    submit(tasks)
    (fake / "queue").write_text("")
    looks, states = [], Tasks.states

    def late(tasks: Tasks):
        looks.append(len(looks))
        for task in tasks.all if len(looks) == 3 else ():
            tasks.write(task, 0, state=DONE)
        return states(tasks)

    monkeypatch.setattr(Tasks, "states", late)
    slurm._follow(tasks)
    assert {state.state for state in tasks.states().values()} == {DONE}


# --- the script -------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that starts the script as Slurm does, over a worker that is this code of the shell."""
    started = []

    def start(code: str, **environment: str) -> subprocess.Popen:
        worker = tmp_path / "a python"
        worker.write_text(f'#!/bin/bash\necho "$*" > {tmp_path}/arguments\n{code}\n')
        worker.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(worker))
        path = tmp_path / "script.sh"
        path.write_text(slurm.script(tmp_path / "a plan", [3, 5]))
        known = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_JOB_ID": "17", **environment}
        started.append(subprocess.Popen(["bash", str(path)], env=os.environ | known, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_the_script_has_paths_with_spaces(tmp_path, start):
    assert start("exit 0").wait(timeout=60) == 0
    assert (tmp_path / "arguments").read_text() == f"run_all.py --worker {tmp_path}/a plan --task 5\n"
    lines = (tmp_path / "script.sh").read_text().splitlines()
    given = [word for line in lines if line.startswith("#SBATCH ") for word in shlex.split(line)[1:]]
    assert {"--job-name=a plan", "--array=3,5", "--requeue", f"--output={tmp_path}/a plan/%a.log"} <= {*given}
    assert "--output='/a%%b c/%a.log'" in slurm.script(Path("/a%b c"), [0])


@pytest.mark.parametrize(
    ("code", "restarts", "status", "requeued"),
    [
        ("exit 0", "", 0, False),
        # A cell's error, a wrong plan, a stop that a person asked for.
        ("exit 1", "", 1, False),
        ("exit 2", "", 2, False),
        ("exit 130", "", 130, False),
        # The kernel is lost, then the worker itself.
        ("exit 75", "", 75, True),
        ("exit 75", "4", 75, True),
        ("exit 75", "5", 75, False),
        ("kill -KILL $$", "1", 137, True),
    ],
)
def test_what_was_lost_is_requeued_so_often(fake, start, code, restarts, status, requeued):
    more = {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    assert start(code, **more).wait(timeout=60) == status
    assert calls(fake, "scontrol") == ["requeue 17_5"] * requeued


# As a worker: a signal is heard, and the row is finished.
FINISHES_ITS_ROW = "trap 'sleep 0.3; exit 130' TERM\ntouch {folder}/ready\nwhile :; do sleep 0.1; done"


@pytest.mark.parametrize("warned", [True, False])
def test_a_warning_requeues_and_slurms_own_end_does_not(fake, start, tmp_path, warned):
    script = start(FINISHES_ITS_ROW.format(folder=tmp_path))
    wait_for((tmp_path / "ready").exists)
    if warned:
        script.send_signal(signal.SIGUSR1)
    else:
        os.killpg(script.pid, signal.SIGTERM)
    assert script.wait(timeout=60) == 130
    assert calls(fake, "scontrol") == ["requeue 17_5"] * warned
