"""Memory of a device and of a batch: what is free, what a row takes, what to do where an allocator gives up."""

import gc
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lib.engine.attention import head_size

# The CPU's allocator; the driver itself, under an error of the accelerator; cuBLAS, which takes its workspace late.
OUT_OF_MEMORY_WORDS = ("DefaultCPUAllocator", "CUDA error: out of memory", "ALLOC_FAILED", "MPS backend out of memory")


def free_memory_bytes(device: torch.device) -> int:
    """Memory that can still be taken on ``device``, what torch holds in reserve included."""
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    return min(_free_on_machine(), _free_in_container())


def memory_for_work_bytes(model: PreTrainedModel) -> int:
    """What a model's work may take on its device: on a CPU what is free, on a GPU all that its weights leave.

    The latter is the same in each run, so batches are, and so is their rounding; a GPU that is shared runs out of
    memory and is given less (``with_halving``).
    """
    if model.device.type != "cuda":
        return free_memory_bytes(model.device)
    return torch.cuda.mem_get_info(model.device)[1] - model.get_memory_footprint()


def _free_on_machine() -> int:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        # Where the system does not say what is free (macOS), half of what there is.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    lines = (line.split() for line in meminfo.read_text().splitlines())
    return next(int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:")


def _free_in_container(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """What the container's limit leaves; /proc/meminfo shows the memory of the machine even inside one."""
    limit, used = folder / "memory.max", folder / "memory.stat"
    if not limit.exists() or limit.read_text().strip() == "max":
        return 2**63
    lines = (line.split() for line in used.read_text().splitlines())
    # Only memory of processes: the page cache counts against the limit but gives way.
    return int(limit.read_text()) - next(int(words[1]) for words in lines if words[0] == "anon")


def row_bytes(model: PreTrainedModel, capacity: int) -> int:
    """Memory of one row: its keys and values, and its logits in the model's dtype and in float32."""
    config, size = model.config, model.dtype.itemsize
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    states = 2 * config.num_hidden_layers * heads * head_size(config) * capacity * size
    return states + config.vocab_size * (size + 4)


def step_bytes(model: PreTrainedModel, num_tokens: int) -> int:
    """Memory of one forward pass: per token, some ten hidden states and four of the wider kind are alive at once."""
    config = model.config
    wide = getattr(config, "intermediate_size", 4 * config.hidden_size)
    return num_tokens * (10 * config.hidden_size + 4 * wide) * max(4, model.dtype.itemsize)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator gave up: that of torch on CUDA has an exception for it, the others are known by words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY_WORDS)


def with_halving(most: int, unit: str, attempt: Callable[[int], None], least: int = 1) -> int:
    """Call ``attempt(most)``, and with half of it each time that memory runs out; returns what was enough.

    Raises what ran out at ``least`` or below.
    """
    while True:
        try:
            attempt(most)
            return most
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or most <= least:
                raise
            shortage = str(error).splitlines()[0]
        # Outside the except block: the exception's frames hold the tensors that must go first.
        release_memory()
        warnings.warn(f"out of memory with {most} {unit}, going on with {most // 2}: {shortage}", stacklevel=2)
        most //= 2


def release_memory() -> None:
    """Free what only cycles hold, and give what torch then holds in reserve back to the GPU."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
