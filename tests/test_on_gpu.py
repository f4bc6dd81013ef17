"""On a GPU: its kernels against float32, NF4, peak memory, tokens per second. ``pytest -m gpu``, two minutes.

Without a GPU all are skipped. ``PRETEND_GPU=9.0 pytest -m gpu`` tries these tests themselves on a pretended one, but
for those that need the allocator or bitsandbytes' kernels.
"""

import gc
import os
import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from pretend_gpu import pretend_gpu
from test_gpu_paths import SETTINGS, load_model, near_greedy
from test_sft import conversation
from tiny import save_tiny_model, tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM

from lib.engine import attention, kernels, load
from lib.engine.generate import Engine
from lib.engine.plain import generate_batch
from lib.train import sft
from lib.train.rows import encode_rows

PRETENDED = os.environ.get("PRETEND_GPU", "") if not torch.cuda.is_available() else ""
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() and not PRETENDED, reason="torch sees no CUDA GPU"),
]
real_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs the real allocator and kernels")
# Half a billion weights: what a step takes is then the GPU's work and not only its launches.
HALF_BILLION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16}


@pytest.fixture(autouse=True)
def gpu():
    capability = tuple(map(int, PRETENDED.split("."))) if PRETENDED else ()
    with pretend_gpu(capability) if PRETENDED else nullcontext():
        yield


@pytest.fixture
def folder(tmp_path):
    return save_tiny_model(tmp_path / "model")


def examples():
    return encode_rows(tiny_tokenizer(), [conversation(number) for number in range(24)], 100).examples


def runtime():
    return load.resolve_runtime("cuda")


def random_states(*shape, dtype):
    # Keys as large as Qwen2.5's: q @ k reaches 1e5, which float16 cannot hold.
    return torch.randn(shape, device="cuda").mul_(30.0).to(dtype)


def expected(query, key, value, scale, hidden=None):
    """Attention of (T, H, D) to (S, Hkv, D) in float32."""
    group = query.shape[1] // key.shape[1]
    query, key, value = (states.float().transpose(0, 1) for states in (query, key, value))
    scores = query @ key.repeat_interleave(group, dim=0).transpose(-1, -2) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    out = scores.softmax(dim=-1) @ value.repeat_interleave(group, dim=0)
    return out.transpose(0, 1), scores.logsumexp(dim=-1).transpose(0, 1)


def assert_close(found, wanted):
    # Weights and values are rounded to eight bits in bfloat16; scores of 1e5 / 8 to some 1e-3 in float32.
    torch.testing.assert_close(found[0].float(), wanted[0], atol=1.0, rtol=0.02)
    torch.testing.assert_close(found[1], wanted[1], atol=0.05, rtol=1e-4)


def future(length):
    return torch.ones(length, length, dtype=torch.bool, device="cuda").triu(1)


DTYPES = [torch.float16, torch.bfloat16]
HEADS = [(12, 2, 128), (16, 8, 64), (4, 4, 64)]  # Qwen2.5-1.5B, Qwen3's kind, no groups


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "size"), HEADS)
def test_the_varlen_kernel_is_attention_in_float32(dtype, num_heads, num_kv_heads, size):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("FlashAttention needs compute capability 8.0")
    scale = size**-0.5
    # Rows that enter, one of a single token.
    lengths = [40, 1, 17]
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")
    query = random_states(sum(lengths), num_heads, size, dtype=dtype)
    key, value = (random_states(sum(lengths), num_kv_heads, size, dtype=dtype) for _ in range(2))
    rows = kernels.Sequences(ends, ends, max(lengths), max(lengths))
    out, log_sum = kernels.attend_sequences(query, key, value, rows, scale, causal=True)
    for first, length in zip(accumulate([0, *lengths[:-1]]), lengths, strict=True):
        row = slice(first, first + length)
        assert_close((out[row], log_sum[row]), expected(query[row], key[row], value[row], scale, future(length)))
    # Rows that decode, each against its half-filled slot, seen through the strided view.
    capacity, used = 64, [3, 64, 33]
    slots = random_states(2, 3, num_kv_heads, capacity, size, dtype=dtype)
    starts = torch.arange(4, dtype=torch.int32, device="cuda")
    num_keys = torch.tensor(used, dtype=torch.int32, device="cuda")
    where = kernels.Sequences(starts, starts * (num_kv_heads * capacity), 1, capacity, num_keys)
    views = [attention._slots_as_sequences(states) for states in slots]
    out, log_sum = kernels.attend_sequences(query[:3], *views, where, scale)
    for row, length in enumerate(used):
        states = (states[row, :, :length].transpose(0, 1) for states in slots)
        assert_close((out[row : row + 1], log_sum[row : row + 1]), expected(query[row : row + 1], *states, scale))


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "size"), HEADS)
def test_the_efficient_kernel_is_attention_in_float32(num_heads, num_kv_heads, size):
    # A T4's kernel, which later GPUs have too.
    scale, group = size**-0.5, num_heads // num_kv_heads
    query = random_states(3, num_kv_heads, group, size, dtype=torch.float16)
    slots = random_states(2, 3, num_kv_heads, 64, size, dtype=torch.float16)
    used = torch.tensor([3, 64, 33], device="cuda")
    mask = torch.zeros(3, 1, 1, 64, dtype=torch.float16, device="cuda")
    mask = mask.masked_fill((torch.arange(64, device="cuda") >= used[:, None])[:, None, None], -torch.inf)
    out, log_sum = kernels.attend_in_blocks(query, *slots, scale, mask=mask)
    for row, length in enumerate(used.tolist()):
        states = (states[row, :, :length].transpose(0, 1) for states in slots)
        wanted = expected(query[row].flatten(0, 1)[None], *states, scale)
        assert_close((out[row].flatten(0, 1)[None], log_sum[row].flatten()[None]), wanted)
    row = random_states(1, num_heads, 40, size, dtype=torch.float16)
    key, value = (random_states(1, num_heads, 40, size, dtype=torch.float16) for _ in range(2))
    out, log_sum = kernels.attend_in_blocks(row, key, value, scale, causal=True)
    wanted = expected(*(states[0].transpose(0, 1) for states in (row, key, value)), scale, future(40))
    assert_close((out[0].transpose(0, 1), log_sum[0].t()), wanted)


def long_conversations():
    system = {"role": "system", "content": "Answer in one word, and keep to what was asked before. " * 3}
    return [[system, {"role": "user", "content": f"question {n}" + "?" * (3 * n)}] for n in range(6)]


def test_the_engine_writes_greedy_texts_within_rounding(folder):
    dtype = runtime().dtype
    engine = Engine(load_model(folder, dtype, "cuda").eval(), tiny_tokenizer(), batch_size=4)
    reference = load_model(folder, torch.float32, "cpu").eval()
    completions = engine.generate(long_conversations(), max_new_tokens=40)
    assert engine.stats.num_prefix_tokens > 128 and engine.stats.peak_rows == 4
    for messages, done in zip(long_conversations(), completions, strict=True):
        prompt = load.render_prompt(engine.tokenizer, messages)
        assert near_greedy(reference, prompt, list(done.token_ids), dtype)


def test_two_trainings_and_one_that_was_cut_are_the_same_bytes(folder, tmp_path):
    trained = [
        sft.train(load_model(folder, runtime().dtype, "cuda").train(), examples(), settings, tmp_path / name)
        for name, settings in [("one", SETTINGS), ("two", replace(SETTINGS, micro_batch_tokens=128))]
    ]
    assert trained[0].adapter_sha256 == trained[1].adapter_sha256
    (tmp_path / "two" / "training.json").unlink()
    for step in (12, 18):
        (tmp_path / "two" / "checkpoints" / f"checkpoint-{step}" / "complete.json").unlink()
    model = load_model(folder, runtime().dtype, "cuda").train()
    resumed = sft.train(model, examples(), SETTINGS, tmp_path / "two")
    assert resumed.resumed_from == 6 and resumed.adapter_sha256 == trained[0].adapter_sha256


@real_gpu
def test_dequantised_nf4_weights_compute_what_packed_ones_do(folder):
    dense = load.load_dense(folder, runtime(), "nf4").train()
    packed = load.load_base(folder, runtime(), "nf4").train()
    tokens = torch.arange(3, 200, device="cuda")[None]
    with torch.no_grad():
        found, wanted = (model(tokens, use_cache=False).logits.float() for model in (dense, packed))
    torch.testing.assert_close(found, wanted, atol=0.02 * wanted.abs().max().item(), rtol=0)


@pytest.fixture
def half_billion():
    config = tiny_config("qwen2", vocab_size=32_000)
    for name, value in HALF_BILLION.items():
        setattr(config, name, value)
    config.num_key_value_heads, config.head_dim = 2, 64
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=runtime().dtype)
    yield model.requires_grad_(False)
    del model
    gc.collect()


@real_gpu
def test_training_takes_no_more_memory_than_planned_and_gives_it_back(half_billion, tmp_path):
    rows = [{"input_ids": list(range(1000)), "labels": list(range(1000))} for _ in range(32)]
    settings = replace(SETTINGS, num_epochs=1, train_batch_size=16, micro_batch_tokens=4000)
    messages = []
    before = torch.cuda.memory_allocated()
    result = sft.train(half_billion.train(), rows, settings, tmp_path, say=messages.append)
    per_token = float(next(line for line in messages if "MiB a token" in line).split("(")[1].split()[0]) / 1024
    weights = before / 2**30
    assert weights < result.peak_memory_gib < weights + 2 * 4000 * per_token + 2
    gc.collect()
    assert torch.cuda.memory_allocated() < before + 2**20


@real_gpu
def test_where_memory_runs_out_training_and_generation_go_on(half_billion, tmp_path):
    total = torch.cuda.get_device_properties(0).total_memory
    rows = [{"input_ids": list(range(1000)), "labels": list(range(1000))} for _ in range(32)]
    settings = replace(SETTINGS, num_epochs=1, train_batch_size=16, micro_batch_tokens=32_000)
    taken = torch.cuda.memory_allocated() + 3 * 2**30
    torch.cuda.set_per_process_memory_fraction(min(1.0, taken / total))
    try:
        with pytest.warns(UserWarning, match="tokens in a micro-batch, going on with"):
            result = sft.train(half_billion.train(), rows, settings, tmp_path)
        assert result.micro_batch_tokens < 32_000 and result.num_steps == 1
        engine = Engine(half_billion.eval(), tiny_tokenizer(), batch_size=256)
        with pytest.warns(UserWarning, match="rows, going on with"):
            done = engine.generate([[{"role": "user", "content": "?" * 900}]] * 256, max_new_tokens=20)
        assert len(done) == 256
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@real_gpu
def test_the_engine_makes_more_tokens_per_second_than_generate(half_billion):
    tokenizer, rows = tiny_tokenizer(), [[{"role": "user", "content": "?" * 300 + str(n)}] for n in range(64)]
    engine = Engine(half_billion.eval(), tokenizer)
    engine.stop_ids = frozenset({half_billion.config.vocab_size})
    engine.generate(rows[:2], max_new_tokens=2)
    engine.generate(rows, max_new_tokens=64)
    prompts = [load.render_prompt(tokenizer, row) for row in rows[:8]]
    with torch.inference_mode():
        generate_batch(half_billion, prompts, 2, engine.stop_ids)
        torch.cuda.synchronize()
        started = time.perf_counter()
        generate_batch(half_billion, prompts, 64, engine.stop_ids)
        torch.cuda.synchronize()
    plain = 8 * 64 / (time.perf_counter() - started)
    print(f"{engine.stats.tokens_per_s:.0f} tokens/s, generate() in batches of 8 {plain:.0f}")
    assert engine.stats.tokens_per_s > 2 * plain
