"""How many tokens fit into one forward and backward pass."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.engine.kernels import own_generators
from lib.engine.memory import memory_for_work_bytes
from lib.train.packing import Example, pack_rows, supervised_loss
from lib.train.settings import TrainSettings

# More tokens at a time are no faster on a CPU (measured, 135M weights) and fall out of its caches.
MOST_MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768, "mps": 2048}
# Of the free memory, what activations kept for the backward pass may take; the rest is for what comes and goes.
ACTIVATION_SHARE = 0.5


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


@dataclass(frozen=True)
class MemoryPlan:
    """How large a micro-batch is and whether activations are computed twice, and why."""

    micro_batch_tokens: int
    gradient_checkpointing: bool
    reason: str


def plan_memory(model: PreTrainedModel, examples: Sequence[Example], settings: TrainSettings) -> MemoryPlan:
    """The largest micro-batch that fits, as a power of two so that a resumed run cuts the same ones.

    Gradient checkpointing is used only where not even the longest row fits without.
    """
    device = model.device
    per_token = _kept_bytes(model, examples[0]) / len(examples[0]["input_ids"])
    free = memory_for_work_bytes(model) * ACTIVATION_SHARE
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


def _kept_bytes(model: PreTrainedModel, example: Example) -> int:
    """Bytes that a forward pass over one row keeps for its backward pass, weights apart."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        # The tensor itself would keep the pass alive for ever: a cycle through C++, which gc does not see.
        return tensor.detach()

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with torch.random.fork_rng(own_generators(model.device)), hooks:
        loss = supervised_loss(model, pack_rows([example], model.device))
    assert loss.requires_grad
    return sum(kept.values())
