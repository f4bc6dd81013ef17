#!/usr/bin/env python3
"""Run the five notebooks once per preset with papermill, keep them filled in, and say what happened.

    python run_all.py --presets sandbox_one
    python run_all.py --presets simple medium strong

Every preset is checked before any notebook starts. A stage whose parameters, inputs and outputs are unchanged is not
run again. Exit status: 0 all ran; 1 a preset failed (the others still ran); 2 wrong usage or parameters, before
anything started; 3 a baseline was missed under --require-baselines; 130 interrupted. Never imports torch.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.driver.cli import UsageError, build_parser, check_names, settle_streams
from lib.driver.plan import Plan, make_plans, output_folders
from lib.record.paths import PROJECT_ROOT

if TYPE_CHECKING:
    from lib.driver.jobs import Channel

COMPARE = "05_compare"
# A run that starts on a disk as full as this only fails later, in the middle of its training.
MIN_FREE_BYTES = 20_000_000
# Of the person: once something runs, the project is the working directory.
TYPED_IN = Path.cwd()


# --- running ------------------------------------------------------------------------------------------------------


def stage_parameters(stage: str, plan: Plan) -> dict[str, Any]:
    """What the driver injects: exactly the names that the notebook declares."""
    from lib.driver.notebook import declared_parameters

    known = {**plan.params.model_dump(), **plan.settings}
    return {name: known[name] for name in declared_parameters(stage)}


def run_preset(plan: Plan, rerun: bool) -> None:
    """Run the stages of one preset that are not up to date; stop at the first that fails."""
    from lib.record.files import remove_temporary, write_json
    from lib.record.redaction import clean_value

    for folder in (plan.paths.run_dir, plan.reports_dir):
        remove_temporary(folder)
    write_json(plan.paths.config_resolved, clean_value(resolved_config(plan)))
    if rerun:
        forget_run(plan)
    for stage in plan.stages:
        if stage != COMPARE and not (plan.failure or plan.interrupted):
            run_stage(plan, stage, plan.paths.manifest(stage), plan.reports_dir / f"{stage}.ipynb", rerun)


def resolved_config(plan: Plan) -> dict[str, Any]:
    """Every parameter after overrides, and where each came from."""
    values, origin = plan.params.model_dump(), plan.params.origin
    return {"preset": plan.of_preset, "parameters": values, "origin": origin, "settings": plan.settings}


def forget_run(plan: Plan) -> None:
    """Remove rows and checkpoints that the asked stages would otherwise reuse."""
    import shutil

    paths = plan.paths
    reusable = {
        "02_train": [paths.stage_dir("02_train")],
        "03_eval_gsm8k": [paths.gsm8k_preds],
        "04_eval_safety": [paths.ailuminate_preds, paths.ailuminate_safety],
    }
    for path in (path for stage in plan.stages for path in reusable.get(stage, [])):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def run_stage(plan: Plan, stage: str, manifest: Path, notebook: Path, rerun: bool) -> None:
    """Run one stage unless its manifest still holds, and say why in a line."""
    from lib.driver import kernel_server
    from lib.driver.display import Display, Relay, StageWatch
    from lib.driver.notebook import execute, is_whole
    from lib.record.locks import held_descriptors
    from lib.record.manifest import NOT_RUN, stale_reason

    parameters = stage_parameters(stage, plan)
    reason = "asked for by --rerun-all" if rerun else stale_reason(manifest, stage, parameters)
    reason = reason or ("" if is_whole(notebook) else "its filled notebook is not whole")
    label = f"{plan.preset} {stage}"
    if not reason:
        _tell_stage(plan, f"{label}: unchanged, kept")
        return
    _tell_stage(plan, f"{label}: running" + (f" ({reason})" if reason != NOT_RUN else ""))
    if stage != COMPARE:
        # 05 imports no torch: alone it starts faster without.
        kernel_server.start(held_descriptors())
    watch = StageWatch(f"{plan.preset} {stage[:2]}", plan.paths, stage, parameters)
    channel = plan.channel
    display = Relay(watch, channel.show, live=channel.live, quiet=plan.quiet) if channel else None
    with display or Display(watch, quiet=plan.quiet):
        outcome = execute(stage, notebook, parameters, cell_timeout_s=plan.cell_timeout_s, go_on=plan.go_on)
    plan.interrupted = outcome.interrupted
    plan.wall_s += outcome.wall_s
    plan.ran.append(stage)
    if outcome.error:
        plan.failure = _failure_text(stage, outcome)
        word = "interrupted" if outcome.interrupted else "failed"
        _tell_stage(plan, f"{label}: {word} after {outcome.wall_s:.0f} s")
    else:
        _tell_stage(plan, "\n  ".join([f"{label}: done in {outcome.wall_s:.0f} s", *watch.final_lines()]))


def _tell_stage(plan: Plan, line: str) -> None:
    from lib.driver.terminal import tell

    if not plan.quiet:
        tell(line)


def _failure_text(stage: str, outcome: Any) -> str:
    cell = f" in cell {outcome.cell}" if outcome.cell else ""
    return f"{stage}{cell}: {outcome.error}\n  notebook: {_shown(outcome.notebook)}"


def run_comparison(plans: list[Plan], rerun: bool) -> Plan | None:
    """05 once, over every run of the folder; ``None`` when it was not asked for or has nothing to compare."""
    from lib.record.paths import find_runs, results_root

    first = plans[0]
    runs = find_runs(first.settings["results_dir"])
    if COMPARE not in first.stages or not runs:
        return None
    # By name, so that a run folder that was copied in makes the comparison run again.
    settings = {**first.settings, "run_names": [run.name for run in runs]}
    plan = replace(first, preset="all runs", settings=settings, reports_dir=first.reports_dir.parent, stages=[COMPARE])
    plan.wall_s, plan.failure, plan.ran = 0.0, "", []
    manifest = results_root(settings["results_dir"]) / COMPARE / "manifest.json"
    run_stage(plan, COMPARE, manifest, plan.reports_dir / f"{COMPARE}.ipynb", rerun)
    return plan


@contextmanager
def locked(folder: Path, typed: str = "", wait: bool = False) -> Iterator[None]:
    """Hold the output folder for one driver; the lock goes with its holder and its kernel, however they end.

    Raises:
        UsageError: the folder cannot be written or is full, or another driver holds it.
    """
    from lib.driver.terminal import fail
    from lib.record.locks import FolderInUse, FolderUnwritable, hold

    try:
        with hold(folder, typed, wait=wait, tell=fail):
            _check_room(folder)
            yield
    except FolderUnwritable as error:
        raise UsageError(f"--output-dir: {error}; choose another folder") from None
    except FolderInUse as error:
        raise UsageError(f"{error}\n--wait waits for it; another --output-dir runs beside it") from None


@contextmanager
def places(args: argparse.Namespace, plans: list[Plan]) -> Iterator[list[dict[str, str]]]:
    """The environment of each preset that runs at once: a GPU that it holds alone, or its share of the CPU.

    Raises:
        UsageError: other drivers hold every GPU.
    """
    from lib.driver.devices import VISIBLE_VARIABLE, DevicesInUse, cpu_shares, held_gpus, slow_cpu_note, visible_gpus
    from lib.driver.terminal import fail, tell

    most = min(args.jobs, len(plans))
    computing = any(plan.params.device != "cpu" and set(plan.stages) - {COMPARE} for plan in plans)
    gpus = visible_gpus() if computing else []
    with ExitStack() as stack:
        if gpus:
            try:
                held = stack.enter_context(held_gpus(gpus, most, args.typed, wait=args.wait, tell=fail))
            except (DevicesInUse, PermissionError) as error:
                raise UsageError(f"{error}\n--wait waits for a GPU; --set device=cpu needs none") from None
            if len(held) < most:
                fail(f"--jobs {args.jobs}: {len(held)} at once, a GPU for each; {len(gpus)} can be seen")
            # A machine's only GPU needs no name, and not every system knows its devices by UUID.
            yield [{VISIBLE_VARIABLE: gpu} if len(gpus) > 1 else {} for gpu in held]
        else:
            if set(plans[0].stages) - {COMPARE} and (note := slow_cpu_note()):
                tell(note)
            yield [cpu_shares(most)] * most


def _check_room(folder: Path) -> None:
    from lib.record.files import free_bytes

    free = free_bytes(folder)
    if free < MIN_FREE_BYTES:
        least = f"at least {MIN_FREE_BYTES / 1e6:.0f} MB are needed to begin"
        raise UsageError(f"{folder}: {free / 1e6:.1f} MB free on its disk, {least}; free some space, then go on")


def check_writable(folder: Path) -> None:
    """Whether files can be made in ``folder``, before anything is started that would write there in an hour.

    Raises:
        UsageError: they cannot.
    """
    from tempfile import NamedTemporaryFile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        # One with a name: some network mounts cannot remove a file that is open.
        with NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({error.strerror}); choose another folder") from None


# --- telling ------------------------------------------------------------------------------------------------------


def tell_results(args: argparse.Namespace, plans: list[Plan]) -> None:
    """The small table at the end, and where everything lies."""
    from lib.compare.tables import results_table
    from lib.driver.terminal import tell
    from lib.record.paths import display_path

    results, reports = output_folders(args)
    seconds = {plan.preset: plan.wall_s for plan in plans}
    table = results_table(display_path(results), seconds)
    if table:
        tell("\n" + table)
    if any(not plan.params.benchmark for plan in plans):
        tell("a rehearsal, not a benchmark: sandbox runs use a 135M model and small data.")
    tell(f"\nartefacts: {_shown(results)}/\nreports:   {_shown(reports)}/ (.ipynb and .html)")
    if (reports / "index.html").exists():
        tell(f"begin at:  {_shown(reports)}/index.html")


def _shown(path: Path) -> str:
    """``path`` as a person can use it where the command was typed."""
    path = (PROJECT_ROOT / path).resolve()
    return str(path.relative_to(TYPED_IN) if path.is_relative_to(TYPED_IN) else path)


def write_report_site(args: argparse.Namespace, required: bool = False) -> bool:
    """Write ``index.html`` over every run of the folder; False, and said, where that failed.

    Args:
        required: a folder without any scored run is a failure too.
    """
    from lib.compare.folder_schema import check_folder
    from lib.driver.terminal import fail, tell
    from lib.record.paths import ArtifactError, display_path, find_runs
    from lib.reports.site import write_site

    results, reports = output_folders(args)
    if not required and not find_runs(display_path(results)):
        return True
    try:
        check_folder(results, for_report=True)
        path = write_site(display_path(results), reports, redact=args.redact)
    except (ArtifactError, OSError, ValueError) as error:
        fail(f"reports/index.html was not written: {error}")
        return False
    if args.redact:
        tell_unredacted(results, reports)
    if required:
        tell(f"written: {_shown(path)}")
    return True


def tell_unredacted(results: Path, reports: Path) -> None:
    """Which filled notebooks still show texts of AILuminate, and what makes them anew without."""
    from lib.driver.terminal import fail
    from lib.record.paths import find_runs
    from lib.reports.site import TEXT_STAGE, rewriting_commands, unredacted_runs

    names = unredacted_runs(find_runs(str(results)), reports)
    if names:
        fail(f"--redact: {TEXT_STAGE} of {', '.join(names)} was made without it and still shows texts of AILuminate;")
        fail("index.html does not link it; with the other flags of the run, this makes it anew from its rows:")
        fail("\n".join(f"  {command}" for command in rewriting_commands(names)))


def export_runs(args: argparse.Namespace) -> int:
    """Write the runs of ``--presets``, or all of the folder, in the format of ``--export``; 1 when there is none."""
    from lib.compare.folder_schema import check_folder
    from lib.driver.terminal import fail, tell
    from lib.record.paths import ArtifactError, display_path
    from lib.reports.to_lm_eval import export_lm_eval

    results = output_folders(args)[0]
    try:
        check_folder(results, for_report=True)
        paths = export_lm_eval(display_path(results), _named_runs(args), redact=args.redact)
    except (ArtifactError, ValueError) as error:
        fail(f"--export {args.export}: {error}")
        return 1
    tell("\n".join(f"written: {_shown(path)}" for path in paths))
    return 0


def _named_runs(args: argparse.Namespace) -> list[str]:
    """The runs that ``--presets`` and ``--seeds`` name; none stands for all."""
    presets = args.presets or []
    return [f"{preset}_seed{seed}" for preset in presets for seed in args.seeds or []] or presets


def export_models(args: argparse.Namespace) -> int:
    """Write the evaluated model of the runs of ``--presets``, or of all, in a child process; 1 when one failed."""
    import subprocess

    from lib.record.paths import find_runs

    results, _ = output_folders(args)
    names = _named_runs(args) or [run.name for run in find_runs(str(results))]
    sources = (["--assets", str(args.assets.resolve())] if args.assets else []) + ["--offline"] * args.offline
    set_kernel_environment(args.offline)
    # A process of its own: the driver never imports torch.
    command = [sys.executable, "-m", "lib.reports.to_transformers", "--results-dir", str(results), *sources, *names]
    return min(1, subprocess.run(command, cwd=PROJECT_ROOT).returncode)


def check_tracker(args: argparse.Namespace) -> None:
    """Whether the runs can be logged as ``--track`` asks, before anything is started.

    Raises:
        UsageError: mlflow is not installed.
    """
    if args.track:
        from lib.reports.to_mlflow import missing

        if why := missing():
            raise UsageError(why)


def track_runs(args: argparse.Namespace, names: Sequence[str], status: int) -> int:
    """Log the runs ``names`` (every run where none is named) as ``--track`` asks.

    Returns ``status``, or 1 where logging failed: what failed is told, and the runs are as they were.
    """
    if not args.track or status == 130:
        return status
    from lib.driver.terminal import fail, tell
    from lib.record.paths import ArtifactError, display_path, find_runs
    from lib.reports.to_mlflow import TrackError, connect, how_to_look, log_runs

    results, reports = output_folders(args)
    scored = [run.name for run in find_runs(str(results)) if not names or run.name in names]
    if not scored:
        fail(f"--track {args.track}: no run has rows to score yet, nothing was logged")
        return status or 1
    try:
        connection = connect(str(results))
        lines = log_runs(display_path(results), reports, connection, scored, redact=args.redact)
    except (ArtifactError, TrackError) as error:
        fail(f"--track {args.track}: {error}")
        return status or 1
    tell("\n".join([*lines, how_to_look(connection)]))
    return status


def tell_failures(plans: list[Plan], typed: str) -> None:
    """What failed, in which cell, and the command that goes on."""
    from lib.driver.terminal import fail

    for plan in plans:
        if plan.failure:
            fail(f"\n{plan.preset}: {plan.failure}")
    fail(f"\nfinished stages and rows are kept; to go on: {typed}")


def show_list(args: argparse.Namespace) -> int:
    """Presets and the state of their stages; 2 where one that was named cannot be run, or there is none."""
    from lib.driver.terminal import fail, tell
    from lib.params import ParamsError, find_presets
    from lib.record.manifest import stale_reason
    from lib.record.paths import STAGES

    named, status = args.presets, 0
    chosen = named or find_presets(args.params_dir)
    if not chosen:
        raise UsageError(f"--params-dir {args.params_dir}: there is no preset in this folder")
    for preset in chosen:
        args.presets = [preset]
        try:
            plans = make_plans(args)
        except (UsageError, ParamsError) as error:
            fail(f"{preset}: {error}")
            status = 2 if named else status
            continue
        for plan in plans:
            tell(f"{plan.preset}: {plan.params.description}")
            for stage in (stage for stage in STAGES if stage != COMPARE):
                reason = stale_reason(plan.paths.manifest(stage), stage, stage_parameters(stage, plan))
                tell(f"  {stage:<15} {reason or 'complete'}")
    return status


def verify(folder: str) -> int:
    """Recompute every metric below ``folder`` from its row files; 1 when anything differs.

    Raises:
        UsageError: there is no such folder.
    """
    from lib.compare.folder_schema import check_folder
    from lib.compare.verify import verify_folder
    from lib.driver.terminal import fail, tell
    from lib.record.paths import ArtifactError

    if not Path(folder).is_dir():
        raise UsageError(f"--verify {folder}: there is no such folder; results of a run lie in results/")
    try:
        check_folder(Path(folder).resolve())
        lines, mismatches = verify_folder(Path(folder).resolve())
    except ArtifactError as error:
        fail(f"--verify {folder}: {error}")
        return 1
    tell("\n".join(lines))
    for mismatch in mismatches:
        fail(f"MISMATCH {mismatch}")
    runs = f"{len(lines)} run{'s' if len(lines) != 1 else ''}"
    tell(f"{len(mismatches)} mismatch{'es' if len(mismatches) != 1 else ''}; recomputed from the rows of {runs}")
    return 1 if mismatches else 0


# --- main ---------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the return value is the exit status."""
    settle_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(argv)
    args.params_dir = args.params_dir.resolve()
    args.typed = shlex.join(["python", "run_all.py", *argv])
    from lib.driver.terminal import fail
    from lib.record.paths import ArtifactError

    try:
        check_names(argv)
        return run_command(args)
    except UsageError as error:
        fail(f"run_all.py: {error}")
        return 2
    except KeyboardInterrupt:
        fail(f"\ninterrupted; to go on: {args.typed}")
        return 130
    except ModuleNotFoundError as error:
        # The first command that is typed, with the system's Python: a traceback would not say so.
        fail(f"run_all.py: {error} for {sys.executable}; use .venv/bin/python, which make setup makes")
        return 2
    except (ArtifactError, OSError) as error:
        # A full disk above all: what was written before is whole.
        fail(f"run_all.py: {_os_words(error)}\nto go on: {args.typed}")
        return 1


def _os_words(error: Exception) -> str:
    from lib.record.files import DISK_FULL, full_disk_text

    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return full_disk_text(Path(error.filename or "."))
    return str(error)


def run_command(args: argparse.Namespace) -> int:
    """What the command line asks for; the return value is the exit status.

    Raises:
        UsageError: it cannot be done; nothing was started.
    """
    from lib.driver import kernel_server

    if args.verify:
        return verify(args.verify)
    if args.list:
        return show_list(args)
    if args.export:
        return export_models(args) if args.export == "model" else export_runs(args)
    check_tracker(args)
    if args.report_only:
        # What no page can be made of, no tracker is told.
        return track_runs(args, [], 0) if write_report_site(args, required=True) else 1
    plans = make_plans(args)
    results, reports = output_folders(args)
    with locked(results, args.typed, args.wait), places(args, plans) as environments:
        check_writable(reports)
        try:
            status = run_all(args, plans, environments)
        finally:
            # It inherited the lock, which then goes with this driver.
            kernel_server.stop()
        return track_runs(args, [plan.preset for plan in plans], status)


def run_all(args: argparse.Namespace, plans: list[Plan], environments: list[dict[str, str]]) -> int:
    """Every preset, then the comparison; the return value is the exit status.

    Args:
        environments: of the presets that run at once, as ``places`` gives them.
    """
    from lib.driver.terminal import fail
    from lib.record.files import remove_temporary

    set_kernel_environment(args.offline)
    # Every path was resolved above; from here on the project is the working directory, as in the kernels.
    os.chdir(PROJECT_ROOT)
    for folder in output_folders(args):
        remove_temporary(folder, below=False)
    if len(environments) > 1:
        run_at_once(args, plans, environments)
    else:
        os.environ |= environments[0]
        run_in_turn(args, plans)
    interrupted = any(plan.interrupted for plan in plans)
    comparison = None if interrupted else run_comparison(plans, args.rerun_all)
    every = [*plans, *([comparison] if comparison else [])]
    interrupted = any(plan.interrupted for plan in every)
    site_failed = not interrupted and not write_report_site(args)
    if not interrupted:
        tell_results(args, plans)
    if interrupted or any(plan.failure for plan in every):
        tell_failures(every, args.typed)
        return 130 if interrupted else 1
    if "05" in (args.stages or []) and comparison is None:
        fail("run_all.py: --stages 05: no run here has answered rows to compare; run stages 03 or 04 first")
        return 1
    if site_failed:
        return 1
    return 3 if args.require_baselines and baselines_missed(args, plans) else 0


def run_in_turn(args: argparse.Namespace, plans: list[Plan]) -> None:
    """One preset after the other; none after an interrupt."""
    for plan in plans:
        run_preset(plan, args.rerun_all)
        if plan.interrupted:
            break


def run_at_once(args: argparse.Namespace, plans: list[Plan], environments: list[dict[str, str]]) -> None:
    """Every preset in a process of its own, as many at once as there are places; what became of each is noted."""
    from functools import partial

    from lib.driver.display import Board
    from lib.driver.jobs import run_jobs

    with Board(quiet=args.quiet) as board:
        jobs = {plan.preset: partial(run_as_job, plan, args.rerun_all) for plan in plans}
        results = run_jobs(jobs, environments, board)
    for plan in plans:
        if plan.preset not in results:
            plan.interrupted = True
            continue
        ended = results[plan.preset] or {"failure": "its process was ended from outside"}
        for name, value in ended.items():
            setattr(plan, name, value)


def run_as_job(plan: Plan, rerun: bool, channel: "Channel") -> dict[str, Any]:
    """One preset in a process of its own; returns what became of it, for the driver's plan."""
    from lib.driver import kernel_server
    from lib.record.paths import ArtifactError

    plan = replace(plan, channel=channel)
    try:
        run_preset(plan, rerun)
    except KeyboardInterrupt:
        plan.interrupted, plan.failure = True, plan.failure or "interrupted"
    except (ArtifactError, OSError) as error:
        plan.failure = _os_words(error)
    finally:
        kernel_server.stop()
    return {name: getattr(plan, name) for name in ("failure", "interrupted", "wall_s", "ran")}


def baselines_missed(args: argparse.Namespace, plans: list[Plan]) -> bool:
    """Whether a preset is below a baseline; each miss is told."""
    from lib.compare.tables import missed_baselines
    from lib.driver.terminal import fail
    from lib.record.paths import display_path

    misses = missed_baselines(display_path(output_folders(args)[0]), [plan.preset for plan in plans])
    for miss in misses:
        fail(miss)
    return bool(misses)


def set_kernel_environment(offline: bool) -> None:
    """What the kernels inherit: no bars that flood a notebook, no telemetry, no network where it is forbidden."""
    from lib.record.paths import DRIVER_VARIABLE

    ensure_home()
    # This project's modules also where the environment was made for another checkout: a forked kernel does not look
    # into its working directory.
    paths = [str(PROJECT_ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, paths)))
    os.environ[DRIVER_VARIABLE] = "1"
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    # The order of a set is the same in every kernel: a run that went on is the run that was never broken.
    os.environ["PYTHONHASHSEED"] = "0"
    if offline:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def ensure_home() -> None:
    """Give the libraries a folder where HOME is not set and the user has no account: many end without one."""
    from lib.driver.terminal import fail
    from lib.record.locks import machine_folder
    from lib.record.redaction import home_folder

    if not home_folder():
        folder = machine_folder()
        fail(f"HOME is not set and user {os.getuid()} has no account: libraries keep their files in {folder}")
        os.environ["HOME"] = str(folder)


if __name__ == "__main__":
    sys.exit(main())
