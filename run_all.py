#!/usr/bin/env python3
"""Run the five notebooks once per preset with papermill: ``python run_all.py --presets sandbox_one``."""

import shlex
import sys
from collections.abc import Sequence

from lib.driver.cli import UsageError, build_parser, check_names, settle_streams
from lib.record.files import error_text
from lib.record.paths import ArtifactError
from lib.record.terminal import fail


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    settle_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(argv)
    args.typed = shlex.join(["python", "run_all.py", *argv])
    try:
        check_names(argv)
        # Only now: --help and a wrong flag need no package.
        from lib.driver.commands import run_command

        return run_command(args)
    except (UsageError, ModuleNotFoundError) as error:
        # The system's Python lacks the packages.
        remedy = f" for {sys.executable}; use .venv/bin/python, which make setup makes"
        fail(f"run_all.py: {error}{remedy if isinstance(error, ModuleNotFoundError) else ''}")
        return 2
    except KeyboardInterrupt:
        fail(f"\ninterrupted; to go on: {args.typed}")
        return 130
    except (ArtifactError, OSError) as error:
        fail(f"run_all.py: {error_text(error)}\nto go on: {args.typed}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
