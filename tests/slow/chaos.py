"""Drivers of a small run that are killed and started again, and how the run then differs from an undisturbed one."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from lib.record.files import read_json, write_json
from lib.record.paths import STAGES, ArtifactError
from lib.record.rows import read_jsonl

PRESET = "chaos"
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
DRIVER_S = 900.0


def write_preset(project: Path, **changed: Any) -> None:
    values = yaml.safe_load((project / "params" / "sandbox_one.yaml").read_text(encoding="utf-8")) | SIZES | changed
    (project / "params" / f"{PRESET}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")


def save_models(project: Path) -> None:
    """Two tiny random models with a tokenizer that needs no download."""
    from tiny import save_tiny_model

    for seed, (name, family) in enumerate((("base", "qwen2"), ("judge", "qwen3"))):
        folder = save_tiny_model(project / "models" / name, family, seed=seed)
        # Every byte is a token, so the guidelines alone take two thousand; positions cost nothing (rotary).
        config = read_json(folder / "config.json")
        write_json(folder / "config.json", {**config, "max_position_embeddings": 8192})


# --- a driver that is killed -----------------------------------------------------------------------------------------


@dataclass
class Driver:
    """One ``run_all.py`` in its own process; ``stage`` is the one that it reported last, ``began`` when."""

    project: Path
    output: Path
    stages: Sequence[str] = STAGES
    flags: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    stage: str = ""
    began: float = 0.0
    process: subprocess.Popen | None = None

    @property
    def log(self) -> Path:
        return self.output.with_suffix(".log")

    def start(self) -> None:
        command = [sys.executable, "run_all.py", "--presets", PRESET, "--output-dir", str(self.output), "--offline"]
        command += ["--stages", *(stage[:2] for stage in self.stages), *self.flags]
        # Forked kernels share the import of torch, which light notebooks do without.
        fork = {"FORK_KERNELS": "1" if (self.project / "models").is_dir() else "0"}
        inherited = {name: value for name, value in os.environ.items() if name != "ASSETS_DIR"}
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command, cwd=self.project, env=inherited | fork | self.environment, stdout=log, stderr=subprocess.STDOUT
            )
        self.stage = ""

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def look(self) -> None:
        """Read which stage runs."""
        lines = [line for line in self.output_text().splitlines() if ": running" in line]
        stage = lines[-1].split(": running")[0].split()[-1] if lines else ""
        if stage != self.stage:
            self.stage, self.began = stage, time.monotonic()

    def below(self) -> list[psutil.Process]:
        """What runs below it."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def kernels(self) -> list[psutil.Process]:
        return [process for process in self.below() if _is_kernel(process)]

    def finish(self) -> int:
        """Wait for its end; the exit status."""
        return self.process.wait(timeout=DRIVER_S)

    def run_to_its_end(self) -> list[str]:
        """Start it where it does not run, and wait; what was broken."""
        if not self.is_running():
            self.start()
        return [] if self.finish() == 0 else [f"did not end well: {self.output_text()[-1000:]}"]

    def output_text(self) -> str:
        """What it printed since it started."""
        return self.log.read_text(encoding="utf-8")


def _is_kernel(process: psutil.Process) -> bool:
    try:
        return "ipykernel" in " ".join([process.name(), *process.cmdline()])
    except psutil.NoSuchProcess:
        # Ended, or ended and not yet waited for.
        return False


def _is_job(process: psutil.Process, driver: Driver) -> bool:
    """Whether it is the process of one preset, under ``--jobs``."""
    try:
        return process.ppid() == driver.process.pid and not _is_kernel(process)
    except psutil.NoSuchProcess:
        return False


def kill_in_stage(driver: Driver, wanted: str, kind: str, after_s: float, draw: random.Random) -> list[str] | None:
    """Start the driver and kill it ``after_s`` into the stage ``wanted``; what was broken.

    Where the stage ended sooner, the next one is killed as it begins; ``None`` where the run ended first.
    """
    driver.start()
    while driver.is_running():
        driver.look()
        if driver.stage > wanted or (driver.stage == wanted and time.monotonic() - driver.began >= after_s):
            return strike(driver, kind, draw)
        time.sleep(0.02)
    return None


def strike(driver: Driver, kind: str, draw: random.Random) -> list[str]:
    """Kill the driver, one of its kernels, one of its jobs, or all of these, with SIGKILL; what was broken."""
    below = driver.below()
    kernels = [process for process in below if _is_kernel(process)]
    jobs = [process for process in below if _is_job(process, driver)]
    one = {"kernel": kernels, "job": jobs}.get(kind, [])
    targets = [draw.choice(one)] if one else [driver.process, *(kernels + jobs if kind == "all" else [])]
    for target in targets:
        with suppress(psutil.NoSuchProcess):
            target.send_signal(signal.SIGKILL)
    status = driver.finish()
    # A kernel that was killed while it started is started once more, and the run ends well.
    if one and status not in (0, 1):
        return [f"status {status} after a killed {kind}"]
    if one and "Traceback" in driver.output_text():
        return [f"a traceback after a killed {kind}: {driver.output_text()[-500:]}"]
    _, alive = psutil.wait_procs(below, timeout=ORPHAN_S)
    return [f"{len(alive)} processes outlived their driver"] if alive else []


def run_undisturbed(driver: Driver) -> dict[str, float]:
    """One run without a kill; stage -> seconds that it took."""
    assert not driver.run_to_its_end(), driver.output_text()
    return {stage: float(s) for stage, s in re.findall(r"(\w+): done in (\d+) s", driver.output_text())}


# --- comparing -------------------------------------------------------------------------------------------------------

TIMINGS = frozenset({"wall_s", "dev_wall_s", "tokens_per_s", "peak_memory_gib", "finished_at", "speed", "model_work_s"})
TIMINGS |= {"model_load_s", "kernel_start_s"}
# Stamps of files (their bytes are compared), a run's threads (--jobs shares them out), its engine, and paths.
PLACES = frozenset({"inputs", "outputs", "runtime", "results_dir", "source", "second_opinion", "engine"})


def faults(undisturbed: Path, killed: Path, project: Path) -> list[str]:
    """What a killed run that was brought to its end differs in, what was left behind, and what ``--verify`` finds."""
    left = [path for path in killed.rglob("*.tmp") if "/checkpoints/" not in path.as_posix()]
    return [*compare(undisturbed, killed), *(f"{path} stayed behind" for path in left), *_verified(project, killed)]


def _verified(project: Path, output: Path) -> list[str]:
    command = [sys.executable, "run_all.py", "--verify", str(output)]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=DRIVER_S)
    return [] if done.returncode == 0 else [f"--verify: {done.stdout[-500:]} {done.stderr[-500:]}"]


def compared_files(output: Path) -> dict[str, Path]:
    """Name -> file, of all that must be equal: everything but reports, locks, and files with times in them."""
    found = {path.relative_to(output).as_posix(): path for path in sorted(output.rglob("*")) if path.is_file()}
    # The second panel of the training curves is the speed of each step.
    timed = "training_curves.svg"
    kinds = (".jsonl", ".csv", ".json", ".safetensors", ".svg")
    return {
        name: path
        for name, path in found.items()
        if not name.startswith(("reports/", ".lock")) and name.endswith(kinds) and not name.endswith(timed)
    }


def compare(undisturbed: Path, killed: Path) -> list[str]:
    """What ``killed`` lacks, has twice, or has otherwise."""
    ours, theirs = compared_files(undisturbed), compared_files(killed)
    found = [f"{name} is only in one of the runs" for name in sorted(ours.keys() ^ theirs.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        if name.endswith(".jsonl") and "/checkpoints/" not in name:
            found += _row_faults(name, ours[name], theirs[name])
        elif _essence(ours[name]) != _essence(theirs[name]):
            found.append(f"{name} differs")
    return found


def _row_faults(name: str, ours: Path, theirs: Path) -> Iterator[str]:
    expected, rows = _keyed_rows(ours), _keyed_rows(theirs)
    numbers, last = Counter(key for key, _ in rows), dict(rows)
    counts = {
        "lost": sum(key not in last for key, _ in expected),
        "duplicated": numbers.total() - len(numbers),
        "differing": sum(last.get(key, row) != row for key, row in expected),
    }
    yield from (f"{name}: {count} rows {what}" for what, count in counts.items() if count)
    if not any(counts.values()) and ours.name != "training_log.jsonl" and ours.read_bytes() != theirs.read_bytes():
        yield f"{name}: the same rows, other bytes"


def _keyed_rows(path: Path) -> list[tuple[str, str]]:
    rows = [_without_times(row) for row in read_jsonl(path)]
    return [(str(row.get("id", row.get("step", place))), json.dumps(row)) for place, row in enumerate(rows)]


def _essence(path: Path) -> Any:
    """What of a file must be equal: all of its bytes, but of JSON only what holds no time."""
    return _without_times(read_json(path)) if path.suffix == ".json" else path.read_bytes()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in TIMINGS | PLACES}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def torn_files(output: Path) -> list[str]:
    """Files that bear a real name and cannot be read; the torn last row of a row file is allowed for."""
    return [fault for name, path in compared_files(output).items() for fault in _file_fault(name, path)]


def _file_fault(name: str, path: Path) -> Iterator[str]:
    readers: dict[str, Callable[[Path], Any]] = {".jsonl": _read_ended_lines}
    if "/checkpoints/" not in name and "/adapter/" not in name:
        readers[".json"] = read_json
    try:
        readers.get(path.suffix, Path.stat)(path)
    except (ArtifactError, ValueError) as error:
        yield f"{name} cannot be read after a kill: {error}"


def _read_ended_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
