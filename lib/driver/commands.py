"""Which command a command line gives, and the list of presets."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from lib.driver.cli import UsageError
from lib.driver.convert import convert_preset
from lib.driver.dry_run import dry_run
from lib.driver.engines.engine import Engine
from lib.driver.plan import Plan, make_plans, output_folders
from lib.driver.run import locked, places, run_all
from lib.driver.tasks import find_tasks, task_lines
from lib.driver.worker import stage_parameters
from lib.params import ParamsError, find_presets
from lib.record.manifest import stale_reason
from lib.record.paths import COMPARE_STAGE, STAGES
from lib.record.terminal import as_typed, fail, tell


def run_command(args: argparse.Namespace) -> int:
    """Run the command and return the exit status; UsageError if nothing could be started."""
    args.params_dir = args.params_dir.resolve()
    if args.dry_run and (args.convert_preset or args.verify or args.export or args.report_only):
        others = "--convert-preset, --verify, --export and --report-only"
        raise UsageError(f"--dry-run is for commands that run presets: leave out {others}")
    if args.worker:
        return run_worker(args)
    if args.convert_preset:
        return convert_preset(args)
    if args.list:
        return show_list(args)
    if (args.audit and not args.verify) or (args.audit_seed is not None and not args.audit):
        missing = "--audit K" if args.verify else "--verify DIR"
        raise UsageError(f"rows are drawn from a finished folder: add {missing} (--verify DIR --audit 5)")
    if args.verify or args.export or args.report_only or args.track:
        # Scipy and statsmodels behind it take two seconds.
        from lib.driver import reporting
        from lib.reports import to_mlflow

        if args.verify:
            return max(reporting.verify(args), reporting.audit(args) if args.audit else 0)
        if args.export:
            return reporting.export_models(args) if args.export == "model" else reporting.export_runs(args)
        if args.track and (why := to_mlflow.missing()):
            raise UsageError(why)
        if args.report_only:
            return reporting.track_runs(args, [], 0) if reporting.write_report_site(args, required=True) else 1
    plans = make_plans(args)
    if args.dry_run:
        return dry_run(args, plans)
    with locked(output_folders(args)[0], args.typed, args.wait), chosen_engine(args, plans) as engine:
        return run_all(args, plans, engine)


def run_worker(args: argparse.Namespace) -> int:
    """Run one task of a plan."""
    # With papermill's half a second.
    from lib.driver import worker

    if args.task is None:
        raise UsageError("--worker runs one task: add --task N")
    return worker.work(args)


@contextmanager
def chosen_engine(args: argparse.Namespace, plans: list[Plan]) -> Iterator[Engine]:
    """What ``--engine`` names; UsageError where it cannot run here."""
    if args.engine == "ray":
        from lib.driver.engines.ray import RayEngine

        yield RayEngine(args.address, args.jobs)
    elif args.engine == "slurm":
        from lib.driver.engines.slurm import SlurmEngine

        yield SlurmEngine(args.sbatch)
    else:
        from lib.driver.engines.local import LocalEngine

        with places(args, plans) as environments:
            yield LocalEngine(environments)


def show_list(args: argparse.Namespace) -> int:
    """Print the tasks of a plan, the presets and the state of their stages; 2 if one that was named cannot be run."""
    status = 0
    if tasks := find_tasks(output_folders(args)[0]):
        tell(f"tasks of {as_typed(tasks.folder)}")
        tell("\n".join(task_lines(tasks)))
    chosen = args.presets or find_presets(args.params_dir)
    if not chosen:
        raise UsageError(f"--params-dir {args.params_dir}: there is no preset in this folder")
    for preset in chosen:
        try:
            plans = make_plans(argparse.Namespace(**{**vars(args), "presets": [preset]}))
        except (UsageError, ParamsError) as error:
            fail(f"{preset}: {error}")
            status = 2 if args.presets else status
            continue
        for plan in plans:
            tell(f"{plan.preset}: {plan.params.description}")
            for stage in (stage for stage in STAGES if stage != COMPARE_STAGE):
                reason = stale_reason(plan.paths.manifest(stage), stage, stage_parameters(stage, plan))
                tell(f"  {stage:<15} {reason or 'complete'}")
    return status
