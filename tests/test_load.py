"""Device and dtype, prompts rendered as the templates say, dense weights equal to what training computes."""

import gc
import importlib
import os
import weakref
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, save_tiny_model, tiny_tokenizer

import lib.engine
from lib.engine import load
from lib.engine.models import Models
from lib.record import paths

BUNDLED = paths.PROJECT_ROOT / "data" / "models" / "smollm2-135m-instruct"
TOKENIZERS = os.environ.get("TOKENIZERS_DIR", "")
needs_tokenizers = pytest.mark.skipif(not TOKENIZERS, reason="TOKENIZERS_DIR names no folder with qwen2.5 and qwen3")

MESSAGES = [
    {"role": "system", "content": "Solve it."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "#### 2"},
    {"role": "user", "content": "2 + 2?"},
]


def real_tokenizer(name):
    return load.load_tokenizer(Path(TOKENIZERS) / name)


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
    assert load.render_prompt(tokenizer, MESSAGES) == plain_ids(tokenizer, expected)


@needs_tokenizers
def test_qwen25_training_prompt_is_the_evaluation_prompt_and_the_answer():
    tokenizer = real_tokenizer("qwen2.5")
    prompt, completion = load.render_completion(tokenizer, MESSAGES[:3])
    assert prompt == load.render_prompt(tokenizer, MESSAGES[:2])
    assert completion == plain_ids(tokenizer, "#### 2<|im_end|>\n")


@needs_tokenizers
def test_qwen3_prompt_ends_in_the_empty_thinking_block():
    tokenizer = real_tokenizer("qwen3")
    ids = load.render_prompt(tokenizer, MESSAGES)
    tail = plain_ids(tokenizer, "<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert ids[-len(tail) :] == tail
    # Only the turn to be written is opened with it: finished turns before it carry none.
    assert tokenizer.decode(ids).count("<think>") == 1


@needs_tokenizers
def test_qwen3_training_row_keeps_the_thinking_block_in_the_prompt():
    tokenizer = real_tokenizer("qwen3")
    prompt, completion = load.render_completion(tokenizer, MESSAGES[:3])
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
    assert tokenizer.decode([load.end_of_turn_id(tokenizer)]) == "<|im_end|>"
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


@needs_tokenizers
def test_an_answer_that_changes_the_prompt_is_refused():
    tokenizer = real_tokenizer("qwen2.5")
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "\n\n4"}]
    with pytest.raises(load.ModelError, match="beginning of the tokens"):
        load.render_completion(tokenizer, messages)


TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
TURNS += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
NO_SYSTEM_ROLE = {
    "gemma": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}",
    "mistral": "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}{% endfor %}",
    "silent": "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}",
}


def saved_tokenizer(folder, template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return load.load_tokenizer(folder)


@pytest.mark.parametrize("family", NO_SYSTEM_ROLE)
def test_a_template_without_a_system_role_shows_it_in_the_first_user_turn(tmp_path, family):
    plain = saved_tokenizer(tmp_path / "plain", TURNS)
    folded = saved_tokenizer(tmp_path / "folded", NO_SYSTEM_ROLE[family] + TURNS)
    by_hand = [{"role": "user", "content": "Solve it.\n\n1 + 1?"}, *MESSAGES[2:]]
    assert load.render_prompt(folded, MESSAGES) == load.render_prompt(plain, by_hand)
    # Without a system message nothing changes: AILuminate prompts stay as they were.
    assert load.render_prompt(folded, MESSAGES[1:]) == load.render_prompt(plain, MESSAGES[1:])
    assert load.render_completion(folded, MESSAGES[:3])[1] == load.render_completion(plain, MESSAGES[:3])[1]
    assert "first user turn" in load.place_of_system_message(folded)
    assert load.place_of_system_message(plain) == "in a separate turn"
    # Every protocol holds the template's hash, so the record tells the two apart; what is saved again stays as it is.
    assert folded.chat_template != NO_SYSTEM_ROLE[family] + TURNS and plain.chat_template == TURNS
    folded.save_pretrained(tmp_path / "again")
    assert load.load_tokenizer(tmp_path / "again").chat_template == folded.chat_template


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[-1]['content'] }", "Hello."])
def test_a_template_that_shows_no_question_is_named_with_its_keys(tmp_path, template):
    with pytest.raises(
        load.ModelError, match=r"chat template in .*broken cannot be used: it .*base_model or safeguard"
    ):
        saved_tokenizer(tmp_path / "broken", template)


# --- device and dtype -----------------------------------------------------------------------------------------------


def test_cpu_takes_bfloat16_only_where_it_has_the_instructions(monkeypatch):
    for capabilities, dtype in [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_f": True}, torch.float32),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capabilities=capabilities: capabilities)
        assert load.resolve_runtime("cpu").dtype == dtype


@pytest.mark.parametrize(("number", "words"), [(1, "CPU with 1 thread ("), (2, "CPU with 2 threads (")])
def test_threads_are_counted_in_words(monkeypatch, number, words):
    monkeypatch.setattr(torch, "get_num_threads", lambda: number)
    assert load.resolve_runtime("cpu").reason.startswith(words)


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_t4_takes_float16_though_torch_says_it_has_bfloat16(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    runtime = load.resolve_runtime()
    assert (runtime.device, runtime.dtype) == ("cuda", dtype)
    assert f"{capability[0]}.{capability[1]}" in runtime.reason


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [("gpu", "auto", "allowed: auto, cpu, cuda"), ("cpu", "half", "allowed: auto"), ("cpu", "float16", "float32")],
)
def test_what_cannot_be_done_is_an_error(device, dtype, message):
    with pytest.raises(load.ModelError, match=message):
        load.resolve_runtime(device, dtype)


@pytest.fixture
def listed_gpu(tmp_path, monkeypatch):
    """An nvidia-smi that lists a GPU with driver 470.57."""
    tool = tmp_path / "nvidia-smi"
    gpu = "GPU 0: Tesla (UUID: GPU-aaaa-1)"
    tool.write_text(f'#!/bin/sh\ncase "$1" in -L) echo "{gpu}";; *) printf "470.57.02\\n470.57.02\\n";; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("cuda", "error", "words"),
    [
        (
            None,
            AssertionError("Torch not compiled with CUDA enabled"),
            "built for CPUs alone, .*not compiled with CUDA",
        ),
        (
            "13.0",
            RuntimeError("The NVIDIA driver on your system is too old (found version 11040)."),
            "CUDA 13.0, .*old",
        ),
        ("12.6", None, "built for CUDA 12.6, .*it sees no device"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_refused(monkeypatch, listed_gpu, device, cuda, error, words):
    def init():
        if error:
            raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(load.ModelError, match=f"{words}.*install torch for a CUDA.*device: cpu") as caught:
        load.resolve_runtime(device)
    assert "driver 470.57.02:" in str(caught.value)
    assert load.resolve_runtime("cpu").device == "cpu"


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_gpu_that_a_person_hides_is_not_missed(monkeypatch, listed_gpu, hidden):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert load.resolve_runtime("auto").device == "cpu"


@pytest.mark.parametrize(
    ("builds", "capability", "usable"),
    [
        (["sm_75", "sm_80", "sm_90"], (7, 5), True),
        (["sm_75", "sm_80", "sm_90"], (8, 6), True),
        (["sm_75", "sm_80", "sm_90"], (6, 0), False),  # a P100
        (["sm_75", "sm_80", "sm_90"], (12, 0), False),
        (["sm_75", "sm_90", "compute_90"], (12, 0), True),
        (["sm_86"], (8, 0), False),
        (["gfx90a"], (9, 0), True),  # AMD's are named otherwise
    ],
)
def test_a_gpu_that_torch_has_no_kernels_for_is_refused(monkeypatch, builds, capability, usable):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: builds)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    if usable:
        assert load.resolve_runtime().device == "cuda"
        return
    with pytest.raises(
        load.ModelError, match=rf"no kernels for its compute capability {capability[0]}.{capability[1]}"
    ):
        load.resolve_runtime()
    assert load.resolve_runtime("cpu").device == "cpu"


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(load.ModelError, match="no CUDA GPU"):
        load.resolve_runtime("cuda")


# --- models ---------------------------------------------------------------------------------------------------------

BFLOAT16 = load.Runtime("cpu", torch.bfloat16, "test")
FLOAT32 = load.Runtime("cpu", torch.float32, "test")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    return save_adapter(folder, tmp_path_factory.mktemp("adapter"))


def save_adapter(folder, path, scale=0.1, **kind):
    """An adapter whose B is not zero, as after training."""
    torch.manual_seed(1)
    base = load.load_base(folder, FLOAT32, "none")
    targets = {} if "target_modules" in kind else {"target_modules": LINEARS}
    wrapped = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **targets, **kind))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
        elif "magnitude" in name:
            parameter.data *= torch.rand_like(parameter) + 0.5
    wrapped.save_pretrained(path, save_embedding_layers=False)
    return path


def tokens(model):
    return torch.randint(0, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    return model(input_ids=tokens(model)).logits.float()


def training_logits(folder, runtime, adapter):
    """What QLoRA training computes: packed weights in train mode, the adapter beside them."""
    base = load.load_base(folder, runtime, "nf4")
    return logits(PeftModel.from_pretrained(base, str(adapter)).train() if adapter else base.train())


@pytest.mark.parametrize("runtime", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_logits_equal_packed_training_logits_exactly(tmp_path, family, runtime):
    folder = save_tiny_model(tmp_path, family)
    dense = load.load_dense(folder, runtime, "nf4")
    assert torch.equal(logits(dense), training_logits(folder, runtime, None))


def test_merged_logits_equal_training_logits_in_float32(folder, adapter):
    trained = training_logits(folder, FLOAT32, adapter)
    merged = logits(load.load_dense(folder, FLOAT32, "nf4", adapter))
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-4)
    assert (trained - training_logits(folder, FLOAT32, None)).std() > 0.5, "the adapter of this test does something"


def test_merging_costs_no_more_than_the_dtype(folder, adapter):
    """bfloat16 moves logits by itself; those of the merged model may not be further from float32 than training's."""
    exact = training_logits(folder, FLOAT32, adapter)
    trained = training_logits(folder, BFLOAT16, adapter)
    merged = logits(load.load_dense(folder, BFLOAT16, "nf4", adapter))
    assert (merged - exact).std() < 1.5 * (trained - exact).std()


@pytest.mark.slow
@pytest.mark.skipif(not (BUNDLED / "config.json").exists(), reason="the bundled model is not converted yet")
def test_the_bundled_model_is_evaluated_as_it_is_trained():
    dense = load.load_dense(BUNDLED, BFLOAT16, "nf4")
    assert torch.equal(logits(dense), training_logits(BUNDLED, BFLOAT16, None))


def test_without_quantization_the_adapter_merges_into_the_plain_weights(folder, adapter):
    plain = PeftModel.from_pretrained(load.load_base(folder, FLOAT32, "none"), str(adapter))
    merged = load.load_dense(folder, FLOAT32, "none", adapter)
    torch.testing.assert_close(logits(merged), logits(plain.eval()), rtol=1e-4, atol=1e-4)


def test_the_dense_model_is_plain_frozen_and_in_eval_mode(folder, adapter, tmp_path):
    model = load.load_dense(folder, BFLOAT16, "nf4", adapter)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert not getattr(model, "is_quantized", False) and not getattr(model, "is_loaded_in_4bit", False)
    assert getattr(model.config, "quantization_config", None) is None
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # It saves, and loads again, as any plain model does.
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load.load_dense(tmp_path, BFLOAT16, "none")), logits(model))


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_output_layer_are_not_quantised(tmp_path, tied):
    model = load.load_base(save_tiny_model(tmp_path, tied=tied), BFLOAT16, "nf4")
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    packed = [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
    assert len(packed) == 2 * len(LINEARS)


def test_packed_weights_are_gone_when_the_dense_model_is_there(folder, monkeypatch):
    packed, original = [], load.load_base

    def noted(*args):
        model = original(*args)
        packed.extend(weakref.ref(module.weight) for module in model.modules() if "4bit" in type(module).__name__)
        return model

    monkeypatch.setattr(load, "load_base", noted)
    gc.collect()
    gc.disable()
    try:
        dense = load.load_dense(folder, BFLOAT16, "nf4")
        assert len(packed) == 2 * len(LINEARS) and not any(weight() is not None for weight in packed)
    finally:
        gc.enable()
    assert not getattr(dense, "is_quantized", False)


def test_a_gpu_gets_its_memory_back_before_a_model_is_loaded_and_after_it_is_unpacked(folder, monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    load.load_dense(folder, BFLOAT16, "nf4")
    assert len(emptied) == 2


@pytest.mark.parametrize("named", [None, "backend:cudaMallocAsync"])
def test_cuda_gets_memory_in_blocks_that_grow_unless_a_person_says_otherwise(monkeypatch, named):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    if named:
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", named)
    importlib.reload(lib.engine)
    assert os.environ["PYTORCH_ALLOC_CONF"] == (named or "expandable_segments:True")


def test_training_keeps_the_weights_dense_where_memory_allows(folder, monkeypatch, capsys):
    dense = Models(folder, BFLOAT16, "nf4").for_training()
    assert type(dense.model.layers[0].mlp.up_proj) is torch.nn.Linear and dense.training
    assert "NF4, dense (dense needs 2.0 GiB" in capsys.readouterr().out
    monkeypatch.setattr(load, "free_memory_bytes", lambda device: 2**30)
    packed = Models(folder, BFLOAT16, "nf4").for_training()
    assert packed.is_quantized and packed.training
    message = capsys.readouterr().out
    assert "NF4, packed" in message and "1.0 GiB are free" in message


def test_an_adapter_that_does_not_fit_is_refused(folder, adapter, tmp_path):
    with pytest.raises(load.ModelError, match=r"adapter_model\.safetensors is missing"):
        load.load_dense(folder, FLOAT32, "none", tmp_path)
    tensors = load_file(adapter / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    # peft itself would warn, and evaluate a layer's random A with B = 0.
    save_file(dict(list(tensors.items())[2:]), tmp_path / "adapter_model.safetensors")
    with pytest.raises(load.ModelError, match="differ in 2 tensors"):
        load.load_dense(folder, FLOAT32, "none", tmp_path)
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}, tmp_path / "nan")
    (tmp_path / "nan").rename(tmp_path / "adapter_model.safetensors")
    with pytest.raises(load.ModelError, match="not finite"):
        load.load_dense(folder, FLOAT32, "none", tmp_path)


def test_only_safetensors_weights_are_loaded(tmp_path):
    with pytest.raises(load.ModelError, match="only safetensors"):
        load.load_base(tmp_path, FLOAT32, "none")
    with pytest.raises(load.ModelError, match="allowed: nf4, none"):
        load.load_base(tmp_path, FLOAT32, "int8")


def test_stop_ids_are_those_of_model_tokenizer_and_template(folder):
    model, tokenizer = load.load_base(folder, FLOAT32, "none"), load.load_tokenizer(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.eos_token_id = [7, 3]
    assert load.stop_token_ids(model, tokenizer) == sorted([3, 7, end])
    model.generation_config.eos_token_id = None
    assert load.stop_token_ids(model, tokenizer) == [end]


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(load.ModelError, match="chat template"):
        load.load_tokenizer(tmp_path)


def test_peak_memory_is_in_gib(folder):
    assert 0.05 < load.peak_memory_gib("cpu") < 64


# --- the judge ------------------------------------------------------------------------------------------------------


def test_a_judge_that_does_not_fit_is_refused_with_the_numbers_and_the_remedy(folder, monkeypatch):
    monkeypatch.setattr(load, "free_memory_bytes", lambda _: load.GIB)
    with pytest.raises(
        load.ModelError, match=r"1\.0 GiB are needed .* 1\.0 GiB are free on cpu; set judge_quantization=nf4"
    ):
        load.plan_judge(folder, FLOAT32, "none")
    with pytest.raises(load.ModelError, match="free memory, or name a smaller safeguard_model") as caught:
        load.plan_judge(folder, FLOAT32, "nf4")
    assert "set judge_quantization" not in str(caught.value)


def test_the_course_s_judge_fits_a_t4_in_16_bits(tmp_path, monkeypatch):
    """By headers alone: Qwen3-4B's shapes, 4.02 billion weights, tied embeddings."""
    block = {"q": (4096, 2560), "k": (1024, 2560), "v": (1024, 2560), "o": (2560, 4096), "norm": (2560,)}
    block |= {"gate": (9728, 2560), "up": (9728, 2560), "down": (2560, 9728)}
    shapes = {f"model.layers.{n}.{name}": shape for n in range(36) for name, shape in block.items()}
    monkeypatch.setattr(load, "_weight_shapes", lambda _: shapes | {"model.embed_tokens.weight": (151936, 2560)})
    monkeypatch.setattr(load, "free_memory_bytes", lambda _: int(14.6 * load.GIB))
    t4 = load.Runtime("cuda", torch.float16, "test")
    kind, text = load.plan_judge(tmp_path, t4, "none")
    assert kind == "dense" and "float16: 9.2 GiB are needed" in text
    # Where 16 bits do not fit, 4 do: packed, because dense copies of them would be as large.
    monkeypatch.setattr(load, "free_memory_bytes", lambda _: 6 * load.GIB)
    with pytest.raises(load.ModelError, match="set judge_quantization=nf4"):
        load.plan_judge(tmp_path, t4, "none")
    assert load.plan_judge(tmp_path, t4, "nf4")[0] == "packed"


@pytest.mark.parametrize("runtime", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def test_a_packed_judge_computes_what_the_dense_one_does(folder, runtime, monkeypatch):
    dense = load.load_judge(folder, runtime, "nf4")
    monkeypatch.setattr(load, "plan_judge", lambda *_: ("packed", ""))
    packed = load.load_judge(folder, runtime, "nf4")
    assert packed.is_quantized and not packed.training and not getattr(dense, "is_quantized", False)
    with torch.inference_mode():
        assert torch.equal(logits(packed), logits(dense))
        assert torch.equal(logits(packed), logits(dense)), "again: nothing was packed a second time"


# --- other kinds of adapters ----------------------------------------------------------------------------------------

KINDS = [{"use_rslora": True}, {"use_dora": True}, {"target_modules": ["q_proj", "down_proj"]}]
KINDS += [{"use_dora": True, "use_rslora": True, "target_modules": ["v_proj", "up_proj"]}]


@pytest.mark.parametrize("runtime", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_kind_of_adapter_is_merged_as_it_computes(folder, tmp_path, kind, runtime):
    adapter = save_adapter(folder, tmp_path, **kind)
    exact = logits(PeftModel.from_pretrained(load.load_base(folder, FLOAT32, "none"), str(adapter)).eval())
    beside = logits(PeftModel.from_pretrained(load.load_base(folder, runtime, "none"), str(adapter)).eval())
    merged = load.load_dense(folder, runtime, "none", adapter)
    assert not any("lora" in name for name, _ in merged.named_modules()) and merged.dtype == runtime.dtype
    if runtime is FLOAT32:
        torch.testing.assert_close(logits(merged), beside, rtol=1e-4, atol=1e-4)
    else:
        assert (logits(merged) - exact).std() < 1.5 * (beside - exact).std()
    assert (exact - logits(load.load_dense(folder, FLOAT32, "none"))).std() > 0.3, "it does something"


def test_a_dora_adapter_at_a_scale_is_refused(folder, tmp_path):
    adapter = save_adapter(folder, tmp_path, use_dora=True)
    with pytest.raises(load.ModelError, match=r"is DoRA: at scale 0\.5 its magnitudes would stay; set adapter_scales"):
        load.load_dense(folder, FLOAT32, "none", adapter, 0.5)
