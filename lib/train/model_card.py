"""Model cards of the adapter and of the merged model: base, data, parameters, what it reached, how it is loaded.

Nothing in it depends on when, where or how fast it was made: the same training writes the same bytes. Knows nothing
about models; what it tells is handed to it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lib.engine.sources import ModelSource
from lib.record.files import sha256_file, write_text
from lib.record.paths import PROJECT_ROOT, shown_path
from lib.record.redaction import clean, clean_value

CARD = "README.md"
# What a reader needs to train the same again; the rest is in the run's config_resolved.json.
SHOWN_PARAMETERS = (
    "num_epochs",
    "learning_rate",
    "warmup_share",
    "weight_decay",
    "max_grad_norm",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "train_batch_size",
    "gradient_accumulation_steps",
    "max_seq_length",
    "quantization",
    "seed",
)
# What 01 calls the source of the training rows, by train_source, and the sources of what is asked, with their rows.
TRAINED_ON = {"gsm8k": "GSM8K train", "file": "training file", "self_distilled": "GSM8K train"}
EVALUATED_ON = {"GSM8K test": "gsm8k_eval", "AILuminate": "ailuminate"}
_QUANTISED = """
nf4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.{dtype},
)
base = AutoModelForCausalLM.from_pretrained({base}, dtype=torch.{dtype}, quantization_config=nf4)
base = base.dequantize()"""
_PLAIN = """
base = AutoModelForCausalLM.from_pretrained({base}, dtype=torch.{dtype})"""
_SCRIPT = """\
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
{load}
model = PeftModel.from_pretrained(base, "path/to/this/folder").eval()
tokenizer = AutoTokenizer.from_pretrained({base})
"""
_WHY_DEQUANTIZED = """
Training optimised the function of the 4-bit weights, so the base must be quantised as above and not loaded plainly.
`dequantize()` before the first forward pass keeps that function and is what the scores below were measured with, after
merging the adapter (`model.merge_and_unload()`). Without that line the weights stay in 4 bits; on a CPU, bitsandbytes
then computes them in a kernel of lower precision. Never merge into packed 4-bit weights: rounding them again can lose
what was trained.
"""

_PLAIN_SCRIPT = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
"""
_HOW_DECODED = """
Or `vllm serve path/to/this/folder`. The scores were measured with greedy decoding, which stands in
`generation_config.json`; a server that samples by default needs `temperature: 0` in each request.
"""


@dataclass(frozen=True)
class CardFacts:
    """What the card tells.

    Attributes:
        trained: what was trained on how much, in a sentence; for an adapter made elsewhere, where it is from.
        selection: how this checkpoint was chosen, in a sentence.
        dtype: compute dtype, as ``torch`` names it (``bfloat16``).
        training: what was trained on and nothing else, as ``training_data`` tells it; empty for an adapter made
            elsewhere.
        evaluation: what the run chooses and is evaluated on, as ``evaluation_data`` tells it.
        parameters: those of the run.
        metrics: what -> value, as far as the run knew them when the adapter was saved.
        prompt: the system message of training and evaluation.
        benchmark: whether the numbers mean anything outside the run.
        adapter_sha256: of the adapter that was merged in; the adapter's own card takes it from the file.
    """

    run_name: str
    base: ModelSource
    revision: str
    trained: str
    selection: str
    dtype: str
    training: Mapping[str, str]
    evaluation: Mapping[str, str]
    parameters: Mapping[str, Any]
    metrics: Mapping[str, str]
    prompt: str
    benchmark: bool
    adapter_sha256: str = ""


def training_data(prepared: Mapping[str, Any], rows: Path) -> dict[str, str]:
    """What was trained on and nothing else: source, whose answers, how many rows, their hash.

    Args:
        prepared: 01's manifest; empty where there is none.
        rows: file of the training rows.
    """
    facts, parameters = prepared.get("facts", {}), prepared.get("parameters", {})
    told: dict[str, str] = {}
    if source := parameters.get("train_source", ""):
        use = TRAINED_ON[source]
        # Of GSM8K, own answers take the questions; how many of its answers they take is told below.
        what = f"questions of {use}" if source == "self_distilled" else use
        told = {"train_source": source, **data_table({what: facts["data"][use]}, {})}
    if facts.get("distil"):
        told |= _own_answers(facts["distil"], parameters)
    if "rows" in facts:
        too_long = facts["num_too_long"]
        told["rows"] = f"{facts['rows']['train'] - too_long:,}"
        told["rows"] += f"; {too_long:,} more are over max_seq_length and were left out" * bool(too_long)
    return told | data_table({}, {"training rows": rows})


def _own_answers(distil: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, str]:
    protocol = distil["protocol"]
    kept = f"kept: at most {parameters['distil_keep']} of the correct ones a question, {parameters['distil_choice']}"
    covered = f"{distil['num_covered']:,} of {distil['num_questions']:,} questions"
    return {
        "answers": f"{distil['num_own']:,} rows by the untuned base model, {distil['num_gold']:,} by GSM8K",
        "sampling": f"{protocol['answers']}, {protocol['decoding']}; {kept}",
        "coverage": f"{covered} had a correct answer of the base model; {distil['num_dropped']:,} have no row",
    }


def evaluation_data(prepared: Mapping[str, Any], dev_rows: Path) -> dict[str, str]:
    """What the run chooses a checkpoint on and is evaluated on.

    Args:
        prepared: as for ``training_data``.
        dev_rows: file of the development rows, which may hold none.
    """
    facts = prepared.get("facts", {})
    sources = {use: facts["data"][use] for use in EVALUATED_ON if use in facts.get("data", {})}
    told = {
        use: f"{text}; {facts['rows'][EVALUATED_ON[use]]:,} of them asked"
        for use, text in data_table(sources, {}).items()
    }
    has_dev = dev_rows.exists() and dev_rows.stat().st_size > 0
    return told | data_table({}, {"development rows, of GSM8K train": dev_rows} if has_dev else {})


def data_table(sources: Mapping[str, Mapping[str, Any]], files: Mapping[str, Path]) -> dict[str, str]:
    """Data sets of a card: published sources that 01 found, and the very rows that were used.

    Args:
        sources: use -> ``assets.Source.table_row()``, from 01's manifest.
        files: what -> row file; files that are not there are left out.
    """
    told = {
        use: f"{source['name']} ({source['licence']}), {source['num_rows']:,} rows, sha256 {source['sha256']}"
        for use, source in sources.items()
    }
    return told | {what: f"sha256 {sha256_file(path)}" for what, path in files.items() if path.exists()}


def write_card(folder: Path, facts: CardFacts) -> Path:
    """Writes the card beside the adapter in ``folder``."""
    path = folder / CARD
    write_text(path, adapter_card(_cleaned(facts), sha256_file(folder / "adapter_model.safetensors")))
    return path


def _cleaned(facts: CardFacts) -> CardFacts:
    # Before the card is laid out: the words of its YAML and of its code are no user's name.
    texts = {field.name: clean_value(getattr(facts, field.name)) for field in fields(facts) if field.name != "base"}
    return replace(facts, **texts)


def adapter_card(facts: CardFacts, adapter_sha256: str) -> str:
    """The card as Markdown, with the front matter that the hub reads."""
    warning = "" if facts.benchmark else "**Not a benchmark**: a rehearsal whose numbers say nothing about a model.\n\n"
    identity = {
        "base model": _base_name(facts.base),
        "its identity": facts.base.identity,
        "adapter_model.safetensors": "",
    }
    identity["adapter_model.safetensors"] = f"sha256 {adapter_sha256}"
    parameters = {name: facts.parameters[name] for name in SHOWN_PARAMETERS if name in facts.parameters}
    told = f"{warning}{facts.trained} {facts.selection}"
    parts = [
        f"{_front_matter(facts)}\n# LoRA adapter of run {facts.run_name}\n\n{told}\n",
        _section("What it is", _table(identity)),
        *_data_sections(facts),
        _section("Parameters", _table(parameters)),
        _section("Metrics so far", _table(facts.metrics)),
        _section("How to load it", _loading(facts)),
        _section("How to ask it", f"With the base model's chat template and this system message:\n\n{_quote(facts)}"),
    ]
    return "\n".join(parts)


def write_model_card(folder: Path, facts: CardFacts) -> Path:
    """Writes the card beside a merged model's weights in ``folder``."""
    path = folder / CARD
    hashes = {file.name: f"sha256 {sha256_file(file)}" for file in sorted(folder.glob("model*.safetensors"))}
    write_text(path, merged_card(_cleaned(facts), hashes))
    return path


def merged_card(facts: CardFacts, hashes: Mapping[str, str]) -> str:
    """The merged model's card as Markdown; ``hashes`` of its weight files, by their names."""
    warning = "" if facts.benchmark else "**Not a benchmark**: a rehearsal whose numbers say nothing about a model.\n\n"
    is_packed = facts.parameters.get("quantization") == "nf4"
    weights = "its 4-bit NF4 weights, dequantised, with the adapter merged in" if is_packed else "adapter merged in"
    identity = {"base model": _base_name(facts.base), "its identity": facts.base.identity, "weights": weights}
    identity |= {"adapter": f"sha256 {facts.adapter_sha256}"} if facts.adapter_sha256 else {}
    identity |= {"dtype": facts.dtype, **hashes}
    parameters = {name: facts.parameters[name] for name in SHOWN_PARAMETERS if name in facts.parameters}
    loading = f"```python\n{_PLAIN_SCRIPT}```\n{_HOW_DECODED}".rstrip()
    asking = f"With the chat template and this system message:\n\n{_quote(facts)}"
    examples = facts.parameters.get("fewshot_k", 0)
    asking += f"\n\nIts GSM8K score was measured after {examples} worked examples, as turns of the chat." * bool(
        examples
    )
    parts = [
        f"{_front_matter(facts, 'transformers')}\n# Evaluated model of run {facts.run_name}\n\n"
        f"{warning}{facts.trained} {facts.selection}\n",
        _section("What it is", _table(identity)),
        *_data_sections(facts),
        _section("Parameters", _table(parameters)),
        _section("Metrics", _table(facts.metrics)),
        _section("How to load it", loading),
        _section("How to ask it", asking),
    ]
    return "\n".join(parts)


def _front_matter(facts: CardFacts, library: str = "peft") -> str:
    fields: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation", "tags": ["lora", "gsm8k"]}
    if _is_published(facts.base):
        fields["base_model"] = facts.base.name
    # JSON is YAML, and quotes whatever a name may hold.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in sorted(fields.items())]
    return "\n".join(["---", *lines, "---", ""])


def _base_name(base: ModelSource) -> str:
    # The folders above a local model may be named after a person.
    return clean(Path(base.name).name) if base.origin == "local folder" else base.name


def _is_published(base: ModelSource) -> bool:
    return base.origin in ("hub", "assets folder") and re.fullmatch(r"[\w.-]+/[\w.-]+", base.name) is not None


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}\n"


def _data_sections(facts: CardFacts) -> list[str]:
    trained = _table(facts.training) if facts.training else "Not known here: the adapter was made elsewhere."
    return [_section("Trained on", trained), _section("Chosen and evaluated on", _table(facts.evaluation))]


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "| --- | --- |", *lines]) if lines else "None yet."


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _loading(facts: CardFacts) -> str:
    quantised = facts.parameters.get("quantization") == "nf4"
    code = (_QUANTISED if quantised else _PLAIN).lstrip("\n")
    load = code.format(base=_base_argument(facts), dtype=facts.dtype)
    imports = _SCRIPT if quantised else _SCRIPT.replace(", BitsAndBytesConfig", "")
    script = imports.format(load="\n" + load, base=_base_argument(facts))
    return f"```python\n{script}```\n{_WHY_DEQUANTIZED if quantised else ''}".rstrip()


def _base_argument(facts: CardFacts) -> str:
    """The first arguments of ``from_pretrained``: a hub name with its commit, or a folder as far as it may be shown."""
    if not _is_published(facts.base):
        folder = facts.base.folder
        inside = folder.is_relative_to(PROJECT_ROOT)
        # A folder above it may be named after a person.
        return json.dumps(clean(shown_path(folder) if inside else f"path/to/{folder.name}"), ensure_ascii=False)
    commit = facts.base.identity.rpartition("@")[2] if facts.base.origin == "hub" else facts.revision
    return f"{json.dumps(facts.base.name)}, revision={json.dumps(commit)}"


def _quote(facts: CardFacts) -> str:
    return "\n".join(f"> {line}" for line in facts.prompt.splitlines())


def metrics_table(log: Sequence[Mapping[str, Any]], scores: Sequence[tuple[str, int, int]] = ()) -> dict[str, str]:
    """Metrics of the card: losses of the training log, and rates with their rows.

    Args:
        log: rows of ``training_log.jsonl``; none for an adapter made elsewhere.
        scores: (what, successes, rows).
    """
    told = {}
    if log:
        told["training loss, first and last step"] = f"{log[0]['loss']:.4f}, {log[-1]['loss']:.4f}"
    measured = [(row["step"], row["dev_loss"]) for row in log if row.get("dev_loss") is not None]
    if measured:
        steps = ", ".join(f"{loss:.4f} (step {step})" for step, loss in (measured[0], measured[-1]))
        told["loss on development rows"] = steps
    return told | {what: f"{successes} of {total}" for what, successes, total in scores}
