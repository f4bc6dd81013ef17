"""Supervised fine-tuning with LoRA: assistant-only labels, transformers' Trainer, resume that equals an unbroken run.

An optimizer step is one item of the Trainer's data set: its rows are drawn by a seeded shuffle of each epoch, and
``train_batch_size * gradient_accumulation_steps`` of them make a step. How they are cut into micro-batches is a matter
of memory and speed alone: rows are packed without padding (``packed``), and the loss is divided by the supervised
tokens of the whole step, so that no cut changes the update (transformers PR 34191). Knows nothing about GSM8K.

Written to ``output_dir``: ``adapter/`` (plain peft safetensors), ``checkpoints/checkpoint-N/``,
``training_log.jsonl`` (a row a step; at the first step and wherever a checkpoint is saved with the loss on development
rows, ``dev_loss``) and, last, ``training.json``: it exists only when training is complete.
"""

import hashlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from lib.artifacts import read_json, read_jsonl, sha256_file, sha256_json, write_json, write_jsonl
from lib.memory import free_memory_bytes
from lib.model import Message, ModelError, end_of_turn_id, peak_memory_gib, quiet_loading, render_completion
from lib.packed import (
    ATTENTION_NAME,
    IGNORED_LABEL,
    ComputeDtypeLoraLinear,
    Example,
    attention,
    check_loss,
    pack_rows,
    supervised_loss,
)
from lib.redaction import clean

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# More tokens at a time are no faster on a CPU (measured, 135M weights) and fall out of its caches.
MOST_MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
# Of the free memory, what activations kept for the backward pass may take; the rest is for what comes and goes.
ACTIVATION_SHARE = 0.5
# When a loss counts as exploded (``why_exploded``); wide of what the rows of a step move it by.
EXPLODED_OVER_FIRST, EXPLODED_OVER_USUAL = 2, 10
USUAL_STEPS, FEWEST_USUAL_STEPS = 20, 5
COMPLETE = "complete.json"
# What the mark above is renamed to in a checkpoint whose weights were found unsound: nothing goes on from it.
UNSOUND = "unsound.json"
ADAPTER_FILE = "adapter_model.safetensors"


class TrainingError(Exception):
    """Rows that cannot be trained on, or a training that went wrong; the text says which and what to do."""


class RowTooLong(TrainingError):
    """A row has more tokens than ``max_seq_length``; nothing of it is cut away."""


# --- rows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedRows:
    """Rows ready for training, and what became of the others."""

    examples: list[Example]  # {"input_ids", "labels"}
    kept: list[int]  # row number of each example, from 0
    too_long: list[int]  # row numbers that were left out
    faults: dict[int, str] = field(default_factory=dict)  # row number -> why nobody could learn from the row

    @property
    def num_tokens(self) -> int:
        return sum(len(example["input_ids"]) for example in self.examples)

    @property
    def num_supervised_tokens(self) -> int:
        return sum(map(num_supervised, self.examples))


def encode_row(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], max_seq_length: int, end: int | None = None
) -> Example:
    """Tokens and labels of a conversation that ends in the answer to learn.

    Labelled are the answer's tokens and the token that ends its turn, so that the model learns to stop; everything
    before has the label -100. What a template adds after the end of the turn (a line break) is left out: it is never
    generated, and no label looks back on it.

    Args:
        end: the token that ends a turn, for who encodes many rows; asked of the tokenizer where it is None.

    Returns:
        ``{"input_ids", "labels"}``, equally long.

    Raises:
        RowTooLong: more than ``max_seq_length`` tokens.
        TrainingError: an empty answer, or one that holds the end of its own turn.
        ModelError: the prompt's tokens are not where the conversation's tokens begin.
    """
    prompt, completion = render_completion(tokenizer, messages)
    end = end_of_turn_id(tokenizer) if end is None else end
    if completion.count(end) != 1:
        raise TrainingError(f"the answer holds the end-of-turn token {tokenizer.decode([end])!r} as text; take it out")
    answer = completion[: completion.index(end) + 1]
    if not messages[-1]["content"].strip() or len(answer) < 2:
        raise TrainingError("the answer is empty: a row needs at least one token to learn")
    length = len(prompt) + len(answer)
    if length > max_seq_length:
        raise RowTooLong(f"{length} tokens, max_seq_length is {max_seq_length}")
    return {"input_ids": prompt + answer, "labels": [IGNORED_LABEL] * len(prompt) + answer}


def try_rows(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]], max_seq_length: int
) -> EncodedRows:
    """Encodes conversations; those over ``max_seq_length``, and those that cannot be learnt, are left out whole."""
    rows = EncodedRows([], [], [])
    end = end_of_turn_id(tokenizer)
    for number, messages in enumerate(conversations):
        try:
            rows.examples.append(encode_row(tokenizer, messages, max_seq_length, end))
        except RowTooLong:
            rows.too_long.append(number)
        except (TrainingError, ModelError) as error:
            rows.faults[number] = str(error)
        else:
            rows.kept.append(number)
    return rows


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    max_seq_length: int,
    use: str = "training",
) -> EncodedRows:
    """As ``try_rows``, where every row can be learnt and one is left.

    Args:
        use: what the rows are for, as errors name them: training or development.

    Raises:
        TrainingError: no row is left, or one cannot be learnt; the text has its number and how many there are.
    """
    rows = try_rows(tokenizer, conversations, max_seq_length)
    if rows.faults:
        number, why = next(iter(rows.faults.items()))
        raise TrainingError(f"{use} row {number}: {why} ({len(rows.faults)} of {len(conversations)} rows have a fault)")
    if not rows.examples:
        raise TrainingError(
            f"{use} rows: none of {len(conversations)} rows has at most max_seq_length = {max_seq_length} tokens; "
            "raise max_seq_length"
        )
    return rows


def num_supervised(example: Example) -> int:
    """Tokens of a row that have a label; the first token of a row is never predicted."""
    return sum(label != IGNORED_LABEL for label in example["labels"][1:])


# --- settings -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainSettings:
    """What training is told. The last two do not change the function that is optimised; the rest is its identity."""

    base_model: str  # name written into adapter_config.json
    base_identity: str  # what the frozen weights are, quantization included ("Qwen/...@<commit> nf4")
    num_epochs: int
    learning_rate: float  # highest of the cosine schedule
    lora_r: int
    lora_alpha: int
    lora_dropout: float
    train_batch_size: int  # times gradient_accumulation_steps = rows of an optimizer step
    gradient_accumulation_steps: int
    save_steps: int
    seed: int
    warmup_share: float = 0.0  # of all steps, rounded up
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    micro_batch_tokens: int = 0  # most tokens in one forward pass; 0: from free memory
    gradient_checkpointing: bool | None = None  # None: only where memory asks for it

    @property
    def rows_per_step(self) -> int:
        return self.train_batch_size * self.gradient_accumulation_steps

    @property
    def identity(self) -> dict[str, Any]:
        own = asdict(self)
        for name in ("micro_batch_tokens", "gradient_checkpointing"):
            del own[name]
        return own


@dataclass(frozen=True)
class TrainResult:
    """A finished training, as ``training.json`` holds it (paths and the log apart)."""

    fingerprint: str  # settings, rows, base and dtype in one hash
    adapter_sha256: str
    num_steps: int
    num_rows: int  # seen in training, all epochs
    num_trainable: int
    num_parameters: int
    num_tokens: int  # seen in training, all epochs
    num_supervised_tokens: int
    wall_s: float  # sum over the steps, earlier sessions of a resumed run included; without the development rows
    peak_memory_gib: float  # of the session that ended it
    micro_batch_tokens: int
    gradient_checkpointing: bool
    resumed_from: int | None  # step of the checkpoint that the last session went on from
    adapter_dir: Path
    checkpoints: list[Path] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)  # a row a step
    reused: bool = False  # complete already, nothing was trained

    @property
    def examples_per_s(self) -> float:
        return sum(row["num_rows"] for row in self.log) / self.wall_s

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.wall_s


def step_rows(num_rows: int, rows_per_step: int, num_epochs: int, seed: int) -> list[list[int]]:
    """Row numbers of each optimizer step: every epoch is a seeded shuffle of all rows, its last step may be short."""
    steps = []
    for epoch in range(num_epochs):
        order = np.random.default_rng([seed, epoch]).permutation(num_rows).tolist()
        steps += [order[start : start + rows_per_step] for start in range(0, num_rows, rows_per_step)]
    return steps


def checkpoint_steps(num_steps: int, save_steps: int) -> list[int]:
    """The steps at which a checkpoint is saved: every ``save_steps``-th, and the last."""
    return sorted({*range(save_steps, num_steps + 1, save_steps), num_steps})


def cut_micro_batches(examples: Sequence[Example], most_tokens: int) -> list[list[Example]]:
    """Cuts a step's rows, in their order, so that no part has more than ``most_tokens`` unless one row alone does."""
    parts: list[list[Example]] = []
    filled = most_tokens
    for example in examples:
        length = len(example["input_ids"])
        if filled + length > most_tokens:
            parts.append([])
            filled = 0
        parts[-1].append(example)
        filled += length
    return parts


# --- memory -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryPlan:
    """How large a micro-batch is and whether activations are computed twice, and why."""

    micro_batch_tokens: int
    gradient_checkpointing: bool
    reason: str


def plan_memory(model: PreTrainedModel, examples: Sequence[Example], settings: TrainSettings) -> MemoryPlan:
    """The largest micro-batch that fits; gradient checkpointing only where not even the longest row fits without.

    What a token keeps for the backward pass is measured on the first row. The size is a power of two, so that a little
    more or less free memory cuts the same micro-batches and a resumed run stays the run that it was.
    """
    device = model.device
    per_token = _kept_bytes(model, examples[0]) / len(examples[0]["input_ids"])
    free = free_memory_bytes(device) * ACTIVATION_SHARE
    longest = max(len(example["input_ids"]) for example in examples)
    checkpointing = settings.gradient_checkpointing
    if checkpointing is None:
        checkpointing = per_token * longest > free
    if checkpointing:
        # One layer at a time keeps its activations; of the others only their input stays.
        config = model.config
        per_token = per_token / config.num_hidden_layers + config.num_hidden_layers * config.hidden_size * 4
    fitting = 2 ** int(math.log2(max(1.0, free / per_token)))
    most = settings.micro_batch_tokens or min(fitting, MOST_MICRO_BATCH_TOKENS[device.type])
    reason = f"{per_token / 2**20:.2f} MiB a token, {free / 2**30:.1f} GiB for them, longest row {longest} tokens"
    return MemoryPlan(most, checkpointing, reason)


@torch.random.fork_rng()
def _kept_bytes(model: PreTrainedModel, example: Example) -> int:
    """Bytes that a forward pass over one row keeps for its backward pass, weights apart."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = supervised_loss(model, pack_rows([example], model.device))
    assert loss.requires_grad
    return sum(kept.values())


# --- training -----------------------------------------------------------------------------------------------------


def train(
    model: PreTrainedModel,
    examples: Sequence[Example],
    settings: TrainSettings,
    output_dir: Path,
    *,
    dev_examples: Sequence[Example] = (),
    num_checkpoints: int = 0,
    say: Callable[[str], None] = print,
) -> TrainResult:
    """Trains a LoRA adapter on all linear layers of the decoder blocks, or goes on where the same training stopped.

    A complete training of the same settings, rows and base is returned as it is. Otherwise the latest whole
    checkpoint of it is gone on from: order of the rows, optimizer, schedule and random numbers continue, so that the
    result is that of an unbroken run. What another training left in ``output_dir`` is deleted, and said.

    Args:
        model: frozen base in train mode, as ``model.load_for_training`` gives it; it is handed back without adapter.
        examples: as ``encode_rows`` gives them.
        output_dir: the stage's folder (module docstring).
        dev_examples: rows whose loss is measured beside training, never trained on; they change no weight.
        num_checkpoints: how many of the last checkpoints are needed afterwards; where one of them is gone, training
            goes on from before it, even if it was complete. 0: none is needed.
        say: takes a line about how it begins, and one at its end.

    Raises:
        TrainingError: a loss, gradient or weight that is not finite, or a loss that has exploded; sound checkpoints are
            kept and gone on from, the others are not.
        ValueError: a model whose loss ``packed`` does not know to compute.
    """
    fingerprint = training_fingerprint(model, examples, settings, dev_examples)
    checkpoints_dir = output_dir / "checkpoints"
    steps = step_rows(len(examples), settings.rows_per_step, settings.num_epochs, settings.seed)
    saved = checkpoint_steps(len(steps), settings.save_steps)
    needed = saved[max(0, len(saved) - num_checkpoints) :]
    finished = _finished(output_dir, fingerprint)
    if finished and not (gone := _lost(checkpoints_dir, needed)):
        say(f"complete already: {finished.num_steps} steps with these settings, rows and base; nothing was trained")
        return finished
    if finished:
        names = ", ".join(f"checkpoint-{step}" for step in gone)
        say(f"complete already, but {names} is needed to choose among checkpoints and gone: training again")
    _delete_other_trainings(output_dir, fingerprint, say)
    _delete_after_gap(checkpoints_dir, needed, say)
    with _adapted(model, settings) as wrapped:
        check_loss(model, examples[0])
        plan = plan_memory(model, examples, settings)
        say(f"micro-batches of up to {plan.micro_batch_tokens} tokens, {_checkpointing_words(plan)} ({plan.reason})")
        trainer = _build_trainer(wrapped, examples, steps, plan, settings, output_dir, fingerprint, say)
        trainer.dev_parts = cut_micro_batches(dev_examples, plan.micro_batch_tokens)
        latest = list_checkpoints(checkpoints_dir)[-1:]
        if latest:
            say(f"going on from {latest[0].name}")
        with _checkpointed_activations(model, plan.gradient_checkpointing):
            trainer.train(resume_from_checkpoint=str(latest[0]) if latest else None)
        trainer.require_finite_weights()
        save_adapter(wrapped, output_dir / "adapter")
        return _finish(trainer, plan, latest, output_dir)


def training_fingerprint(
    model: PreTrainedModel, examples: Sequence[Example], settings: TrainSettings, dev_examples: Sequence[Example] = ()
) -> str:
    """Hash of all that makes two trainings the same: settings, rows in their order, base, dtype, adapted layers.

    Development rows count too: they change no weight, but what the log holds.
    """
    identity = [settings.identity, rows_sha256(examples), str(model.dtype), LORA_TARGETS]
    return sha256_json([*identity, rows_sha256(dev_examples)] if dev_examples else identity)


def rows_sha256(examples: Sequence[Example]) -> str:
    """SHA-256 over the tokens and labels of rows, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.array([example["input_ids"], example["labels"]], dtype=np.int64).tobytes() + b"|")
    return digest.hexdigest()


def list_checkpoints(checkpoints_dir: Path) -> list[Path]:
    """Whole checkpoints by step (checkpoint-500 before checkpoint-1000).

    One that a kill cut short is none, and neither is one whose weights were found unsound.
    """
    found = [path for path in checkpoints_dir.glob("checkpoint-*") if (path / COMPLETE).is_file()]
    return sorted(found, key=_checkpoint_step)


def save_adapter(wrapped: PeftModel, folder: Path) -> None:
    """Saves the adapter alone, as safetensors; peft's template README, which says nothing, is left out."""
    # "auto" would ask the hub whether the base model's vocabulary was changed.
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def _checkpoint_step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _checkpointing_words(plan: MemoryPlan) -> str:
    return "activations computed twice" if plan.gradient_checkpointing else "activations kept"


def _finished(output_dir: Path, fingerprint: str) -> TrainResult | None:
    if not (output_dir / "training.json").is_file():
        return None
    facts = read_json(output_dir / "training.json")
    if facts["fingerprint"] != fingerprint or not _has_adapter(output_dir, facts["adapter_sha256"]):
        return None
    return _result(facts, output_dir, reused=True)


def _has_adapter(output_dir: Path, sha256: str) -> bool:
    """Whether the final adapter is there; where another was put in its place, it comes back from the checkpoint."""
    adapter_dir = output_dir / "adapter"
    if _adapter_sha256(adapter_dir) == sha256:
        return True
    latest = list_checkpoints(output_dir / "checkpoints")[-1:]
    if not latest or _adapter_sha256(latest[0]) != sha256:
        return False
    adapter_dir.mkdir(exist_ok=True)
    for file in latest[0].glob("adapter_*"):
        # The bytes alone: not every file system takes the times and rights that copy2 sets.
        shutil.copyfile(file, adapter_dir / file.name)
    return True


def _adapter_sha256(folder: Path) -> str:
    path = folder / ADAPTER_FILE
    return sha256_file(path) if path.is_file() else ""


def _result(facts: Mapping[str, Any], output_dir: Path, *, reused: bool) -> TrainResult:
    return TrainResult(
        **facts,
        adapter_dir=output_dir / "adapter",
        checkpoints=list_checkpoints(output_dir / "checkpoints"),
        log=read_jsonl(output_dir / "training_log.jsonl"),
        reused=reused,
    )


def _delete_other_trainings(output_dir: Path, fingerprint: str, say: Callable[[str], None]) -> None:
    (output_dir / "training.json").unlink(missing_ok=True)
    for path in sorted((output_dir / "checkpoints").glob("checkpoint-*"), key=_checkpoint_step):
        if why := _why_not_taken(path, fingerprint):
            say(f"deleting {path.name}: {why}")
            shutil.rmtree(path)


def _why_not_taken(checkpoint: Path, fingerprint: str) -> str:
    if (checkpoint / UNSOUND).is_file():
        return "its weights were found unsound"
    if not (checkpoint / COMPLETE).is_file():
        return "cut short while it was saved"
    return "" if read_json(checkpoint / COMPLETE)["fingerprint"] == fingerprint else "made by another training"


def _lost(checkpoints_dir: Path, needed: Sequence[int]) -> list[int]:
    """Those of the needed steps whose checkpoint is not there, or not yet."""
    there = set(map(_checkpoint_step, list_checkpoints(checkpoints_dir)))
    return [step for step in needed if step not in there]


def _delete_after_gap(checkpoints_dir: Path, needed: Sequence[int], say: Callable[[str], None]) -> None:
    """Deletes what comes after a needed checkpoint that is gone: going on from there would never make it again."""
    lost = _lost(checkpoints_dir, needed)
    for path in list_checkpoints(checkpoints_dir):
        if lost and _checkpoint_step(path) > lost[0]:
            say(f"deleting {path.name}: it is made again after checkpoint-{lost[0]}, which is needed and gone")
            shutil.rmtree(path)


@contextmanager
def _adapted(model: PreTrainedModel, settings: TrainSettings) -> Iterator[PeftModel]:
    """The model with fresh adapters and packed attention; both are taken off again."""
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(LORA_TARGETS),
        task_type="CAUSAL_LM",
    )
    config._register_custom_module({nn.Linear: ComputeDtypeLoraLinear})
    set_seed(settings.seed)
    with quiet_loading():
        wrapped = get_peft_model(model, config)
    # peft notes the folder that the model was loaded from, which means nothing elsewhere and may name a person.
    wrapped.peft_config["default"].base_model_name_or_path = clean(settings.base_model)
    # peft keeps them as a set, whose order differs from process to process: so would the adapter's hash, and with it
    # the protocol of every row that is answered.
    wrapped.peft_config["default"].target_modules = list(LORA_TARGETS)
    try:
        with attention(model, ATTENTION_NAME):
            yield wrapped.train()
    finally:
        wrapped.unload()


@contextmanager
def _checkpointed_activations(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.activation_checkpointing_disable()


def _build_trainer(
    wrapped: PeftModel,
    examples: Sequence[Example],
    steps: list[list[int]],
    plan: MemoryPlan,
    settings: TrainSettings,
    output_dir: Path,
    fingerprint: str,
    say: Callable[[str], None],
) -> "StepTrainer":
    recorder = Recorder(output_dir / "training_log.jsonl", fingerprint, len(steps), say)
    trainer = StepTrainer(
        model=wrapped,
        args=_training_arguments(wrapped, len(steps), settings, output_dir / "checkpoints"),
        train_dataset=StepDataset(examples, steps, plan.micro_batch_tokens, settings.num_epochs),
        data_collator=_only_item,
        callbacks=[recorder],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _training_arguments(
    wrapped: PeftModel, num_steps: int, settings: TrainSettings, checkpoints_dir: Path
) -> TrainingArguments:
    device, dtype = wrapped.device, wrapped.get_base_model().dtype
    args = TrainingArguments(
        output_dir=str(checkpoints_dir),
        use_cpu=device.type == "cpu",
        # Rows of a step, their order and their accumulation are the data set's business.
        per_device_train_batch_size=1,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        optim="adamw_torch_fused",
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(settings.warmup_share * num_steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        # For its loss scaling; the forward pass does not go through autocast, its layers are in float16 as they are.
        fp16=dtype == torch.float16,
        seed=settings.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.save_steps,
        report_to=[],
        disable_tqdm=True,
    )
    # With several GPUs the Trainer would wrap the model in DataParallel; everything here is on one.
    args._n_gpu = min(args.n_gpu, 1)
    return args


def _finish(trainer: "StepTrainer", plan: MemoryPlan, latest: list[Path], output_dir: Path) -> TrainResult:
    log = [row for row in trainer.state.log_history if "num_rows" in row]
    num_trainable, num_parameters = trainer.model.get_nb_trainable_parameters()
    facts = {
        "fingerprint": trainer.recorder.fingerprint,
        "adapter_sha256": _adapter_sha256(output_dir / "adapter"),
        "num_steps": trainer.state.global_step,
        "num_trainable": num_trainable,
        "num_parameters": num_parameters,
        "num_rows": sum(row["num_rows"] for row in log),
        "num_tokens": sum(row["num_tokens"] for row in log),
        "num_supervised_tokens": sum(row["num_supervised_tokens"] for row in log),
        "wall_s": sum(row["wall_s"] for row in log),
        "peak_memory_gib": peak_memory_gib(trainer.model.device.type),
        "micro_batch_tokens": plan.micro_batch_tokens,
        "gradient_checkpointing": plan.gradient_checkpointing,
        "resumed_from": _checkpoint_step(latest[0]) if latest else None,
    }
    write_json(output_dir / "training.json", facts)
    return _result(facts, output_dir, reused=False)


# --- inside the Trainer -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """The rows of one optimizer step, cut into micro-batches."""

    micro_batches: list[list[Example]]
    epoch: float  # epochs done when this step is

    @property
    def facts(self) -> dict[str, int]:
        rows = [example for part in self.micro_batches for example in part]
        return {
            "num_rows": len(rows),
            "num_tokens": sum(len(example["input_ids"]) for example in rows),
            "num_supervised_tokens": sum(map(num_supervised, rows)),
        }


class StepDataset(torch.utils.data.Dataset):
    """Item i is optimizer step i."""

    def __init__(self, examples: Sequence[Example], steps: list[list[int]], most_tokens: int, num_epochs: int) -> None:
        self.examples, self.steps, self.most_tokens = examples, steps, most_tokens
        self.steps_per_epoch = len(steps) // num_epochs

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> Step:
        rows = [self.examples[number] for number in self.steps[index]]
        return Step(cut_micro_batches(rows, self.most_tokens), (index + 1) / self.steps_per_epoch)


def _only_item(items: list[Step]) -> dict[str, Step]:
    return {"step": items[0]}


def why_exploded(loss: float, earlier: Sequence[float], vocab_size: int) -> str:
    """Why a loss counts as exploded, in words; empty where it does not.

    It must be more than twice the first loss and, besides, more than ten times the median of the last twenty (of five
    at least), or more than ``ln(vocab_size)``, which is what guessing every token alike would give. Conservative: an
    unusual step of a sound training is not stopped, and a training that only gets slowly worse is not either; the loss
    on development rows shows that.
    """
    if not earlier or loss <= EXPLODED_OVER_FIRST * earlier[0]:
        return ""
    usual = statistics.median(earlier[-USUAL_STEPS:])
    if len(earlier) >= FEWEST_USUAL_STEPS and loss > EXPLODED_OVER_USUAL * usual:
        return f"over {EXPLODED_OVER_USUAL} times the median {usual:.4g} of the steps before"
    if loss > math.log(vocab_size):
        return f"worse than guessing every token alike ({math.log(vocab_size):.1f})"
    return ""


@contextmanager
def _without_dropout(wrapped: PeftModel) -> Iterator[None]:
    """Dropout off and nothing else: in eval mode, packed NF4 layers on a CPU would repack their weights (``model``)."""
    dropouts = [module for module in wrapped.modules() if isinstance(module, nn.Dropout)]
    for module in dropouts:
        module.eval()
    try:
        yield
    finally:
        for module in dropouts:
            module.train()


class StepTrainer(Trainer):
    """transformers' Trainer whose batch is a whole optimizer step."""

    def __init__(self, *args: Any, callbacks: list["Recorder"], **kwargs: Any) -> None:
        super().__init__(*args, callbacks=callbacks, **kwargs)
        self.recorder = callbacks[0]
        self.dev_parts: list[list[Example]] = []

    def training_step(self, model: nn.Module, inputs: dict[str, Step], num_items_in_batch: object = None) -> Tensor:
        """Gradients of the mean loss over all supervised tokens of the step; returns that loss."""
        self._started, self._step = time.perf_counter(), inputs["step"]
        model.train()
        base = self.model.get_base_model()
        total = torch.zeros((), device=self.model.device)
        num_targets = self._step.facts["num_supervised_tokens"]
        for part in self._step.micro_batches:
            loss = supervised_loss(base, pack_rows(part, self.model.device)) / num_targets
            self.accelerator.backward(loss)
            total += loss.detach()
        self._require_sound(total.item())
        return total

    def _require_sound(self, loss: float) -> None:
        earlier = [row["loss"] for row in self.state.log_history]
        vocab_size = self.model.get_base_model().get_output_embeddings().weight.shape[0]
        if not math.isfinite(loss):
            fault = f"the loss is {loss}"
        elif why := why_exploded(loss, earlier, vocab_size):
            fault = f"the loss has exploded: it is {loss:.4g}, {earlier[0]:.4g} in the first step, {why},"
        else:
            return
        # The weights as they are gave this loss.
        self._distrust_checkpoint_of_now()
        raise self._stopped(f"{fault} at step {self.state.global_step + 1}")

    def require_finite_weights(self) -> None:
        """Ends the training where a weight of the adapter is not finite: none such is saved, here or as the result.

        Raises:
            TrainingError: one is not.
        """
        finite = [weight.isfinite().all() for weight in self.model.parameters() if weight.requires_grad]
        if not torch.stack(finite).all():
            self._distrust_checkpoint_of_now()
            raise self._stopped(f"weights of the adapter are not finite after step {self.state.global_step}")

    def _distrust_checkpoint_of_now(self) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if (folder / COMPLETE).is_file():
            (folder / COMPLETE).rename(folder / UNSOUND)

    def _stopped(self, fault: str) -> TrainingError:
        good = list_checkpoints(Path(self.args.output_dir))[-1:]
        kept = "no checkpoint was saved before it"
        if good:
            kept = f"the last good checkpoint, {good[0].name}, is kept, and the same settings go on from it"
        return TrainingError(
            f"{fault}; {kept}. Lower learning_rate, raise warmup_share, or set compute_dtype to float32: with another "
            "setting training begins anew, and the checkpoints of this one are deleted"
        )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> float:
        # The Trainer asks for it between the backward pass and the update: the last moment at which broken gradients
        # have changed no weight. Read here and not for the log, so the device is waited for no more often.
        norm = float(super()._get_grad_norm(model, grad_norm=grad_norm))
        # float16's loss scaling overflows now and then by design, and skips the update itself.
        if not math.isfinite(norm) and not self.args.fp16:
            raise self._stopped(f"the norm of the gradient is {norm} at step {self.state.global_step + 1}")
        return norm

    def dev_loss(self) -> float:
        """Mean loss over the supervised tokens of the development rows, without dropout.

        Raises:
            TrainingError: it is not finite.
        """
        base = self.model.get_base_model()
        num_targets = sum(num_supervised(example) for part in self.dev_parts for example in part)
        with torch.no_grad(), _without_dropout(self.model):
            parts = [supervised_loss(base, pack_rows(part, base.device)).item() for part in self.dev_parts]
        loss = sum(parts) / num_targets
        if not math.isfinite(loss):
            raise self._stopped(f"the loss on development rows is {loss} after step {self.state.global_step}")
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds a row to the log: what the Trainer measured in this step, and what the step was."""
        if "loss" not in logs:
            return
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            # A step that float16's loss scaling skipped; JSON has no word for infinity.
            logs["grad_norm"] = None
        measured = {"step": self.state.global_step, "epoch": self._step.epoch, **logs, **self._step.facts}
        wall_s = time.perf_counter() - self._started
        row = {**measured, "wall_s": wall_s, "tokens_per_s": measured["num_tokens"] / wall_s}
        if self.dev_parts and (self.control.should_save or self.state.global_step == 1):
            started = time.perf_counter()
            row["dev_loss"] = self.dev_loss()
            row["dev_wall_s"] = time.perf_counter() - started
        # Kept in the checkpoint's state too: a resumed run's log starts with the rows before it.
        self.state.log_history.append(row)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, row)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the Trainer would look for padded batches."""
        return 0

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # Without the pickled arguments and the model card that the Trainer adds.
        self.require_finite_weights()
        save_adapter(self.model, Path(output_dir))


class Recorder(TrainerCallback):
    """Writes the log as steps finish, marks whole checkpoints, and says one line at the end."""

    def __init__(self, log_path: Path, fingerprint: str, num_steps: int, say: Callable[[str], None]) -> None:
        self.log_path, self.fingerprint, self.num_steps, self.say = log_path, fingerprint, num_steps, say
        self._begun_at, self._begun_step = 0.0, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        write_jsonl(self.log_path, state.log_history)
        self._begun_at, self._begun_step = time.perf_counter(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        with self.log_path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(logs) + "\n")
        # One line at the end: what is seen meanwhile is read from the log, and a notebook that is kept holds no bar.
        if logs["step"] == self.num_steps:
            self.say(self._final_line(logs))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_json(folder / COMPLETE, {"step": state.global_step, "fingerprint": self.fingerprint})

    def _final_line(self, row: dict[str, Any]) -> str:
        num_made, took = row["step"] - self._begun_step, time.perf_counter() - self._begun_at
        return (
            f"step {row['step']}/{self.num_steps}  loss {row['loss']:.4f}  {num_made} steps made here in {took:.0f} s"
        )
