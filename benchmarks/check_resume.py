"""A training killed with SIGKILL at random moments and resumed, against the same training unbroken: is it the same?

    python benchmarks/check_resume.py --data ../gsm8k --rows 48 --kills 2

Each session is a separate process. The parent watches the log grow and, a random fraction of a step after a random
step, kills it: in a forward pass, in an update or while a checkpoint is saved. Dropout is on, so that random numbers
must continue too. Compared are the losses of every step, the losses on development rows and the adapter's weights.
Exit status 1 when anything differs by more than ``TOLERANCE``.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROJECT_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_ROOT))

# On one CPU with the same number of threads, nothing explains a difference: every sum is in the same order.
TOLERANCE = 0.0
NUM_DEV_ROWS = 8
POLL_S = 0.02


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="hub name, folder, or the bundled model")
    parser.add_argument("--data", default="data/sandbox", help="folder with gsm8k_train.jsonl")
    parser.add_argument("--rows", type=int, default=48, help="training rows, four to a step")
    parser.add_argument("--save-steps", type=int, default=3)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1, help="of the moments of the kills")
    parser.add_argument("--quantization", default="nf4", choices=("nf4", "none"))
    parser.add_argument("--compute-dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the lines")
    parser.add_argument("--train-into", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def train(args: argparse.Namespace) -> None:
    """Trains into ``--train-into``, or goes on with what is there."""
    from lib import gsm8k
    from lib.engine import load, sources
    from lib.engine.models import Models
    from lib.prepare import datasets
    from lib.train import sft
    from lib.train.rows import encode_rows
    from lib.train.settings import TrainSettings

    rows, _ = datasets.load_gsm8k("train", args.data)
    rows = rows[: args.rows + NUM_DEV_ROWS]
    base = sources.resolve_model(args.model)
    tokenizer = load.load_tokenizer(base.folder)
    chats = [gsm8k.training_messages(row) for row in rows]
    dev = encode_rows(tokenizer, chats[args.rows :], 1024).examples
    settings = TrainSettings(
        base_model=args.model,
        base_identity=f"{base.identity} {args.quantization}",
        num_epochs=1,
        learning_rate=1e-4,
        lora_r=8,
        lora_alpha=16,
        lora_dropout=0.1,
        train_batch_size=4,
        gradient_accumulation_steps=1,
        save_steps=args.save_steps,
        seed=42,
        warmup_share=0.1,
        # What is free now must not decide how steps are cut in the next session.
        micro_batch_tokens=1024,
    )
    runtime = load.resolve_runtime("cpu", args.compute_dtype)
    trainee = Models(base.folder, runtime, args.quantization).for_training()
    train_rows = encode_rows(tokenizer, chats[: args.rows], 1024).examples
    sft.train(trainee, train_rows, settings, args.train_into, dev_examples=dev)


def start(folder: Path) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, *sys.argv[1:], "--train-into", str(folder)]
    return subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.DEVNULL)


def finish(folder: Path) -> None:
    """One session to its end."""
    if start(folder).wait() != 0:
        raise SystemExit("a session failed; its message stands above")


def num_logged(folder: Path) -> int:
    path = folder / "training_log.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def kill_after(folder: Path, step: int, delay_s: float) -> int | None:
    """One session, killed ``delay_s`` after ``step`` is logged; the steps that it had logged, None if it was done."""
    session = start(folder)
    # A resumed session begins its log with the rows of the checkpoint: those are not its own steps.
    while session.poll() is None and num_logged(folder) < step:
        time.sleep(POLL_S)
    time.sleep(delay_s)
    if session.poll() is not None:
        return None
    session.kill()
    session.wait()
    return num_logged(folder)


def compare(unbroken: Path, broken: Path) -> dict[str, Any]:
    """Largest differences between two finished trainings."""
    from safetensors.torch import load_file

    logs = [[json.loads(line) for line in (path / "training_log.jsonl").open()] for path in (unbroken, broken)]
    columns = ("loss", "dev_loss", "grad_norm", "learning_rate")
    pairs = list(zip(*logs, strict=True))
    differences = {
        column: max(abs(one[column] - other[column]) for one, other in pairs if column in one) for column in columns
    }
    files = [path / "adapter" / "adapter_model.safetensors" for path in (unbroken, broken)]
    one, other = map(load_file, files)
    differences["weights"] = max((one[name] - other[name]).abs().max().item() for name in one.keys() | other.keys())
    return {"differences": differences, "same_bytes": files[0].read_bytes() == files[1].read_bytes()}


def main() -> int:
    args = parse_arguments()
    if args.train_into:
        train(args)
        return 0
    rng = random.Random(args.seed)
    num_steps = -(-args.rows // 4)
    with tempfile.TemporaryDirectory() as folder:
        unbroken, broken = Path(folder) / "unbroken", Path(folder) / "broken"
        finish(unbroken)
        seconds = [json.loads(line)["wall_s"] for line in (unbroken / "training_log.jsonl").open()]
        killed = []
        for step in sorted(rng.sample(range(1, num_steps), args.kills)):
            killed.append(kill_after(broken, step, rng.random() * sum(seconds) / len(seconds)))
        finish(broken)
        result = compare(unbroken, broken)
        resumed_from = json.loads((broken / "training.json").read_text())["resumed_from"]
    result |= {"num_steps": num_steps, "killed_after_steps": killed, "resumed_from": resumed_from}
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{num_steps} steps, killed after {killed} logged steps, last session from checkpoint {resumed_from}")
        print("largest differences: " + ", ".join(f"{name} {value:g}" for name, value in result["differences"].items()))
        print(f"adapter files are {'the same bytes' if result['same_bytes'] else 'different bytes'}")
    return int(max(result["differences"].values()) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
