"""Training rows as one unpadded sequence: attention row by row, LoRA in the compute dtype, loss where labels are.

Up to rounding the function is transformers' own (``check_loss``), plugged in through its attention interface and peft's
custom layers. Letters in shapes: N tokens of a micro-batch, T tokens of a row, S supervised tokens, H query heads,
K key/value heads, D head size, C hidden size, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lib.engine.kernels import (
    Sequences,
    attend_expanded,
    attend_sequences,
    attention,
    kernel_of,
    own_generators,
    torch_attention,
)

ATTENTION_NAME = "packed_rows"
IGNORED_LABEL = -100
# Scores of longer rows are too large to keep for the backward pass; torch's own kernel recomputes them.
LONGEST_ROW_WITH_KEPT_SCORES = 1024
# Float32 logits at a time, in elements: on a CPU they should stay in its last cache.
LOSS_CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27, "mps": 2**22}
# Relative difference up to which a loss counts as transformers' own, by the dtype of the weights.
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}

Example = Mapping[str, list[int]]


@dataclass(frozen=True)
class PackedRows:
    """Rows end to end. Row i's label at position p is predicted from the token at p - 1 of the same row."""

    input_ids: Tensor  # (1, N)
    position_ids: Tensor  # (1, N), each row counts from 0
    row_lengths: list[int]  # sums to N
    sequences: Sequences  # each row's tokens to itself
    predict_index: Tensor  # (S,) position among N whose next token is supervised
    targets: Tensor  # (S,) that next token
    noise_alpha: float = 0.0  # of ``noisy_embeddings``; 0: none

    @property
    def num_tokens(self) -> int:
        return sum(self.row_lengths)


def pack_rows(examples: Sequence[Example], device: torch.device | str = "cpu", noise_alpha: float = 0.0) -> PackedRows:
    """Pack rows of ``{"input_ids", "labels"}`` (equally long, labels -100 where nothing is to be learnt)."""
    lengths = [len(example["input_ids"]) for example in examples]
    # The first label of a row has nothing before it; without this it would be predicted from the row before.
    labels = torch.tensor([label for row in examples for label in [IGNORED_LABEL, *row["labels"][1:]]], device=device)
    supervised = torch.nonzero(labels != IGNORED_LABEL).squeeze(1)
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return PackedRows(
        input_ids=torch.tensor([[token for row in examples for token in row["input_ids"]]], device=device),
        position_ids=torch.cat([torch.arange(length, device=device) for length in lengths])[None],
        row_lengths=lengths,
        sequences=Sequences(starts, starts, max(lengths), max(lengths)),
        predict_index=supervised - 1,
        targets=labels[supervised],
        noise_alpha=noise_alpha,
    )


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    row_lengths: list[int],
    sequences: Sequences,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Causal attention within each row: ``query`` (1, H, N, D), ``key``, ``value`` (1, K, N, D) -> (1, N, H, D)."""
    if dropout or (sliding_window is not None and max(row_lengths) > sliding_window):
        raise ValueError(f"packed rows know no attention dropout ({dropout}) and no sliding window ({sliding_window})")
    if kernel_of(query) == "varlen":
        # All rows in one call; torch's own would plan each new length on compute capability 9 (cuDNN).
        states = (states[0].transpose(0, 1) for states in (query, key, value))
        return attend_sequences(*states, sequences, scaling, causal=True)[0][None], None
    attend = _attend_keeping_scores if _keeps_scores(query, row_lengths) else _attend_by_torch
    rows = zip(*(states.split(row_lengths, dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([attend(module, *row, scaling) for row in rows], dim=1), None


def _keeps_scores(query: Tensor, row_lengths: list[int]) -> bool:
    # On a CPU, torch's fused kernel takes three times as long in bfloat16 (forward and backward, 230 tokens).
    plain_wins = query.device.type == "cpu" and query.dtype == torch.bfloat16
    return plain_wins and max(row_lengths) <= LONGEST_ROW_WITH_KEPT_SCORES


def _attend_by_torch(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    attend = sdpa_attention_forward if torch_attention(query.device) == "sdpa" else attend_expanded
    return attend(module, query, key, value, None, scaling=scaling, is_causal=True)[0]


def _attend_keeping_scores(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """One row; query heads that share a key head are one batch of G * T queries, so keys are never repeated."""
    _, num_heads, length, size = query.shape
    num_groups = key.shape[1]
    future = _future_mask(query.dtype)[:length, :length].repeat(num_heads // num_groups, 1)
    queries = query.reshape(num_groups, -1, size)
    scores = torch.baddbmm(future.expand(num_groups, -1, -1), queries, key[0].transpose(1, 2), alpha=scaling)
    # softmax sums in float32 inside, so rounding its output is all that bfloat16 costs.
    mixed = torch.bmm(scores.softmax(dim=-1), value[0])
    return mixed.view(1, num_heads, length, size).transpose(1, 2)


@lru_cache(maxsize=1)
def _future_mask(dtype: torch.dtype) -> Tensor:
    size = LONGEST_ROW_WITH_KEPT_SCORES
    return torch.full((size, size), -torch.inf, dtype=dtype).triu(1)


AttentionInterface.register(ATTENTION_NAME, packed_attention)


class ComputeDtypeLoraLinear(LoraLinear):
    """peft's LoRA layer with float32 weights and products in the activations' dtype, without autocast's casts."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        # A variant (DoRA) has a forward pass of its own in peft.
        if self.disable_adapters or self.merged or self.lora_variant:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            down = F.linear(self.lora_dropout[name](x), self.lora_A[name].weight.to(x.dtype))
            up = self.lora_B[name].weight.to(x.dtype)
            flat = torch.addmm(result.flatten(0, -2), down.flatten(0, -2), up.t(), alpha=self.scaling[name])
            result = flat.view_as(result)
        return result


def supervised_loss(model: PreTrainedModel, rows: PackedRows) -> Tensor:
    """Summed cross-entropy of supervised tokens, a float32 scalar with gradient; attention is ``ATTENTION_NAME``."""
    read = {"inputs_embeds": noisy_embeddings(model, rows)} if rows.noise_alpha else {"input_ids": rows.input_ids}
    packed = {"position_ids": rows.position_ids, "row_lengths": rows.row_lengths, "sequences": rows.sequences}
    outputs = model.base_model(**read, **packed, use_cache=False)
    hidden = outputs.last_hidden_state[0].index_select(0, rows.predict_index)
    return _LinearCrossEntropy.apply(hidden, model.get_output_embeddings().weight, rows.targets)


def noisy_embeddings(model: PreTrainedModel, rows: PackedRows) -> Tensor:
    """Embeddings (1, N, C) plus NEFTune's uniform noise, at most alpha / sqrt(T * C) (Jain et al. 2023, 2310.05914).

    T is each row's own length: transformers' hook would take the packed N, and so a noise that packing decides on.
    """
    embeddings = model.get_input_embeddings()(rows.input_ids)
    lengths = torch.tensor(rows.row_lengths, device=embeddings.device)
    most = rows.noise_alpha / (lengths * embeddings.shape[-1]).sqrt()
    most = most.repeat_interleave(lengths)[None, :, None]
    return embeddings + (torch.rand_like(embeddings, dtype=torch.float32) * 2 - 1).mul(most).to(embeddings.dtype)


@torch.no_grad()
def check_loss(model: PreTrainedModel, example: Example) -> None:
    """ValueError where the packed loss of a row is not transformers' own; adapters are fresh (B = 0)."""
    rows = pack_rows([example], model.device)
    labels = torch.tensor([example["labels"]], device=model.device)
    with torch.random.fork_rng(own_generators(model.device)):
        ours = supervised_loss(model, rows).item() / len(rows.targets)
        with attention(model, torch_attention(model.device)):
            plain = model(input_ids=rows.input_ids, labels=labels, use_cache=False).loss.item()
    # A loss that is not finite cannot be compared; training stops at its first step and says so.
    if math.isfinite(plain) and abs(ours - plain) > LOSS_TOLERANCE[model.dtype] * max(1.0, abs(plain)):
        raise ValueError(
            f"loss of the first row is {ours:.5f} packed and {plain:.5f} plain: this model kind is unknown"
        )


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of ``hidden @ weight.T`` against ``targets``, summed, with a frozen ``weight``.

    The gradient with respect to ``hidden`` is made in the forward pass, chunk by chunk, so that no logits are kept.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        size = max(1, LOSS_CHUNK_ELEMENTS[hidden.device.type] // weight.shape[0])
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            log_p = torch.log_softmax(hidden[chunk] @ weight.t(), dim=-1, dtype=torch.float32)
            column = targets[chunk, None]
            total -= log_p.gather(1, column).sum()
            # d loss / d logits = p - 1 at the target, p elsewhere.
            p = log_p.exp_()
            p.scatter_add_(1, column, torch.full_like(column, -1, dtype=p.dtype))
            gradient[chunk] = p.to(hidden.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None
