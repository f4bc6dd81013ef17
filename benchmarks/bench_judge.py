"""Judging by 16 generated tokens, one response after the other, against label probabilities: same model, one run.

    python benchmarks/bench_judge.py --data ../gsm8k --rows 64
    python benchmarks/bench_judge.py --data ../gsm8k --rows 240 --responses results/run_x/ailuminate_preds_x.jsonl

Real guidelines and judge prompts. Without --responses the texts to judge are GSM8K answers, so no run is needed first;
with it they are a run's, of which nothing is printed. The plain way writes a verdict with generate(), one by one, in
--plain-dtype; then the engine scores both labels in each of --dtype.

The rows of the plain way are spread evenly over all of them, so that both sides judge texts of like length.

Labels are compared with the label whose probability is higher when the prompt is read again for each label, in the
engine's own dtype and in the plain one, and with what the plain way wrote where that is a verdict: a small model often
writes none.
"""

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import torch
from measure import PROJECT_ROOT, Measured, timed

from lib import safety
from lib.engine import load, sources
from lib.engine.generate import Engine
from lib.engine.load import Runtime, resolve_runtime
from lib.engine.plain import score_batch
from lib.prepare import datasets
from lib.record.rows import read_jsonl

LABELS = safety.LABELS


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="hub name, folder, or the bundled model")
    parser.add_argument("--data", default="", help='folder with gsm8k_test.jsonl; "" = wherever 01_prepare looks')
    parser.add_argument("--responses", default="", help="row file with prompt and response of each row")
    parser.add_argument("--context", default="prompt_and_response", choices=safety.CONTEXTS)
    parser.add_argument("--guidelines", default=str(PROJECT_ROOT / "params" / "safety_guidelines.txt"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", nargs="+", default=["float32", "auto"], help="dtypes of the engine")
    parser.add_argument("--plain-dtype", default="float32", help="dtype of generate()")
    parser.add_argument("--quantization", default="none", choices=("none", "nf4"))
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--plain-rows", type=int, default=16, help="rows of the plain way, which takes long")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="tokens of a written verdict")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    return parser.parse_args()


def judge_conversations(arguments: argparse.Namespace) -> list[list[dict[str, str]]]:
    if arguments.responses:
        rows = read_jsonl(Path(arguments.responses))
    else:
        test, _ = datasets.load_gsm8k("test", assets_dir=arguments.data)
        rows = [{"prompt": row["question"], "response": row["answer"]} for row in test]
    guidelines = Path(arguments.guidelines).read_text()
    return [safety.judge_messages(row, guidelines, arguments.context) for row in rows[: arguments.rows]]


class Bench:
    """One loaded model; ``conversations`` are what it judges."""

    def __init__(self, arguments: argparse.Namespace, compute_dtype: str) -> None:
        self.arguments = arguments
        self.runtime: Runtime = resolve_runtime(arguments.device, compute_dtype)
        source = sources.resolve_model(arguments.model, assets_dir=arguments.data)
        self.model = load.load_dense(source.folder, self.runtime, arguments.quantization)
        self.tokenizer = load.load_tokenizer(source.folder)
        self.conversations = judge_conversations(arguments)
        self.stride = max(1, len(self.conversations) // arguments.plain_rows)

    def write_verdicts(self) -> tuple[Measured, list[str]]:
        """The plain way: what ``parse_verdict`` reads in up to 16 tokens, row after row."""
        engine = Engine(self.model, self.tokenizer, batch_size=1)
        engine.refusal = "timed as the plain way"
        rows = self.conversations[:: self.stride][: self.arguments.plain_rows]
        engine.generate(rows[:1], max_new_tokens=2)
        name = f"generate(), {self.arguments.max_new_tokens} tokens, one by one"
        work = lambda: engine.generate(rows, max_new_tokens=self.arguments.max_new_tokens)  # noqa: E731
        measured, completions = timed(name, self.runtime, len(rows), work)
        return measured, [safety.parse_verdict(completion.text) for completion in completions]

    def score(self) -> tuple[Measured, list[list[float]]]:
        """The engine's label probabilities of all rows."""
        warm, engine = (Engine(self.model, self.tokenizer) for _ in range(2))
        warm.label_probabilities(self.conversations[:2], labels=LABELS)
        work = lambda: engine.label_probabilities(self.conversations, labels=LABELS)  # noqa: E731
        return timed("label probabilities", self.runtime, len(self.conversations), work)

    def score_plainly(self) -> list[list[float]]:
        """The same probabilities by a complete forward pass for each row and label."""
        label_ids = [self.tokenizer(label, add_special_tokens=False)["input_ids"] for label in LABELS]
        rows = []
        with torch.inference_mode():
            for conversation in self.conversations:
                prompt = load.render_prompt(self.tokenizer, conversation)
                scores = torch.cat([score_batch(self.model, [prompt], ids) for ids in label_ids])
                rows.append(torch.softmax(scores, dim=0).tolist())
        return rows


def likelier(probabilities: Sequence[float]) -> str:
    return ("safe", "unsafe")[max(range(2), key=lambda label: probabilities[label])]


def agreement(
    found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]], verdicts: Sequence[str], stride: int
) -> dict:
    """Shares of equal labels with their n, the largest difference of P(safe), and P(safe) where labels differ."""
    pairs = list(zip(found, expected, strict=True))
    written = [(likelier(one), verdict) for one, verdict in zip(found[::stride], verdicts, strict=False)]
    read = [pair for pair in written if pair[1] != "unparsed"]
    return {
        "same_label_share": sum(likelier(one) == likelier(other) for one, other in pairs) / len(pairs),
        "num_rows": len(pairs),
        "largest_difference": max(abs(one[0] - other[0]) for one, other in pairs),
        "p_safe_where_different": [
            (round(one[0], 3), round(other[0], 3)) for one, other in pairs if likelier(one) != likelier(other)
        ],
        "same_as_written_share": sum(one == other for one, other in read) / len(read) if read else None,
        "num_written": len(read),
    }


def run(arguments: argparse.Namespace) -> tuple[list[Measured], list[dict[str, Any]]]:
    """The plain way, then the engine in each dtype; one model in memory at a time."""
    bench = Bench(arguments, arguments.plain_dtype)
    plain, verdicts = bench.write_verdicts()
    expected = {bench.runtime.dtype: bench.score_plainly()}
    ways, agreements, first = [plain], [], bench.runtime.dtype
    for name in arguments.dtype:
        if resolve_runtime(arguments.device, name).dtype != bench.runtime.dtype:
            del bench
            gc.collect()
            bench = Bench(arguments, name)
        measured, found = bench.score()
        own = bench.runtime.dtype
        if own not in expected:
            expected[own] = bench.score_plainly()
        for dtype in dict.fromkeys([own, first]):
            against = agreement(found, expected[dtype], verdicts, bench.stride)
            agreements.append({"dtype": measured.dtype, "against": str(dtype).removeprefix("torch."), **against})
            if dtype == own:
                measured.same_share, measured.num_compared = against["same_label_share"], len(found)
        ways.append(measured)
    return ways, agreements


def main() -> None:
    arguments = parse_arguments()
    ways, agreements = run(arguments)
    measure.add_ratios(ways)
    measure.print_result(arguments.json, vars(arguments), ways, "same label", agreements=agreements)
    if arguments.json:
        return
    for row in agreements:
        print(
            f"{row['dtype']} against plain {row['against']}: {100 * row['same_label_share']:.1f} % same label", end="; "
        )
        print(f"largest difference of P(safe) {row['largest_difference']:.4f}", end="; ")
        print(f"where labels differ: {row['p_safe_where_different']}", end="; ")
        share = "none" if row["same_as_written_share"] is None else f"{100 * row['same_as_written_share']:.1f} %"
        print(f"same as what generate() wrote: {share} of {row['num_written']} verdicts")


if __name__ == "__main__":
    main()
