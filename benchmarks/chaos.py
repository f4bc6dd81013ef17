"""Kills whole runs at seeded random moments, goes on with the same command, and compares with the unbroken run.

    python benchmarks/chaos.py --kills 100 --seed 0
    python benchmarks/chaos.py --kills 20 --json

A tiny random model goes through all five stages of a copy of the project. In each round every stage is killed three
times (`kill -9` of the driver, of its kernel, or of both at once), the same command is given again each time, and at
the end row files, metrics and tables must be those of a run that nobody disturbed, byte for byte; only what holds a
time, a path or a version is left out. Rows lost, duplicated and differing are counted, and what was found broken on
the way: files that cannot be read, temporary files that stayed, kernels that outlived their driver.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import psutil
import yaml

PROJECT_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_ROOT))

from lib.record.files import read_json, write_json  # noqa: E402
from lib.record.paths import STAGES, ArtifactError  # noqa: E402
from lib.record.rows import read_jsonl  # noqa: E402

PRESET = "chaos"
KINDS = ("driver", "kernel", "both")
COPIED = ("run_all.py", "lib", "notebooks", "params", "data/sandbox")
# Small enough for a run of a minute on one core, large enough that every stage has several rows or steps to lose.
SIZES = {
    "description": "a tiny random model, killed on purpose",
    "base_model": "models/base",
    "safeguard_model": "models/judge",
    "quantization": "none",
    "compute_dtype": "float32",
    "device": "cpu",
    "max_train_rows": 12,
    "dev_rows": 3,
    "max_gsm8k_rows": 8,
    "max_ailuminate_rows": 8,
    "fewshot_k": 1,
    "fewshot_pool_size": 2,
    "max_seq_length": 1024,
    "save_steps": 1,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_sweep_checkpoints": 2,
    "gsm8k_max_new_tokens": 24,
    "ailuminate_max_new_tokens": 24,
    "eval_batch_size": 2,
    "judge_card_rows": 2,
}
ORPHAN_S = 3.0
# What the driver says when it starts a kernel once more.
RETRY = "trying again"
DRIVER_S = 900.0
TIMINGS = frozenset({"wall_s", "dev_wall_s", "tokens_per_s", "peak_memory_gib"})


@dataclass(frozen=True)
class Kill:
    """One kill: which stage was running, what was killed, and how far the stage was (s after it began)."""

    stage: str
    kind: str
    after_s: float


@dataclass
class Losses:
    """What a broken run differs in from the unbroken one, by stage, and what was broken on the way."""

    lost: Counter[str] = field(default_factory=Counter)
    duplicated: Counter[str] = field(default_factory=Counter)
    differing: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)

    @property
    def num_faults(self) -> int:
        return sum(map(Counter.total, (self.lost, self.duplicated, self.differing))) + len(self.broken)


# --- a project of its own --------------------------------------------------------------------------------------------


def copy_project(folder: Path) -> Path:
    """A copy of the project in ``folder``, so that edits and other runs cannot disturb; without any model."""
    project = folder / "project"
    for name in COPIED:
        source, target = PROJECT_ROOT / name, project / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target)
    values = yaml.safe_load((project / "params" / "sandbox_one.yaml").read_text(encoding="utf-8")) | SIZES
    (project / "params" / f"{PRESET}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return project


def save_models(project: Path) -> None:
    """Two tiny random models with a tokenizer that needs no download."""
    from tests.tiny import save_tiny_model

    for seed, (name, family) in enumerate((("base", "qwen2"), ("judge", "qwen3"))):
        folder = save_tiny_model(project / "models" / name, family, seed=seed)
        # Every byte is a token, so the guidelines alone take two thousand; positions cost nothing (rotary).
        config = read_json(folder / "config.json")
        write_json(folder / "config.json", {**config, "max_position_embeddings": 8192})


# --- a driver that is killed -----------------------------------------------------------------------------------------


@dataclass
class Driver:
    """One ``run_all.py`` in a process of its own; ``stage`` is the one that it said it began last."""

    project: Path
    output: Path
    stages: Sequence[str] = STAGES
    flags: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    stage: str = ""
    began: float = 0.0
    process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [sys.executable, "run_all.py", "--presets", PRESET, "--output-dir", str(self.output), "--offline"]
        command += ["--stages", *(stage[:2] for stage in self.stages), *self.flags]
        self.log: TextIO = (self.project / "driver.log").open("a+", encoding="utf-8")
        self.log.seek(0, os.SEEK_END)
        self.told = self.log.tell()
        environment = os.environ | self.environment
        self.process = subprocess.Popen(
            command, cwd=self.project, env=environment, stdout=self.log, stderr=subprocess.STDOUT
        )
        self.stage = ""

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def look(self) -> None:
        """Read which stage runs."""
        with (self.project / "driver.log").open(encoding="utf-8") as stream:
            stream.seek(self.told)
            lines = [line for line in stream.read().splitlines() if ": running" in line]
        stage = lines[-1].split(": running")[0].split()[-1] if lines else ""
        if stage != self.stage:
            self.stage, self.began = stage, time.monotonic()

    def kernels(self) -> list[psutil.Process]:
        """Its kernels that live, and those of its jobs: what runs below it and is no ``git``."""
        try:
            return [child for child in psutil.Process(self.process.pid).children(recursive=True) if _is_kernel(child)]
        except psutil.NoSuchProcess:
            return []

    def finish(self) -> int:
        """Wait for its end; the exit status."""
        status = self.process.wait(timeout=DRIVER_S)
        self.log.close()
        return status

    def output_text(self) -> str:
        """What it printed since it started."""
        with (self.project / "driver.log").open(encoding="utf-8") as stream:
            stream.seek(self.told)
            return stream.read()


def _is_kernel(process: psutil.Process) -> bool:
    try:
        return "ipykernel" in " ".join([process.name(), *process.cmdline()])
    except psutil.NoSuchProcess:
        # Ended, or ended and not yet waited for.
        return False


def kill_in(driver: Driver, wanted: str, kind: str, after_s: float) -> tuple[Kill | None, str]:
    """Start the driver, kill it ``after_s`` into the stage ``wanted``; the kill, and what was broken.

    Where the stage ended sooner, the next one is killed as it begins; ``None`` where the whole run ended first.
    """
    if not driver.is_running():
        driver.start()
    while driver.is_running():
        driver.look()
        due = driver.stage > wanted or (driver.stage == wanted and time.monotonic() - driver.began >= after_s)
        kernels = driver.kernels() if due else []
        if due and (kernels or kind == "driver"):
            kill = Kill(driver.stage, kind, round(time.monotonic() - driver.began, 2))
            return kill, _strike(driver, kernels, kind)
        time.sleep(0.02)
    return None, "" if driver.finish() == 0 else f"ended by itself: {driver.output_text()[-500:]}"


def _strike(driver: Driver, kernels: Sequence[psutil.Process], kind: str) -> str:
    retries = driver.output_text().count(RETRY)
    targets = [*(kernels if kind != "driver" else []), *([driver.process] if kind != "kernel" else [])]
    for target in targets:
        try:
            target.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    # A kernel that was killed while it started is started once more, and the driver goes on.
    while kind == "kernel" and driver.is_running():
        if driver.output_text().count(RETRY) > retries:
            return ""
        time.sleep(0.05)
    status = driver.finish()
    if kind == "kernel" and "Traceback" in driver.output_text():
        return f"a traceback after a killed kernel: {driver.output_text()[-500:]}"
    if kind == "kernel" and status not in (0, 1):
        return f"status {status} after a killed kernel"
    _, alive = psutil.wait_procs(kernels, timeout=ORPHAN_S)
    return f"{len(alive)} kernels outlived their driver" if alive else ""


# --- comparing -------------------------------------------------------------------------------------------------------


def compared_files(output: Path) -> dict[str, Path]:
    """Name -> file, of all that must be equal: everything but reports, locks, and files with times in them."""
    found = {path.relative_to(output).as_posix(): path for path in sorted(output.rglob("*")) if path.is_file()}
    left_out = ("reports/", ".lock")
    # Its second panel is the speed of each step.
    timed = "training_curves.svg"
    kinds = (".jsonl", ".csv", ".json", ".safetensors", ".svg")
    return {
        name: path
        for name, path in found.items()
        if not name.startswith(left_out) and name.endswith(kinds) and not name.endswith(timed)
    }


def stage_of(name: str) -> str:
    """The stage that writes the file ``name``."""
    parts = {"gsm8k_preds": "03_eval_gsm8k", "ailuminate_": "04_eval_safety", "checkpoint_scores": "02_train"}
    known = [stage for stage in STAGES if f"{stage}/" in name]
    return (known or [stage for part, stage in parts.items() if part in name] or ["05_compare"])[0]


def compare(unbroken: Path, broken: Path) -> Losses:
    """What ``broken`` lacks, has twice, or has otherwise."""
    losses = Losses()
    ours, theirs = compared_files(unbroken), compared_files(broken)
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs or name not in ours:
            losses.broken.append(f"{name} is only in the {'broken' if name in theirs else 'unbroken'} run")
        elif name.endswith(".jsonl") and "/checkpoints/" not in name:
            _compare_rows(name, ours[name], theirs[name], losses)
        elif _essence(ours[name]) != _essence(theirs[name]):
            losses.differing[stage_of(name)] += 1
            losses.broken.append(f"{name} differs")
    return losses


def _compare_rows(name: str, ours: Path, theirs: Path, losses: Losses) -> None:
    expected, got = (_keyed_rows(path) for path in (ours, theirs))
    stage, numbers = stage_of(name), Counter(key for key, _ in got)
    losses.lost[stage] += sum(key not in numbers for key, _ in expected)
    losses.duplicated[stage] += sum(number - 1 for number in numbers.values())
    found = dict(got)
    different = [key for key, row in expected if key in found and found[key] != row]
    losses.differing[stage] += len(different)
    if different:
        losses.broken.append(f"{name}: row {different[0]} differs")
    if not (ours.name == "training_log.jsonl" or different or ours.read_bytes() == theirs.read_bytes()):
        losses.broken.append(f"{name}: the same rows, other bytes")


def _keyed_rows(path: Path) -> list[tuple[str, str]]:
    rows = [_without_times(row) for row in read_jsonl(path)]
    return [(str(row.get("id", row.get("step", place))), json.dumps(row)) for place, row in enumerate(rows)]


def _essence(path: Path) -> Any:
    """What of a file must be equal: all of its bytes, but of JSON only what holds no time."""
    return _without_times(read_json(path)) if path.suffix == ".json" else path.read_bytes()


def _without_times(value: Any) -> Any:
    """A JSON value without seconds, speeds, memory, threads, and stamps of files (their bytes are compared)."""
    if isinstance(value, dict):
        left_out = {
            "inputs",
            "outputs",
            "finished_at",
            "speed",
            # How many threads a run had: --jobs shares them out.
            "runtime",
            "model_work_s",
            "results_dir",
            "source",
            "second_opinion",
        }
        return {key: _without_times(item) for key, item in value.items() if key not in TIMINGS | left_out}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def broken_files(output: Path) -> list[str]:
    """Files that bear a real name and cannot be read; the torn last row of a row file is allowed for."""
    return [fault for path in compared_files(output).values() for fault in _file_fault(path, output)]


def _file_fault(path: Path, output: Path) -> Iterator[str]:
    name = path.relative_to(output).as_posix()
    try:
        if path.suffix == ".json" and "/checkpoints/" not in name and "/adapter/" not in name:
            read_json(path)
        elif path.suffix == ".jsonl":
            for line in path.read_bytes().split(b"\n")[:-1]:
                json.loads(line)
    except (ArtifactError, ValueError) as error:
        yield f"{name} cannot be read after a kill: {error}"


# --- rounds ----------------------------------------------------------------------------------------------------------


def run_unbroken(project: Path, output: Path, stages: Sequence[str]) -> dict[str, float]:
    """One run without a kill; stage -> seconds that it took, as told."""
    driver = Driver(project, output, stages)
    driver.start()
    if driver.finish() != 0:
        raise SystemExit(f"the unbroken run failed:\n{driver.output_text()}")
    return {stage: float(s) for stage, s in re.findall(r"(\w+): done in (\d+) s", driver.output_text())}


def run_round(
    project: Path, unbroken: Path, seconds: dict[str, float], wanted: Sequence[str], seed: int
) -> tuple[list[Kill], Losses]:
    """One run that is killed in each of ``wanted`` (in their order), brought to its end, and compared."""
    draw, kills, broken = random.Random(seed), [], []
    output = unbroken.parent / f"round-{seed}"
    driver = Driver(project, output, list(seconds))
    for stage in sorted(wanted):
        # Up to its end and a little past it, so that what happens between two stages is hit too.
        kill, fault = kill_in(driver, stage, draw.choice(KINDS), draw.uniform(0, seconds[stage] + 1.0))
        broken += [f"{kill}: {fault}"] if fault else []
        if not kill:
            # The run came to its end first: there is nothing left to kill.
            break
        kills.append(kill)
        broken += broken_files(output)
    if not driver.is_running():
        driver.start()
    if driver.finish() != 0:
        broken.append(f"did not end well: {driver.output_text()[-1000:]}")
    losses = compare(unbroken, output)
    losses.broken += [*broken, *left_behind(output), *verified(project, output)]
    if not losses.num_faults:
        shutil.rmtree(output)
    return kills, losses


def left_behind(output: Path) -> list[str]:
    reports = [path for path in output.rglob("*.tmp") if "/checkpoints/" not in path.as_posix()]
    return [f"{path.relative_to(output)} stayed behind" for path in reports]


def verified(project: Path, output: Path) -> list[str]:
    command = [sys.executable, "run_all.py", "--verify", str(output)]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=DRIVER_S)
    return [] if done.returncode == 0 else [f"--verify: {done.stdout[-500:]} {done.stderr[-500:]}"]


def wreak(
    project: Path,
    num_kills: int,
    seed: int,
    stages: Sequence[str] = STAGES,
    kills_a_stage: int = 3,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Rounds of ``kills_a_stage`` kills in each stage until there were ``num_kills``; the result as one object."""
    unbroken = project.parent / "unbroken"
    started, seconds = time.monotonic(), run_unbroken(project, unbroken, stages)
    kills, total, rounds = [], Losses(), 0
    while len(kills) < num_kills:
        wanted = sorted([*stages] * kills_a_stage)[: num_kills - len(kills)]
        made, losses = run_round(project, unbroken, seconds, wanted, seed + rounds)
        kills, rounds = kills + made, rounds + 1
        for name in ("lost", "duplicated", "differing"):
            getattr(total, name).update(getattr(losses, name))
        total.broken += losses.broken
        tell(f"round {rounds}: {len(kills)} kills so far, {total.num_faults} faults")
    return {
        "seed": seed,
        "kills": len(kills),
        "rounds": rounds,
        "wall_s": round(time.monotonic() - started),
        "unbroken_s": seconds,
        "by_stage": [_stage_row(stage, kills, total) for stage in stages],
        "broken": total.broken,
        "faults": total.num_faults,
    }


def _stage_row(stage: str, kills: Sequence[Kill], losses: Losses) -> dict[str, Any]:
    here = [kill for kill in kills if kill.stage == stage]
    kinds = {kind: sum(kill.kind == kind for kill in here) for kind in KINDS}
    counts = {name: getattr(losses, name)[stage] for name in ("lost", "duplicated", "differing")}
    return {"stage": stage, "kills": len(here), **kinds, **counts}


def as_table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    columns = list(result["by_stage"][0])
    rows = [columns, ["---"] * len(columns), *([row[name] for name in columns] for row in result["by_stage"])]
    totals = [sum(row[name] for row in result["by_stage"]) for name in columns[1:]]
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [*rows, ["all", *totals]]]
    lines += ["", f"{result['kills']} kills in {result['rounds']} rounds, seed {result['seed']}, {result['wall_s']} s."]
    lines += [f"Faults: {result['faults']}.", *(f"- {fault}" for fault in result["broken"])]
    return "\n".join(lines)


def main() -> int:
    """Print one table, or one JSON object; 1 where anything was lost, doubled, different or broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--keep", type=Path, help="work here, and keep what differs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        project = copy_project(folder)
        save_models(project)
        result = wreak(project, args.kills, args.seed, tell=lambda text: print(text, file=sys.stderr, flush=True))
    print(json.dumps(result, indent=2) if args.json else as_table(result))
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
