"""One base model with and without adapters, loaded once: the weights from before a merge are kept, and put back."""

import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.engine.generate import Engine
from lib.engine.generator import LazyGenerator
from lib.engine.load import Runtime, choose_weights, load_base, load_dense, load_tokenizer, merge_adapter
from lib.engine.memory import free_memory_bytes

# Of the machine's free memory, for a copy of the base's weights; batches and their keys need the rest.
MOST_KEPT = 0.25


class Models:
    """One base model with and without adapters, each made when first used; at most one is in memory."""

    def __init__(self, folder: Path, runtime: Runtime, quantization: str, batch_size: int = 0) -> None:
        self._folder, self._runtime = folder, runtime
        self._quantization, self._batch_size = quantization, batch_size
        self._made: list[LazyGenerator] = []
        self._model: PreTrainedModel | None = None
        self._is_merged = False
        self._kept: dict[str, Tensor] = {}
        self._training_load_s = 0.0

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the base model, for all that it is used for."""
        return load_tokenizer(self._folder)

    def untuned(self) -> LazyGenerator:
        """The base model itself."""
        return self.tuned(None)

    def tuned(self, adapter_dir: Path | None, scale: float = 1.0) -> LazyGenerator:
        """The base model with the adapter's effect times ``scale`` merged in."""
        self._made.append(LazyGenerator(self.engine, adapter_dir, scale))
        return self._made[-1]

    def engine(self, adapter_dir: Path | None, scale: float = 1.0) -> Engine:
        """The same, ready for use; what was in use before must not be used again."""
        model = self._base()
        if adapter_dir is not None:
            self._kept = self._kept or copy_weights(model)
            self._is_merged = True
            model = self._model = merge_adapter(model, adapter_dir, scale)
        return Engine(model.eval().requires_grad_(False), self.tokenizer, batch_size=self._batch_size)

    def for_training(self) -> PreTrainedModel:
        """The frozen base in train mode: the one in memory, unless training needs it packed."""
        started = time.perf_counter()
        held = self._model.get_memory_footprint() if self._model else 0
        weights, reason = choose_weights(self._folder, self._runtime, self._quantization, held_bytes=held)
        print(f"weights: {reason}")
        if weights == "packed":
            self.close()
            model = load_base(self._folder, self._runtime, self._quantization)
        else:
            model = self._base()
        self._training_load_s += time.perf_counter() - started
        return model.train()

    @property
    def work_s(self) -> float:
        """Seconds that all of them worked."""
        return sum(generator.wall_s for generator in self._made)

    @property
    def load_s(self) -> float:
        """Seconds that loading, merging and putting back took."""
        return self._training_load_s + sum(generator.load_s for generator in self._made)

    def close(self) -> None:
        """Drop what is in memory."""
        self._close_generators()
        self._model, self._is_merged, self._kept = None, False, {}

    def _close_generators(self) -> None:
        for generator in self._made:
            generator.close()

    def _base(self) -> PreTrainedModel:
        self._close_generators()
        # An audit computes in float32 with weights of 16 bits.
        changed = self._model is not None and (self._is_merged or self._model.dtype != self._runtime.dtype)
        if changed and not put_back(self._kept, self._model):
            self.close()
        if self._model is None:
            self._model = load_dense(self._folder, self._runtime, self._quantization)
        self._is_merged = False
        return self._model


def copy_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's weights in the machine's memory; {} where that would take too much of what is free."""
    weights = {name: weight.data for name, weight in model.named_parameters()}
    num_bytes = sum(weight.nbytes for weight in weights.values())
    if num_bytes > MOST_KEPT * free_memory_bytes(torch.device("cpu")):
        return {}
    return {name: weight.to("cpu", copy=True) for name, weight in weights.items()}


def put_back(kept: Mapping[str, Tensor], model: PreTrainedModel) -> bool:
    """Give ``model`` the weights of ``copy_weights`` bit by bit: subtracting an adapter again would round.

    False where they are not those of ``model``: none were kept, or an adapter brought layers.
    """
    weights = dict(model.named_parameters())
    shapes = ({name: weight.shape for name, weight in one.items()} for one in (kept, weights))
    if not kept or next(shapes) != next(shapes):
        return False
    for name, weight in weights.items():
        weight.data = weight.data.to(kept[name].dtype)
        weight.data.copy_(kept[name])
    return True
