"""How much slower generation and training get beside two busy processes, with and without OpenMP's wait policy.

    python benchmarks/bench_busy.py
    python benchmarks/bench_busy.py --repeats 5 --json

A child process answers 8 questions after 3 worked examples (24 tokens each) and makes training steps of 4 rows, both
with the bundled model in float32. It is run in turn with OpenMP's own default (a waiting thread spins for
milliseconds) and with what `lib/__init__.py` sets (a short spin, then asleep), first on the idle machine, then beside
two endless loops. Compared are medians; the ratio over the default on the idle machine is what the policy costs there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROJECT_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_ROOT))
# libgomp's own numbers where neither variable is set: undefined policy, 300,000 turns.
POLICIES = {"spin (OpenMP's default)": {"GOMP_SPINCOUNT": "300000"}, "sleep (this project)": {}}
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
NUM_BUSY = 2


def child() -> None:
    """Seconds of one generation and of one training step, as JSON; each is done twice and the second is timed."""
    import torch

    from lib import gsm8k
    from lib.engine import bundled, generate, sources
    from lib.engine.load import load_base, load_tokenizer, resolve_runtime
    from lib.record.rows import read_jsonl
    from lib.train.packing import ATTENTION_NAME, pack_rows, supervised_loss
    from lib.train.rows import encode_rows

    runtime = resolve_runtime("cpu", "float32")
    folder = sources.resolve_model(bundled.BUNDLED_MODEL).folder
    tokenizer = load_tokenizer(folder)
    rows = read_jsonl(PROJECT_ROOT / "data" / "sandbox" / "gsm8k_train.jsonl")
    weights = load_base(folder, runtime, "none").eval()
    fewshot = gsm8k.fewshot_examples(rows[:3], 3)
    questions = [gsm8k.build_messages(row["question"], fewshot) for row in rows[8:16]]

    def answer() -> None:
        # A new engine, so that the examples are read each time.
        generate.Engine(weights.eval(), tokenizer).generate(questions, max_new_tokens=24)

    encoded = encode_rows(tokenizer, [gsm8k.training_messages(row) for row in rows[:4]], 512)

    def train() -> None:
        supervised_loss(weights, pack_rows(encoded.examples)).backward()
        weights.zero_grad()

    measured = {"cpu": torch.cpu.get_capabilities()["cpu_name"], "answers_s": _second_time_s(answer)}
    weights.train().set_attn_implementation(ATTENTION_NAME)
    for name, parameter in weights.named_parameters():
        # The first layer's: the gradient then passes through all of them, as an adapter's does.
        parameter.requires_grad_(".layers.0." in name)
    print(json.dumps(measured | {"step_s": _second_time_s(train)}))


def _second_time_s(work: Callable[[], None]) -> float:
    work()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def run_child(policy: dict[str, str]) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | policy
    if policy:
        # Beside an explicit spin count the policy says nothing more.
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    command = [sys.executable, __file__, "--child"]
    done = subprocess.run(command, cwd=PROJECT_ROOT, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(repeats: int) -> dict[str, Any]:
    """Medians by load, policy and work, and the CPU's name."""
    measured: dict[str, Any] = {}
    for load, num_busy in {"idle": 0, f"{NUM_BUSY} busy processes": NUM_BUSY}.items():
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_busy)]
        try:
            runs = [{name: run_child(policy) for name, policy in POLICIES.items()} for _ in range(repeats)]
        finally:
            for process in busy:
                process.kill()
        for name in POLICIES:
            for key in ("answers_s", "step_s"):
                measured[f"{load}, {name}, {key}"] = round(statistics.median(run[name][key] for run in runs), 2)
        measured["cpu"] = runs[0][name]["cpu"]
    return measured


def main() -> None:
    """Print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="children of each kind")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child()
    result = measure(args.repeats)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result.pop('cpu')}, {os.cpu_count()} cores")
    for key in ("answers_s", "step_s"):
        base = result[f"idle, {next(iter(POLICIES))}, {key}"]
        for name, seconds in result.items():
            if name.endswith(key):
                print(f"{name:<55}{seconds:>8.2f} s{seconds / base:>7.2f} times the idle default")


if __name__ == "__main__":
    main()
