"""What benchmarks/gpu_session.sh measures after the tests: generation, judge, training, peak memory; one table.

Without --model the weights are random, in the shape of Qwen2.5-1.5B-Instruct, and in the tokenizer of the tests
a token is a byte: then texts mean nothing, each row runs to its last token, and texts have the lengths that
GSM8K has in Qwen2.5's tokens. Speed and memory depend on those and not on the values.
"""

import argparse
import gc
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import measure
import torch
import transformers
from make_random_model import SHAPE
from measure import PROJECT_ROOT
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(PROJECT_ROOT / "tests"))

from tiny import tiny_tokenizer

from lib import gsm8k, safety
from lib.engine import load
from lib.engine.generate import Engine
from lib.engine.models import Models
from lib.engine.plain import greedy_config
from lib.prepare import datasets
from lib.train import sft
from lib.train.rows import encode_rows
from lib.train.settings import TrainSettings

# The published config.json of Qwen3-4B.
JUDGE_SHAPE = {
    **SHAPE,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
TINY = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
# Tokens of GSM8K's questions and answers in Qwen2.5's tokenizer, and of a response and the judge's instructions.
QUESTION, ANSWER, RESPONSE, INSTRUCTIONS = (60, 22), (110, 45), (250, 120), 900
# What a measurement takes at most on a T4, with its load: it is not begun where less is left.
LONGEST_S = {"few rows": 60, "many rows": 160, "generate_batch": 100, "judge": 100, "training": 130}


@dataclass
class Session:
    """What was measured so far; written after each row."""

    output: Path
    until: float
    heading: str
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)

    def measure(self, name: str, longest_s: float, work: Callable[[], str]) -> None:
        """A row with what ``work`` returns, its time and its peak memory, or with the reason why it has no result."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        load.reset_peak_memory(device)
        started = time.perf_counter()
        if time.time() + longest_s > self.until:
            found = f"not measured: less than {longest_s} s were left"
        else:
            try:
                found = work()
            except Exception as error:  # one row fails, the others are still worth their time
                found = f"**failed**: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        wall_s, peak = time.perf_counter() - started, load.peak_memory_gib(device.type)
        self.rows.append((name, found.replace("|", "\\|"), f"{wall_s:.1f}", f"{peak:.2f}"))
        print(*self.rows[-1], sep="  ", file=sys.stderr, flush=True)
        self.write()

    def write(self) -> None:
        lines = ["| what | found | s | peak GiB |", "| --- | --- | ---: | ---: |"]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        self.output.write_text(f"{self.heading}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


@dataclass
class Subject:
    """A model with its tokenizer; ``is_random``: its rows never stop."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    is_random: bool

    def engine(self) -> Engine:
        engine = Engine(self.model.eval(), self.tokenizer)
        if self.is_random:
            engine.stop_ids = frozenset({self.model.config.vocab_size})
        return engine


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="Markdown file to write")
    parser.add_argument("--model", default="", help="folder with a real model in the place of random weights")
    parser.add_argument("--judge", default="", help="folder with a real judge")
    parser.add_argument("--data", default="", help="folder with gsm8k_*.jsonl; made-up texts without")
    parser.add_argument("--tests", type=Path, help="what pytest printed")
    parser.add_argument("--until", type=float, default=time.time() + 480, help="when to end, in seconds since 1970")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape and few rows, to try the script on a CPU")
    return parser.parse_args()


def runtime() -> load.Runtime:
    return load.resolve_runtime("auto")


def make_subject(folder: str, family: str, shape: dict[str, Any], tiny: bool) -> Subject:
    gc.collect()
    if folder:
        return Subject(load.load_dense(folder, runtime(), "none"), load.load_tokenizer(folder), False)
    tokenizer = tiny_tokenizer()
    config = AutoConfig.for_model(family, **{**shape, **(TINY if tiny else {})}, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    with torch.device(runtime().device):
        model = AutoModelForCausalLM.from_config(config, dtype=runtime().dtype)
    return Subject(model.eval().requires_grad_(False), tokenizer, True)


def made_up(seed: int, tokens: tuple[int, int]) -> str:
    """Letters, each a token, as many as a text of GSM8K has tokens: ``tokens`` are mean and standard deviation."""
    draw = random.Random(seed)
    return "".join(draw.choices("abcdefgh ", k=max(10, int(draw.gauss(*tokens)))))


def questions(data: str, k: int, num_rows: int) -> list[list[dict[str, str]]]:
    if data:
        return measure.gsm8k_conversations(data, k, num_rows)
    examples = [{"question": made_up(-n, QUESTION), "answer": made_up(-n - 100, ANSWER) + "\n#### 1"} for n in range(k)]
    return [gsm8k.build_messages(made_up(n, QUESTION), examples) for n in range(num_rows)]


def generation(subject: Subject, data: str, k: int, num_rows: int, num_tokens: int) -> str:
    engine, rows = subject.engine(), questions(data, k, num_rows)
    engine.generate(rows[:2], max_new_tokens=2)
    engine.generate(rows, max_new_tokens=num_tokens)
    stats = engine.stats
    slots = f"prefix {stats.num_prefix_tokens}, up to {stats.peak_rows} rows at a time, {stats.num_halvings} halvings"
    return f"{stats.wall_s:.1f} s, {stats.tokens_per_s:.0f} tokens/s, {slots}"


def continuous_batching(subject: Subject, data: str, k: int, num_rows: int, num_tokens: int) -> str:
    """transformers' ``generate_batch`` on the same rows."""
    prompts = [load.render_prompt(subject.tokenizer, row) for row in questions(data, k, num_rows)]
    config = greedy_config(num_tokens, [subject.model.config.vocab_size])
    started = time.perf_counter()
    outputs = subject.model.generate_batch(prompts, generation_config=config, progress_bar=False)
    seconds = time.perf_counter() - started
    made = sum(len(output.generated_tokens) for output in outputs.values())
    return f"{seconds:.1f} s, {made / seconds:.0f} tokens/s"


def judging(subject: Subject, num_rows: int, tiny: bool) -> str:
    guidelines = "" if tiny else made_up(0, (INSTRUCTIONS, 0))
    texts = [{"prompt": made_up(n, QUESTION), "response": made_up(n + 10**6, RESPONSE)} for n in range(num_rows)]
    rows = [safety.judge_messages(row, guidelines, "prompt_and_response") for row in texts]
    engine = subject.engine()
    engine.label_probabilities(rows[:2], labels=safety.LABELS)
    engine.label_probabilities(rows, labels=safety.LABELS)
    return f"{engine.stats.wall_s:.1f} s, {num_rows / engine.stats.wall_s:.1f} responses/s"


def training(arguments: argparse.Namespace, num_steps: int) -> str:
    """The first steps of an epoch, by NF4 with a real folder: random weights have no file to pack."""
    folder = arguments.model
    tokenizer = load.load_tokenizer(folder) if folder else tiny_tokenizer()
    if arguments.data:
        rows, _ = datasets.load_gsm8k("train", assets_dir=arguments.data)
    else:
        rows = [{"question": made_up(n, QUESTION), "answer": made_up(n + 10**6, ANSWER)} for n in range(16 * num_steps)]
    messages = [gsm8k.training_messages(row) for row in rows[: 16 * num_steps]]
    if folder:
        model = Models(Path(folder), runtime(), "nf4").for_training()
    else:
        model = make_subject("", "qwen2", SHAPE, arguments.tiny).model.train()
    size = {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "learning_rate": 1e-4}
    batch = {"train_batch_size": 2, "gradient_accumulation_steps": 8, "num_epochs": 1, "save_steps": 10_000, "seed": 42}
    settings = TrainSettings(base_model="base", base_identity="base", **size, **batch)
    with tempfile.TemporaryDirectory() as output:
        result = sft.train(model, encode_rows(tokenizer, messages, 2048).examples, settings, Path(output))
    step_s = [row["wall_s"] for row in result.log][num_steps // 4 :]
    # The first quarter waits for kernels to be made and memory to be taken.
    epoch = 467 * sum(step_s) / len(step_s)
    kind = "NF4" if folder else "16 bits"
    return (
        f"{result.num_steps} steps, {kind}, {result.tokens_per_s:.0f} tokens/s, {epoch:.0f} s for an epoch of 7,473 "
        f"rows at that pace, micro-batches of {result.micro_batch_tokens} tokens"
    )


def heading(arguments: argparse.Namespace) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    weights = "real weights" if arguments.model else "random weights"
    texts = "GSM8K" if arguments.data else "made-up texts of GSM8K's lengths"
    return f"# {device}, {date.today()}\n\n{versions}; {runtime().reason}; {weights}, {texts}" + (
        "; a tiny shape: **no figure means anything**" if arguments.tiny else ""
    )


def test_row(log: Path | None) -> str:
    lines = log.read_text(encoding="utf-8").splitlines() if log and log.exists() else []
    failures = [line for line in lines if line.startswith("FAILED")]
    return "; ".join([lines[-1].strip("= ") if lines else "not run", *failures])


@dataclass(frozen=True)
class Sizes:
    """How much is done of each."""

    few_rows: int
    many_rows: int
    num_tokens: int
    num_steps: int
    num_judged: int


FULL, SMALL = Sizes(263, 1319, 200, 60, 240), Sizes(3, 6, 4, 2, 4)


def measure_few_rows(session: Session, arguments: argparse.Namespace, sizes: Sizes) -> None:
    """The validation split's number of questions, by the engine and by transformers."""
    subject, what = make_subject(arguments.model, "qwen2", SHAPE, arguments.tiny), (sizes.few_rows, sizes.num_tokens)
    rows = f"{sizes.few_rows} rows x {sizes.num_tokens} tokens"
    for k in (3, 5, 8):
        work = lambda k=k: generation(subject, arguments.data, k, *what)  # noqa: E731
        session.measure(f"generation, k = {k}, {rows}", LONGEST_S["few rows"], work)
    work = lambda: continuous_batching(subject, arguments.data, 8, *what)  # noqa: E731
    session.measure(f"generate_batch(), k = 8, {rows}", LONGEST_S["generate_batch"], work)


def measure_training(session: Session, arguments: argparse.Namespace, sizes: Sizes) -> None:
    work = lambda: training(arguments, sizes.num_steps)  # noqa: E731
    session.measure(f"training, first {sizes.num_steps} steps of 16 rows", LONGEST_S["training"], work)


def measure_judge(session: Session, arguments: argparse.Namespace, sizes: Sizes) -> None:
    judge = make_subject(arguments.judge, "qwen3", JUDGE_SHAPE, arguments.tiny)
    work = lambda: judging(judge, sizes.num_judged, arguments.tiny)  # noqa: E731
    session.measure(f"judge, {sizes.num_judged} responses", LONGEST_S["judge"], work)


def measure_many_rows(session: Session, arguments: argparse.Namespace, sizes: Sizes) -> None:
    """All of GSM8K's test questions; last, because a slow GPU has no time for them."""
    subject = make_subject(arguments.model, "qwen2", SHAPE, arguments.tiny)
    for k in (3, 8, 5):
        work = lambda k=k: generation(subject, arguments.data, k, sizes.many_rows, sizes.num_tokens)  # noqa: E731
        name = f"generation, k = {k}, {sizes.many_rows} rows x {sizes.num_tokens} tokens"
        session.measure(name, LONGEST_S["many rows"], work)


def main() -> None:
    arguments = parse_arguments()
    session = Session(arguments.output, arguments.until, heading(arguments))
    session.measure("pytest -m gpu", 0, lambda: test_row(arguments.tests))
    for part in (measure_few_rows, measure_training, measure_judge, measure_many_rows):
        # Each has its own model, which is gone when it returns.
        part(session, arguments, SMALL if arguments.tiny else FULL)
        load.release_memory()


if __name__ == "__main__":
    main()
