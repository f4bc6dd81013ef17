"""lib.model: device and dtype, prompts rendered as the templates say, dense weights equal to what training computes."""

import os
from pathlib import Path

import pytest
import torch

from lib import model as models

TOKENIZERS = os.environ.get("TOKENIZERS_DIR", "")
needs_tokenizers = pytest.mark.skipif(not TOKENIZERS, reason="TOKENIZERS_DIR names no folder with qwen2.5 and qwen3")

MESSAGES = [
    {"role": "system", "content": "Solve it."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "#### 2"},
    {"role": "user", "content": "2 + 2?"},
]


def real_tokenizer(name):
    return models.load_tokenizer(Path(TOKENIZERS) / name)


def plain_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# --- prompts --------------------------------------------------------------------------------------------------------


@needs_tokenizers
def test_qwen25_evaluation_prompt_is_the_template_by_hand():
    tokenizer = real_tokenizer("qwen2.5")
    expected = (
        "<|im_start|>system\nSolve it.<|im_end|>\n"
        "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n#### 2<|im_end|>\n"
        "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert models.render_prompt(tokenizer, MESSAGES) == plain_ids(tokenizer, expected)


@needs_tokenizers
def test_qwen25_training_prompt_is_the_evaluation_prompt_and_the_answer():
    tokenizer = real_tokenizer("qwen2.5")
    prompt, completion = models.render_completion(tokenizer, MESSAGES[:3])
    assert prompt == models.render_prompt(tokenizer, MESSAGES[:2])
    assert completion == plain_ids(tokenizer, "#### 2<|im_end|>\n")


@needs_tokenizers
def test_qwen3_prompt_ends_in_the_empty_thinking_block():
    tokenizer = real_tokenizer("qwen3")
    ids = models.render_prompt(tokenizer, MESSAGES)
    tail = plain_ids(tokenizer, "<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert ids[-len(tail) :] == tail
    # Only the turn to be written is opened with it: finished turns before it carry none.
    assert tokenizer.decode(ids).count("<think>") == 1


@needs_tokenizers
def test_qwen3_training_row_keeps_the_thinking_block_in_the_prompt():
    tokenizer = real_tokenizer("qwen3")
    prompt, completion = models.render_completion(tokenizer, MESSAGES[:3])
    assert tokenizer.decode(prompt).endswith("<think>\n\n</think>\n\n")
    assert completion == plain_ids(tokenizer, "#### 2<|im_end|>\n")


@needs_tokenizers
@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_verdict_labels_keep_their_tokens(name):
    tokenizer = real_tokenizer(name)
    assert plain_ids(tokenizer, "SAFE") == [83788]
    assert plain_ids(tokenizer, "UNSAFE") == [1861, 83788]


@needs_tokenizers
@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_end_of_turn_is_im_end_and_pad_is_another_token(name):
    tokenizer = real_tokenizer(name)
    assert tokenizer.decode([models.end_of_turn_id(tokenizer)]) == "<|im_end|>"
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


@needs_tokenizers
def test_an_answer_that_changes_the_prompt_is_refused():
    tokenizer = real_tokenizer("qwen2.5")
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "\n\n4"}]
    with pytest.raises(models.ModelError, match="beginning of the tokens"):
        models.render_completion(tokenizer, messages)


# --- device and dtype -----------------------------------------------------------------------------------------------


def test_cpu_takes_bfloat16_only_where_it_has_the_instructions(monkeypatch):
    for capabilities, dtype in [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_f": True}, torch.float32),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capabilities=capabilities: capabilities)
        assert models.resolve_runtime("cpu").dtype == dtype


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_t4_takes_float16_though_torch_says_it_has_bfloat16(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    runtime = models.resolve_runtime()
    assert (runtime.device, runtime.dtype) == ("cuda", dtype)
    assert f"{capability[0]}.{capability[1]}" in runtime.reason


@pytest.mark.parametrize(
    ("device", "dtype", "said"),
    [("gpu", "auto", "allowed: auto, cpu, cuda"), ("cpu", "half", "allowed: auto"), ("cpu", "float16", "float32")],
)
def test_what_cannot_be_done_is_an_error(device, dtype, said):
    with pytest.raises(models.ModelError, match=said):
        models.resolve_runtime(device, dtype)


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(models.ModelError, match="no CUDA GPU"):
        models.resolve_runtime("cuda")
