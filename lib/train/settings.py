"""Settings and result of a training."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lib.params import LORA_TARGETS

LATER = ("use_rslora", "use_dora", "init_lora_weights", "lr_scheduler", "optimizer", "neftune_noise_alpha")


@dataclass(frozen=True)
class TrainSettings:
    """``micro_batch_tokens`` and ``gradient_checkpointing`` change no function; the others are its identity."""

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
    # As in ``Params``; ``LATER`` names them.
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: str = "default"
    lora_target_modules: Sequence[str] = LORA_TARGETS
    lr_scheduler: str = "cosine"
    optimizer: str = "adamw"
    neftune_noise_alpha: float = 0.0

    @classmethod
    def from_params(cls, params: Mapping[str, Any], base_identity: str) -> "TrainSettings":
        """Settings from the parameters of a run; memory decides on those that are not among them."""
        known = {one.name: params[one.name] for one in fields(cls) if one.name in params}
        return cls(base_identity=base_identity, **known)

    @property
    def rows_per_step(self) -> int:
        return self.train_batch_size * self.gradient_accumulation_steps

    @property
    def identity(self) -> dict[str, Any]:
        # What came later is left out at its default, so that a training made before is the same training still; the
        # fingerprint has the target modules for itself.
        usual = {one.name: one.default for one in fields(self) if one.name in LATER}
        left_out = {"micro_batch_tokens", "gradient_checkpointing", "lora_target_modules"}
        known = {name: value for name, value in asdict(self).items() if name not in left_out}
        return {name: value for name, value in known.items() if name not in usual or value != usual[name]}


def checkpoint_step(path: Path) -> int:
    """The optimizer step that ``checkpoint-<step>`` was saved at."""
    return int(path.name.rpartition("-")[2])


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
    log: list[dict[str, Any]] = field(default_factory=list)  # one row per step
    reused: bool = False  # complete already, nothing was trained

    @property
    def new_work_s(self) -> float:
        """Seconds of this call's training; 0 where it was complete already."""
        return 0.0 if self.reused else self.wall_s

    @property
    def dev_losses(self) -> list[float]:
        """Losses on development rows, in the order of the steps."""
        return [row["dev_loss"] for row in self.log if row.get("dev_loss") is not None]

    @property
    def metrics(self) -> dict[str, Any]:
        """For the manifest."""
        metrics = {"first_loss": self.log[0]["loss"], "last_loss": self.log[-1]["loss"], "num_steps": self.num_steps}
        metrics |= {"wall_s": self.wall_s, "tokens_per_s": self.tokens_per_s, "num_trainable": self.num_trainable}
        dev = self.dev_losses
        return metrics | ({"first_dev_loss": dev[0], "last_dev_loss": dev[-1]} if dev else {})

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.wall_s
