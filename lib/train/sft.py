"""Supervised fine-tuning with LoRA: assistant-only labels, transformers' Trainer, resume that equals an unbroken run.

An item of the Trainer's data set is an optimizer step. Its cut into micro-batches affects memory and speed alone: rows
are packed, and the loss is divided by the supervised tokens of the complete step (transformers PR 34191). Of what is
written, ``training.json`` comes last: it exists only when training is complete.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, set_seed
from transformers.trainer_callback import PrinterCallback

from lib.engine.kernels import attention
from lib.engine.load import four_bit_library, peak_memory_gib, reset_peak_memory
from lib.engine.models import Models
from lib.engine.quiet import quiet_loading
from lib.engine.sources import ModelSource
from lib.record.files import sha256_json, write_json
from lib.record.redaction import clean
from lib.train import checkpoints
from lib.train.memory_plan import MemoryPlan, plan_memory
from lib.train.packing import ATTENTION_NAME, ComputeDtypeLoraLinear, Example, check_loss
from lib.train.rows import EncodedRows, TrainingError
from lib.train.settings import TrainResult, TrainSettings
from lib.train.trainer import Recorder, StepDataset, StepTrainer, only_item, training_arguments

# Of a training, over the rows of its log.
SUMMED = ("num_rows", "num_tokens", "num_supervised_tokens", "wall_s")


def step_rows(num_rows: int, rows_per_step: int, num_epochs: int, seed: int) -> list[list[int]]:
    """Row numbers of each optimizer step: every epoch is a seeded shuffle of all rows, its last step may be short."""
    steps = []
    for epoch in range(num_epochs):
        order = np.random.default_rng([seed, epoch]).permutation(num_rows).tolist()
        steps += [order[start : start + rows_per_step] for start in range(0, num_rows, rows_per_step)]
    return steps


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
    """Train a LoRA adapter on ``lora_target_modules``, or go on where the same training stopped.

    A complete training of the same settings, rows and base is returned as it is; an interrupted one continues from its
    latest complete checkpoint with the result of an unbroken run. What another training left is deleted, with a note.
    With ``num_checkpoints``, training goes on from before the first missing one of so many last checkpoints. Raises
    TrainingError for a loss, gradient or weight that is not finite, or a loss that has exploded.
    """
    _check_optimizer(model.device.type, settings.optimizer)
    check_targets(model, settings.lora_target_modules)
    fingerprint = training_fingerprint(model, examples, settings, dev_examples)
    checkpoints_dir = output_dir / "checkpoints"
    steps = step_rows(len(examples), settings.rows_per_step, settings.num_epochs, settings.seed)
    saved = checkpoints.checkpoint_steps(len(steps), settings.save_steps)
    needed = saved[max(0, len(saved) - num_checkpoints) :]
    finished = checkpoints.finished_training(output_dir, fingerprint)
    if finished and not (gone := checkpoints.lost_checkpoints(checkpoints_dir, needed)):
        say(f"complete already: {finished.num_steps} steps with these settings, rows and base; nothing was trained")
        return finished
    if finished:
        names = ", ".join(f"checkpoint-{step}" for step in gone)
        say(f"complete already, but {names} is needed to choose among checkpoints and gone: training again")
    checkpoints.delete_other_trainings(output_dir, fingerprint, say)
    checkpoints.delete_after_gap(checkpoints_dir, needed, say)
    with deterministic(model.device), _adapted(model, settings) as wrapped:
        reset_peak_memory(model.device)
        check_loss(model, examples[0])
        plan = plan_memory(model, examples, settings)
        activations = "activations computed twice" if plan.gradient_checkpointing else "activations kept"
        if settings.use_dora:
            say("DoRA: peft's own layers, in float32, in place of the faster ones here; rows stay packed")
        say(f"micro-batches of up to {plan.micro_batch_tokens} tokens, {activations} ({plan.reason})")
        trainer = _build_trainer(wrapped, examples, dev_examples, steps, plan, settings, output_dir, fingerprint, say)
        latest = checkpoints.list_checkpoints(checkpoints_dir)[-1:]
        if latest:
            say(f"going on from {latest[0].name}")
        with _checkpointed_activations(model, plan.gradient_checkpointing):
            trainer.train(resume_from_checkpoint=str(latest[0]) if latest else None)
        trainer.require_finite_weights()
        checkpoints.save_adapter(wrapped, output_dir / "adapter")
        return _finish(trainer, plan, latest, output_dir)


def train_adapter(
    parameters: Mapping[str, Any],
    base: ModelSource,
    models: Models,
    rows: EncodedRows,
    dev_rows: EncodedRows,
    output_dir: Path,
) -> TrainResult | None:
    """The training of a run; None where ``checkpoint`` names a finished adapter."""
    if parameters["checkpoint"]:
        return None
    settings = TrainSettings.from_params(parameters, f"{base.identity} {parameters['quantization']}")
    num_checkpoints = parameters["max_sweep_checkpoints"] if parameters["checkpoint_sweep"] else 0
    dev = dev_rows.examples
    trainee = models.for_training()
    return train(trainee, rows.examples, settings, output_dir, dev_examples=dev, num_checkpoints=num_checkpoints)


def training_fingerprint(
    model: PreTrainedModel, examples: Sequence[Example], settings: TrainSettings, dev_examples: Sequence[Example] = ()
) -> str:
    """Hash of all that makes two trainings the same: settings, rows in their order, base, dtype, adapted layers."""
    identity = [settings.identity, rows_sha256(examples), str(model.dtype), list(settings.lora_target_modules)]
    return sha256_json([*identity, rows_sha256(dev_examples)] if dev_examples else identity)


def rows_sha256(examples: Sequence[Example]) -> str:
    """SHA-256 over the tokens and labels of rows, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.array([example["input_ids"], example["labels"]], dtype=np.int64).tobytes() + b"|")
    return digest.hexdigest()


def lora_config(settings: TrainSettings) -> LoraConfig:
    """What peft is called with."""
    size = {"r": settings.lora_r, "lora_alpha": settings.lora_alpha, "lora_dropout": settings.lora_dropout}
    kind = {"use_rslora": settings.use_rslora, "use_dora": settings.use_dora}
    kind["init_lora_weights"] = settings.init_lora_weights != "gaussian" or "gaussian"
    return LoraConfig(**size, **kind, target_modules=list(settings.lora_target_modules), task_type="CAUSAL_LM")


def check_targets(model: PreTrainedModel, target_modules: Sequence[str]) -> None:
    """Raise TrainingError where the model has no linear layer of a name; the output layer is none to adapt."""
    # It is applied outside of the model (``supervised_loss``) and often shared with the embeddings.
    output = model.get_output_embeddings()
    linear = [name for name, one in model.named_modules() if isinstance(one, nn.Linear) and one is not output]
    unknown = [name for name in target_modules if not any(f".{one}".endswith(f".{name}") for one in linear)]
    if unknown:
        there = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
        raise TrainingError(f"lora_target_modules names {', '.join(unknown)}; {type(model).__name__} has {there}")


def _check_optimizer(device: str, optimizer: str) -> None:
    if device != "cuda" and optimizer.startswith("paged"):
        raise TrainingError(
            f"optimizer is {optimizer!r}, which moves its state between the memory of a GPU and the machine's, and no "
            "GPU is used here: take adamw or adamw_8bit"
        )
    if optimizer != "adamw":
        four_bit_library(device, f"optimizer is {optimizer!r}", "take adamw")


@contextmanager
def _adapted(model: PreTrainedModel, settings: TrainSettings) -> Iterator[PeftModel]:
    """The model with fresh adapters and packed attention; both are taken off again."""
    config = lora_config(settings)
    config._register_custom_module({nn.Linear: ComputeDtypeLoraLinear})
    set_seed(settings.seed)
    with quiet_loading():
        wrapped = get_peft_model(model, config)
    # peft notes the folder that the model was loaded from, which means nothing elsewhere and may name a person.
    wrapped.peft_config["default"].base_model_name_or_path = clean(settings.base_model)
    # peft keeps them as a set, whose order differs from process to process: so would the adapter's hash, and with it
    # the protocol of every row that is answered.
    wrapped.peft_config["default"].target_modules = list(settings.lora_target_modules)
    try:
        with attention(model, ATTENTION_NAME):
            yield wrapped.train()
    finally:
        wrapped.unload()


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """On a GPU, sums in an order that is the same in each run; attention's backward pass is slower for it.

    An operator that knows no such order raises an error that names it.
    """
    if device.type != "cuda":
        yield
        return
    before, fills = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory that it has not written, and filling all of it takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fills


@contextmanager
def _checkpointed_activations(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    if wanted:
        model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if wanted:
            model.activation_checkpointing_disable()


def _build_trainer(
    wrapped: PeftModel,
    examples: Sequence[Example],
    dev_examples: Sequence[Example],
    steps: list[list[int]],
    plan: MemoryPlan,
    settings: TrainSettings,
    output_dir: Path,
    fingerprint: str,
    say: Callable[[str], None],
) -> StepTrainer:
    recorder = Recorder(output_dir / "training_log.jsonl", fingerprint, len(steps), say)
    device, dtype = wrapped.device.type, wrapped.get_base_model().dtype
    trainer = StepTrainer(
        model=wrapped,
        args=training_arguments(device, dtype, len(steps), settings, output_dir / "checkpoints"),
        train_dataset=StepDataset(examples, steps, settings.num_epochs),
        data_collator=only_item,
        callbacks=[recorder],
        micro_batch_tokens=plan.micro_batch_tokens,
        dev_rows=dev_examples,
        noise_alpha=settings.neftune_noise_alpha,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _finish(trainer: StepTrainer, plan: MemoryPlan, latest: list[Path], output_dir: Path) -> TrainResult:
    log = [row for row in trainer.state.log_history if "num_rows" in row]
    num_trainable, num_parameters = trainer.model.get_nb_trainable_parameters()
    facts = {
        "fingerprint": trainer.recorder.fingerprint,
        "adapter_sha256": checkpoints.adapter_sha256(output_dir / "adapter"),
        "num_steps": trainer.state.global_step,
        "num_trainable": num_trainable,
        "num_parameters": num_parameters,
        **{name: sum(row[name] for row in log) for name in SUMMED},
        "peak_memory_gib": peak_memory_gib(trainer.model.device.type),
        # Less than planned where memory ran out.
        "micro_batch_tokens": trainer.micro_batch_tokens,
        "gradient_checkpointing": plan.gradient_checkpointing,
        "resumed_from": checkpoints.checkpoint_step(latest[0]) if latest else None,
    }
    write_json(output_dir / "training.json", facts)
    return checkpoints.training_result(facts, output_dir, reused=False)
