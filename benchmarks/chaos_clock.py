"""A whole run under a clock that jumps, killed and gone on with, against a run under an honest one.

    python benchmarks/chaos_clock.py          (on Linux, with a C compiler)

Twice a second the time of day jumps to a seeded random moment within 400 days of now, as it does, by less, on laptops
that wake and on virtual machines that are moved; the monotonic clock goes on. Once in each stage the driver is killed,
every file gets a random time of its own, and the same command goes on. Rows, adapter, tables and metrics must be those
of the run under an honest clock, byte for byte, see ``chaos.py``; and a finished run must be found unchanged.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

PROJECT_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_ROOT))

from benchmarks import chaos  # noqa: E402
from lib.record.paths import STAGES  # noqa: E402

MOST_DAYS = 400
SECONDS_BETWEEN_JUMPS = 0.5


class JumpingClock(threading.Thread):
    """Sets the offset of the clock anew, again and again, while a ``with`` block runs."""

    def __init__(self, library: Path, file: Path, seed: int) -> None:
        super().__init__(daemon=True)
        self.file, self.num_jumps, self._draw = file, 0, random.Random(seed)
        self._done = threading.Event()
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(file)}

    def __enter__(self) -> "JumpingClock":
        self._jump()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()

    def run(self) -> None:
        while not self._done.wait(SECONDS_BETWEEN_JUMPS):
            self._jump()

    def _jump(self) -> None:
        self.num_jumps += 1
        seconds = self._draw.uniform(-MOST_DAYS, MOST_DAYS) * 86_400
        beside = self.file.with_suffix(".new")
        beside.write_text(f"{seconds:+.0f}\n", encoding="ascii")
        beside.replace(self.file)


def build_clock(folder: Path) -> Path:
    """The library that stands between a program and the time of day."""
    library = folder / "jumping_clock.so"
    source = PROJECT_ROOT / "benchmarks" / "jumping_clock.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return library


def shake_times(output: Path, draw: random.Random) -> None:
    """Give every file a random time within ``MOST_DAYS`` of now."""
    for path in output.rglob("*"):
        at = time.time() + draw.uniform(-MOST_DAYS, MOST_DAYS) * 86_400
        os.utime(path, (at, at))


def run(project: Path, clock: JumpingClock, seed: int) -> tuple[list[str], dict[str, Any]]:
    """The faults of a run under ``clock`` that is killed in every stage, and what was done to it."""
    output, unbroken = project.parent / "jumping", project.parent / "unbroken"
    seconds = chaos.run_unbroken(project, unbroken, STAGES)
    draw, kills, faults = random.Random(seed), [], []
    started = time.monotonic()
    with clock:
        driver = chaos.Driver(project, output, environment=clock.environment)
        for stage in STAGES:
            kill, fault = chaos.kill_in(driver, stage, "driver", draw.uniform(0, seconds[stage]))
            faults += [fault] if fault else []
            kills += [stage] if kill else []
            shake_times(output, draw)
        if not driver.is_running():
            driver.start()
        if driver.finish() != 0:
            faults.append(f"did not end well: {driver.output_text()[-1000:]}")
        shake_times(output, draw)
        driver.start()
        driver.finish()
        faults += [] if "running (" not in driver.output_text() else ["a finished stage was run again"]
    losses = chaos.compare(unbroken, output)
    counted = {name: getattr(losses, name).total() for name in ("lost", "duplicated", "differing")}
    faults += [*losses.broken, *chaos.left_behind(output), *chaos.verified(project, output)]
    return faults, {
        "jumps": clock.num_jumps,
        "killed_in": kills,
        "wall_s": round(time.monotonic() - started),
        **counted,
    }


def main() -> int:
    """Print one JSON object; 1 where anything was lost, doubled, different or broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="work here, and keep everything")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        project = chaos.copy_project(args.keep or Path(temporary))
        chaos.save_models(project)
        clock = JumpingClock(build_clock(project.parent), project.parent / "offset", args.seed)
        faults, result = run(project, clock, args.seed)
    print(json.dumps({**result, "faults": faults}, indent=2))
    return 1 if faults or any(result[name] for name in ("lost", "duplicated", "differing")) else 0


if __name__ == "__main__":
    sys.exit(main())
