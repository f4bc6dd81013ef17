"""transformers' Trainer with an optimizer step as its batch."""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lib.engine.memory import with_halving
from lib.record import progress
from lib.record.files import write_json
from lib.record.rows import write_jsonl
from lib.train.checkpoints import COMPLETE, UNSOUND, list_checkpoints, save_adapter
from lib.train.memory_plan import cut_micro_batches
from lib.train.packing import Example, pack_rows, supervised_loss
from lib.train.rows import TrainingError, num_supervised
from lib.train.settings import TrainSettings

# When a loss counts as exploded (``why_exploded``); wide of what the rows of a step move it by.
EXPLODED_OVER_FIRST, EXPLODED_OVER_USUAL = 2, 10
USUAL_STEPS, FEWEST_USUAL_STEPS = 20, 5

# Our name -> transformers'.
OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}


def training_arguments(
    device: str, dtype: torch.dtype, num_steps: int, settings: TrainSettings, checkpoints_dir: Path
) -> TrainingArguments:
    """What transformers' Trainer is called with."""
    args = TrainingArguments(
        output_dir=str(checkpoints_dir),
        use_cpu=device == "cpu",
        # The data set decides on the rows of a step, their order and their accumulation.
        per_device_train_batch_size=1,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        optim=OPTIMIZERS[settings.optimizer],
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
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


@dataclass(frozen=True)
class Step:
    """The rows of one optimizer step."""

    rows: list[Example]
    epoch: float  # epochs done when this step is

    @property
    def facts(self) -> dict[str, int]:
        facts = {"num_rows": len(self.rows), "num_tokens": sum(len(example["input_ids"]) for example in self.rows)}
        return facts | {"num_supervised_tokens": sum(map(num_supervised, self.rows))}


class StepDataset(torch.utils.data.Dataset):
    """Item i is optimizer step i."""

    def __init__(self, examples: Sequence[Example], steps: list[list[int]], num_epochs: int) -> None:
        self.examples, self.steps = examples, steps
        self.steps_per_epoch = len(steps) // num_epochs

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> Step:
        return Step([self.examples[number] for number in self.steps[index]], (index + 1) / self.steps_per_epoch)


def only_item(items: list[Step]) -> dict[str, Step]:
    return {"step": items[0]}


def why_exploded(loss: float, earlier: Sequence[float], vocab_size: int) -> str:
    """Why a loss counts as exploded, in words; empty where it does not.

    It must be over twice the first loss and, besides, over ten times the median of the last twenty (of five at least)
    or over ``ln(vocab_size)``, that of guessing. A training that slowly gets worse is not stopped.
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
    """transformers' Trainer whose batch is an optimizer step, cut into micro-batches of ``micro_batch_tokens``."""

    def __init__(
        self,
        *args: Any,
        callbacks: list["Recorder"],
        micro_batch_tokens: int,
        dev_rows: Sequence[Example],
        noise_alpha: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, callbacks=callbacks, **kwargs)
        self.recorder = callbacks[0]
        self.micro_batch_tokens, self.dev_rows, self.noise_alpha = micro_batch_tokens, dev_rows, noise_alpha

    def training_step(self, model: nn.Module, inputs: dict[str, Step], num_items_in_batch: object = None) -> Tensor:
        """Gradients of the mean loss over all supervised tokens of the step; returns that loss."""
        self._started, self._step = time.perf_counter(), inputs["step"]
        model.train()
        rows = self._step.rows
        generator = {"cuda": torch.cuda, "mps": torch.mps}.get(self.model.device.type, torch)
        random_state = generator.get_rng_state()
        longest = max(len(example["input_ids"]) for example in rows)
        total = torch.zeros((), device=self.model.device)

        def attempt(most_tokens: int) -> None:
            # Of an attempt that memory ended, in the middle of a backward pass or not, nothing stays.
            model.zero_grad()
            generator.set_rng_state(random_state)
            total.zero_()
            self._add_gradients(cut_micro_batches(rows, most_tokens), total)

        begun = min(self.micro_batch_tokens, self._step.facts["num_tokens"])
        enough = with_halving(begun, "tokens in a micro-batch", attempt, least=longest)
        if enough < begun:
            self.micro_batch_tokens = enough
        self._require_sound(total.item())
        return total

    def _add_gradients(self, micro_batches: Sequence[Sequence[Example]], total: Tensor) -> None:
        """Gradients of all micro-batches; adds their losses to ``total``."""
        base, num_targets = self.model.get_base_model(), self._step.facts["num_supervised_tokens"]
        for part in micro_batches:
            loss = supervised_loss(base, pack_rows(part, self.model.device, self.noise_alpha)) / num_targets
            self.accelerator.backward(loss)
            total += loss.detach()

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
        """Raise TrainingError where a weight of the adapter is not finite: none such is saved."""
        finite = [weight.isfinite().all() for weight in self.model.parameters() if weight.requires_grad]
        if not torch.stack(finite).all():
            self._distrust_checkpoint_of_now()
            raise self._stopped(f"weights of the adapter are not finite after step {self.state.global_step}")

    def _distrust_checkpoint_of_now(self) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if (folder / COMPLETE).is_file():
            (folder / COMPLETE).rename(folder / UNSOUND)

    def _stopped(self, fault: str) -> TrainingError:
        kept = "no checkpoint was saved before it"
        if good := list_checkpoints(Path(self.args.output_dir)):
            kept = f"the last good checkpoint, {good[-1].name}, is kept, and the same settings go on from it"
        return TrainingError(
            f"{fault}; {kept}. Lower learning_rate, raise warmup_share, or set compute_dtype to float32: with another "
            "setting training starts over, and the checkpoints of this one are deleted"
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
        """Mean loss over supervised tokens of the development rows, without dropout; TrainingError if not finite."""
        base = self.model.get_base_model()
        num_targets = sum(map(num_supervised, self.dev_rows))
        micro_batches = cut_micro_batches(self.dev_rows, self.micro_batch_tokens)
        with torch.no_grad(), _without_dropout(self.model):
            parts = [supervised_loss(base, pack_rows(part, base.device)).item() for part in micro_batches]
        loss = sum(parts) / num_targets
        if not math.isfinite(loss):
            raise self._stopped(f"the loss on development rows is {loss} after step {self.state.global_step}")
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add a row to the log: what the Trainer measured in this step, and what the step was."""
        if "loss" not in logs:
            return
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            # A step that float16's loss scaling skipped; JSON has no word for infinity.
            logs["grad_norm"] = None
        measured = {"step": self.state.global_step, "epoch": self._step.epoch, **logs, **self._step.facts}
        wall_s = time.perf_counter() - self._started
        row = {**measured, "wall_s": wall_s, "tokens_per_s": measured["num_tokens"] / wall_s}
        if self.dev_rows and (self.control.should_save or self.state.global_step == 1):
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
    """Writes the log as steps finish, marks complete checkpoints, and prints one line at the end."""

    def __init__(self, log_path: Path, fingerprint: str, num_steps: int, say: Callable[[str], None]) -> None:
        self.log_path, self.fingerprint, self.num_steps, self.say = log_path, fingerprint, num_steps, say
        self._begun_at, self._begun_step = 0.0, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        write_jsonl(self.log_path, state.log_history)
        self._begun_at, self._begun_step = time.perf_counter(), state.global_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        with self.log_path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(logs) + "\n")
        num_tokens = sum(row["num_tokens"] for row in state.log_history)
        shown = {"num_tokens": num_tokens, "loss": logs["loss"], "dev_loss": logs.get("dev_loss")}
        progress.report("steps", logs["step"], self.num_steps, **shown)
        if logs["step"] == self.num_steps:
            made, took = logs["step"] - self._begun_step, time.perf_counter() - self._begun_at
            where = f"step {logs['step']}/{self.num_steps}  loss {logs['loss']:.4f}"
            self.say(f"{where}  {made} steps made here in {took:.0f} s")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_json(folder / COMPLETE, {"step": state.global_step, "fingerprint": self.fingerprint})
