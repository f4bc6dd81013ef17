"""Does the adapter, loaded with peft by a script that imports nothing of this project, compute what is evaluated here?

    python benchmarks/check_adapter.py --data ../gsm8k --rows 48
    python benchmarks/check_adapter.py --adapter results/run_simple/02_train/adapter --model Qwen/Qwen2.5-1.5B-Instruct

Trains a small NF4 adapter (or takes one), then loads it in processes of their own in the ways that a user might, and
compares the logits of development rows with those of ``load_dense``, which 03 and 04 evaluate. Exit status 1
when the ways of the model card differ by more than ``TOLERANCE`` of the largest logit.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PROJECT_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_ROOT))

from lib import gsm8k  # noqa: E402
from lib.engine import load, sources  # noqa: E402
from lib.engine.models import Models  # noqa: E402
from lib.prepare import datasets  # noqa: E402
from lib.train import sft  # noqa: E402
from lib.train.rows import encode_rows  # noqa: E402
from lib.train.settings import TrainSettings  # noqa: E402

NUM_ROWS = 4
# Of the largest logit, in float32. An unmerged adapter adds s B (A x) to W x, a merged one multiplies by W + s B A: the
# same function, rounded at other places. A float32 sum of n products is off by about sqrt(n) * 6e-8 of its size, which
# is 1e-6 for n = 576; thirty layers of seven such sums add up to some 1e-5. Ten times that is allowed.
TOLERANCE = 1e-4
OUTSIDE = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

base_folder, adapter, rows, output, weights, dtype, merge = sys.argv[1:]
dtype = getattr(torch, dtype)
nf4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
)
quantization = None if weights == "plain" else nf4
base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype, quantization_config=quantization)
if weights == "dequantized":
    base = base.dequantize()
tuned = PeftModel.from_pretrained(base, adapter).eval()
tuned = tuned.merge_and_unload() if merge == "merged" else tuned
with torch.no_grad():
    logits = {name: tuned(ids).logits.float() for name, ids in load_file(rows).items()}
assert not [name for name in sys.modules if name.partition(".")[0] == "lib"], "something of ours was imported"
save_file(logits, output)
"""


@dataclass(frozen=True)
class Way:
    """How a user loads base and adapter, and the dtype of ours that it is compared with."""

    weights: str  # dequantized (the card's), packed, plain (the wrong base)
    dtype: str
    merge: str
    is_checked: bool

    @property
    def words(self) -> str:
        kinds = {"dequantized": "NF4, dequantised", "packed": "NF4, packed", "plain": "not quantised: the wrong base"}
        return f"{kinds[self.weights]}, {self.merge}"


WAYS = (
    Way("dequantized", "float32", "merged", True),
    Way("dequantized", "float32", "unmerged", True),
    Way("dequantized", "bfloat16", "unmerged", False),
    Way("packed", "float32", "unmerged", False),
    Way("packed", "bfloat16", "unmerged", False),
    Way("packed", "float32", "merged", False),
    Way("plain", "float32", "unmerged", False),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="hub name, folder, or the bundled model")
    parser.add_argument("--data", default="data/sandbox", help="folder with gsm8k_train.jsonl")
    parser.add_argument("--rows", type=int, default=48, help="rows to train on, four to a step")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="high, so that the adapter changes much")
    parser.add_argument("--adapter", type=Path, help="use this one instead of training")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    return parser.parse_args()


def train_adapter(args: argparse.Namespace, base: sources.ModelSource, output: Path) -> Path:
    """A small QLoRA training on the first rows."""
    tokenizer = load.load_tokenizer(base.folder)
    rows = datasets.load_gsm8k("train", args.data)[0][: args.rows]
    encoded = encode_rows(tokenizer, [gsm8k.training_messages(row) for row in rows], 1024)
    settings = TrainSettings(
        base_model=args.model,
        base_identity=f"{base.identity} nf4",
        num_epochs=1,
        learning_rate=args.learning_rate,
        lora_r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        train_batch_size=4,
        gradient_accumulation_steps=1,
        save_steps=10_000,
        seed=42,
    )
    trainee = Models(base.folder, load.resolve_runtime("cpu"), "nf4").for_training()
    return sft.train(trainee, encoded.examples, settings, output).adapter_dir


def conversation_rows(args: argparse.Namespace, base: sources.ModelSource) -> dict[str, torch.Tensor]:
    """Token ids of the last training questions with their answers, which are not trained on; (1, T) each."""
    tokenizer = load.load_tokenizer(base.folder)
    rows = datasets.load_gsm8k("train", args.data)[0][-NUM_ROWS:]
    chats = [gsm8k.training_messages(row) for row in rows]
    return {
        f"row {number}": torch.tensor([example["input_ids"]])
        for number, example in enumerate(encode_rows(tokenizer, chats, 1024).examples)
    }


def ours(base: sources.ModelSource, adapter: Path | None, dtype: str, rows: dict) -> dict[str, torch.Tensor]:
    runtime = load.Runtime("cpu", getattr(torch, dtype), "requested")
    dense = load.load_dense(base.folder, runtime, "nf4", adapter)
    with torch.no_grad():
        return {name: dense(ids).logits.float() for name, ids in rows.items()}


def theirs(base: sources.ModelSource, adapter: Path, way: Way, rows_file: Path) -> dict[str, torch.Tensor]:
    output = rows_file.with_name("logits.safetensors")
    files = map(str, (base.folder, adapter.resolve(), rows_file, output))
    arguments = [*files, way.weights, way.dtype, way.merge]
    # -I: neither this folder nor variables of the environment are on the path.
    subprocess.run([sys.executable, "-I", "-c", OUTSIDE, *arguments], check=True, stderr=subprocess.DEVNULL)
    return load_file(output)


def compare(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest difference, absolute and of the largest logit; share of positions with the same most likely token."""
    a, b = (torch.cat([logits[name][0] for name in sorted(one)]) for logits in (one, other))
    largest = (a - b).abs().max().item()
    same = (a.argmax(-1) == b.argmax(-1)).float().mean().item()
    return {"largest": largest, "relative": largest / b.abs().max().item(), "same_token": same}


def main() -> int:
    args = parse_arguments()
    base = sources.resolve_model(args.model)
    with tempfile.TemporaryDirectory() as folder:
        adapter = args.adapter or train_adapter(args, base, Path(folder) / "run")
        rows = conversation_rows(args, base)
        rows_file = Path(folder) / "rows.safetensors"
        save_file(rows, rows_file)
        reference = ours(base, adapter, "float32", rows)
        found = {"float32: our untuned model": compare(ours(base, None, "float32", rows), reference)}
        found["bfloat16: our merged model"] = compare(ours(base, adapter, "bfloat16", rows), reference)
        for way in WAYS:
            found[f"{way.dtype}: {way.words}"] = compare(theirs(base, adapter, way, rows_file), reference)
    checked = [found[f"{way.dtype}: {way.words}"]["relative"] for way in WAYS if way.is_checked]
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        num_positions = sum(ids.shape[1] for ids in rows.values())
        print(f"against the evaluated model in float32; {num_positions} positions of {len(rows)} rows")
        print("| way | largest difference | of the largest logit | same token |\n| --- | ---: | ---: | ---: |")
        for name, one in found.items():
            print(f"| {name} | {one['largest']:.2g} | {one['relative']:.1e} | {100 * one['same_token']:.1f} % |")
    return int(max(checked) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
