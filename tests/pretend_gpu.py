"""A GPU made of the CPU, for the CUDA branches of generation and training: ``with pretend_gpu((7, 5)) as gpu``.

Its tensors say ``cuda:0``, hold CPU memory and refuse to meet a CPU tensor. Every operator computes with real numbers,
dtypes and shapes; fused attention is computed by references with the signatures and limits of torch's own kernels.
Counted are launches, by operator, and the places where the host waits for the device or copies to it. Speed, the
allocator, rounding inside real kernels and bitsandbytes' kernels are not imitated: ``pytest -m gpu`` is for those.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
GIB = 2**30
# Operators that launch nothing.
VIEWS = frozenset(
    [
        "view",
        "_unsafe_view",
        "expand",
        "permute",
        "transpose",
        "t",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "alias",
        "detach",
        "as_strided",
        "split",
        "unbind",
        "split_with_sizes",
        "lift_fresh",
        "_reshape_alias",
        "diagonal",
        "unfold",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
    ]
)
# Operators that CUDA allows between devices.
MAY_MIX = {"_to_copy", "copy_", "index", "index_put", "index_put_", "_index_put_impl_", "_fused_adamw_", "set_data"}
# Operators whose result the host waits for.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}
# Those of the operators without a deterministic kernel on CUDA that a language model may meet
# (the documentation of torch.use_deterministic_algorithms).
NOT_DETERMINISTIC = {"put_", "histc", "bincount", "kthvalue", "median", "nll_loss2d_forward", "_ctc_loss"}


class GpuTensor(torch.Tensor):
    """A tensor of the pretended GPU; ``held`` is the CPU tensor with its values."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "GpuTensor":
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), **layout, dtype=held.dtype, device="cpu")

    def __init__(self, held: Tensor) -> None:
        self.held = held

    # C++ takes it for a tensor of the CPU: it may know of no other device.
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.to("cpu")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __repr__(self, **kwargs: Any) -> str:
        return f"GpuTensor({self.held!r})"

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.held.detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return PretendGpu.current.call(func, args, kwargs or {})


class PretendGpu(TorchDispatchMode):
    """Runs operators on what GPU tensors hold, and counts."""

    current: "PretendGpu"

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__()
        self.capability = capability
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.largest = 0  # elements of the largest tensor that an operator made
        PretendGpu.current = self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.call(func, args, kwargs or {})

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The operator ``func``: on the GPU where one of its tensors is there, or where it makes one there."""
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = [tensor for tensor in tensors if isinstance(tensor, GpuTensor)]
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        if not on_gpu and not _is_cuda(kwargs.get("device")):
            return func(*args, **kwargs)
        self._refuse(name, on_gpu, [tensor for tensor in tensors if not isinstance(tensor, GpuTensor)])
        self._count(name, args)
        if "device" in kwargs:
            # C++ names the device that it takes a tensor to be on; true moves go through ``_Move``.
            kwargs["device"] = torch.device("cpu")
        held_args, held_kwargs = tree_map(_held, (args, kwargs))
        with _disable_current_modes():
            out = KERNELS.get(name, func)(*held_args, **held_kwargs)
        self.largest = max([self.largest, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        if name == "copy_" and not isinstance(args[0], GpuTensor):
            return out
        out = tree_map(lambda leaf: GpuTensor(leaf) if isinstance(leaf, Tensor) else leaf, out)
        return out if name in KERNELS else return_and_correct_aliasing(func, args, kwargs, out)

    def _refuse(self, name: str, on_gpu: list[GpuTensor], others: list[Tensor]) -> None:
        mixed = on_gpu and any(tensor.dim() for tensor in others)
        if mixed and name not in MAY_MIX:
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} found cuda:0 and cpu")
        if name in NOT_DETERMINISTIC and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(f"{name} does not have a deterministic implementation")

    def _count(self, name: str, args: Any) -> None:
        if name not in VIEWS:
            self.launches[name] += 1
        by_mask = name == "index" and any(
            isinstance(leaf, GpuTensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1:])
        )
        between = name == "copy_" and isinstance(args[0], GpuTensor) != isinstance(args[1], GpuTensor)
        if name in WAITS or by_mask or between:
            self.waits[name] += 1


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, GpuTensor) else leaf


class _Move(torch.autograd.Function):
    """``Tensor.to`` another device."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, to_gpu: bool, dtype: torch.dtype) -> Tensor:
        PretendGpu.current.waits["to the GPU" if to_gpu else "to the CPU"] += 1
        ctx.back = (not to_gpu, tensor.dtype)
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            moved = _held(tensor).detach().clone().to(dtype)
            return GpuTensor(moved) if to_gpu else moved

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Move.apply(gradient, *ctx.back), None, None


class _Moves(TorchFunctionMode):
    """Calls in which C++ would look for a CUDA build."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and _is_cuda(kwargs.get("device")):
            PretendGpu.current.waits["to the GPU"] += 1
            return GpuTensor(func(*args, **{key: value for key, value in kwargs.items() if key != "device"}))
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.cuda:
            return args[0].to(CUDA)
        if func is torch.Tensor.to:
            return self._to(func, args, kwargs)
        return func(*args, **kwargs)

    def _to(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        given = [*args[1:], *kwargs.values()]
        like = next((one for one in given if isinstance(one, Tensor)), args[0])
        device = next((torch.device(one) for one in given if isinstance(one, str | torch.device)), like.device)
        dtype = next((one for one in given if isinstance(one, torch.dtype)), like.dtype)
        if device.type != args[0].device.type:
            return _Move.apply(args[0], device.type == "cuda", dtype)
        with torch._C.DisableTorchFunction():
            return func(args[0], dtype)


# --- kernels --------------------------------------------------------------------------------------------------------


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, H, T, D) and log-sum-exp (B, H, T): products in float32, as fused kernels sum; ``hidden`` where True."""
    scores = query.float() @ key.float().transpose(-1, -2) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf) if hidden.dtype == torch.bool else scores + hidden.float()
    return (scores.softmax(-1) @ value.float()).to(query.dtype), scores.logsumexp(-1)


def _future(num_queries: int, num_keys: int, causal: bool) -> Tensor | None:
    """Bottom right aligned, as in FlashAttention; for as many queries as keys it is the same either way."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool).triu(num_keys - num_queries + 1) if causal else None


def _require_half(kernel: str, capability: tuple[int, int], *states: Tensor) -> None:
    half = states[0].dtype in (torch.float16, torch.bfloat16) and len({state.dtype for state in states}) == 1
    assert half and PretendGpu.current.capability >= capability, f"{kernel} takes no {states[0].dtype} here"
    assert not (states[0].dtype == torch.bfloat16 and PretendGpu.current.capability < (8, 0)), "no bfloat16 here"
    assert all(state.shape[-1] % 8 == 0 and state.stride(-1) == 1 for state in states), f"{kernel}: {states[0].shape}"
    assert states[0].shape[-1] <= 256


def _efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """aten::_scaled_dot_product_efficient_attention: no grouped heads, log-sum-exp padded to a multiple of 32."""
    _require_half("efficient attention", (5, 0), query, key, value)
    assert query.shape[:2] == key.shape[:2] == value.shape[:2] and not dropout_p and compute_log_sumexp
    hidden = _future(query.shape[-2], key.shape[-2], is_causal)
    if attn_bias is not None:
        assert not is_causal and attn_bias.dtype == query.dtype
        assert attn_bias.shape == (*query.shape[:3], key.shape[-2]), attn_bias.shape
        assert attn_bias.stride(-1) == 1 and all(stride % 8 == 0 for stride in attn_bias.stride()[:-1])
        hidden = attn_bias
    out, log_sum = _attend(query, key, value, scale, hidden)
    padded = torch.full((*log_sum.shape[:2], -(-log_sum.shape[2] // 32) * 32), torch.inf)
    padded[..., : log_sum.shape[2]] = log_sum
    return out, padded, torch.empty(0), torch.empty(0)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch_attn::_varlen_attn over (tokens, heads, D): output, log-sum-exp (heads, tokens), random state."""
    _require_half("varlen_attn", (8, 0), query, key, value)
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and cu_seq_q.is_contiguous() and cu_seq_k.is_contiguous()
    assert seqused_k is None or (seqused_k.dtype == torch.int32 and not query.requires_grad)
    assert window_size == ([-1, 0] if is_causal else [-1, -1]) and block_table is None
    assert (query.shape[1] == key.shape[1]) or enable_gqa
    out, log_sum = torch.empty_like(query), torch.empty(query.shape[1], len(query))
    for one, (first, last) in enumerate(_spans(cu_seq_q)):
        start, end = _spans(cu_seq_k)[one]
        end = end if seqused_k is None else start + int(seqused_k[one])
        assert last - first <= max_q and end - start <= max_k
        states = (query[first:last], *(_repeat(state[start:end], query.shape[1]) for state in (key, value)))
        future = _future(last - first, end - start, is_causal)
        part, part_sum = _attend(*(state.transpose(0, 1)[None] for state in states), scale, future)
        out[first:last], log_sum[:, first:last] = part[0].transpose(0, 1), part_sum[0]
    assert int(cu_seq_q[-1]) == len(query)
    return out, log_sum, torch.zeros(2, dtype=torch.uint64)


def _varlen_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    rng_state: Tensor,
    scale: float | None = None,
    window_size: list[int] | None = None,
) -> tuple[Tensor, ...]:
    """torch_attn::_varlen_attn_backward, from the log-sum-exp as FlashAttention does it, in float32."""
    gradients = [torch.zeros_like(state, dtype=torch.float32) for state in (query, key, value)]
    group = query.shape[1] // key.shape[1]
    for (first, last), (start, end) in zip(_spans(cu_seq_q), _spans(cu_seq_k), strict=True):
        own = [state[first:last].float().transpose(0, 1) for state in (query, out, grad_out)]
        keys, values = (_repeat(state[start:end].float(), query.shape[1]).transpose(0, 1) for state in (key, value))
        scores = own[0] @ keys.transpose(-1, -2) * scale - lse[:, first:last, None]
        if is_causal:
            scores = scores.masked_fill(_future(last - first, end - start, is_causal), -torch.inf)
        weights = scores.exp()
        of_scores = weights * (own[2] @ values.transpose(-1, -2) - (own[1] * own[2]).sum(-1, keepdim=True)) * scale
        parts = (of_scores @ keys, of_scores.transpose(-1, -2) @ own[0], weights.transpose(-1, -2) @ own[2])
        places = (slice(first, last), slice(start, end), slice(start, end))
        for gradient, part, place, heads in zip(gradients, parts, places, (1, group, group), strict=True):
            gradient[place] += part.unflatten(0, (-1, heads)).sum(1).transpose(0, 1)
    return tuple(gradient.to(query.dtype) for gradient in gradients)


def _spans(starts: Tensor) -> list[tuple[int, int]]:
    return list(zip(starts.tolist()[:-1], starts.tolist()[1:], strict=True))


def _repeat(state: Tensor, num_heads: int) -> Tensor:
    return state.repeat_interleave(num_heads // state.shape[1], dim=1)


KERNELS = {
    "_scaled_dot_product_efficient_attention": _efficient,
    "_varlen_attn": _varlen,
    "_varlen_attn_backward": _varlen_backward,
}


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention, counted by the path that torch takes: below 8.0, grouped heads leave ``math``."""
    gpu = PretendGpu.current
    fused = query.dtype != torch.float32 and (gpu.capability >= (8, 0) or not enable_gqa)
    gpu.launches["sdpa fused" if fused else "sdpa math"] += 1
    key, value = (_repeat(state, query.shape[1]) for state in (key, value))
    hidden = attn_mask
    if is_causal:
        hidden = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).triu(1)
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        hidden = attn_mask.logical_not()
    out, _ = _attend(query, key, value, scale or query.shape[-1] ** -0.5, hidden)
    # Padding that sees nothing.
    return out.nan_to_num(0.0)


# --- the machine ----------------------------------------------------------------------------------------------------


def _torch_cuda(capability: tuple[int, int], total_gib: int) -> dict[str, Any]:
    """What ``torch.cuda`` answers."""
    properties = {"major": capability[0], "minor": capability[1], "name": "pretended", "multi_processor_count": 40}
    constant = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": capability,
        "get_device_name": "pretended",
        "get_arch_list": [f"sm_{capability[0]}{capability[1]}"],
        "get_device_properties": SimpleNamespace(**properties, total_memory=total_gib * GIB),
        "mem_get_info": ((total_gib - 1) * GIB, total_gib * GIB),
        "memory_reserved": 0,
        "memory_allocated": 0,
        "max_memory_allocated": GIB,
        "max_memory_reserved": 2 * GIB,
        "get_rng_state_all": [],
    }
    nothing = ("_lazy_init", "set_device", "empty_cache", "synchronize", "manual_seed", "manual_seed_all")
    nothing += ("set_rng_state_all", "reset_peak_memory_stats")
    answers = {name: lambda *args, _value=value, **kwargs: _value for name, value in constant.items()}
    answers |= {name: lambda *args, **kwargs: None for name in nothing}
    # Its operators draw from the CPU's generator.
    states = {"get_rng_state": lambda *args: torch.get_rng_state()}
    return answers | states | {"set_rng_state": lambda state, *args: torch.set_rng_state(state)}


@contextmanager
def pretend_gpu(capability: tuple[int, int], total_gib: int = 15) -> Iterator[PretendGpu]:
    """Within it, ``cuda`` is a device with this compute capability and memory."""
    gpu = PretendGpu(capability)
    answers = _torch_cuda(capability, total_gib)
    # Module.to puts a new parameter in place of one that was on the CPU.
    compatible = lambda one, other: isinstance(one, GpuTensor) == isinstance(other, GpuTensor)  # noqa: E731
    with ExitStack() as stack:
        # Not in ``_Moves``, which is off while ``Tensor.backward`` computes activations again.
        stack.enter_context(patch.object(torch.nn.functional, "scaled_dot_product_attention", _sdpa))
        stack.enter_context(patch.object(torch, "_has_compatible_shallow_copy_type", compatible))
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
            if name.removesuffix("_all") in ("get_rng_state", "set_rng_state"):
                stack.enter_context(patch.object(torch.cuda.random, name, answer))
        stack.enter_context(_Moves())
        stack.enter_context(gpu)
        yield gpu
