"""Which of torch's attention kernels a device has, and those that also return the log-sum-exp of the scores.

Written for the operators of torch 2.13; none of the CUDA kernels was run yet (``pytest -m gpu`` compares them with
float32). Letters in shapes: T tokens, A sequences, H query heads, Hkv key/value heads, D head size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Literal

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

Kernel = Literal["flash_cpu", "varlen", "efficient", "products"]
# transformers' "sdpa" with key/value heads repeated first.
EXPANDED_NAME = "sdpa_expanded"
LARGEST_HEAD = 256


def kernel_of(states: Tensor) -> Kernel:
    """The attention kernel for queries and keys like ``states`` (..., D).

    | device                            | kernel                                                        |
    | CPU, bfloat16 without AMX         | products: torch's own does not use AVX-512's bfloat16 units   |
    | CPU                               | flash_cpu                                                     |
    | GPU from 8.0 on, 16 bits          | varlen: FlashAttention over sequences of any length           |
    | older GPU (T4), float16           | efficient: the only fused one that it has                     |
    | GPU, float32 or an odd head size  | products                                                      |
    | GPU of a Mac                      | products                                                      |
    """
    if states.device.type == "cpu":
        return "products" if states.dtype == torch.bfloat16 and not has_amx() else "flash_cpu"
    if states.device.type == "mps" or states.shape[-1] % 8 or states.shape[-1] > LARGEST_HEAD:
        return "products"
    if is_ampere(states.device):
        return "varlen" if states.dtype in (torch.float16, torch.bfloat16) else "products"
    return "efficient" if states.dtype == torch.float16 else "products"


@cache
def has_amx() -> bool:
    """Whether the CPU has tiles for bfloat16, which make torch's kernel five times as fast as products (P 1,100)."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def is_ampere(device: torch.device) -> bool:
    """Whether a GPU is of compute capability 8.0 or later."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


@dataclass(frozen=True)
class Sequences:
    """Sequences of queries, each with its own keys, end to end in one tensor each; all tensors are int32."""

    query_starts: Tensor  # (A + 1,) the last is the end
    key_starts: Tensor  # (A + 1,)
    most_queries: int
    most_keys: int
    num_keys: Tensor | None = None  # (A,) how many count, where not all up to the next start do; without gradients


def attend_sequences(
    query: Tensor, key: Tensor, value: Tensor, where: Sequences, scale: float, *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """``varlen``: ``query`` (T, H, D) to ``key`` and ``value`` (keys, Hkv, D): (T, H, D) and float32 (T, H)."""
    # Registers operators for torch.compile when it is imported, which a CPU has no use for.
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    out, log_sum = varlen_attn(
        query,
        key,
        value,
        where.query_starts,
        where.key_starts,
        where.most_queries,
        where.most_keys,
        return_aux=AuxRequest(lse=True),
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=True,
        seqused_k=where.num_keys,
    )
    # Its documentation has it the other way round.
    return out, log_sum.t()


def attend_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``flash_cpu`` and ``efficient``: (B, H, T, D) to as many heads (B, H, S, D); the latter adds a ``mask``."""
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
    if mask is not None:
        mask = mask.expand(*query.shape[:3], key.shape[2])
    out, log_sum, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, True, 0.0, causal, scale=scale
    )
    # It returns log-sum-exps for a multiple of 32 queries.
    return out, log_sum[..., : query.shape[2]]


def torch_attention(device: torch.device) -> str:
    """Name of transformers' attention over torch's kernels that is fused on ``device``.

    Below 8.0 grouped heads leave only the float32 path: 202 tokens/s instead of 371 (transformers PR 45776).
    """
    return EXPANDED_NAME if device.type == "cuda" and not is_ampere(device) else "sdpa"


@contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Set the attention of a model, by the name it is registered under, for the time of a ``with``."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def own_generators(device: torch.device) -> list[torch.device]:
    """What ``torch.random.fork_rng`` forks beside the CPU's: left alone it forks, and so starts, every GPU."""
    return [device] if device.type == "cuda" else []


def attend_expanded(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: object
) -> tuple[Tensor, None]:
    """transformers' ``sdpa_attention_forward``, with key/value heads (B, Hkv, T, D) repeated for all H query heads."""
    key, value = (repeat_kv(states, query.shape[1] // states.shape[1]) for states in (key, value))
    ungrouped = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    return sdpa_attention_forward(ungrouped, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(EXPANDED_NAME, attend_expanded)
AttentionMaskInterface.register(EXPANDED_NAME, sdpa_mask)
