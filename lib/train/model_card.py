"""Model cards of the adapter and the merged model, from ``model_card.md.j2``: the same training, the same bytes."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCard, ModelCardData

from lib import gsm8k
from lib.engine.sources import ModelSource
from lib.record.files import read_json, sha256_file, write_text
from lib.record.paths import PROJECT_ROOT, RunPaths, shown_path
from lib.record.redaction import clean, clean_value
from lib.record.rows import read_jsonl
from lib.train.checkpoint_selection import Choice

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("model_card.md.j2")
# What a reader needs to train the same again; the rest is in the run's config_resolved.json.
SHOWN_PARAMETERS = ("num_epochs", "learning_rate", "warmup_share", "weight_decay", "max_grad_norm")
SHOWN_PARAMETERS += ("lora_r", "lora_alpha", "lora_dropout", "train_batch_size", "gradient_accumulation_steps")
SHOWN_PARAMETERS += ("use_rslora", "use_dora", "init_lora_weights", "lora_target_modules", "lr_scheduler", "optimizer")
SHOWN_PARAMETERS += ("neftune_noise_alpha", "max_seq_length", "quantization", "seed")
# 01's name for the source of the training rows, by train_source; evaluation sources with the key of their row count.
TRAINED_ON = {"gsm8k": "GSM8K train", "file": "training file", "self_distilled": "GSM8K train"}
EVALUATED_ON = {"GSM8K test": "gsm8k_eval", "AILuminate": "ailuminate"}
# What begins a tag, a heading, a link, a picture, code, or the next cell of a table.
MARKDOWN = re.compile(r"[\\`~#|<\[\]]")

Library = Literal["peft", "transformers"]


@dataclass(frozen=True)
class CardFacts:
    """The contents of a card."""

    run_name: str
    base: ModelSource
    revision: str
    trained: str  # what was trained on how much, in a sentence; for an adapter made elsewhere, where it is from
    selection: str  # how this checkpoint was chosen, in a sentence
    dtype: str  # as torch names it (bfloat16)
    training: Mapping[str, str]  # see ``training_data``; empty for an adapter made elsewhere
    evaluation: Mapping[str, str]  # see ``evaluation_data``
    parameters: Mapping[str, Any]
    metrics: Mapping[str, str]  # as known when the card is written
    prompt: str  # the system message of training and evaluation
    benchmark: bool  # whether the numbers mean anything outside the run
    adapter_sha256: str = ""  # of the merged adapter; the adapter's card takes it from the file


def training_data(prepared: Mapping[str, Any], rows: Path) -> dict[str, str]:
    """Training data only: its source, whose answers, the number of rows, their hash; ``prepared``: manifest of 01."""
    facts, parameters = prepared.get("facts", {}), prepared.get("parameters", {})
    table: dict[str, str] = {}
    if source := parameters.get("train_source", ""):
        name = TRAINED_ON[source]
        # Own answers use the questions of GSM8K; `_own_answers` says how many of its answers are used.
        label = f"questions of {name}" if source == "self_distilled" else name
        table = {"train_source": source, label: _source_words(facts["data"][name])}
    if facts.get("distil"):
        table |= _own_answers(facts["distil"], parameters)
    if "rows" in facts:
        too_long = facts["num_too_long"]
        table["rows"] = f"{facts['rows']['train'] - too_long:,}"
        table["rows"] += f"; {too_long:,} more are over max_seq_length and were left out" * bool(too_long)
    return table | ({"training rows": f"sha256 {sha256_file(rows)}"} if rows.exists() else {})


def _own_answers(distil: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, str]:
    protocol = distil["protocol"]
    kept = f"kept: at most {parameters['distil_keep']} of the correct ones per question, {parameters['distil_choice']}"
    covered = f"{distil['num_covered']:,} of {distil['num_questions']:,} questions"
    return {
        "answers": f"{distil['num_own']:,} rows by the untuned base model, {distil['num_gold']:,} by GSM8K",
        "sampling": f"{protocol['answers']}, {protocol['decoding']}; {kept}",
        "coverage": f"{covered} had a correct answer of the base model; {distil['num_dropped']:,} have no row",
    }


def evaluation_data(prepared: Mapping[str, Any], dev_rows: Path) -> dict[str, str]:
    """Data on which the run chooses a checkpoint and is evaluated."""
    facts = prepared.get("facts", {})
    table = {
        name: f"{_source_words(facts['data'][name])}; {facts['rows'][count]:,} of them evaluated"
        for name, count in EVALUATED_ON.items()
        if name in facts.get("data", {})
    }
    has_dev = dev_rows.exists() and dev_rows.stat().st_size > 0
    return table | ({"development rows, of GSM8K train": f"sha256 {sha256_file(dev_rows)}"} if has_dev else {})


def _source_words(source: Mapping[str, Any]) -> str:
    """A published source in words, from ``assets.Source.table_row()`` in the manifest of 01."""
    return f"{source['name']} ({source['licence']}), {source['num_rows']:,} rows, sha256 {source['sha256']}"


def metrics_table(log: Sequence[Mapping[str, Any]], scores: Sequence[tuple[str, int, int]] = ()) -> dict[str, str]:
    """Losses of ``training_log.jsonl``, and rates from ``scores``: (name, successes, rows)."""
    table = {}
    if log:
        table["training loss, first and last step"] = f"{log[0]['loss']:.4f}, {log[-1]['loss']:.4f}"
    measured = [f"{row['dev_loss']:.4f} (step {row['step']})" for row in log if row.get("dev_loss") is not None]
    if measured:
        table["loss on development rows"] = f"{measured[0]}, {measured[-1]}"
    return table | {name: f"{successes} of {total}" for name, successes, total in scores}


def run_card(
    parameters: Mapping[str, Any], paths: RunPaths, base: ModelSource, dtype: str, trained: str, choice: Choice
) -> CardFacts:
    """Contents of the card of a run's adapter; ``trained``: what was trained, in a sentence."""
    manifest = paths.manifest("01_prepare")
    prepared = read_json(manifest) if manifest.exists() else {}
    made_here = not parameters["checkpoint"]
    rates = next((one.rates for one in choice.scores if one.checkpoint == choice.name), {})
    scores = [(f"{metric}, {choice.selected_on}", rate.successes, rate.n) for metric, rate in rates.items()]
    return CardFacts(
        run_name=parameters["run_name"],
        base=base,
        revision=parameters["base_model_revision"],
        trained=trained,
        selection=choice.sentence,
        dtype=dtype.removeprefix("torch."),
        training=training_data(prepared, paths.train_rows) if made_here else {},
        evaluation=evaluation_data(prepared, paths.dev_rows),
        parameters=parameters if made_here else {"quantization": parameters["quantization"]},
        metrics=metrics_table(read_jsonl(paths.training_log) if made_here else [], scores),
        prompt=gsm8k.read_system_prompt(parameters["system_prompt_file"]),
        benchmark=parameters["benchmark"],
    )


def write_card(folder: Path, facts: CardFacts, library: Library = "peft") -> Path:
    """Write the card beside the weights in ``folder``: of an adapter or, for ``transformers``, of a merged model."""
    merged = library == "transformers"
    weights = sorted(folder.glob("model*.safetensors")) if merged else [folder / "adapter_model.safetensors"]
    # Cleaned before the layout: words of the YAML and of the code may equal a user's name.
    texts = {field.name: clean_value(getattr(facts, field.name)) for field in fields(facts) if field.name != "base"}
    hashes = {file.name: sha256_file(file) for file in weights}
    write_text(folder / CARD, card_text(replace(facts, **texts), library, hashes))
    return folder / CARD


def card_text(facts: CardFacts, library: Library, hashes: Mapping[str, str]) -> str:
    """The card as Markdown with the hub's front matter; ``hashes`` are the SHA-256 of the weight files by name."""
    name = facts.base.name
    # The folders above a local model may be named after a person.
    shown = clean(Path(name).name) if facts.base.origin == "local folder" else name
    identity = {"base model": shown, "its identity": facts.base.identity}
    if library == "transformers":
        is_packed = facts.parameters.get("quantization") == "nf4"
        identity["weights"] = "its 4-bit NF4 weights, dequantised, with the " * is_packed + "adapter merged in"
        identity |= {"adapter": f"sha256 {facts.adapter_sha256}"} if facts.adapter_sha256 else {}
        identity["dtype"] = facts.dtype
    identity |= {name: f"sha256 {value}" for name, value in hashes.items()}
    found = {"base_model": name if _is_published(facts.base) else None, "library_name": library}
    data = ModelCardData(**found, pipeline_tag="text-generation", tags=["lora", "gsm8k"])
    parameters = {name: facts.parameters[name] for name in SHOWN_PARAMETERS if name in facts.parameters}
    more = {"facts": facts, "identity": identity, "parameters": parameters, "base": _base_argument(facts)}
    more["plain"] = _plain
    return f"{ModelCard.from_template(data, template_path=str(TEMPLATE), **more)}\n"


def _plain(value: Any) -> str:
    """``value`` on one line of Markdown, shown as it was written: a results folder that was handed in may hold any."""
    line = " ".join(str(value).split())
    return MARKDOWN.sub(lambda found: "&lt;" if found[0] == "<" else f"\\{found[0]}", line)


def _is_published(base: ModelSource) -> bool:
    return base.origin in ("hub", "assets folder") and re.fullmatch(r"[\w.-]+/[\w.-]+", base.name) is not None


def _base_argument(facts: CardFacts) -> str:
    """First arguments of ``from_pretrained``: a hub name with its commit, or a folder as far as it may be shown."""
    if not _is_published(facts.base):
        folder = facts.base.folder
        inside = folder.is_relative_to(PROJECT_ROOT)
        # The folders above may be named after a person.
        return json.dumps(clean(shown_path(folder) if inside else f"path/to/{folder.name}"), ensure_ascii=False)
    commit = facts.base.identity.rpartition("@")[2] if facts.base.origin == "hub" else facts.revision
    return f"{json.dumps(facts.base.name)}, revision={json.dumps(commit)}"
