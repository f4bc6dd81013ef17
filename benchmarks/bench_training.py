"""Training as most do it today against this project's, on the same rows in the same optimizer steps.

    python benchmarks/bench_training.py --data ../gsm8k --rows 128
    python benchmarks/bench_training.py --data ../gsm8k --rows 7473 --only ours --model Qwen/Qwen2.5-1.5B-Instruct

The plain way: transformers' Trainer on packed NF4 weights, batches of 2 accumulated 8 times, padded, in random order,
gradient checkpointing, autocast, logits for every token. Both sides see the same 16 rows in each step, begin with the
same adapter and follow the same schedule, so their losses differ by rounding only. Each side runs in its own process,
one after the other; the first step of each is left out of its speed.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, TrainerCallback

PROJECT_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_ROOT))

from lib import gsm8k  # noqa: E402
from lib.engine import load, sources  # noqa: E402
from lib.engine.models import Models  # noqa: E402
from lib.params import LORA_TARGETS  # noqa: E402
from lib.prepare import datasets  # noqa: E402
from lib.train import sft  # noqa: E402
from lib.train.packing import Example  # noqa: E402
from lib.train.rows import encode_rows  # noqa: E402
from lib.train.settings import TrainSettings  # noqa: E402

SIDES = ("plain", "ours")
SETTINGS = {
    "num_epochs": 1,
    "learning_rate": 1e-4,
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "save_steps": 10_000,
    "seed": 42,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="hub name, folder, or the bundled model")
    parser.add_argument("--data", default="", help='folder with gsm8k_train.jsonl; "" = wherever 01_prepare looks')
    parser.add_argument("--rows", type=int, default=128, help="training rows, a multiple of 16 for complete steps")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--compute-dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    parser.add_argument("--only", choices=SIDES, help="time this side alone")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the tables")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def load_examples(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The first ``--rows`` rows of GSM8K train as this project encodes them, in the order of the optimizer steps."""
    rows, _ = datasets.load_gsm8k("train", assets_dir=arguments.data)
    encoded = encode_rows(tokenizer, [gsm8k.training_messages(row) for row in rows[: arguments.rows]], 2048)
    return encoded.examples


def run_side(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains one side; returns its log and what it took."""
    runtime = load.resolve_runtime(arguments.device, arguments.compute_dtype)
    source = sources.resolve_model(arguments.model, assets_dir=arguments.data)
    tokenizer = load.load_tokenizer(source.folder)
    examples = load_examples(arguments, tokenizer)
    settings = TrainSettings(base_model=source.name, base_identity=source.identity, **SETTINGS)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train = train_ours if arguments.side == "ours" else train_plain
        log = train(source.folder, runtime, tokenizer, examples, settings, Path(folder))
    return {
        "side": arguments.side,
        "runtime": runtime.reason,
        "log": log,
        "wall_s": time.perf_counter() - started,
        "peak_memory_gib": load.peak_memory_gib(runtime.device),
    }


def train_ours(
    folder: Path,
    runtime: load.Runtime,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    settings: TrainSettings,
    output_dir: Path,
) -> list[dict[str, Any]]:
    """This project's way; a row a step."""
    with contextlib.redirect_stdout(sys.stderr):
        base = Models(folder, runtime, "nf4").for_training()
    log = sft.train(base, examples, settings, output_dir, say=to_stderr).log
    return [{name: row[name] for name in ("loss", "wall_s", "num_rows", "num_tokens")} for row in log]


def train_plain(
    folder: Path,
    runtime: load.Runtime,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    settings: TrainSettings,
    output_dir: Path,
) -> list[dict[str, Any]]:
    """The usual recipe with nothing of ``sft`` but the rows; a row a step."""
    order = [row for step in sft.step_rows(len(examples), 16, 1, settings.seed) for row in step]
    base = load.load_base(folder, runtime, "nf4").train()
    set_seed(settings.seed)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM")
    trainer = Trainer(
        model=get_peft_model(base, lora),
        args=plain_arguments(runtime, settings, output_dir),
        train_dataset=[examples[row] for row in order],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[StepClock([len(examples[row]["input_ids"]) for row in order])],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.callback_handler.callbacks[-1].log


def plain_arguments(runtime: load.Runtime, settings: TrainSettings, output_dir: Path) -> TrainingArguments:
    """Arguments as recipes give them; nothing is saved, which favours this side."""
    return TrainingArguments(
        output_dir=str(output_dir),
        use_cpu=runtime.device == "cpu",
        per_device_train_batch_size=settings.train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=runtime.dtype == torch.bfloat16,
        fp16=runtime.dtype == torch.float16,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        seed=settings.seed,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


class StepClock(TrainerCallback):
    """Notes loss and seconds of each step."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.log, self.started = lengths, [], 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        lengths = self.lengths[16 * (state.global_step - 1) : 16 * state.global_step]
        row = {"loss": logs["loss"], "wall_s": time.perf_counter() - self.started}
        self.log.append({**row, "num_rows": len(lengths), "num_tokens": sum(lengths)})
        to_stderr(f"plain: step {state.global_step}/{state.max_steps} loss {logs['loss']:.4f} {row['wall_s']:.1f} s")


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measure(side: str) -> dict[str, Any]:
    """Runs this script again for one side and reads what it prints; its failure ends the benchmark."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    timed = result["log"][1:] or result["log"]
    seconds = sum(row["wall_s"] for row in timed)
    result["examples_per_s"] = sum(row["num_rows"] for row in timed) / seconds
    result["tokens_per_s"] = sum(row["num_tokens"] for row in timed) / seconds
    result["training_s"] = sum(row["wall_s"] for row in result["log"])
    return result


def compare(plain: dict[str, Any], ours: dict[str, Any]) -> dict[str, float]:
    """Ratio of the speeds, and how far the loss curves are apart."""
    pairs = zip(plain["log"], ours["log"], strict=True)
    differences = [abs(one["loss"] - other["loss"]) for one, other in pairs]
    return {
        "examples_per_s_ratio": ours["examples_per_s"] / plain["examples_per_s"],
        "peak_memory_ratio": ours["peak_memory_gib"] / plain["peak_memory_gib"],
        "largest_loss_difference": max(differences),
        "mean_loss_difference": statistics.mean(differences),
    }


def print_tables(results: list[dict[str, Any]], comparison: dict[str, float] | None) -> None:
    print(results[0]["runtime"])
    print(
        f"{'':8} {'examples/s':>10} {'tokens/s':>9} {'training s':>10} {'peak GiB':>9} {'first loss':>10} {'last':>8}"
    )
    for result in results:
        first, last = result["log"][0]["loss"], result["log"][-1]["loss"]
        speed = f"{result['examples_per_s']:10.2f} {result['tokens_per_s']:9.0f} {result['training_s']:10.1f}"
        print(f"{result['side']:8} {speed} {result['peak_memory_gib']:9.2f} {first:10.4f} {last:8.4f}")
    for name, value in (comparison or {}).items():
        print(f"{name.replace('_', ' ')}: {value:.4f}")


def main() -> None:
    arguments = parse_arguments()
    if arguments.side:
        print(json.dumps(run_side(arguments)))
        return
    sides = [arguments.only] if arguments.only else list(SIDES)
    results = [measure(side) for side in sides]
    comparison = compare(*results) if len(results) == 2 else None
    if arguments.json:
        print(json.dumps({"arguments": vars(arguments), "sides": results, "comparison": comparison}))
    else:
        print_tables(results, comparison)


if __name__ == "__main__":
    main()
