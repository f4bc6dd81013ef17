"""Kills drivers that run two presets at once, goes on with the same command, compares with one preset after the other.

    python benchmarks/chaos_jobs.py --kills 20 --seed 0

Two seeds of one preset ask the same questions, so that both want the rows of the untuned model at the same time. In a
round a run with ``--jobs 2`` is killed at seeded random moments (``kill -9`` of the driver, of a kernel, of the process
of one preset, or of all at once) and brought to its end; rows, adapters, tables and metrics must then be those of a run
that took one preset after the other and that nobody disturbed, byte for byte, see ``chaos.py``.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

PROJECT_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_ROOT))

from benchmarks import chaos  # noqa: E402

KINDS = ("driver", "kernel", "job", "all")
SEEDS = ("--seeds", "1", "2")


def run(project: Path, output: Path, *flags: str) -> float:
    """One run that nobody disturbs; its seconds."""
    started = time.monotonic()
    driver = chaos.Driver(project, output, flags=[*SEEDS, *flags])
    driver.start()
    if driver.finish() != 0:
        raise SystemExit(f"a run that nobody disturbed failed:\n{driver.output_text()}")
    return time.monotonic() - started


def strike(driver: chaos.Driver, kind: str, draw: random.Random) -> str:
    """Kill what ``kind`` says; what was broken by it."""
    below = psutil.Process(driver.process.pid).children(recursive=True)
    kernels = [process for process in below if process in driver.kernels()]
    jobs = [process for process in below if process not in kernels and process.ppid() == driver.process.pid]
    one = {"kernel": kernels, "job": jobs}.get(kind, [])
    targets = [draw.choice(one)] if one else [driver.process, *(kernels + jobs if kind == "all" else [])]
    for target in targets:
        try:
            target.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    status = driver.finish()
    if one and "Traceback" in driver.output_text():
        return f"a traceback after a killed {kind}: {driver.output_text()[-500:]}"
    # Where the killed kernel was only starting, it is started again, and the run ends well.
    if one and status not in (0, 1):
        return f"status {status} after a killed {kind}"
    _, alive = psutil.wait_procs(below, timeout=chaos.ORPHAN_S)
    return f"{len(alive)} processes outlived their driver" if alive else ""


def run_round(project: Path, unbroken: Path, usual_s: float, num_kills: int, seed: int) -> tuple[list[str], list[str]]:
    """One run of two presets at once, killed up to ``num_kills`` times; kinds of the kills, and all faults."""
    draw, kinds, faults = random.Random(seed), [], []
    driver = chaos.Driver(project, unbroken.parent / f"jobs-{seed}", flags=[*SEEDS, "--jobs", "2"])
    for _ in range(num_kills):
        driver.start()
        due = time.monotonic() + draw.uniform(0.5, usual_s)
        while driver.is_running() and time.monotonic() < due:
            time.sleep(0.02)
        if not driver.is_running():
            break
        kinds.append(draw.choice(KINDS))
        fault = strike(driver, kinds[-1], draw)
        faults += [f"{kinds[-1]}: {fault}"] if fault else []
        faults += chaos.broken_files(driver.output)
    driver.start()
    if driver.finish() != 0:
        faults.append(f"did not end well: {driver.output_text()[-1000:]}")
    losses = chaos.compare(unbroken, driver.output)
    counted = {name: getattr(losses, name).total() for name in ("lost", "duplicated", "differing")}
    faults += [f"{number} rows {name}" for name, number in counted.items() if number]
    faults += [*losses.broken, *chaos.left_behind(driver.output), *chaos.verified(project, driver.output)]
    if not faults:
        shutil.rmtree(driver.output)
    return kinds, faults


def wreak(project: Path, num_kills: int, a_round: int, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Rounds of up to ``a_round`` kills until there were ``num_kills``; the result as one object."""
    unbroken = project.parent / "in-turn"
    in_turn_s = run(project, unbroken)
    at_once_s = run(project, project.parent / "at-once", "--jobs", "2")
    faults = chaos.compare(unbroken, project.parent / "at-once").broken
    kinds: list[str] = []
    rounds = 0
    while len(kinds) < num_kills:
        most = min(a_round, num_kills - len(kinds))
        made, broken = run_round(project, unbroken, at_once_s, most, seed + rounds)
        kinds, faults, rounds = kinds + made, faults + broken, rounds + 1
        tell(f"round {rounds}: {len(kinds)} kills so far, {len(faults)} faults")
    return {
        "kills": dict(Counter(kinds)),
        "rounds": rounds,
        "seed": seed,
        "in_turn_s": round(in_turn_s, 1),
        "at_once_s": round(at_once_s, 1),
        "faults": faults,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print one JSON object; 1 where anything was lost, doubled, different or broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kills-a-round", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="work here, and keep what differs")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        project = chaos.copy_project(args.keep or Path(temporary))
        chaos.save_models(project)
        result = wreak(project, args.kills, args.kills_a_round, args.seed, lambda text: print(text, file=sys.stderr))
    print(json.dumps(result, indent=2))
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
