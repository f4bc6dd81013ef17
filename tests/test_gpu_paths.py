"""The CUDA branches on a pretended GPU: same texts, probabilities and losses as the CPU, the kernels by capability."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from tiny import save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from lib.engine import load
from lib.train import sft
from lib.train.rows import encode_rows
from lib.train.settings import TrainSettings

# A T4, a consumer card run in float16, an A100 and an H100.
GPUS = [((7, 5), torch.float16), ((8, 6), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
by_gpu = pytest.mark.parametrize(("capability", "dtype"), GPUS, ids=lambda value: str(value))
SETTINGS = TrainSettings(
    base_model="owner/base",
    base_identity="random",
    num_epochs=3,
    learning_rate=3e-3,
    lora_r=4,
    lora_alpha=8,
    lora_dropout=0.0,
    train_batch_size=2,
    gradient_accumulation_steps=2,
    save_steps=6,
    seed=1,
    micro_batch_tokens=128,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads only wait for each other on products this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="module")
def examples():
    rows = [
        [{"role": "user", "content": f"{number} + 1?"}, {"role": "assistant", "content": f"#### {number + 1}"}]
        for number in range(24)
    ]
    return encode_rows(tiny_tokenizer(), rows, 512).examples


def load_model(folder, dtype, device):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False).to(device)


# --- memory ---------------------------------------------------------------------------------------------------------


def alive_after_training(folder, examples, output_dir, quantization):
    model = load.load_for_training(folder, load.Runtime("cpu", torch.float32, "test"), quantization, say=print)
    sft.train(model, examples[:8], replace(SETTINGS, num_epochs=1), output_dir, say=lambda line: None)
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    gc.collect()
    return sum(weight() is not None for weight in weights)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_training_leaves_no_weight_alive(folder, examples, tmp_path, quantization):
    # A saved-tensors hook that returned its tensor kept the pass that measures memory, and 14 of 26 weights with it.
    assert alive_after_training(folder, examples, tmp_path, quantization) == 0
