"""Attention over a prompt prefix that all rows share, and the slots that hold each row's own keys and values.

Rows travel packed, without padding. Each token attends to the shared prefix and to its own row; both results are merged
exactly by their log-sum-exp (Hydragen, arXiv 2402.05099, section 3; FlashInfer's cascade inference).
Letters in shapes: N tokens of one step, B rows that decode, R rows that enter, T their longest, Hkv key/value heads,
G query heads per key/value head, D head size, P prefix length, S capacity of a slot.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from lib.engine.kernels import Sequences, attend_in_blocks, attend_sequences, kernel_of

ATTENTION_NAME = "shared_prefix"
# Slots grow by this many tokens.
CAPACITY_STEP = 32
# Where scores are written out, for this many queries at a time: they then stay in a CPU's cache; on a GPU they are
# large enough for its units, and small beside what is reserved for a pass.
NUM_QUERIES = {"cpu": 192, "cuda": 4096, "mps": 192}


@dataclass(frozen=True)
class SharedPrefix:
    """Keys and values of a prompt prefix, computed once: for each layer (2, 1, Hkv, P, D)."""

    tokens: tuple[int, ...]
    layers: tuple[Tensor, ...]


@dataclass(frozen=True)
class PackedStep:
    """Where the tokens of a pass belong: one per decoding row (slots 0, 1, ...), then complete rows that enter."""

    input_ids: Tensor  # (1, N)
    position_ids: Tensor  # (1, N), counted from the start of the prompt
    write_index: Tensor  # (N * Hkv,) where each token's keys and values go in the flattened slots of a layer
    last_index: Tensor  # (B + R,) index of each row's last token among the N
    num_decoding: int
    decode_mask: Tensor  # (B, 1, 1, S): 0 where the row has a token, this step's included, and -inf beyond
    pad_index: Tensor  # (R, T) among the entering tokens, short rows repeat their last one
    unpad_index: Tensor  # (entering tokens,) into R * T
    sequences: "StepSequences | None"  # the same for a kernel that takes rows of any length, where there is one


@dataclass(frozen=True)
class StepSequences:
    """What a step's tokens attend to; None where it has none of them."""

    decoding: Sequences | None  # each row's token to its slot
    entering: Sequences | None  # each row to itself
    prefix: Sequences | None  # all tokens to the prefix


class SlotCache(Cache):
    """Keys and values of up to ``num_slots`` rows; row ``i``'s own tokens are in slot ``i``, from position 0 on."""

    def __init__(self, config: PretrainedConfig, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(layers=[])
        self.num_slots, self.capacity, self.num_kv_heads = num_slots, 0, config.num_key_value_heads
        empty = torch.zeros((2, num_slots, self.num_kv_heads, 0, head_size(config)), dtype=dtype, device=device)
        # A layer's keys, then its values: (2, slots, Hkv, S, D).
        self.slots = [empty] * config.num_hidden_layers
        self.prefix: SharedPrefix | None = None
        self.step: PackedStep | None = None

    def reserve(self, length: int) -> None:
        """Make every slot hold ``length`` tokens; slots grow with the rows: slices would be copied at each step."""
        if length <= self.capacity:
            return
        self.capacity = -(-length // CAPACITY_STEP) * CAPACITY_STEP
        for layer, old in enumerate(self.slots):
            *outer, used, size = old.shape
            # Zeros and not empty memory: a masked position weighs 0, and 0 times a leftover NaN would be NaN.
            self.slots[layer] = old.new_zeros((*outer, self.capacity, size))
            self.slots[layer][..., :used, :] = old

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: object, **kwargs: object) -> tuple:
        """Write ``key`` and ``value`` (1, Hkv, N, D) into the slots; return them for entering rows to attend to."""
        for fresh, slots in zip((key, value), self.slots[layer_idx], strict=True):
            rows = fresh.transpose(1, 2).reshape(-1, fresh.shape[-1])
            slots.view(-1, fresh.shape[-1]).index_copy_(0, self.step.write_index, rows)
        return key, value

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of slot ``source`` over slot ``target``."""
        for slots in self.slots:
            slots[:, target, :, :length] = slots[:, source, :, :length]


def head_size(config: PretrainedConfig) -> int:
    """Size of one attention head; older configurations leave it to be derived."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def pack_step(
    cache: SlotCache,
    decoding: Sequence[tuple[int, int]],
    entering: Sequence[Sequence[int]],
    offset: int,
    num_parked: int = 0,
) -> PackedStep:
    """Lay out one forward pass.

    Args:
        decoding: (token, number of own tokens already in the slot) of the rows in slots 0, 1, ...
        entering: own tokens of the rows that go into the slots after those.
        offset: number of prefix tokens before each row's own.
        num_parked: slots at the front whose rows wait and are fed nothing; then no row may decode.
    """
    device = cache.slots[0].device
    lengths = [len(tokens) for tokens in entering]
    cache.reserve(max([cached + 1 for _, cached in decoding] + lengths))
    tokens = [token for token, _ in decoding] + [token for row in entering for token in row]
    positions = [cached for _, cached in decoding] + [position for length in lengths for position in range(length)]
    slots = list(range(len(decoding)))
    slots += [num_parked + len(decoding) + row for row, length in enumerate(lengths) for _ in range(length)]
    position = torch.tensor(positions, device=device)
    ends = torch.tensor([1] * len(decoding) + lengths, device=device).cumsum(0) - 1
    pad_index, unpad_index = _padding(lengths, device)
    slot, heads = torch.tensor(slots, device=device), torch.arange(cache.num_kv_heads, device=device)
    write_index = (slot[:, None] * cache.num_kv_heads + heads) * cache.capacity + position[:, None]
    beyond = torch.arange(cache.capacity, device=device) > position[: len(decoding), None]
    # The efficient kernel adds it in the dtype of the scores' factors.
    mask_dtype = torch.float32 if device.type == "cpu" else cache.slots[0].dtype
    decode_mask = torch.zeros(beyond.shape, dtype=mask_dtype, device=device)
    varlen = kernel_of(cache.slots[0]) == "varlen"
    return PackedStep(
        input_ids=torch.tensor([tokens], device=device),
        position_ids=position[None] + offset,
        write_index=write_index.flatten(),
        last_index=ends,
        num_decoding=len(decoding),
        decode_mask=decode_mask.masked_fill_(beyond, -torch.inf)[:, None, None],
        pad_index=pad_index,
        unpad_index=unpad_index,
        sequences=_sequences(cache, position[: len(decoding)], lengths, len(tokens), offset) if varlen else None,
    )


def _sequences(cache: SlotCache, position: Tensor, lengths: list[int], num_tokens: int, offset: int) -> StepSequences:
    device, num_decoding = position.device, len(position)
    starts = lambda end, step: torch.arange(0, end + 1, step, dtype=torch.int32, device=device)  # noqa: E731
    decoding = entering = prefix = None
    if num_decoding:
        slot = cache.num_kv_heads * cache.capacity
        used = (position + 1).to(torch.int32)
        decoding = Sequences(starts(num_decoding, 1), starts(num_decoding * slot, slot), 1, cache.capacity, used)
    if lengths:
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        entering = Sequences(ends, ends, max(lengths), max(lengths))
    if offset:
        prefix = Sequences(starts(num_tokens, num_tokens), starts(offset, offset), num_tokens, offset)
    return StepSequences(decoding, entering, prefix)


def _padding(lengths: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    length = torch.tensor(lengths, dtype=torch.long, device=device)[:, None]
    column = torch.arange(max(lengths, default=0), device=device)
    start = length.cumsum(0) - length
    unpad_index = (column < length).flatten().nonzero().squeeze(1)
    return start + torch.minimum(column, length - 1), unpad_index


def forward_step(model: PreTrainedModel, cache: SlotCache, step: PackedStep, prefix: SharedPrefix | None) -> Tensor:
    """Logits (rows, vocabulary) after each row's last token; only those go through the output layer."""
    cache.step, cache.prefix = step, prefix
    decoder = getattr(model, model.base_model_prefix)
    tokens = {"input_ids": step.input_ids, "position_ids": step.position_ids}
    hidden = decoder(**tokens, past_key_values=cache, use_cache=True, slot_cache=cache).last_hidden_state[0]
    return model.get_output_embeddings()(hidden[step.last_index])


def compute_prefix(model: PreTrainedModel, tokens: Sequence[int], portion: int = 0) -> SharedPrefix:
    """Keys and values of ``tokens``, read as if they were a row: at once, or ``portion`` tokens at a time."""
    prefix = None
    for start in range(0, len(tokens), portion or len(tokens)):
        part = tokens[start : start + (portion or len(tokens))]
        cache = SlotCache(model.config, 1, model.dtype, model.device)
        forward_step(model, cache, pack_step(cache, [], [part], start), prefix)
        layers = [slots[..., : len(part), :].contiguous() for slots in cache.slots]
        if prefix is not None:
            layers = [torch.cat(pair, dim=-2) for pair in zip(prefix.layers, layers, strict=True)]
        prefix = SharedPrefix(tuple(tokens[: start + len(part)]), tuple(layers))
    return prefix


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
    """Attention of ``query`` (1, Hkv * G, N, D) to fresh ``key``, ``value`` (1, Hkv, N, D): (1, N, Hkv * G, D)."""
    step, slots = slot_cache.step, slot_cache.slots[module.layer_idx]
    prefix = None if slot_cache.prefix is None else slot_cache.prefix.layers[module.layer_idx]
    if step.sequences is not None:
        return _attend_by_sequences(query, key, value, slots, prefix, step, scaling), None
    num_kv_heads = key.shape[1]
    grouped = query[0].transpose(0, 1).unflatten(1, (num_kv_heads, -1))  # (N, Hkv, G, D)
    parts = []
    if step.num_decoding:
        # One token per row against its own slot.
        key_and_value, first = slots[:, : step.num_decoding], grouped[: step.num_decoding]
        attend_to_slots = attend_in_blocks if kernel_of(query) == "efficient" else attend_by_products
        parts.append(attend_to_slots(first, *key_and_value, scaling, mask=step.decode_mask))
    if len(step.unpad_index):
        fresh = [states[0].transpose(0, 1)[step.num_decoding :] for states in (key, value)]
        parts.append(_attend_entering(grouped[step.num_decoding :], *fresh, step, scaling))
    out, log_sum = _joined(parts)
    if prefix is not None:
        out = merge(out, log_sum, *_attend_prefix(grouped, prefix, scaling))
    return out.flatten(1, 2)[None].to(query.dtype), None


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return parts[0] if len(parts) == 1 else tuple(torch.cat(pair) for pair in zip(*parts, strict=True))


def _attend_by_sequences(
    query: Tensor, key: Tensor, value: Tensor, slots: Tensor, prefix: Tensor | None, step: PackedStep, scale: float
) -> Tensor:
    """The same with one kernel call each for decoding rows, entering rows and the prefix, and without padding."""
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # (N, heads, D)
    num_decoding, where, parts = step.num_decoding, step.sequences, []
    if where.decoding is not None:
        states = (_slots_as_sequences(states[:num_decoding]) for states in slots)
        parts.append(attend_sequences(query[:num_decoding], *states, where.decoding, scale))
    if where.entering is not None:
        states = (states[num_decoding:] for states in (query, key, value))
        parts.append(attend_sequences(*states, where.entering, scale, causal=True))
    out, log_sum = _joined(parts)
    if prefix is not None:
        keys, values = (states[0].transpose(0, 1) for states in prefix)
        out = merge(out, log_sum, *attend_sequences(query, keys, values, where.prefix, scale))
    return out[None].to(query.dtype)


def _slots_as_sequences(states: Tensor) -> Tensor:
    """Slots (B, Hkv, S, D) as tokens (..., Hkv, D) without a copy: slot i's begin at token i * Hkv * S.

    A token's heads lie S tokens apart, so most tokens of this view are other heads' and belong to no sequence.
    """
    num_slots, num_heads, capacity, size = states.shape
    num_tokens = (num_slots - 1) * num_heads * capacity + capacity
    return states.as_strided((num_tokens, num_heads, size), (size, capacity * size, 1))


def _attend_entering(
    query: Tensor, key: Tensor, value: Tensor, step: PackedStep, scale: float
) -> tuple[Tensor, Tensor]:
    """Complete rows, causal within each; right-padded only here, where no real token sees the padding after it."""
    padded = query[step.pad_index].permute(0, 2, 3, 1, 4)  # (R, Hkv, G, T, D)
    key, value = (states[step.pad_index].transpose(1, 2) for states in (key, value))  # (R, Hkv, T, D)
    out, log_sum = attend_causally(padded, key, value, scale)
    out, log_sum = out.permute(0, 3, 1, 2, 4).flatten(0, 1), log_sum.permute(0, 3, 1, 2).flatten(0, 1)
    return out[step.unpad_index], log_sum[step.unpad_index]


def _attend_prefix(query: Tensor, prefix: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """All N tokens against the one prefix, as one product per key/value head: (N, Hkv, G, D) and (N, Hkv, G)."""
    num_tokens, _, group, _ = query.shape
    folded = query.transpose(0, 1).flatten(1, 2)[None]  # (1, Hkv, N * G, D)
    out, log_sum = (part[0].unflatten(1, (num_tokens, group)) for part in attend(folded, *prefix, scale))
    return out.transpose(0, 1), log_sum.transpose(0, 1)


def merge(out: Tensor, log_sum: Tensor, other: Tensor, other_log_sum: Tensor) -> Tensor:
    """Attention over the union of two sets of keys from the attention over each, in float32."""
    share = torch.sigmoid(other_log_sum - log_sum).unsqueeze(-1)
    return torch.lerp(out.float(), other.float(), share)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention (A, H, T, D) to (A, H, S, D) and the log of its denominator (A, H, T), both float32."""
    if kernel_of(query) in ("flash_cpu", "efficient"):
        return attend_in_blocks(query, key, value, scale)
    return attend_in_portions(query, key, value, scale)


def attend_causally(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``attend`` of each token to itself and those before: (R, Hkv, G, T, D) to (R, Hkv, T, D)."""
    if kernel_of(query) in ("flash_cpu", "efficient"):
        # A view that shows each key/value head to its G query heads: no copy.
        shape = (-1, -1, query.shape[2], -1, -1)
        states = (query, key.unsqueeze(2).expand(shape), value.unsqueeze(2).expand(shape))
        out, log_sum = attend_in_blocks(*(state.flatten(0, 1) for state in states), scale, causal=True)
        return out.unflatten(0, query.shape[:2]), log_sum.unflatten(0, query.shape[:2])
    parts = []
    num_queries = NUM_QUERIES[query.device.type]
    for start in range(0, query.shape[-2], num_queries):
        last = start + num_queries
        queries = query[..., start:last, :]
        parts.append(_attend_to_last(queries, key[..., :last, :], value[..., :last, :], scale))
    return torch.cat([out for out, _ in parts], dim=-2), torch.cat([log_sum for _, log_sum in parts], dim=-1)


def _attend_to_last(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of the last T of S tokens: ``query`` (R, Hkv, G, T, D), ``key`` and ``value`` (R, Hkv, S, D)."""
    group, num_queries = query.shape[2:4]
    num_before = key.shape[-2] - num_queries
    future = torch.full((num_queries, key.shape[-2]), -torch.inf, device=query.device).triu_(num_before + 1)
    out, log_sum = attend_by_products(query.flatten(2, 3), key, value, scale, mask=future.repeat(group, 1))
    return out.unflatten(2, (group, -1)), log_sum.unflatten(2, (group, -1))


def attend_by_products(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``attend`` written out, with a float32 ``mask`` added to the scores (A, H, T, S): for few queries per key."""
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        # In float16, products of Qwen2.5's large keys overflow before they are scaled (transformers PR 33317), and so
        # may sums of values. A CPU keeps its bfloat16 units, whose range is float32's.
        query, key, value = query.float(), key.float(), value.float()
    scores = (query @ key.transpose(-1, -2)).float().mul_(scale)
    if mask is not None:
        scores += mask
    return _weigh(scores, value)


def attend_in_portions(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``attend`` written out for many queries, with scores in float32 that are never all there at once."""
    # Exact in bfloat16 on a CPU: what is rounded inside the product was bfloat16 before.
    key = key.transpose(-1, -2).float()
    # As above: sums of values overflow float16.
    value = value.float() if value.dtype == torch.float16 else value
    parts = []
    for portion in query.chunk(-(-query.shape[-2] // NUM_QUERIES[query.device.type]), dim=-2):
        with _bfloat16_products(query.dtype == torch.bfloat16):
            scores = portion.float() @ key
        parts.append(_weigh(scores.mul_(scale), value))
    return torch.cat([out for out, _ in parts], dim=-2), torch.cat([log_sum for _, log_sum in parts], dim=-1)


def _weigh(scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over float32 ``scores`` (A, H, T, S), which it overwrites: the weighted values and the log-sums."""
    top = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    return (weights.to(value.dtype) @ value) / total, (top + total.log()).squeeze(-1)


@contextmanager
def _bfloat16_products(allowed: bool) -> Iterator[None]:
    """Let float32 products use bfloat16 units with float32 sums; never for positions, which it rounds."""
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    if allowed:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


AttentionInterface.register(ATTENTION_NAME, shared_prefix_attention)
