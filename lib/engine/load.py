"""Models ready for use: device and dtype, tokenizer and prompts, the 4-bit base, the dense model of an evaluation.

Training and evaluation must compute the same function. On a CPU, bitsandbytes re-packs an NF4 layer at the first eval
pass, which moves logits by up to 0.9, and dequantising after that gives garbage. So weights are dequantised right after
loading, which equals the packed layers in train mode exactly, and the adapter is merged into those (into the original
16-bit weights it would not fit, see peft issue 2321 and transformers issue 31293).
"""

import math
import re
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from jinja2 import TemplateError
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lib.engine import dense_cache
from lib.engine.memory import free_memory_bytes, release_memory
from lib.engine.quiet import quiet_loading
from lib.engine.trial import TrialError, try_patterns, try_template
from lib.record.gpus import nvidia_smi, visible_gpus
from lib.record.paths import ArtifactError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DEVICES = ("cpu", "cuda", "mps")
QUANTIZATIONS = ("nf4", "none")
# Of a machine without bitsandbytes.
DENSE_REMEDY = "set quantization: none and judge_quantization: none"
GIB = 2**30
# Packed NF4: half a byte a weight, and a little for the double-quantised block scales.
NF4_BYTES_PER_WEIGHT = 0.52
UNPACKED = re.compile(r"embed|lm_head|norm")
# Left free beside the weights when training keeps them dense: activations, optimizer and what else runs here.
TRAINING_RESERVE_BYTES = 2 * GIB
# Beside the weights of a judge: a few rows' activations, keys and logits.
JUDGING_RESERVE_BYTES = GIB
# Tried in this order where a tokenizer pads with its end-of-sequence token or with nothing.
PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>")

# Put before a chat template without a system role (Gemma, early Mistral): the system message begins the first user
# turn. As part of the template it enters every protocol's hash, and a merged model is saved with it.
SYSTEM_IN_USER_TURN = (
    "{% if messages[0]['role'] == 'system' and messages[1:] %}"
    "{% set messages = [{'role': messages[1]['role'], 'content': messages[0]['content'] + '\n\n' "
    "+ messages[1]['content']}] + messages[2:] %}{% endif %}"
)

Message = Mapping[str, str]


class ModelError(Exception):
    """A model, tokenizer, device or dtype cannot be used; the text says what is allowed and what to do."""


@dataclass(frozen=True)
class Runtime:
    """Where the model runs and in which dtype, and why."""

    device: str
    dtype: torch.dtype
    reason: str


def resolve_runtime(device: str = "auto", compute_dtype: str = "auto") -> Runtime:
    """Device and dtype of this machine, or ModelError for an unknown name or a combination that it does not have.

    ``auto`` takes CUDA where there is a GPU, and the fastest dtype of the hardware itself: bfloat16 on GPUs of compute
    capability 8 and CPUs with AVX-512 or AMX bfloat16, float16 on older GPUs (T4), else float32. A Mac's GPU (``mps``)
    is used only where it is requested.
    """
    _require_one_of("device", device, ("auto", *DEVICES))
    _require_one_of("compute_dtype", compute_dtype, ("auto", *DTYPES))
    if device in ("auto", "cuda") and (why := _why_gpu_is_no_use()):
        raise ModelError(f"device is {device!r} and this machine has a GPU, but {why}; or use device: cpu, without it")
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("device is 'cuda' but torch sees no CUDA GPU here; use device: auto or cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise ModelError("device is 'mps' but torch sees no GPU of a Mac here; use device: auto or cpu")
    chosen = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    found = "a GPU is there" if chosen == "cuda" else "no CUDA GPU here"
    name, why = _fastest_dtype(chosen) if compute_dtype == "auto" else (compute_dtype, "requested")
    if chosen == "cpu" and name == "float16":
        raise ModelError("compute_dtype is 'float16' on the CPU, where it is slow and overflows; use auto or float32")
    if chosen == "mps" and name == "bfloat16":
        raise ModelError("compute_dtype is 'bfloat16' on mps, where not every Mac has it; use auto or float16")
    why_device = "requested" if device != "auto" else found
    return Runtime(chosen, DTYPES[name], f"{_device_name(chosen)} ({why_device}), {name} ({why})")


def _why_gpu_is_no_use() -> str:
    """Why torch cannot use the GPU that is there, and what to do; "" where it can, and where there is none."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs alone"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if _has_machine_code(torch.cuda.get_arch_list(), major, minor):
            return ""
        why = f"torch {torch.__version__}, built for {build}, has no kernels for its compute capability {major}.{minor}"
        return f"{why}; install a build of torch that has them"
    driver = nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader") if visible_gpus() else ""
    if not driver.strip():
        return ""
    try:
        torch.cuda.init()
        reason = "it sees no device"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
    why = (
        f"torch {torch.__version__}, built for {build}, cannot use it with NVIDIA driver {driver.split()[0]}: {reason}"
    )
    return f"{why}; install torch for a CUDA that this driver has (pytorch.org, Get started), or a newer driver"


def _has_machine_code(builds: Sequence[str], major: int, minor: int) -> bool:
    """Whether one of torch's builds ("sm_75", "compute_90") runs on this compute capability."""
    if not any(build.startswith("sm_") for build in builds):
        return True
    for kind, number in re.findall(r"\b(sm|compute)_(\d+)", " ".join(builds)):
        built = divmod(int(number), 10)
        # Machine code runs on its major version, from its minor one on; an intermediate form on all that is newer.
        if built <= (major, minor) and (kind == "compute" or built[0] == major):
            return True
    return False


def _require_one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ModelError(f"{key} is {value!r}; allowed: {', '.join(allowed)}")


def _fastest_dtype(device: str) -> tuple[str, str]:
    if device == "cuda":
        # torch.cuda.is_bf16_supported() also answers yes for GPUs that only emulate it, a T4 among them.
        major, minor = torch.cuda.get_device_capability()
        return ("bfloat16" if major >= 8 else "float16"), f"compute capability {major}.{minor}"
    if device == "mps":
        return "float32", "as exact as on a CPU; compute_dtype: float16 takes half the memory and can overflow"
    capabilities = torch.cpu.get_capabilities()
    found = [name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name, False)]
    return ("bfloat16", f"the CPU has {found[0]}") if found else ("float32", "the CPU has no bfloat16 instructions")


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    if device == "mps":
        return "GPU of a Mac"
    num_threads = torch.get_num_threads()
    return f"CPU with {num_threads} {'thread' if num_threads == 1 else 'threads'}"


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``, with a pad token and a chat template that takes a system message, or ModelError."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder), use_fast=True, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise ModelError(f"the tokenizer in {folder} has no chat template; use an instruct model's tokenizer")
    try:
        render = partial(tokenizer.apply_chat_template, tokenize=False, enable_thinking=False)
        try_template(render, tokenizer.get_chat_template())
    except TrialError as error:
        raise ModelError(
            f"the chat template in {folder} {error}; choose another base_model or safeguard_model"
        ) from None
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        vocabulary = tokenizer.get_vocab()
        known = [token for token in PAD_TOKENS if token in vocabulary and token != tokenizer.eos_token]
        tokenizer.pad_token = known[0] if known else tokenizer.eos_token
    if _why_no_system_role(tokenizer):
        tokenizer.chat_template = SYSTEM_IN_USER_TURN + tokenizer.get_chat_template()
    if why := _why_no_system_role(tokenizer):
        raise ModelError(
            f"the chat template in {folder} cannot be used: {why}. Allowed are models whose template takes a system "
            "message, or user and assistant turns alone; choose another base_model or safeguard_model"
        )
    return tokenizer


def _why_no_system_role(tokenizer: PreTrainedTokenizerBase) -> str:
    """Why the chat template does not show a system message; empty where it does."""
    probe = [{"role": "system", "content": "Count to 7."}, {"role": "user", "content": "Now."}]
    try:
        text = tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    except TemplateError as error:
        return f"it refuses a system message and a question ({error})"
    # Some templates leave out what they do not know, without a word.
    return "" if all(turn["content"] in text for turn in probe) else "it leaves a system message out"


def place_of_system_message(tokenizer: PreTrainedTokenizerBase) -> str:
    """Where prompts hold the system message, in words for the record."""
    if tokenizer.get_chat_template().startswith(SYSTEM_IN_USER_TURN):
        return "at the beginning of the first user turn, because the chat template has no system role"
    return "in a separate turn"


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool = True
) -> list[int]:
    """Token ids for training, evaluation and the judge alike; thinking is always off (Qwen3: an empty block)."""
    how = {"tokenize": True, "return_dict": False, "enable_thinking": False}
    return tokenizer.apply_chat_template(list(messages), add_generation_prompt=add_generation_prompt, **how)


def render_completion(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Prompt and completion ids of a conversation that ends in an assistant turn, split where generation begins.

    Raises ModelError where a finished turn's prompt is rendered differently: evaluation would never show such a row.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise ModelError("the last message of a training conversation must have the role 'assistant'")
    prompt = render_prompt(tokenizer, messages[:-1])
    full = render_prompt(tokenizer, messages, add_generation_prompt=False)
    if full[: len(prompt)] != prompt:
        raise ModelError(
            "the tokens of the prompt are not the beginning of the tokens of the conversation: the chat template or "
            f"the first characters of the answer ({messages[-1]['content'][:10]!r}) change them; remove blanks, line "
            "breaks and thinking blocks from the beginning of the answer"
        )
    return prompt, full[len(prompt) :]


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the special token that ends an assistant turn (``<|im_end|>``, ...); ModelError without one."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    _, completion = render_completion(tokenizer, messages)
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    found = [token_id for token_id in completion if token_id in special]
    if not found:
        raise ModelError("the chat template ends assistant turns with no special token; use an instruct model's")
    return found[0]


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end generation, sorted: the model's, the tokenizer's and the template's end of turn."""
    declared = model.generation_config.eos_token_id
    ids = set(declared) if isinstance(declared, list) else {declared}
    ids |= {tokenizer.eos_token_id, end_of_turn_id(tokenizer)}
    return sorted(ids - {None})


def load_base(folder: str | Path, runtime: Runtime, quantization: str) -> PreTrainedModel:
    """The base model: ``nf4`` packed with double quantisation, for training only (module docstring), or plain."""
    _require_one_of("quantization", quantization, QUANTIZATIONS)
    _weight_files(Path(folder))
    if quantization == "nf4":
        four_bit_library(runtime.device)
    # A model that was here before may live on in cycles.
    release_memory()
    with quiet_loading():
        packed = nf4_config(runtime.dtype) if quantization == "nf4" else None
        how = {"dtype": runtime.dtype, "device_map": {"": runtime.device}, "quantization_config": packed}
        safe = {"use_safetensors": True, "trust_remote_code": False}
        model = AutoModelForCausalLM.from_pretrained(str(folder), **how, **safe)
    return model.requires_grad_(False)


def load_dense(
    folder: str | Path,
    runtime: Runtime,
    quantization: str,
    adapter_dir: str | Path | None = None,
    adapter_scale: float = 1.0,
) -> PreTrainedModel:
    """The model that evaluation runs on: dense weights in the runtime's dtype, adapter merged, eval mode, frozen.

    With ``nf4`` its weights are the dequantised 4-bit ones: what QLoRA training optimised, up to the rounding of the
    merged weights. ``adapter_scale`` multiplies the adapter's effect: 0 is the base model, 1 the adapter as trained.
    """
    model = _load_dequantized(Path(folder), runtime, quantization)
    if adapter_dir is not None:
        model = merge_adapter(model, Path(adapter_dir), adapter_scale)
    return model.eval().requires_grad_(False)


def plan_judge(folder: str | Path, runtime: Runtime, quantization: str) -> tuple[str, str]:
    """How a judge's weights are held, "dense" or "packed", and what that takes; ModelError where it does not fit.

    Packed NF4 weights are the same function up to rounding, slower, for where their dense copies do not fit.
    """
    if quantization == "nf4":
        four_bit_library(runtime.device, "judge_quantization is 'nf4'")
    free = free_memory_bytes(torch.device(runtime.device))
    for kind in ("dense", "packed") if quantization == "nf4" else ("dense",):
        need = _judging_bytes(Path(folder), runtime.dtype, quantization, kind)
        text = f"judge_quantization {quantization!r}, {kind} weights, {str(runtime.dtype).removeprefix('torch.')}: "
        text += f"{need / GIB:.1f} GiB are needed at the peak, {free / GIB:.1f} GiB are free on {runtime.device}"
        if need <= free:
            return kind, text
    can_pack = quantization == "none" and runtime.device != "mps"
    remedy = "set judge_quantization=nf4, " if can_pack else ""
    raise ModelError(f"the judge does not fit: {text}; {remedy}free memory, or name a smaller safeguard_model")


def _judging_bytes(folder: Path, dtype: torch.dtype, quantization: str, kind: str) -> int:
    """Peak of loading and judging, one model in memory: its weights, the largest of them in the making, and rows."""
    shapes = _weight_shapes(folder)
    dense = sum(map(math.prod, shapes.values())) * dtype.itemsize
    largest = max(map(math.prod, shapes.values())) * dtype.itemsize
    # Embeddings, output and norms are never packed.
    packed = [math.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and not UNPACKED.search(name)]
    four_bit = dense - sum(packed) * dtype.itemsize + math.ceil(sum(packed) * NF4_BYTES_PER_WEIGHT)
    # Both copies are there while a model is dequantised.
    weights = {"packed": four_bit, "dense": dense + (four_bit if quantization == "nf4" else 0)}[kind]
    return weights + largest + JUDGING_RESERVE_BYTES


def load_judge(folder: str | Path, runtime: Runtime, quantization: str) -> PreTrainedModel:
    """The judge as ``plan_judge`` holds it, in eval mode, frozen."""
    kind, _ = plan_judge(folder, runtime, quantization)
    if kind == "dense":
        return load_dense(folder, runtime, quantization)
    bitsandbytes = four_bit_library(runtime.device)
    model = load_base(folder, runtime, quantization).eval()
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # In eval mode it would be packed again on a CPU (module docstring).
            module.train()
    return model


def reset_peak_memory(device: torch.device) -> None:
    """Let ``peak_memory_gib`` count from now on, on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gib(device: str) -> float:
    """Highest memory in GiB: taken on the GPU since training began, or resident of this process on the CPU so far."""
    if device == "cuda":
        # Reserved, with what lies between tensors: a GPU with less runs out of memory.
        return torch.cuda.max_memory_reserved() / GIB
    if device == "mps":
        # What its driver holds now: it counts no peak, but keeps what was freed.
        return torch.mps.driver_allocated_memory() / GIB
    # It never falls again, so a notebook's number covers all that its kernel did.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def four_bit_library(device: str, wanted: str = "quantization is 'nf4'", remedy: str = DENSE_REMEDY) -> ModuleType:
    """bitsandbytes, for what is ``wanted``; ModelError where it is missing or does not serve ``device``."""
    if device == "mps":
        raise ModelError(f"{wanted}, which is not supported on mps; {remedy}")
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise ModelError(f"{wanted} but bitsandbytes cannot be imported here ({error}); {remedy}") from None
    # Old versions name no devices and are for CUDA alone.
    if device not in getattr(bitsandbytes, "supported_torch_devices", ("cuda",)):
        raise ModelError(f"{wanted} but bitsandbytes {bitsandbytes.__version__} has no backend for {device}; {remedy}")
    return bitsandbytes


def nf4_config(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantisation (QLoRA, arXiv 2305.14314)."""
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(load_in_4bit=True, **nf4, bnb_4bit_compute_dtype=compute_dtype)


def _dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """Dense weights in place of packed ones; plain models as they are."""
    if not getattr(model, "is_quantized", False):
        return model
    with quiet_loading():
        model = model.dequantize()
    # The packed weights live on in cycles, beside the dense ones, until they are collected.
    release_memory()
    # transformers forgets this one; peft, accelerate and saving would still take the model for a packed one.
    model.is_loaded_in_4bit = False
    return model.requires_grad_(False)


def _load_dequantized(folder: Path, runtime: Runtime, quantization: str) -> PreTrainedModel:
    """Dense weights, kept on disk for a CPU; a GPU packs faster than a disk reads."""
    if quantization != "nf4" or runtime.device != "cpu":
        return _dequantize(load_base(folder, runtime, quantization))
    bitsandbytes = four_bit_library(runtime.device)
    files, versions = _weight_files(folder), {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__}
    made_from = dense_cache.identity(
        [*files, folder / "config.json"], nf4=nf4_config(runtime.dtype).to_dict(), dtype=str(runtime.dtype), **versions
    )
    with quiet_loading():
        return dense_cache.load_or_make(
            made_from,
            _num_weights(folder) * runtime.dtype.itemsize,
            load=lambda kept: load_base(kept, runtime, "none"),
            make=lambda: _dequantize(load_base(folder, runtime, quantization)),
        )


def merge_adapter(model: PreTrainedModel, adapter_dir: Path, scale: float) -> PreTrainedModel:
    """``model``, dense, with the adapter's effect times ``scale`` added to its weights; ModelError if it is broken."""
    path = adapter_dir / "adapter_model.safetensors"
    if not path.is_file():
        raise ModelError(f"{path} is missing: an adapter folder as peft saves it (safetensors) is needed")
    stored = load_file(path)
    broken = [name for name, tensor in stored.items() if not tensor.isfinite().all()]
    if broken:
        raise ModelError(f"{path} holds values that are not finite, first in {broken[0]}; train it again")
    config = adapter_dir / "adapter_config.json"
    try:
        try_patterns(config, [name for name, _ in model.named_modules()])
        with quiet_loading():
            wrapped = PeftModel.from_pretrained(model, str(adapter_dir), torch_device=str(model.device))
    except TrialError as error:
        raise ModelError(f"{config} {error}; choose another checkpoint") from None
    except (ArtifactError, RuntimeError, ValueError, LookupError, AttributeError, TypeError, re.error) as error:
        raise ModelError(f"the adapter in {adapter_dir} does not fit the base model: {error}") from error
    # peft only warns of tensors that are missing or left over, and then evaluates an adapter that is partly random.
    difference = stored.keys() ^ get_peft_model_state_dict(wrapped, save_embedding_layers=False).keys()
    if difference:
        raise ModelError(f"{path} and the model differ in {len(difference)} tensors, first {min(difference)}")
    config = wrapped.peft_config["default"]
    if config.use_dora and scale != 1:
        raise ModelError(
            f"the adapter in {adapter_dir} is DoRA: at scale {scale} its magnitudes would stay; set adapter_scales: []"
        )
    for layer in wrapped.modules():
        if isinstance(layer, LoraLayer):
            layer.scale_layer(scale)
            if config.use_dora:
                _merge_dora(layer)
    # The layers of DoRA are merged already.
    return wrapped.unload() if config.use_dora else wrapped.merge_and_unload()


def _merge_dora(layer: LoraLayer) -> None:
    # In float32 as in training: a norm that is rounded to 16 bits would scale all weights of its row alike.
    base = layer.get_base_layer()
    dtype = base.weight.dtype
    base.float()
    layer.merge()
    base.to(dtype)


def choose_weights(folder: Path, runtime: Runtime, quantization: str, held_bytes: int = 0) -> tuple[str, str]:
    """Weights to train on, "dense" or "packed", and why; ``held_bytes``: of memory taken that will be free by then.

    Dense ones are dequantised NF4: ``packed``'s function, faster, at 2 (bfloat16) instead of 0.52 bytes each.
    """
    if quantization != "nf4":
        return "dense", "as they are (quantization: none)"
    num_weights = _num_weights(folder)
    need = num_weights * (runtime.dtype.itemsize + NF4_BYTES_PER_WEIGHT) + TRAINING_RESERVE_BYTES
    free = free_memory_bytes(torch.device(runtime.device)) + held_bytes
    kind = "dense" if need <= free else "packed"
    return kind, f"NF4, {kind} (dense needs {need / GIB:.1f} GiB with working space, {free / GIB:.1f} GiB are free)"


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ModelError(f"{folder} holds no model*.safetensors: only safetensors weights are loaded")
    return files


def _num_weights(folder: Path) -> int:
    """Number of weights in the folder's files."""
    return sum(map(math.prod, _weight_shapes(folder).values()))


def _weight_shapes(folder: Path) -> dict[str, list[int]]:
    """Shape of each tensor in the folder's files; reads their headers alone."""
    shapes = {}
    for path in _weight_files(folder):
        with safe_open(path, "pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.offset_keys()}
    return shapes
