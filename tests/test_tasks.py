"""The tasks of a command: what waits for what, frozen and found again, how each ended, and the worker of one."""

import json
import os
import signal
import subprocess
import sys

import pytest
from small_notebooks import DRIVER, rows_cell, wait_for, write_notebook

import run_all
from lib.driver.cli import UsageError, build_parser
from lib.driver.plan import make_plans, output_folders
from lib.driver.tasks import DONE, FAILED, LOST, RUNNING, STOPPED, WAITING, Task, find_tasks, freeze, levels, make_tasks
from lib.record.paths import PROJECT_ROOT
from lib.record.progress import Counts, read_file, write_file
from lib.record.rows import count_lines

THREE = ("--presets", "simple", "medium", "strong")


def plans_of(tmp_path, *argv):
    args = build_parser().parse_args([*argv, "--output-dir", str(tmp_path / "out")])
    return make_plans(args)


def names(tasks):
    return [task.name for task in tasks]


def before(tasks, name):
    """The names of the tasks that the task ``name`` needs."""
    (task,) = (task for task in tasks if task.name == name)
    return {tasks[number].name for number in task.after}


@pytest.fixture
def freeze_here(tmp_path):
    """A function that freezes a command line in one results folder; ``True`` says that a plan there is at work."""

    def frozen(*argv, is_at_work=False):
        args = build_parser().parse_args([*argv, "--output-dir", str(tmp_path / "out")])
        plans = make_plans(args)
        tasks = make_tasks(plans, args.shards, apart=args.jobs > 1)
        typed = f"python run_all.py {' '.join(argv)}"
        return freeze(output_folders(args)[0], plans, tasks, typed, lambda _: is_at_work)

    return frozen


# --- what waits for what ------------------------------------------------------------------------------------------


def test_a_run_has_its_notebooks_in_order_and_05_waits_for_all_runs(tmp_path):
    tasks = make_tasks(plans_of(tmp_path, "--presets", "simple", "medium"))
    assert [name for name in names(tasks) if name.startswith("simple")] == [
        "simple 01_prepare", "simple 02_train", "simple 03_eval_gsm8k", "simple 04_eval_safety"
    ]  # fmt: skip
    assert before(tasks, "simple 04_eval_safety") == {"simple 02_train"}, "a failure of 03 does not stop 04"
    assert before(tasks, "all runs 05_compare") == {*names(tasks)} - {"all runs 05_compare"}


def test_runs_that_prompt_the_untuned_model_alike_wait_for_one_task_with_its_rows(tmp_path):
    tasks = make_tasks(plans_of(tmp_path, "--presets", "simple", "--seeds", "1", "2"), apart=True)
    shared = "simple_seed1 03_eval_gsm8k untuned 1-of-1"
    assert [name for name in names(tasks) if "03_eval_gsm8k untuned" in name] == [shared]
    assert before(tasks, shared) == {"simple_seed1 01_prepare"}, "it needs no adapter"
    assert before(tasks, "simple_seed2 03_eval_gsm8k") == {"simple_seed2 02_train", shared}
    other = make_tasks(
        plans_of(tmp_path, "--presets", "simple", "medium", "--set", "evaluate_untuned=false"), apart=True
    )
    assert not [name for name in names(other) if "untuned" in name]


def test_other_questions_make_other_untuned_rows(tmp_path):
    one, other = (
        plans_of(tmp_path, "--presets", "simple"),
        plans_of(tmp_path, "--presets", "medium", "--set", "data_seed=7"),
    )
    tasks = make_tasks([*one, *other], apart=True)
    assert len([name for name in names(tasks) if "03_eval_gsm8k untuned" in name]) == 2


def test_shares_cut_03_and_04_alone(tmp_path):
    tasks = make_tasks(plans_of(tmp_path, "--presets", "simple"), 3)
    assert before(tasks, "simple 03_eval_gsm8k") == {"simple 02_train"} | {
        f"simple 03_eval_gsm8k {side} {index}-of-3" for side in ("tuned", "untuned") for index in (1, 2, 3)
    }
    assert before(tasks, "simple 04_eval_safety tuned 2-of-3") == {"simple 02_train"}
    assert len(tasks) == 1 + 1 + 2 * (3 + 3 + 1) + 1
    depth = {task.name.removeprefix("simple "): level for level, group in enumerate(levels(tasks)) for task in group}
    assert (depth["01_prepare"], depth["02_train"], depth["03_eval_gsm8k untuned 3-of-3"]) == (0, 1, 1)
    assert (depth["03_eval_gsm8k tuned 1-of-3"], depth["03_eval_gsm8k"], depth["all runs 05_compare"]) == (2, 3, 4)


def test_chosen_stages_wait_for_what_is_chosen(tmp_path):
    tasks = make_tasks(plans_of(tmp_path, "--presets", "simple", "--stages", "03", "05"), 2)
    assert before(tasks, "simple 03_eval_gsm8k tuned 1-of-2") == set()


# --- frozen -------------------------------------------------------------------------------------------------------


def test_the_same_command_finds_its_plan_and_the_parameters_are_those_of_then(freeze_here, tmp_path):
    tasks, found = freeze_here(*THREE, "--set", "learning_rate=3.0e-5")
    assert not found and find_tasks(tmp_path / "out").folder == tasks.folder
    again, found = freeze_here(*THREE, "--set", "learning_rate=3.0e-5")
    assert found and again.all == tasks.all
    (plan,) = plans_of(tmp_path, "--presets", "medium", "--set", "learning_rate=3.0e-5")
    frozen = again.runs["medium"]
    assert (frozen.params, frozen.params.origin) == (plan.params, plan.params.origin)
    assert (frozen.settings, frozen.paths, frozen.stages) == (plan.settings, plan.paths, plan.stages)


def test_a_plan_that_only_bears_the_name_is_not_taken_for_it(freeze_here):
    tasks, _ = freeze_here("--presets", "simple")
    path = tasks.folder / "tasks.json"
    content = json.loads(path.read_text())
    content["runs"][0]["parameters"]["learning_rate"] = 0.5
    path.write_text(json.dumps(content))
    again, found = freeze_here("--presets", "simple")
    assert not found and again.runs["simple"].params == tasks.runs["simple"].params


def test_a_plan_of_another_version_is_named(freeze_here, tmp_path, capsys):
    tasks, _ = freeze_here("--presets", "simple")
    path = tasks.folder / "tasks.json"
    content = json.loads(path.read_text())
    del content["runs"][0]["parameters"]["lora_r"]
    path.write_text(json.dumps(content))
    assert run_all.main(["--list", "--presets", "simple", "--output-dir", str(tmp_path / "out")]) == 1
    assert "the plan of 'simple' is of another version: delete .plan/" in capsys.readouterr().err


def test_another_command_replaces_a_plan_unless_it_is_at_work(freeze_here):
    first, _ = freeze_here(*THREE)
    with pytest.raises(UsageError) as refused:
        freeze_here("--presets", "simple", "medium", "--set", "lora_r=4", is_at_work=True)
    message = str(refused.value)
    assert "python run_all.py --presets simple medium strong" in message and "strong is only there" in message
    assert "simple: lora_r is 8 there, 4 here" in message
    with pytest.raises(UsageError, match="other stages or shares"):
        freeze_here(*THREE, "--shards", "2", is_at_work=True)
    assert first.folder.exists()
    other, _ = freeze_here(*THREE, "--shards", "2")
    assert other.folder.exists() and not first.folder.exists()


# --- how tasks end ------------------------------------------------------------------------------------------------


def test_what_needs_a_failed_task_is_not_run_and_05_waits_for_the_rest(freeze_here):
    tasks, _ = freeze_here("--presets", "simple", "medium")
    by_name = {task.name: task for task in tasks.all}

    def ready(**states):
        for name, state in states.items():
            tasks.write(by_name[name.replace("__", " ")], os.getpid(), state=state)
        states = tasks.states()
        return names(tasks.ready(states, {number for number, one in states.items() if one.state != WAITING}))

    assert ready() == ["simple 01_prepare", "medium 01_prepare"]
    assert ready(simple__01_prepare=FAILED, medium__01_prepare=DONE) == ["medium 02_train"]
    assert tasks.is_blocked(by_name["simple 04_eval_safety"], tasks.states())
    assert ready(medium__02_train=DONE) == ["medium 03_eval_gsm8k", "medium 04_eval_safety"]
    assert ready(medium__03_eval_gsm8k=LOST) == ["medium 04_eval_safety"]
    assert ready(medium__04_eval_safety=DONE) == ["all runs 05_compare"]
    assert not tasks.was_stopped(by_name["simple 02_train"], tasks.states()), "it was not begun, as 01 failed"
    tasks.write(by_name["medium 04_eval_safety"], os.getpid(), state=STOPPED)
    assert tasks.was_stopped(by_name["medium 04_eval_safety"], tasks.states())


def test_a_worker_that_has_ended_without_a_word_is_lost_and_counts_stay(freeze_here):
    tasks, _ = freeze_here("--presets", "simple")
    task = tasks.all[0]
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    here = {"state": RUNNING, "where": os.uname().nodename, "tries": 2}
    tasks.write(task, ended.pid, **here)
    assert tasks.state(task).state == LOST and "ended from outside" in tasks.state(task).failure
    tasks.write(task, ended.pid, where="another machine")
    assert tasks.state(task).state == RUNNING
    write_file(tasks.file(task), {**read_file(tasks.file(task)), "work": [Counts("answers", 9, 4)]})
    tasks.write(task, os.getpid(), state=DONE)
    assert (tasks.state(task).num_rows, tasks.state(task).tries) == (4, 2)
    tasks.reset()
    assert tasks.state(task).state == WAITING


def test_list_shows_the_tasks_of_a_plan(freeze_here, tmp_path, capsys):
    tasks, _ = freeze_here("--presets", "simple", "--jobs", "2")
    running = {"state": RUNNING, "where": "a-node", "tries": 2, "work": [Counts("answers", 263, 120)]}
    tasks.write(tasks.all[2], os.getpid(), **running)
    assert run_all.main(["--list", "--presets", "simple", "--output-dir", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["0", "simple", "01_prepare", "waiting"] for line in lines)
    (line,) = (line for line in lines if line.lstrip().startswith("2 "))
    assert "simple 03_eval_gsm8k untuned 1-of-1" in line and "running  on a-node  120 rows  begun 2 times" in line


# --- the worker of one task ---------------------------------------------------------------------------------------


@pytest.fixture
def worker(tmp_path, freeze_here):
    """A function that starts the worker of a task over a notebook of one cell in the place of 01_prepare."""
    started = []

    def start(code, number=0, *argv):
        notebooks = write_notebook(tmp_path / "notebooks" / "01_prepare.ipynb", code)
        tasks, _ = freeze_here("--presets", "simple", "--stages", "01", "--set", "device=cpu")
        command = [sys.executable, "-c", DRIVER, str(notebooks), "--worker", str(tasks.folder), "--task", str(number)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([*command, *argv], cwd=PROJECT_ROOT, **pipes))
        return tasks, started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("code", "status", "state", "words"),
    [
        ("print('fine')", 0, DONE, ""),
        ("raise ValueError('the reason')", 1, FAILED, "ValueError: the reason"),
        ("import os; os.kill(os.getpid(), 9)", 75, LOST, "the kernel died"),
    ],
)
def test_a_worker_says_how_its_task_ended(worker, code, status, state, words):
    tasks, process = worker(code)
    _, printed = process.communicate(timeout=200)
    assert process.returncode == status, printed
    ended = tasks.state(tasks.all[0])
    assert (ended.state, ended.tries) == (state, 1) and words in ended.failure


@pytest.mark.parametrize("how", ["stop file", "signal"])
def test_a_worker_that_is_stopped_finishes_its_row(worker, tmp_path, how):
    rows = tmp_path / "rows.jsonl"
    tasks, process = worker(rows_cell(f"{str(rows)!r}", pause_s=0.05))
    wait_for(lambda: count_lines(rows) >= 2)
    tasks.want_stop(1) if how == "stop file" else process.send_signal(signal.SIGTERM)
    process.communicate(timeout=200)
    assert process.returncode == 130 and tasks.state(tasks.all[0]).state == STOPPED
    assert [json.loads(line)["id"] for line in rows.read_text().splitlines()] == list(range(count_lines(rows)))


def test_a_second_worker_of_a_task_waits_and_finds_its_work_done(worker, tmp_path):
    path = str(tmp_path / "ran")
    code = f"import pathlib, time\ntime.sleep(2)\nwith pathlib.Path({path!r}).open('a') as file:\n    file.write('x')"
    _, first = worker(code)
    tasks, second = worker(code)
    assert (first.wait(200), second.wait(200)) == (0, 0)
    assert (tmp_path / "ran").read_text() in ("x", "xx") and tasks.state(tasks.all[0]).state == DONE


def test_a_task_that_does_not_exist_and_a_plan_that_is_gone_are_named(worker, tmp_path, capsys):
    tasks, process = worker("1", 7)
    assert "the plan has tasks 0 to 0" in process.communicate(timeout=100)[1] and process.returncode == 2
    assert run_all.main(["--worker", str(tmp_path / "none"), "--task", "0"]) == 1
    assert "tasks.json is missing" in capsys.readouterr().err
    assert run_all.main(["--worker", str(tasks.folder)]) == 2


def test_a_worker_refuses_a_task_whose_turn_has_not_come(freeze_here, capsys):
    tasks, _ = freeze_here("--presets", "simple", "--stages", "01", "02")
    assert run_all.main(["--worker", str(tasks.folder), "--task", "1"]) == 1
    assert "simple 02_train: not run: simple 01_prepare is not done" in capsys.readouterr().err
    assert tasks.state(tasks.all[1]).state == WAITING and isinstance(tasks.all[1], Task)
