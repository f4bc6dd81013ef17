"""The flags of ``run_all.py`` and their help. Needs only the standard library: ``--help`` works before the setup."""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lib.record.paths import PROJECT_ROOT, RESULTS_VARIABLE, STAGES, is_utf8

DESCRIPTION = """\
Fine-tune, evaluate and compare: five notebooks per preset, kept as a record that others can check.

  python run_all.py --presets sandbox_one             a rehearsal in minutes: bundled 135M model, bundled data, CPU
  python run_all.py --presets simple medium strong    the real thing
  python run_all.py --presets simple --smoke-test     real model and data, few rows: does it run here?
  python run_all.py --presets simple --set learning_rate=2e-5 num_epochs=2
  python run_all.py --verify results                  recompute every number from the rows"""
EPILOG = """\
exit status: 0 all ran; 1 a preset failed, the others ran; 2 wrong usage or parameters; 3 a baseline missed under
--require-baselines; 130 interrupted. A run that was stopped goes on when the same command is typed again."""
STAGE_NUMBERS = tuple(stage[:2] for stage in STAGES)


class UsageError(Exception):
    """The command line asks for something that cannot be done; nothing was started."""


def settle_streams() -> None:
    """Print a letter that the terminal's encoding lacks as a question mark instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        # None where it was closed.
        if getattr(stream, "errors", None) in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def check_names(typed: Sequence[str]) -> None:
    """UsageError if something typed, the project or the working directory has a name that is not UTF-8."""
    places = [str(PROJECT_ROOT), str(Path.cwd()), os.environ.get(RESULTS_VARIABLE, "")]
    for name in [*typed, *places]:
        if is_utf8(name):
            continue
        try:
            os.fsencode(name).decode("utf-8")
        except UnicodeDecodeError:
            raise UsageError(f"{name}: this name is not UTF-8; rename it, or name another folder") from None
        raise UsageError(f"{name}: Python takes names for {sys.getfilesystemencoding()} here; set PYTHONUTF8=1")


class _Parser(argparse.ArgumentParser):
    """Prints one line with the fault and what was probably meant, not twenty lines of usage."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        known = [option for action in self._actions for option in action.option_strings]
        unknown = message.removeprefix("unrecognized arguments: ").split() if "unrecognized" in message else []
        close = [found for word in unknown for found in _meant(word.split("=")[0], known)]
        hint = f"; did you mean {' '.join(close)}?" if close else ""
        names = [word for word in unknown if not word.startswith("-")]
        if names and len(names) == len(unknown):
            # `run_all.py presets simple` too: the word itself was meant as the flag.
            named = " ".join(names[1:] if names[0] == "presets" and names[1:] else names)
            hint = f"; presets are named after --presets: --presets {named}"
        self.exit(2, f"run_all.py: {message}{hint} (all flags: python run_all.py --help)\n")


def _meant(word: str, known: Sequence[str]) -> list[str]:
    begun = [option for option in known if len(word) > 3 and option.startswith(word)]
    return begun[:1] or difflib.get_close_matches(word, known, 1, 0.7)


def build_parser() -> argparse.ArgumentParser:
    """The command line. Only the standard library is needed to print its help."""
    parser = _Parser(
        prog="run_all.py",
        # An abbreviation could mean another flag in the next version.
        allow_abbrev=False,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_selection(parser)
    _add_changes(parser)
    _add_sources(parser)
    _add_machines(parser)
    # For messages that say how to go on; `main` replaces it by what was typed.
    parser.set_defaults(typed="python run_all.py")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; allowed: 1 or more")
    return int(text)


def _add_selection(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to run")
    what.add_argument("--presets", nargs="+", metavar="P", help="presets to run, in this order; --list shows them")
    what.add_argument(
        "--seeds", nargs="+", type=int, metavar="N", help="each preset trained once per seed, as <preset>_seed<N>"
    )
    what.add_argument("--stages", nargs="+", choices=STAGE_NUMBERS, help="only these stages (default: all five)")
    what.add_argument("--skip-gsm8k", action="store_true", help="do not run 03; rows that are there are still scored")
    what.add_argument("--skip-ailuminate", action="store_true", help="do not run 04; rows that are there still count")
    what.add_argument("--resume", action="store_true", help="go on where a run stopped (the default)")
    what.add_argument("--rerun-all", action="store_true", help="run every stage again, reusing no rows, no checkpoint")
    what.add_argument("--wait", action="store_true", help="wait for another run on the same folder, do not refuse")
    what.add_argument(
        "--cell-timeout", type=int, default=0, metavar="SECONDS", help="end a cell that takes longer (0: never)"
    )
    what.add_argument("--list", action="store_true", help="show the presets and the state of their stages, then end")
    what.add_argument(
        "--dry-run", action="store_true", help="print what would run, be fetched and be written, without doing it"
    )
    what.add_argument(
        "--convert-preset",
        type=Path,
        metavar="FILE",
        help="write a preset from another pipeline's nested YAML; --presets names the one that fills the rest (simple)",
    )
    what.add_argument("--verify", metavar="DIR", help="recompute every metric in DIR from its row files, then end")
    what.add_argument("--strict", action="store_true", help="with --verify: what is absent counts as a mismatch")
    what.add_argument(
        "--audit", type=_positive, metavar="K", help="with --verify: generate and judge K rows of each file again"
    )
    what.add_argument("--audit-seed", type=int, metavar="N", help="which rows --audit draws (drawn at random, printed)")
    what.add_argument("--report-only", action="store_true", help="write reports/index.html from the rows, then end")
    what.add_argument(
        "--export",
        choices=["lm-eval", "model"],
        help="the runs of --presets, or all, into the output folder, then end. lm-eval: as lm-evaluation-harness "
        "writes them; model: the evaluated models as plain transformers folders",
    )
    what.add_argument(
        "--track",
        choices=["mlflow"],
        help="log the runs to MLflow, which is installed apart (docs/reference.md); with --report-only, all runs of "
        "the folder",
    )
    what.add_argument("--quiet", action="store_true", help="say only what failed, and the results")


def _add_changes(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("changes to the presets")
    how.add_argument(
        "--set", nargs="+", action="append", default=[], metavar="KEY=VALUE", help="keys of a preset, as in its YAML"
    )
    how.add_argument("--smoke-test", action="store_true", help="few rows through the same code, into results/smoke")
    how.add_argument("--full-gsm8k-test", action="store_true", help="all 1,319 test questions in place of the subset")
    how.add_argument("--eval-batch-size", type=int, metavar="N", help="rows at once in evaluation; 0 derives it")
    how.add_argument(
        "--checkpoint",
        action="append",
        default=[],
        metavar="[PRESET=]PATH_OR_HUB_ID",
        help="evaluate this adapter instead of training one",
    )
    how.add_argument(
        "--allow-unlike", action="store_true", help="compare runs with different protocols, and report how they differ"
    )
    how.add_argument("--redact", action="store_true", help="no prompt or response of AILuminate in any report")
    how.add_argument(
        "--submission", action="store_true", help="the three published adapters, not trained, into submission_results/"
    )
    how.add_argument("--require-baselines", action="store_true", help="exit 3 when a preset is below its baseline")


def _add_machines(parser: argparse.ArgumentParser) -> None:
    on = parser.add_argument_group("machines (docs/cluster.md)")
    on.add_argument("--jobs", type=int, default=1, metavar="N", help="notebooks at once, each on another GPU (1)")
    on.add_argument("--shards", type=_positive, default=1, metavar="N", help="cut questions and prompts into N shares")
    on.add_argument(
        "--engine", choices=["local", "ray", "slurm"], default="local", help="what runs the notebooks (local)"
    )
    on.add_argument("--address", default="", metavar="HOST:PORT", help="of the Ray cluster's head ($RAY_ADDRESS)")
    on.add_argument(
        "--sbatch", default="", metavar="OPTIONS", help="options of sbatch: --sbatch='--gres=gpu:1 --time=4:00:00'"
    )
    on.add_argument("--worker", type=Path, metavar="PLAN", help="run one task of a plan, as the engines do: see --task")
    on.add_argument("--task", type=int, metavar="N", help="the task that --worker runs, from 0; --list numbers them")


def _add_sources(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("where things are")
    where.add_argument(
        "--params-dir", type=Path, default=PROJECT_ROOT / "params", metavar="DIR", help="folder of the presets (params)"
    )
    where.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="artefacts go here (results), filled notebooks into its reports/"
    )
    where.add_argument("--assets", type=Path, metavar="DIR", help="data sets and models already fetched ($ASSETS_DIR)")
    where.add_argument("--offline", action="store_true", help="never use the network")
