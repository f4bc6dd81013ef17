"""Self-distilled data: one unbroken run against one that is killed at random moments, compared byte by byte.

    python benchmarks/bench_distil.py --data DATA
    python benchmarks/bench_distil.py --data DATA --questions 200 --samples 4 --k 5 --max-new-tokens 256 --json

Both runs are processes of their own that do what notebook 01 does: sample, choose, write the training rows. The second
gets SIGKILL, with its process group, at seeded moments of its work, is started again each time, and at last finishes.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROJECT_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_ROOT))

from lib import gsm8k  # noqa: E402
from lib.engine import sources  # noqa: E402
from lib.prepare import self_distillation  # noqa: E402
from lib.record import files, manifest, rows  # noqa: E402

SAMPLES, TRAIN, SUMMARY = "samples.jsonl", "train.jsonl", "summary.json"
POOL_SIZE, SEED = 8, 42


def work(args: argparse.Namespace, folder: Path) -> None:
    """Sample and choose into ``folder``, going on from what is there."""
    from lib.engine.generate import load_engine
    from lib.engine.generator import LazyGenerator, Sampling
    from lib.engine.load import load_tokenizer, resolve_runtime

    train = rows.read_jsonl(Path(args.data) / "gsm8k_train.jsonl")
    split = gsm8k.split_train(train, train, pool_size=POOL_SIZE, dev_rows=0, max_train_rows=args.questions, seed=SEED)
    fewshot = gsm8k.fewshot_examples(split.fewshot, args.k)
    base, runtime = sources.resolve_model(args.model), resolve_runtime("auto", args.dtype)
    tokenizer = load_tokenizer(base.folder)
    asking = self_distillation.Asking(
        Sampling(args.temperature, SEED), args.samples, args.max_new_tokens, runtime.device
    )
    made_by = (base.identity, args.quantization, str(runtime.dtype), split.train, fewshot, tokenizer.chat_template)
    protocol = self_distillation.protocol(*made_by, asking)
    engine = LazyGenerator(load_engine, base.folder, runtime, args.quantization, asking.rows_at_once)
    log = rows.RowLog(folder / SAMPLES, files.sha256_json(protocol))
    sampled = self_distillation.sample_answers(split.train, fewshot, engine, asking, log)
    distilled = self_distillation.choose_training_rows(sampled, keep=1, choice="shortest", fallback="drop", seed=SEED)
    rows.write_jsonl(folder / TRAIN, distilled.rows)
    summary = {
        **self_distillation.summarize(sampled, distilled),
        "coverage_by_samples": {number: count for number, (count, _) in self_distillation.coverage(sampled).items()},
        "lengths": self_distillation.length_rows(sampled, distilled, tokenizer),
        "runtime": runtime.reason,
        "new_rows": sampled.num_new,
        "new_tokens": sampled.num_new_tokens,
        "model_s": round(sampled.wall_s, 1),
        "cpu_s": round(time.process_time(), 1),
        "protocol": protocol,
    }
    # Written last: it says that the run is complete.
    files.write_json(folder / SUMMARY, summary)


def start(folder: Path) -> subprocess.Popen:
    """The same command line as a worker, in a separate process group."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(folder)]
    return subprocess.Popen(command, cwd=PROJECT_ROOT, start_new_session=True)


def run_unbroken(folder: Path) -> float:
    """Wall seconds from start to end; those of an earlier benchmark where ``folder`` holds its run."""
    timed = folder / "unbroken.json"
    if not timed.exists():
        started = time.perf_counter()
        if start(folder).wait():
            raise SystemExit("the unbroken run failed")
        files.write_json(timed, {"unbroken_s": time.perf_counter() - started})
    return files.read_json(timed)["unbroken_s"]


def run_killed(folder: Path, num_rows: int, num_kills: int, seed: int) -> tuple[float, list[dict[str, Any]]]:
    """Wall seconds of all starts together, and a row a kill.

    The moments are drawn in new rows and not in seconds: other work on the machine would otherwise shift them.
    """
    moments, kills, started = random.Random(seed), [], time.perf_counter()
    for _ in range(num_kills):
        before, new, pause_s = complete_rows(folder), moments.randint(1, num_rows // (num_kills + 1)), moments.random()
        process = start(folder)
        while complete_rows(folder) < before + new:
            if process.poll() is not None:
                raise SystemExit(f"a run ended with {process.returncode} before it was killed after {new} new rows")
            time.sleep(0.02)
        time.sleep(pause_s)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        torn = not (folder / SAMPLES).read_bytes().endswith(b"\n")
        kills.append(
            {"new_rows": complete_rows(folder) - before, "all_rows": complete_rows(folder), "torn_last_row": torn}
        )
    if start(folder).wait():
        raise SystemExit("the run failed after the kills")
    return time.perf_counter() - started, kills


def complete_rows(folder: Path) -> int:
    """Rows in the file of answers so far."""
    return (folder / SAMPLES).read_bytes().count(b"\n") if (folder / SAMPLES).exists() else 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The benchmark as one object."""
    with tempfile.TemporaryDirectory() as temporary:
        unbroken, killed = (args.folder or Path(temporary)) / "unbroken", Path(temporary) / "killed"
        unbroken_s = run_unbroken(unbroken)
        killed_s, kills = run_killed(killed, args.questions * args.samples, args.kills, args.seed)
        same = {name: (unbroken / name).read_bytes() == (killed / name).read_bytes() for name in (SAMPLES, TRAIN)}
        return {
            "identical": same,
            "sha256": {name: files.sha256_file(unbroken / name) for name in same},
            "unbroken_s": round(unbroken_s, 1),
            "killed_s": round(killed_s, 1),
            "kills": kills,
            "cores": os.cpu_count(),
            "versions": manifest.package_versions(),
            **files.read_json(unbroken / SUMMARY),
        }


def show(result: dict[str, Any]) -> None:
    """A few lines for a reader."""
    covered = ", ".join(f"{count} after {number}" for number, count in result["coverage_by_samples"].items())
    print(f"identical bytes: {result['identical']}")
    print(f"unbroken {result['unbroken_s']} s: model {result['model_s']} s, CPU {result['cpu_s']} s")
    print(f"killed and finished {result['killed_s']} s")
    for kill in result["kills"]:
        print(f"  SIGKILL after {kill['new_rows']} new rows, {kill['all_rows']} in all; torn: {kill['torn_last_row']}")
    print(f"questions with a correct answer, of {result['num_questions']}: {covered}")
    print(f"answers: {result['fates']}")
    for row in result["lengths"]:
        print(f"  {row}")


def main() -> None:
    """Print a few lines, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with gsm8k_train.jsonl")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--quantization", default="nf4", choices=("nf4", "none"))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=20, help="of the moments of the kills")
    parser.add_argument("--folder", type=Path, help="keep the unbroken run here, for kills at other moments")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args, args.worker)
        return
    result = measure(args)
    print(json.dumps(result, indent=2)) if args.json else show(result)


if __name__ == "__main__":
    main()
