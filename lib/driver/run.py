"""Presets in turn or side by side, then the comparison: which stages run, on which device, and how they ended."""

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from lib.driver import devices, kernel_server
from lib.driver.cli import UsageError
from lib.driver.display import Display, final_lines
from lib.driver.jobs import run_jobs
from lib.driver.notebook import declared_parameters, execute, is_complete
from lib.driver.plan import Plan, output_folders
from lib.record import progress
from lib.record.commitment import write_commitment
from lib.record.files import error_text, free_bytes, remove_temporary, write_json
from lib.record.gpus import VISIBLE_VARIABLE, visible_gpus
from lib.record.locks import FolderInUse, FolderUnwritable, held_descriptors, hold, machine_folder
from lib.record.manifest import NOT_RUN, stale_reason
from lib.record.paths import COMPARE_STAGE, DRIVER_VARIABLE, PROJECT_ROOT, ArtifactError, find_runs, results_root
from lib.record.plain_files import list_files
from lib.record.redaction import clean_value, home_folder
from lib.record.terminal import as_typed, fail, tell

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
    most = min(args.jobs, len(plans))
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


def set_kernel_environment(offline: bool) -> None:
    """Set what the kernels inherit: no bars that flood a notebook, no telemetry, no network where it is forbidden."""
    ensure_home()
    # This project's modules also where the environment was made for another checkout: a forked kernel does not look
    # into its working directory.
    paths = [str(PROJECT_ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ |= {
        DRIVER_VARIABLE: "1",
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, paths))),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        # The order of a set is the same in every kernel: a resumed run gives the numbers of an uninterrupted one.
        "PYTHONHASHSEED": "0",
    }
    # GPUs are numbered as nvidia-smi, which the locks go by, numbers them.
    os.environ.setdefault(devices.ORDER_VARIABLE, devices.BUS_ORDER)
    if offline:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def ensure_home() -> None:
    """Give the libraries a folder where HOME is not set and the user has no account: many fail without one."""
    if not home_folder():
        folder = machine_folder()
        fail(f"HOME is not set and user {os.getuid()} has no account: libraries keep their files in {folder}")
        os.environ["HOME"] = str(folder)


def run_all(args: argparse.Namespace, plans: list[Plan], environments: list[dict[str, str]]) -> int:
    """Run every preset, in the ``environments`` of ``places``, then the comparison; returns the exit status."""
    results, reports = output_folders(args)
    list_files(reports)  # refuses links
    check_writable(reports)
    set_kernel_environment(args.offline)
    # Every path was resolved before; from here on the project is the working directory, as in the kernels.
    os.chdir(PROJECT_ROOT)
    for folder in (results, reports):
        remove_temporary(folder, below=False)
    try:
        if len(environments) > 1:
            run_at_once(args, plans, environments)
        else:
            os.environ |= environments[0]
            for plan in plans:
                with Display({plan.preset: plan.paths.run_dir}, quiet=args.quiet):
                    run_preset(plan, args.rerun_all)
                if plan.interrupted:
                    break
        interrupted = any(plan.interrupted for plan in plans)
        comparison = None if interrupted else run_comparison(plans, args.rerun_all)
    finally:
        # It inherited the lock on the folder.
        kernel_server.stop()
    return conclude(args, plans, comparison)


def conclude(args: argparse.Namespace, plans: list[Plan], comparison: Plan | None) -> int:
    """Write the report site, print results and failures, log the runs; returns the exit status."""
    # Not at the top: scipy and statsmodels behind it take two seconds, while the first notebook could be running.
    from lib.driver import reporting

    every = [*plans, *([comparison] if comparison else [])]
    if any(plan.interrupted for plan in every):
        show_failures(every, args.typed)
        return 130
    has_site = reporting.write_report_site(args)
    reporting.show_results(args, plans, has_site)
    status = 0
    if any(plan.failure for plan in every):
        show_failures(every, args.typed)
        status = 1
    elif "05" in (args.stages or []) and comparison is None:
        fail("run_all.py: --stages 05: no run here has answered rows to compare; run stages 03 or 04 first")
        status = 1
    elif not has_site:
        status = 1
    elif args.require_baselines and reporting.baselines_missed(args, plans):
        status = 3
    return reporting.track_runs(args, [plan.preset for plan in plans], status)


def run_at_once(args: argparse.Namespace, plans: list[Plan], environments: list[dict[str, str]]) -> None:
    """Run each preset in its own process, as many at once as there are ``environments``."""
    runs = {plan.preset: plan.paths.run_dir for plan in plans}
    # No thread: jobs are forked from this process.
    with Display(runs, quiet=args.quiet, background=False) as display:
        results = run_jobs(
            {plan.preset: partial(run_as_job, plan, args.rerun_all) for plan in plans}, environments, display
        )
    for plan in plans:
        ended = results.get(plan.preset, {"interrupted": True})
        for name, value in (ended or {"failure": "its process was ended from outside"}).items():
            setattr(plan, name, value)


def run_as_job(plan: Plan, rerun: bool) -> dict[str, Any]:
    """Run one preset in a job's process; returns how it ended, for the driver's plan."""
    try:
        run_preset(plan, rerun)
    except KeyboardInterrupt:
        plan.interrupted, plan.failure = True, plan.failure or "interrupted"
    except (ArtifactError, OSError) as error:
        plan.failure = error_text(error)
    finally:
        kernel_server.stop()
    return {name: getattr(plan, name) for name in ("failure", "interrupted", "wall_s")}


def run_comparison(plans: list[Plan], rerun: bool) -> Plan | None:
    """Run 05 once, over every run of the folder; ``None`` if it was not chosen or has nothing to compare."""
    plan = comparison_plan(plans[0])
    if plan:
        root = results_root(plan.settings["results_dir"])
        progress.remove_files(root)
        with Display({plan.preset: root}, quiet=plan.quiet):
            run_stage(plan, COMPARE_STAGE, root / COMPARE_STAGE, rerun)
    return plan


def comparison_plan(first: Plan) -> Plan | None:
    """The plan of 05 over every run of the folder; ``None`` if it was not chosen or has nothing to compare."""
    runs = find_runs(str(results_root(first.settings["results_dir"])))
    if COMPARE_STAGE not in first.stages or not runs:
        return None
    # By name, so that a run folder that was copied in makes the comparison run again.
    settings = {**first.settings, "run_names": [run.name for run in runs]}
    above = first.reports_dir.parent
    return replace(first, preset="all runs", settings=settings, reports_dir=above, wall_s=0.0, failure="")


def show_failures(plans: list[Plan], typed: str) -> None:
    """Print what failed, in which cell, and the command that goes on."""
    for plan in plans:
        if plan.failure:
            fail(f"\n{plan.preset}: {plan.failure}")
    fail(f"\nfinished stages and rows are kept; to go on: {typed}")


def run_preset(plan: Plan, rerun: bool) -> None:
    """Run the stages of one preset that are not up to date; stop at the first that fails."""
    for folder in (plan.paths.run_dir, plan.reports_dir):
        remove_temporary(folder)
    progress.remove_files(plan.paths.run_dir)
    write_json(plan.paths.config_resolved, clean_value(resolved_config(plan)))
    if rerun:
        forget_run(plan)
    for stage in plan.stages:
        if stage != COMPARE_STAGE and not (plan.failure or plan.interrupted):
            run_stage(plan, stage, plan.paths.stage_dir(stage), rerun)
    # The plan is part of it, and is written also where every stage is kept.
    write_commitment(plan.paths.run_dir)


def resolved_config(plan: Plan) -> dict[str, Any]:
    """Every parameter after overrides, and where each came from."""
    values, origin = plan.params.model_dump(), plan.params.origin
    return {"preset": plan.of_preset, "parameters": values, "origin": origin, "settings": plan.settings}


def stage_parameters(stage: str, plan: Plan) -> dict[str, Any]:
    """The values of exactly the names that the notebook declares."""
    known = {**plan.params.model_dump(), **plan.settings}
    return {name: known[name] for name in declared_parameters(stage)}


def forget_run(plan: Plan) -> None:
    """Remove rows and checkpoints that the chosen stages would otherwise reuse."""
    paths = plan.paths
    if "02_train" in plan.stages:
        shutil.rmtree(paths.stage_dir("02_train"), ignore_errors=True)
    files = [paths.gsm8k_preds] if "03_eval_gsm8k" in plan.stages else []
    files += [paths.ailuminate_preds, paths.ailuminate_safety] if "04_eval_safety" in plan.stages else []
    for path in files:
        path.unlink(missing_ok=True)


def due_reason(plan: Plan, stage: str, folder: Path, rerun: bool) -> str:
    """Why ``run_stage`` would run the stage; "" where it is kept."""
    reason = "--rerun-all" if rerun else stale_reason(folder / "manifest.json", stage, stage_parameters(stage, plan))
    is_filled = is_complete(plan.reports_dir / f"{stage}.ipynb")
    return reason or ("" if is_filled else "its filled notebook is incomplete")


def run_stage(plan: Plan, stage: str, folder: Path, rerun: bool) -> None:
    """Run one stage unless its manifest in ``folder`` still holds, and print why in a line."""
    parameters, notebook = stage_parameters(stage, plan), plan.reports_dir / f"{stage}.ipynb"
    reason = due_reason(plan, stage, folder, rerun)
    label, say = f"{plan.preset} {stage}", (lambda _: None) if plan.quiet else tell
    if not reason:
        say(f"{label}: unchanged, kept")
        return
    say(f"{label}: running" + (f" ({reason})" if reason != NOT_RUN else ""))
    if stage != COMPARE_STAGE:
        # 05 imports no torch: alone it starts faster without.
        kernel_server.start(held_descriptors())
    with progress.offer_file(folder) as file:
        outcome = execute(stage, notebook, parameters, cell_timeout_s=plan.cell_timeout_s, go_on=plan.go_on)
        lines = final_lines(progress.read_file(file)[1])
    plan.interrupted = outcome.interrupted
    plan.wall_s += outcome.wall_s
    if outcome.error:
        cell = f" in cell {outcome.cell}" if outcome.cell else ""
        plan.failure = f"{stage}{cell}: {outcome.error}\n  notebook: {as_typed(outcome.notebook)}"
        word = "interrupted" if outcome.interrupted else "failed"
        say(f"{label}: {word} after {outcome.wall_s:.0f} s")
    else:
        say("\n  ".join([f"{label}: done in {outcome.wall_s:.0f} s", *lines]))
