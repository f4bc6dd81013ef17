"""A command that runs presets: what it needs first, the tasks it gives to an engine, and how they ended."""

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from lib.driver import devices
from lib.driver.cli import UsageError
from lib.driver.display import Display
from lib.driver.engines import slurm
from lib.driver.engines.engine import Engine
from lib.driver.environment import set_kernel_environment
from lib.driver.plan import Plan, output_folders
from lib.driver.tasks import DONE, Tasks, freeze, levels, make_tasks
from lib.driver.worker import comparison_plan
from lib.record.commitment import write_commitment
from lib.record.files import free_bytes, remove_temporary, write_json
from lib.record.gpus import VISIBLE_VARIABLE, visible_gpus
from lib.record.locks import FolderInUse, FolderUnwritable, hold
from lib.record.paths import COMPARE_STAGE, ENGINE_VARIABLE, PROJECT_ROOT, ArtifactError, results_root
from lib.record.plain_files import list_files
from lib.record.redaction import clean_value
from lib.record.terminal import fail, tell

# A run that starts on a disk as full as this only fails later, in the middle of its training.
MIN_FREE_BYTES = 20_000_000


@contextmanager
def locked(folder: Path, typed: str = "", wait: bool = False) -> Iterator[None]:
    """Hold the output folder for one driver and its kernel; UsageError if it is full, unwritable or held by another."""
    try:
        with hold(folder, typed, wait=wait, tell=fail):
            _check_folder(folder)
            yield
    except FolderUnwritable as error:
        raise UsageError(f"--output-dir: {error}; choose another folder") from None
    except FolderInUse as error:
        raise UsageError(f"{error}\n--wait waits for it; another --output-dir runs beside it") from None


def _check_folder(folder: Path) -> None:
    try:
        # A folder that came from elsewhere may hold links, through which a stage would write.
        list_files(folder)
    except ArtifactError as error:
        raise UsageError(f"--output-dir: {error}") from None
    free = free_bytes(folder)
    if free < MIN_FREE_BYTES:
        least = f"at least {MIN_FREE_BYTES / 1e6:.0f} MB are needed to begin"
        raise UsageError(f"{folder}: {free / 1e6:.1f} MB free on its disk, {least}; free some space")


def check_writable(folder: Path) -> None:
    """Raise UsageError if no file can be made in ``folder``: notebooks are written there only after hours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # One with a name: some network mounts cannot remove a file that is open.
        with NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({error.strerror}); choose another folder") from None


@contextmanager
def places(args: argparse.Namespace, plans: list[Plan]) -> Iterator[list[dict[str, str]]]:
    """The environment of each preset that runs at once: its GPU or share of the CPU; UsageError if no GPU is free."""
    most = min(args.jobs, max(map(len, levels(make_tasks(plans, args.shards, apart=args.jobs > 1)))))
    computes = bool(set(plans[0].stages) - {COMPARE_STAGE})
    gpus = visible_gpus() if computes and any(plan.params.device in ("auto", "cuda") for plan in plans) else []
    if not gpus:
        if computes and (note := devices.slow_cpu_note()):
            tell(note)
        yield [devices.cpu_shares(most)] * most
        return
    with ExitStack() as stack:
        try:
            held = stack.enter_context(devices.held_gpus(gpus, most, args.typed, wait=args.wait, tell=fail))
        except (devices.DevicesInUse, PermissionError) as error:
            raise UsageError(f"{error}\n--wait waits for a GPU; --set device=cpu needs none") from None
        if len(held) < most:
            fail(f"--jobs {args.jobs}: {len(held)} at once, a GPU for each; {len(gpus)} can be seen")
        # A machine's only GPU needs no name, and not every system knows its devices by UUID.
        yield [{VISIBLE_VARIABLE: gpu} if len(gpus) > 1 else {} for gpu in held]


def run_all(args: argparse.Namespace, plans: list[Plan], engine: Engine) -> int:
    """Freeze the tasks of ``plans``, let ``engine`` run them, and conclude; returns the exit status."""
    results, reports = output_folders(args)
    list_files(reports)  # refuses links
    check_writable(reports)
    set_kernel_environment(args.offline)
    # Every path was resolved before; from here on the project is the working directory, as in the kernels.
    os.chdir(PROJECT_ROOT)
    wanted = make_tasks(plans, args.shards, apart=engine.runs_several)
    tasks, found = freeze(results, plans, wanted, args.typed, slurm.queued)
    if args.engine != "slurm" and slurm.queued(tasks.folder):
        ways = f"follow them with --engine slurm, or end them (scancel --name={tasks.folder.name})"
        raise UsageError(f"{results.name}/ is being filled by tasks of this command in Slurm: {ways}")
    if not engine.is_at_work(tasks):
        for folder in (results, reports):
            remove_temporary(folder, below=False)
        for plan in plans:
            begin(plan, args.rerun_all and not found)
        tasks.reset()
    followed = {task.short_name: tasks.file(task) for task in tasks.all}
    os.environ[ENGINE_VARIABLE] = args.engine
    with Display(followed, quiet=args.quiet):
        engine.run(tasks)
    status = conclude(args, plans, tasks)
    if all(state.state == DONE for state in tasks.states().values()):
        shutil.rmtree(tasks.folder.parent)
    return status


def begin(plan: Plan, rerun: bool) -> None:
    """Write a run's parameters, and remove what killed drivers left, or with ``rerun`` everything it would reuse."""
    for folder in (plan.paths.run_dir, plan.reports_dir):
        remove_temporary(folder)
    write_json(plan.paths.config_resolved, clean_value(resolved_config(plan)))
    if rerun:
        forget_run(plan)


def conclude(args: argparse.Namespace, plans: list[Plan], tasks: Tasks) -> int:
    """Write the report site, print results and failures, log the runs; returns the exit status."""
    # Not at the top: scipy and statsmodels behind it take two seconds, while the first notebook could be running.
    from lib.driver import reporting

    states = tasks.states()
    for plan in plans:
        plan.wall_s = sum(states[task.number].wall_s for task in tasks.all if task.run == plan.preset)
        # The plan is part of it, and is written also where every stage is kept.
        write_commitment(plan.paths.run_dir)
    if any(tasks.was_stopped(task, states) for task in tasks.all):
        show_failures(tasks, args.typed)
        return 130
    has_site = reporting.write_report_site(args)
    reporting.show_results(args, plans, has_site)
    status = 0
    if any(state.failure for state in states.values()):
        show_failures(tasks, args.typed)
        status = 1
    elif "05" in (args.stages or []) and comparison_plan(plans[0]) is None:
        fail("run_all.py: --stages 05: no run here has answered rows to compare; run stages 03 or 04 first")
        status = 1
    elif not has_site:
        status = 1
    elif args.require_baselines and reporting.baselines_missed(args, plans):
        status = 3
    return reporting.track_runs(args, [plan.preset for plan in plans], status)


def show_failures(tasks: Tasks, typed: str) -> None:
    """Print what failed, in which cell, and the command that goes on."""
    for task in tasks.all:
        if failure := tasks.state(task).failure:
            fail(f"\n{task.run or 'all runs'}: {failure}")
    fail(f"\nfinished stages and rows are kept; to go on: {typed}")


def resolved_config(plan: Plan) -> dict[str, Any]:
    """Every parameter after overrides, and where each came from."""
    values, origin = plan.params.model_dump(), plan.params.origin
    return {"preset": plan.of_preset, "parameters": values, "origin": origin, "settings": plan.settings}


def forget_run(plan: Plan) -> None:
    """Remove the manifests of the chosen stages, and the rows and checkpoints that these would otherwise reuse."""
    paths = plan.paths
    for stage in plan.stages:
        folder = results_root(plan.settings["results_dir"]) if stage == COMPARE_STAGE else paths.run_dir
        (folder / stage / "manifest.json").unlink(missing_ok=True)
    if "02_train" in plan.stages:
        shutil.rmtree(paths.stage_dir("02_train"), ignore_errors=True)
    files = [paths.gsm8k_preds] if "03_eval_gsm8k" in plan.stages else []
    files += [paths.ailuminate_preds, paths.ailuminate_safety] if "04_eval_safety" in plan.stages else []
    for path in files:
        path.unlink(missing_ok=True)
