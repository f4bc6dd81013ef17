"""Models ready for use: device and dtype, the tokenizer and the one function that renders prompts.

Takes folders on this machine and never looks for them (``assets`` does), knows nothing about data sets or scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DEVICES = ("cpu", "cuda")
# Tried in this order where a tokenizer pads with its end-of-sequence token or with nothing.
PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>")

Message = Mapping[str, str]


class ModelError(Exception):
    """A model, tokenizer, device or dtype cannot be used as asked; the text says what is allowed and what to do."""


# --- device and dtype ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runtime:
    """Where the model runs and in which dtype, and why (printed by the notebooks)."""

    device: str
    dtype: torch.dtype
    reason: str


def resolve_runtime(device: str = "auto", compute_dtype: str = "auto") -> Runtime:
    """Device and compute dtype of this machine.

    ``auto`` takes CUDA where there is a GPU, and the fastest dtype that the hardware itself has: bfloat16 on GPUs of
    compute capability 8 and on CPUs with AVX-512 or AMX bfloat16 instructions, float16 on older GPUs (T4), else
    float32.

    Raises:
        ModelError: an unknown name, CUDA where there is none, or float16 on the CPU.
    """
    _require_one_of("device", device, ("auto", *DEVICES))
    _require_one_of("compute_dtype", compute_dtype, ("auto", *DTYPES))
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("device is 'cuda' but torch sees no CUDA GPU here; use device: auto or cpu")
    chosen = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    name, why = _fastest_dtype(chosen) if compute_dtype == "auto" else (compute_dtype, "asked for")
    if chosen == "cpu" and name == "float16":
        raise ModelError("compute_dtype is 'float16' on the CPU, where it is slow and overflows; use auto or float32")
    return Runtime(chosen, DTYPES[name], f"{_device_name(chosen)} ({_why_device(device, chosen)}), {name} ({why})")


def _require_one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ModelError(f"{key} is {value!r}; allowed: {', '.join(allowed)}")


def _why_device(asked: str, chosen: str) -> str:
    if asked != "auto":
        return "asked for"
    return "a GPU is there" if chosen == "cuda" else "no CUDA GPU here"


def _fastest_dtype(device: str) -> tuple[str, str]:
    if device == "cuda":
        # torch.cuda.is_bf16_supported() also answers yes for GPUs that only emulate it, a T4 among them.
        capability = torch.cuda.get_device_capability()
        real = capability[0] >= 8
        return ("bfloat16" if real else "float16"), f"compute capability {capability[0]}.{capability[1]}"
    capabilities = torch.cpu.get_capabilities()
    found = [name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name, False)]
    return ("bfloat16", f"the CPU has {found[0]}") if found else ("float32", "the CPU has no bfloat16 instructions")


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU with {torch.get_num_threads()} threads"


# --- tokenizer and prompts ----------------------------------------------------------------------------------------


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``, with a chat template and a pad token.

    The pad token is another one than end-of-sequence wherever the vocabulary has one. Nothing here relies on that:
    batches are padded and masked by position, never by token id.

    Raises:
        ModelError: the folder has no chat template.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(folder), use_fast=True, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise ModelError(f"the tokenizer in {folder} has no chat template; use an instruct model's tokenizer")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        vocabulary = tokenizer.get_vocab()
        known = [token for token in PAD_TOKENS if token in vocabulary and token != tokenizer.eos_token]
        tokenizer.pad_token = known[0] if known else tokenizer.eos_token
    return tokenizer


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool = True
) -> list[int]:
    """Token ids of a conversation: the one rendering that training, evaluation and the judge share.

    Thinking is always off: where a template knows the switch (Qwen3), the prompt then ends in an empty thinking
    block, and other templates ignore it.

    Args:
        messages: ``{"role", "content"}`` turns.
        add_generation_prompt: end with the opening of an assistant turn.
    """
    return tokenizer.apply_chat_template(
        list(messages),
        tokenize=True,
        return_dict=False,
        add_generation_prompt=add_generation_prompt,
        enable_thinking=False,
    )


def render_completion(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Prompt and completion ids of a conversation that ends in an assistant turn, split where generation begins.

    Raises:
        ModelError: the last turn is not the assistant's, or the template renders a finished turn otherwise than the
            prompt that asks for it: training on such a row would teach what evaluation never asks.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise ModelError("the last message of a training conversation must have the role 'assistant'")
    prompt = render_prompt(tokenizer, messages[:-1])
    full = render_prompt(tokenizer, messages, add_generation_prompt=False)
    if full[: len(prompt)] != prompt:
        raise ModelError(
            "the tokens of the prompt are not the beginning of the tokens of the conversation: the chat template or "
            "the first characters of the answer (a line break, a thinking block) change them; mend the answer"
        )
    return prompt, full[len(prompt) :]


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token with which the chat template ends an assistant turn (``<|im_end|>``, ``<|eot_id|>``, ...).

    Raises:
        ModelError: the template ends a turn with no special token, so that a model could not learn to stop.
    """
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
