"""What the generation benchmarks share: prompts, one timed way after the other, the peak memory of each, one table."""

import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

PROJECT_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_ROOT))

from lib import gsm8k  # noqa: E402
from lib.engine.load import Runtime  # noqa: E402
from lib.prepare import datasets  # noqa: E402

GIB = 2**30


@dataclass
class Measured:
    """One way of doing the work, timed on ``num_rows`` rows. Ratios are against the first way of a table."""

    way: str
    dtype: str
    num_rows: int
    s_per_row: float
    tokens_per_s: float | None
    peak_memory_gib: float
    ratio: float = 1.0
    same_share: float | None = None
    num_compared: int = 0


def timed(way: str, runtime: Runtime, num_rows: int, work: Callable[[], Any]) -> tuple[Measured, Any]:
    """Runs ``work`` once and notes wall time per row and the highest memory while it ran."""
    reset_peak_memory(runtime.device)
    start = time.perf_counter()
    result = work()
    if runtime.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    dtype = str(runtime.dtype).removeprefix("torch.")
    measured = Measured(way, dtype, num_rows, seconds / num_rows, None, peak_memory_gib(runtime.device))
    print(f"{way}, {dtype}: {measured.s_per_row:.3f} s a row", file=sys.stderr, flush=True)
    return measured, result


def reset_peak_memory(device: str) -> None:
    """Restarts the count of ``peak_memory_gib``: what is resident now stays in it, what was freed does not."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        # Linux forgets the highest resident size of a process when 5 is written here (man 5 proc).
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gib(device: str) -> float:
    """Highest memory since the reset: allocated on the GPU, or resident of the process on the CPU, model included."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 / GIB


def gsm8k_conversations(data: str, k: int, num_rows: int) -> list[list[dict[str, str]]]:
    """The first test questions, each after the same ``k`` examples, as 03_eval_gsm8k asks them."""
    train, _ = datasets.load_gsm8k("train", assets_dir=data)
    test, _ = datasets.load_gsm8k("test", assets_dir=data)
    split = gsm8k.split_train(train, train, pool_size=8, dev_rows=0, max_train_rows=0, seed=42)
    examples = gsm8k.fewshot_examples(split.fewshot, k)
    return [gsm8k.build_messages(row["question"], examples) for row in test[:num_rows]]


def machine() -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"device": device, "num_threads": torch.get_num_threads(), "torch": torch.__version__}


def table(rows: Sequence[Measured], same: str) -> str:
    """The measured ways as a Markdown table; ``same`` heads the column of equal results."""
    lines = [f"| way | rows | s a row | times faster | tokens/s | {same} | peak GiB |", "| --- |" + " ---: |" * 6]
    for row in rows:
        speed = "" if row.tokens_per_s is None else f"{row.tokens_per_s:.0f}"
        share = "" if row.same_share is None else f"{100 * row.same_share:.1f} % of {row.num_compared}"
        cells = [f"{row.way}, {row.dtype}", str(row.num_rows), f"{row.s_per_row:.3f}", f"{row.ratio:.1f}"]
        lines.append("| " + " | ".join([*cells, speed, share, f"{row.peak_memory_gib:.2f}"]) + " |")
    return "\n".join(lines)


def add_ratios(rows: Sequence[Measured]) -> None:
    for row in rows:
        row.ratio = rows[0].s_per_row / row.s_per_row


def print_result(as_json: bool, arguments: dict[str, Any], rows: Sequence[Measured], same: str, **more: Any) -> None:
    """The table, or with ``as_json`` one object that holds everything."""
    if as_json:
        ways = [asdict(row) for row in rows]
        print(json.dumps({"arguments": arguments, "machine": machine(), "ways": ways, **more}, indent=1))
        return
    print("machine: " + ", ".join(f"{name} {value}" for name, value in machine().items()))
    print(table(rows, same))
