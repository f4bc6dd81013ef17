"""Greedy generation by transformers' generate() against this project's engine: same model, same prompts, one run.

    python benchmarks/bench_generation.py --data ../gsm8k --k 8 --rows 64 --max-new-tokens 256
    python benchmarks/bench_generation.py --data ../gsm8k --sweep --plot benchmarks/results/generation_cost.png
    python benchmarks/bench_generation.py --data ../gsm8k --random-qwen TOKENIZER --rows 1319 --max-new-tokens 200

The first prints one table: generate() one by one and in batches of 8 in --plain-dtype, on the first --plain-rows rows
as they take long, then the engine on all rows in each of --dtype. Then, for each row of the engine, whether each of its
tokens is the one that generate()'s model finds most likely (one plain forward pass a row), and the margin between the
two best logits where it first is not: a tie to rounding, or a fault.

--sweep times the engine alone over numbers of examples and rows. --random-qwen builds random weights in the shape of
Qwen2.5-1.5B-Instruct, lets every row run to --max-new-tokens, and adds transformers' continuous batching; unlike the
others it needs no weights, and its texts mean nothing.
"""

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import measure
import torch
from make_random_model import SHAPE
from measure import Measured, timed
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from lib.engine import load as engine_load
from lib.engine import sources
from lib.engine.generate import Engine
from lib.engine.generator import Completion
from lib.engine.load import Runtime, resolve_runtime
from lib.engine.plain import greedy_config
from lib.record import files

SWEEP_K = (0, 3, 5, 8)
SWEEP_ROWS = (16, 32, 64, 128, 256)
PLAIN_BATCH = 8


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="hub name, folder, or the bundled model")
    parser.add_argument("--data", default="", help='folder with gsm8k_*.jsonl; "" = wherever 01_prepare looks')
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", nargs="+", default=["float32", "auto"], help="dtypes of the engine")
    parser.add_argument("--plain-dtype", default="float32", help="dtype of generate()")
    parser.add_argument("--quantization", default="none", choices=("none", "nf4"))
    parser.add_argument("--k", type=int, default=8, help="worked examples before each question")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--plain-rows", type=int, default=8, help="rows of the plain ways; 0 leaves them out")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=0, help="rows of the engine at a time; 0 = from free memory")
    parser.add_argument("--skip-check", action="store_true", help="leave out the plain forward pass a row")
    parser.add_argument("--sweep", action="store_true", help="the engine over examples and rows; prints CSV")
    parser.add_argument("--plot", default="", help="with --sweep: PNG to write")
    parser.add_argument("--random-qwen", default="", metavar="TOKENIZER", help="folder with Qwen's tokenizer")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="with --random-qwen: fewer")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the tables")
    return parser.parse_args()


@dataclass
class Bench:
    """A loaded model with the prompts that it is timed on."""

    arguments: argparse.Namespace
    runtime: Runtime
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    conversations: list[list[dict[str, str]]]
    # Where rows must not stop early: an id beyond the vocabulary.
    never_stop: bool = False

    def engine(self, batch_size: int) -> Engine:
        engine = Engine(self.model, self.tokenizer, batch_size=batch_size)
        if self.never_stop:
            engine.stop_ids = frozenset({self.model.config.vocab_size})
        return engine

    def run_engine(self) -> tuple[Measured, list[Completion]]:
        engine = self.engine(self.arguments.batch_size)
        if engine.refusal:
            sys.exit(f"the engine does not take this model: {engine.refusal}")
        return self._time("engine", engine, self.conversations)

    def run_plain(self, batch_size: int) -> tuple[Measured, list[Completion]]:
        engine = self.engine(batch_size)
        engine.refusal = "timed as the plain way"
        name = "generate(), one by one" if batch_size == 1 else f"generate(), batches of {batch_size}"
        return self._time(name, engine, self.conversations[: self.arguments.plain_rows])

    def run_continuous(self) -> Measured:
        """transformers' continuous batching on all rows."""
        prompts = [engine_load.render_prompt(self.tokenizer, conversation) for conversation in self.conversations]
        config = greedy_config(self.arguments.max_new_tokens, [self.model.config.vocab_size])
        measured, outputs = timed(
            "generate_batch()",
            self.runtime,
            len(prompts),
            lambda: self.model.generate_batch(prompts, generation_config=config, progress_bar=False),
        )
        num_tokens = sum(len(output.generated_tokens) for output in outputs.values())
        measured.tokens_per_s = num_tokens / (measured.s_per_row * len(prompts))
        return measured

    def _time(self, name: str, engine: Engine, rows: Sequence) -> tuple[Measured, list[Completion]]:
        # The first products of a process wait for their kernels to be made; a call of two rows does not count.
        warm = self.engine(engine.batch_size)
        warm.refusal = engine.refusal
        warm.generate(rows[:2], max_new_tokens=2)
        work = lambda: engine.generate(rows, max_new_tokens=self.arguments.max_new_tokens)  # noqa: E731
        measured, completions = timed(name, self.runtime, len(rows), work)
        measured.tokens_per_s = engine.stats.tokens_per_s
        return measured, completions


def load(arguments: argparse.Namespace, compute_dtype: str) -> Bench:
    runtime = resolve_runtime(arguments.device, compute_dtype)
    source = sources.resolve_model(arguments.model, assets_dir=arguments.data)
    loaded = engine_load.load_dense(source.folder, runtime, arguments.quantization)
    conversations = measure.gsm8k_conversations(arguments.data, arguments.k, arguments.rows)
    return Bench(arguments, runtime, loaded, engine_load.load_tokenizer(source.folder), conversations)


def load_random_qwen(arguments: argparse.Namespace, compute_dtype: str) -> Bench:
    """Random weights made on the device itself."""
    runtime = resolve_runtime(arguments.device, compute_dtype)
    tokenizer = engine_load.load_tokenizer(arguments.random_qwen)
    config = Qwen2Config(**{**SHAPE, "num_hidden_layers": arguments.layers}, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    with torch.device(runtime.device):
        made = Qwen2ForCausalLM._from_config(config, dtype=runtime.dtype).eval().requires_grad_(False)
    conversations = measure.gsm8k_conversations(arguments.data, arguments.k, arguments.rows)
    return Bench(arguments, runtime, made, tokenizer, conversations, never_stop=True)


def first_difference(bench: Bench, index: int, completion: Completion) -> dict[str, Any] | None:
    """Where ``completion`` first leaves what the plain forward pass finds most likely, and by what margin.

    Its tokens before that place are the plain way's own, so a row without a difference is what generate() writes.
    """
    prompt = engine_load.render_prompt(bench.tokenizer, bench.conversations[index])
    written = list(completion.token_ids)
    ids = torch.tensor([prompt + written], device=bench.model.device)
    with torch.inference_mode():
        logits = bench.model(ids, use_cache=False, logits_to_keep=len(written) + 1).logits[0].float()
    stops = engine_load.stop_token_ids(bench.model, bench.tokenizer)
    likely = logits.argmax(dim=-1).tolist()
    for place, token in enumerate(likely):
        ended = place == len(written)
        if ended and (completion.finish_reason == "length" or token in stops):
            return None
        if ended or token != written[place]:
            chosen = max(logits[place, stops].tolist()) if ended else logits[place, written[place]].item()
            margin = logits[place, token].item() - chosen
            return {"row": index, "token": place, "of": len(written), "logit_margin": round(margin, 5)}
    raise AssertionError("unreachable: the last place always returns")


def check_engine(bench: Bench, measured: Measured, completions: Sequence[Completion]) -> list[dict[str, Any]]:
    """Fills in the share of rows that the plain model agrees with; returns the others."""
    found = [first_difference(bench, index, completion) for index, completion in enumerate(completions)]
    differences = [{"dtype": measured.dtype, **one} for one in found if one is not None]
    measured.same_share, measured.num_compared = 1 - len(differences) / len(found), len(found)
    return differences


def compare_texts(measured: Measured, completions: Sequence[Completion], reference: Sequence[Completion]) -> None:
    same = [one.text == other.text for one, other in zip(completions, reference, strict=False)]
    measured.same_share, measured.num_compared = sum(same) / len(same), len(same)


def run_comparison(arguments: argparse.Namespace) -> tuple[list[Measured], list[dict[str, Any]]]:
    """The plain ways, then the engine in each dtype; one model in memory at a time."""
    bench = load(arguments, arguments.plain_dtype)
    plain = bench.runtime.dtype
    ways = [bench.run_plain(size) for size in (1, PLAIN_BATCH) if arguments.plain_rows]
    for measured, completions in ways:
        compare_texts(measured, completions, ways[0][1])
    runs = []
    for name in arguments.dtype:
        wanted = resolve_runtime(arguments.device, name).dtype
        if wanted != bench.runtime.dtype:
            del bench
            gc.collect()
            bench = load(arguments, name)
        runs.append(bench.run_engine())
    if bench.runtime.dtype != plain:
        del bench
        gc.collect()
        bench = load(arguments, arguments.plain_dtype)
    differences = [] if arguments.skip_check else [row for run in runs for row in check_engine(bench, *run)]
    return [measured for measured, _ in [*ways, *runs]], differences


def run_random_qwen(arguments: argparse.Namespace) -> list[Measured]:
    bench = load_random_qwen(arguments, arguments.dtype[-1])
    ways = [bench.run_plain(PLAIN_BATCH)[0]] if arguments.plain_rows else []
    ways.append(bench.run_continuous())
    ways.append(bench.run_engine()[0])
    return ways


def run_sweep(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds a question of the engine for each number of examples and rows, in the last of --dtype."""
    bench, cells = load(arguments, arguments.dtype[-1]), []
    for k in SWEEP_K:
        conversations = measure.gsm8k_conversations(arguments.data, k, max(SWEEP_ROWS))
        for num_rows in SWEEP_ROWS:
            bench.conversations = conversations[:num_rows]
            measured, _ = bench.run_engine()
            cell = {"k": k, "rows": num_rows, "s_per_row": round(measured.s_per_row, 4), "dtype": measured.dtype}
            cells.append({**cell, "tokens_per_s": round(measured.tokens_per_s, 1)})
    return cells


def plot_sweep(cells: Sequence[dict[str, Any]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Colour-blind safe (Okabe and Ito), and distinct by their markers too.
    styles = zip(("#0072B2", "#E69F00", "#009E73", "#CC79A7"), "osD^", strict=True)
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for k, (colour, marker) in zip(SWEEP_K, styles, strict=True):
        points = [(cell["rows"], cell["s_per_row"]) for cell in cells if cell["k"] == k]
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=f"k = {k}")
    axes.set(xscale="log", xlabel="rows in the call", ylabel="seconds a question", ylim=(0, None))
    axes.set_xticks(SWEEP_ROWS, [str(rows) for rows in SWEEP_ROWS])
    axes.minorticks_off()
    axes.set_title(f"Cost of a GSM8K question by the engine, {cells[0]['dtype']}, {torch.get_num_threads()} threads")
    axes.legend(title="worked examples")
    figure.savefig(path, dpi=150)


def print_differences(differences: Sequence[dict[str, Any]]) -> None:
    print(f"\n{len(differences)} rows leave the plain model's most likely tokens")
    for row in differences:
        place = f"row {row['row']}, token {row['token']} of {row['of']}"
        print(f"  {row['dtype']}: {place}, logit margin {row['logit_margin']}")


def main() -> None:
    arguments = parse_arguments()
    if arguments.sweep:
        cells = run_sweep(arguments)
        print(json.dumps(cells) if arguments.json else files.csv_text(cells), end="")
        if arguments.plot:
            plot_sweep(cells, arguments.plot)
        return
    ways, differences = (run_random_qwen(arguments), []) if arguments.random_qwen else run_comparison(arguments)
    measure.add_ratios(ways)
    measure.print_result(arguments.json, vars(arguments), ways, "same text", differences=differences)
    if not arguments.json and not arguments.random_qwen and not arguments.skip_check:
        print_differences(differences)


if __name__ == "__main__":
    main()
