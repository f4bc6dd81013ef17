"""Attention over a prompt prefix that all rows share, and the slots that hold each row's own keys and values.

Plugged into transformers through its attention interface: no model class or object is changed. The tokens of all rows
travel packed, as one sequence of N tokens, so no linear layer ever works on padding. Each token attends to the shared
prefix (its keys and values are kept once and read once for the whole batch) and to its own row; the two partial results
are merged by their log-sum-exp, which is exact (Hydragen, arXiv 2402.05099, section 3; FlashInfer's cascade inference).
Knows nothing about tokenizers, scheduling or when a row is done.

Letters in shapes: N tokens of one step, B rows that decode, R rows that enter, T their longest, Hkv key/value heads,
G query heads per key/value head, D head size, P prefix length, S capacity of a slot.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

ATTENTION_NAME = "shared_prefix"


@dataclass(frozen=True)
class SharedPrefix:
    """Keys and values of a prompt prefix, computed once. ``store`` is (layers, 2, 1, Hkv, P, D)."""

    tokens: tuple[int, ...]
    store: Tensor


@dataclass(frozen=True)
class PackedStep:
    """Where the packed tokens of one forward pass belong.

    The first ``num_decoding`` tokens are one token each of the rows in slots 0, 1, ...; then come the whole rows that
    enter, one after the other, with nothing of them in the slots yet.
    """

    input_ids: Tensor  # (1, N)
    position_ids: Tensor  # (1, N), counted from the start of the prompt
    write_index: Tensor  # (N * Hkv,) where each token's keys and values go in the flattened slots of a layer
    last_index: Tensor  # (B + R,) index of each row's last token among the N
    num_decoding: int
    decode_length: int  # longest row among those that decode, this step's token included
    decode_mask: Tensor | None  # (B, 1, 1, decode_length), 0 or -inf; None when all are equally long
    pad_index: Tensor  # (R, T) among the entering tokens, short rows repeat their last one
    unpad_index: Tensor  # (entering tokens,) into R * T


class SlotCache(Cache):
    """Preallocated keys and values of up to ``num_slots`` rows, ``capacity`` own tokens each.

    ``update`` has the signature that transformers' attention layers call; it writes this step's tokens into the slots
    and hands back the fresh ones, from which entering rows attend to themselves.
    """

    def __init__(
        self, config: PretrainedConfig, num_slots: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(layers=[])
        self.num_slots, self.capacity = num_slots, capacity
        self.num_kv_heads = config.num_key_value_heads
        shape = (config.num_hidden_layers, 2, num_slots, self.num_kv_heads, capacity, head_size(config))
        # Zeros and not empty memory: a masked position weighs 0, and 0 times a leftover NaN would be NaN.
        self.store = torch.zeros(shape, dtype=dtype, device=device)
        self.prefix: SharedPrefix | None = None
        self.step: PackedStep | None = None

    def begin(self, step: PackedStep, prefix: SharedPrefix | None) -> None:
        """Sets what the coming forward pass works on."""
        self.step, self.prefix = step, prefix

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: object, **kwargs: object) -> tuple:
        """Writes ``key`` and ``value``, both (1, Hkv, N, D), into the slots."""
        for fresh, slots in zip((key, value), self.store[layer_idx], strict=True):
            rows = fresh.transpose(1, 2).reshape(-1, fresh.shape[-1])
            slots.view(-1, fresh.shape[-1]).index_copy_(0, self.step.write_index, rows)
        return key, value

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first ``length`` tokens of slot ``source`` over slot ``target``."""
        self.store[:, :, target, :, :length] = self.store[:, :, source, :, :length]


def head_size(config: PretrainedConfig) -> int:
    """Size of one attention head; older configurations leave it to be derived."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def pack_step(
    cache: SlotCache, decoding: Sequence[tuple[int, int]], entering: Sequence[Sequence[int]], offset: int
) -> PackedStep:
    """Lays out one forward pass.

    Args:
        decoding: (token, number of own tokens already in the slot) of the rows in slots 0, 1, ...
        entering: own tokens of the rows that go into the slots after those.
        offset: number of prefix tokens before each row's own.
    """
    device = cache.store.device
    lengths = [len(tokens) for tokens in entering]
    tokens = [token for token, _ in decoding] + [token for row in entering for token in row]
    positions = [cached for _, cached in decoding] + [position for length in lengths for position in range(length)]
    slots = list(range(len(decoding)))
    slots += [len(decoding) + row for row, length in enumerate(lengths) for _ in range(length)]
    position = torch.tensor(positions, device=device)
    ends = torch.tensor([1] * len(decoding) + lengths, device=device).cumsum(0) - 1
    longest, mask = _decode_mask([cached + 1 for _, cached in decoding], cache.store.dtype, device)
    pad_index, unpad_index = _padding(lengths, device)
    return PackedStep(
        input_ids=torch.tensor([tokens], device=device),
        position_ids=position[None] + offset,
        write_index=_write_index(cache, torch.tensor(slots, device=device), position),
        last_index=ends,
        num_decoding=len(decoding),
        decode_length=longest,
        decode_mask=mask,
        pad_index=pad_index,
        unpad_index=unpad_index,
    )


def _write_index(cache: SlotCache, slot: Tensor, position: Tensor) -> Tensor:
    heads = torch.arange(cache.num_kv_heads, device=slot.device)
    return ((slot[:, None] * cache.num_kv_heads + heads) * cache.capacity + position[:, None]).flatten()


def _decode_mask(lengths: list[int], dtype: torch.dtype, device: torch.device) -> tuple[int, Tensor | None]:
    longest = max(lengths, default=0)
    if min(lengths, default=0) == longest:
        return longest, None
    beyond = torch.arange(longest, device=device) >= torch.tensor(lengths, device=device)[:, None]
    mask = torch.zeros(len(lengths), longest, dtype=dtype, device=device).masked_fill_(beyond, -torch.inf)
    return longest, mask[:, None, None]


def _padding(lengths: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    length = torch.tensor(lengths, dtype=torch.long, device=device)[:, None]
    column = torch.arange(max(lengths, default=0), device=device)
    start = length.cumsum(0) - length
    unpad_index = (column < length).flatten().nonzero().squeeze(1)
    return start + torch.minimum(column, length - 1), unpad_index


# --- steps --------------------------------------------------------------------------------------------------------


def forward_step(model: PreTrainedModel, cache: SlotCache, step: PackedStep, prefix: SharedPrefix | None) -> Tensor:
    """Logits (rows, vocabulary) after each row's last token; only those go through the output layer."""
    cache.begin(step, prefix)
    decoder = getattr(model, model.base_model_prefix)
    hidden = decoder(
        input_ids=step.input_ids,
        position_ids=step.position_ids,
        past_key_values=cache,
        use_cache=True,
        slot_cache=cache,
    ).last_hidden_state[0]
    return model.get_output_embeddings()(hidden[step.last_index])


def compute_prefix(model: PreTrainedModel, tokens: Sequence[int]) -> SharedPrefix:
    """Keys and values of ``tokens``, read once as if they were a row of their own."""
    cache = SlotCache(model.config, 1, len(tokens), model.dtype, model.device)
    forward_step(model, cache, pack_step(cache, [], [tokens], 0), None)
    return SharedPrefix(tuple(tokens), cache.store)


# --- attention ----------------------------------------------------------------------------------------------------


def shared_prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    slot_cache: SlotCache,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The attention function of a layer: ``query`` (1, Hkv * G, N, D), fresh ``key`` and ``value`` (1, Hkv, N, D).

    Returns (1, N, Hkv * G, D) and no weights. What else a layer passes (dropout 0, no window) does not matter here.
    """
    step, slots = slot_cache.step, slot_cache.store[module.layer_idx]
    num_kv_heads = key.shape[1]
    grouped = query[0].transpose(0, 1).unflatten(1, (num_kv_heads, -1))  # (N, Hkv, G, D)
    parts = []
    if step.num_decoding:
        parts.append(_attend_decoding(grouped[: step.num_decoding], slots, step, scaling))
    if len(step.unpad_index):
        fresh = [states[0].transpose(0, 1)[step.num_decoding :] for states in (key, value)]
        parts.append(_attend_entering(grouped[step.num_decoding :], *fresh, step, scaling))
    out, log_sum = parts[0] if len(parts) == 1 else [torch.cat(pair) for pair in zip(*parts, strict=True)]
    if slot_cache.prefix is not None:
        prefix = _attend_prefix(grouped, slot_cache.prefix.store[module.layer_idx], scaling)
        out = merge(out, log_sum, *prefix)
    return out.flatten(1, 2)[None], None


def _attend_decoding(query: Tensor, slots: Tensor, step: PackedStep, scale: float) -> tuple[Tensor, Tensor]:
    """One token a row against its own slot: (B, Hkv, G, D) and log-sums (B, Hkv, G)."""
    key, value = slots[:, : step.num_decoding, :, : step.decode_length]
    return attend(query, key, value, scale, mask=step.decode_mask)


def _attend_entering(
    query: Tensor, key: Tensor, value: Tensor, step: PackedStep, scale: float
) -> tuple[Tensor, Tensor]:
    """Whole rows, causal within each: (tokens, Hkv, G, D) and (tokens, Hkv, G). ``key`` is (tokens, Hkv, D).

    Right-padded only for this: a real token never sees the padding, which comes after it.
    """
    num_rows = len(step.pad_index)
    group = query.shape[2]
    padded = query[step.pad_index].permute(0, 2, 3, 1, 4).flatten(0, 1)  # (R * Hkv, G, T, D)
    # A view that repeats each key/value head for its G query heads: no copy.
    key, value = (
        states[step.pad_index].transpose(1, 2).flatten(0, 1)[:, None].expand(-1, group, -1, -1)
        for states in (key, value)
    )
    out, log_sum = attend(padded, key, value, scale, causal=True)
    out = out.unflatten(0, (num_rows, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1)
    log_sum = log_sum.unflatten(0, (num_rows, -1)).permute(0, 3, 1, 2).flatten(0, 1)
    return out[step.unpad_index], log_sum[step.unpad_index]


def _attend_prefix(query: Tensor, store: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """All N tokens against the one prefix, as one product a key/value head: (N, Hkv, G, D) and (N, Hkv, G)."""
    num_tokens, _, group, _ = query.shape
    folded = query.transpose(0, 1).flatten(1, 2)[None]  # (1, Hkv, N * G, D)
    out, log_sum = attend(folded, *store, scale)
    return (
        out[0].unflatten(1, (num_tokens, group)).transpose(0, 1),
        log_sum[0].unflatten(1, (num_tokens, group)).transpose(0, 1),
    )


def merge(out: Tensor, log_sum: Tensor, other: Tensor, other_log_sum: Tensor) -> Tensor:
    """Attention over the union of two sets of keys from the attention over each, in float32.

    exp(b) / (exp(a) + exp(b)) is sigmoid(b - a), which neither over- nor underflows.
    """
    share = torch.sigmoid(other_log_sum - log_sum).unsqueeze(-1)
    return torch.lerp(out.float(), other.float(), share).to(out.dtype)


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention and the log of its denominator.

    Args:
        query: (A, H, T, D).
        key, value: (A, H, S, D); T = S where ``causal``.
        mask: added to the scores, broadcast to (A, H, T, S).

    Returns:
        (A, H, T, D) in the dtype of ``query`` and (A, H, T) in float32.
    """
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask, scale=scale
        )
    if mask is None and _has_flash_kernel(query):
        # The kernel wants memory of its own for the repeated heads: those of the entering tokens only, so they are few.
        tensors = [tensor.contiguous() for tensor in (query, key, value)]
        return torch.ops.aten._scaled_dot_product_flash_attention(*tensors, 0.0, causal, False, scale=scale)[:2]
    return attend_by_products(query, key, value, scale, causal=causal, mask=mask)


def attend_by_products(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``attend`` written out, for devices and dtypes without a kernel that returns the log-sum-exp."""
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if mask is not None:
        scores = scores + mask
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        scores = scores.masked_fill(future, -torch.inf)
    log_sum = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - log_sum.unsqueeze(-1)).to(value.dtype)
    return weights @ value, log_sum


def _has_flash_kernel(query: Tensor) -> bool:
    half = query.dtype in (torch.float16, torch.bfloat16)
    return half and query.shape[-1] % 8 == 0 and torch.cuda.get_device_capability(query.device) >= (8, 0)


AttentionInterface.register(ATTENTION_NAME, shared_prefix_attention)
