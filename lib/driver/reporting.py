"""What is made of finished runs: verification, the report site, exports, tracking, and the table at a run's end."""

import argparse
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lib.compare.folder_schema import check_folder
from lib.compare.found import Grader
from lib.compare.tables import findings_lines, missed_baselines, results_table
from lib.compare.verify import verify_folder
from lib.driver.cli import UsageError
from lib.driver.environment import set_kernel_environment
from lib.driver.plan import Plan, output_folders
from lib.record.commitment import COMMITMENT
from lib.record.files import sha256_file
from lib.record.lookup import AssetError
from lib.record.paths import PROJECT_ROOT, ArtifactError, display_path, find_runs
from lib.record.redaction import one_line
from lib.record.terminal import as_typed, fail, tell
from lib.reports import to_mlflow
from lib.reports.site import TEXT_STAGE, rewriting_commands, unredacted_runs, write_site
from lib.reports.to_lm_eval import export_lm_eval

MAX_LINES = 20
# Said after every verification, also of a folder without a mismatch.
NOT_SHOWN = """\
not shown by any recomputation: that a model wrote these rows, on this date, with this code. --audit K generates some
of them again; a commitment that was sent before a deadline shows that nothing was changed after it."""


def verify(args: argparse.Namespace) -> int:
    """Recompute every metric below ``--verify`` from its rows; 1 when anything differs, UsageError without folder.

    With ``--strict``, also when something to compare with is absent.
    """
    folder = Path(args.verify)
    if not folder.is_dir():
        raise UsageError(f"--verify {folder}: there is no such folder; results of a run lie in results/")
    grader = Grader(str(args.assets.resolve()) if args.assets else "", args.params_dir)
    try:
        check_folder(folder.resolve())
        found = verify_folder(folder.resolve(), grader)
    except (ArtifactError, AssetError) as error:
        fail(f"--verify {folder}: {error}")
        return 1
    # Names and ids in it are whatever somebody wrote: none may look like a line of this report.
    tell("\n".join(map(one_line, found.runs)))
    for mismatch in found.mismatches:
        fail(f"MISMATCH {one_line(mismatch)}")
    for title, parts in (
        ("not as here", found.differences),
        ("checked", [f"{count} {what}" for what, count in found.checked.items()]),
        ("absent", found.absent),
        ("not checked", found.unchecked),
        ("commitment", found.commitments),
    ):
        for line in _shortened(parts) if parts else []:
            tell(f"{title}: {one_line(line)}")
    runs = _counted(len(found.runs), "run", "s")
    tell(NOT_SHOWN)
    tell(f"{_counted(len(found.mismatches), 'mismatch', 'es')}; recomputed from the rows of {runs}")
    return 1 if found.mismatches or (args.strict and found.absent) else 0


def _shortened(lines: list[str]) -> list[str]:
    more = len(lines) - MAX_LINES
    return [*lines[:MAX_LINES], f"... and {more} more"] if more > 1 else lines


def _counted(count: int, what: str, plural: str) -> str:
    return f"{count} {what}{plural if count != 1 else ''}"


def audit(args: argparse.Namespace) -> int:
    """Generate and judge ``--audit`` rows of each file of ``--verify`` again; 1 if one differs or cannot be made."""
    # Whoever makes a folder must not know which rows will be drawn.
    seed = random.SystemRandom().randrange(2**32) if args.audit_seed is None else args.audit_seed
    drawn = ["--rows", str(args.audit), "--seed", str(seed), str(Path(args.verify).resolve())]
    return _run_module("lib.compare.regenerate", [*_model_sources(args), *drawn])


def write_report_site(args: argparse.Namespace, required: bool = False) -> bool:
    """Write ``index.html`` over every run; prints why and returns False on failure, also of no run if ``required``."""
    results, reports = output_folders(args)
    if not required and not find_runs(display_path(results)):
        return True
    try:
        check_folder(results, for_report=True)
        path = write_site(display_path(results), reports, redact=args.redact)
    except (ArtifactError, OSError, ValueError) as error:
        fail(f"reports/index.html was not written: {error}")
        return False
    names = unredacted_runs(find_runs(str(results)), reports) if args.redact else []
    if names:
        fail(f"--redact: {TEXT_STAGE} of {', '.join(names)} was made without it and still shows texts of AILuminate;")
        fail("index.html does not link it; with the other flags of the run, this makes it again from its rows:")
        fail("\n".join(f"  {command}" for command in rewriting_commands(names)))
    if required:
        tell(f"written: {as_typed(path)}")
    return True


def show_results(args: argparse.Namespace, plans: list[Plan], has_site: bool) -> None:
    """Print the small table at the end, the findings where index.html has them too, and where everything lies."""
    results, reports = output_folders(args)
    table = results_table(display_path(results), {plan.preset: plan.wall_s for plan in plans})
    if table:
        tell("\n" + table)
    # Without the site, some run of the folder cannot be read, and p-values cannot be adjusted for it.
    if table and has_site:
        tell("\n".join(findings_lines(display_path(results), [plan.preset for plan in plans])))
    if any(not plan.params.benchmark for plan in plans):
        tell("a rehearsal, not a benchmark: sandbox runs use a 135M model and small data.")
    for plan in plans:
        if (path := plan.paths.run_dir / COMMITMENT).exists():
            tell(f"commitment of {plan.preset}: {sha256_file(path)}")
    tell(f"\nartefacts: {as_typed(results)}/\nreports:   {as_typed(reports)}/ (.ipynb and .html)")
    if (reports / "index.html").exists():
        tell(f"begin at:  {as_typed(reports)}/index.html")


def baselines_missed(args: argparse.Namespace, plans: list[Plan]) -> bool:
    """Whether a preset is below a baseline; prints each miss."""
    misses = missed_baselines(display_path(output_folders(args)[0]), [plan.preset for plan in plans])
    for miss in misses:
        fail(miss)
    return bool(misses)


def export_runs(args: argparse.Namespace) -> int:
    """Write the runs of ``--presets``, or all, as lm-evaluation-harness writes them; 1 without any."""
    results = output_folders(args)[0]
    try:
        check_folder(results, for_report=True)
        paths = export_lm_eval(display_path(results), _named_runs(args), redact=args.redact)
    except (ArtifactError, ValueError) as error:
        fail(f"--export {args.export}: {error}")
        return 1
    tell("\n".join(f"written: {as_typed(path)}" for path in paths))
    return 0


def _named_runs(args: argparse.Namespace) -> list[str]:
    """The runs that ``--presets`` and ``--seeds`` name; empty for all."""
    presets = args.presets or []
    return [f"{preset}_seed{seed}" for preset in presets for seed in args.seeds or []] or presets


def export_models(args: argparse.Namespace) -> int:
    """Write the evaluated model of the runs of ``--presets``, or of all; 1 if one failed."""
    results, _ = output_folders(args)
    names = _named_runs(args) or [run.name for run in find_runs(str(results))]
    return _run_module("lib.reports.to_transformers", ["--results-dir", str(results), *_model_sources(args), *names])


def _model_sources(args: argparse.Namespace) -> list[str]:
    return (["--assets", str(args.assets.resolve())] if args.assets else []) + ["--offline"] * args.offline


def _run_module(module: str, arguments: Sequence[str]) -> int:
    """Status 0 or 1 of a child process: the driver never imports torch."""
    set_kernel_environment("--offline" in arguments)
    return min(1, abs(subprocess.run([sys.executable, "-m", module, *arguments], cwd=PROJECT_ROOT).returncode))


def track_runs(args: argparse.Namespace, names: Sequence[str], status: int) -> int:
    """Log the runs ``names`` (all if empty) to ``--track``; returns ``status``, or 1 where logging failed."""
    if not args.track or status == 130:
        return status
    results, reports = output_folders(args)
    scored = [run.name for run in find_runs(str(results)) if not names or run.name in names]
    if not scored:
        fail(f"--track {args.track}: no run has rows to score yet, nothing was logged")
        return status or 1
    try:
        connection = to_mlflow.connect(str(results))
        lines = to_mlflow.log_runs(display_path(results), reports, connection, scored, redact=args.redact)
    except (ArtifactError, to_mlflow.TrackError) as error:
        fail(f"--track {args.track}: {error}")
        return status or 1
    tell("\n".join([*lines, to_mlflow.how_to_look(connection)]))
    return status
