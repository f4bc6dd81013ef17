"""lib.train.packing: rows end to end compute what padded batches compute, for the model kinds in use."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import FAMILIES, tiny_config
from torch import nn
from transformers import AutoModelForCausalLM

from lib.train import packing

LENGTHS = (30, 47, 5, 61)


def random_rows(vocab_size=300):
    """Rows of different lengths, labelled in their last third."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(0, vocab_size, (length,), generator=generator).tolist()
        cut = length * 2 // 3
        rows.append({"input_ids": ids, "labels": [packing.IGNORED_LABEL] * cut + ids[cut:]})
    return rows


def random_model(config):
    """Random weights wide enough that attention and logits are far from uniform."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.15)
    return model.requires_grad_(False).train()


def adapted_model(family, dtype, *, custom, **more):
    """A random model with an adapter whose B is not zero; the same numbers whether the layer is ours or peft's."""
    model = random_model(tiny_config(family, **more)).to(dtype)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    if custom:
        lora._register_custom_module({nn.Linear: packing.ComputeDtypeLoraLinear})
    torch.manual_seed(1)
    wrapped = get_peft_model(model, lora).train()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped


def padded(rows):
    """The plain way's batch: right padding, an attention mask, -100 on padding."""
    longest = max(LENGTHS)

    def fill(name, value):
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * length + [0] * (longest - length) for length in LENGTHS])
    return {"input_ids": fill("input_ids", 0), "labels": fill("labels", -100), "attention_mask": mask}


def plain_step(wrapped, rows):
    loss = wrapped(**padded(rows)).loss
    loss.backward()
    return loss.item(), gradients(wrapped)


def packed_step(wrapped, rows):
    batch = packing.pack_rows(rows)
    with packing.attention(wrapped.get_base_model(), packing.ATTENTION_NAME):
        loss = packing.supervised_loss(wrapped.get_base_model(), batch) / len(batch.targets)
        loss.backward()
    return loss.item(), gradients(wrapped)


def gradients(wrapped):
    return torch.cat([p.grad.flatten().float() for p in wrapped.parameters() if p.requires_grad])


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_padded_way(family):
    rows = random_rows()
    plain, plain_gradients = plain_step(adapted_model(family, torch.float32, custom=False), rows)
    ours, our_gradients = packed_step(adapted_model(family, torch.float32, custom=True), rows)
    assert ours == pytest.approx(plain, rel=1e-6)
    torch.testing.assert_close(our_gradients, plain_gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_it_is_as_close_to_float32_as_the_padded_way(family):
    rows = random_rows()
    exact, exact_gradients = plain_step(adapted_model(family, torch.float32, custom=False), rows)
    with torch.autocast("cpu", torch.bfloat16):
        plain, plain_gradients = plain_step(adapted_model(family, torch.bfloat16, custom=False), rows)
    ours, our_gradients = packed_step(adapted_model(family, torch.bfloat16, custom=True), rows)
    assert abs(ours - exact) < max(0.02 * exact, 2 * abs(plain - exact))
    assert (our_gradients - exact_gradients).norm() < 1.2 * (plain_gradients - exact_gradients).norm()


def test_rows_do_not_see_each_other():
    rows = random_rows()
    model = adapted_model("qwen2", torch.float32, custom=True).get_base_model()
    with packing.attention(model, packing.ATTENTION_NAME), torch.no_grad():
        together = packing.supervised_loss(model, packing.pack_rows(rows))
        alone = sum(packing.supervised_loss(model, packing.pack_rows([row])) for row in rows)
    torch.testing.assert_close(together, alone)


def test_a_label_on_the_first_token_is_not_predicted_from_the_row_before():
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3, 4, 5], "labels": [3, 4, -100]}]
    batch = packing.pack_rows(rows)
    assert batch.predict_index.tolist() == [0, 2] and batch.targets.tolist() == [2, 4]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2]] and batch.num_tokens == 5


@pytest.mark.parametrize("length", [1, 7, 200])
def test_attention_that_keeps_scores_is_causal_attention(length):
    torch.manual_seed(0)
    module = nn.Module()
    module.num_key_value_groups = 3
    query = torch.randn(1, 6, length, 16, requires_grad=True)
    key, value = (torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(2))
    upstream = torch.randn(1, length, 6, 16)

    def run(attend, dtype):
        states = [tensor.detach().to(dtype).requires_grad_() for tensor in (query, key, value)]
        output = attend(module, *states, 0.25)
        output.backward(upstream.to(dtype))
        return torch.cat([output.flatten(), *(state.grad.flatten() for state in states)]).float()

    exact = run(packing._attend_by_torch, torch.float32)
    torch.testing.assert_close(run(packing._attend_keeping_scores, torch.float32), exact, rtol=1e-4, atol=1e-5)
    error = (run(packing._attend_keeping_scores, torch.bfloat16) - exact).norm()
    assert error <= 1.5 * (run(packing._attend_by_torch, torch.bfloat16) - exact).norm()


def test_long_rows_do_not_keep_their_scores():
    bfloat16 = torch.zeros(1, dtype=torch.bfloat16)
    assert packing._keeps_scores(bfloat16, [10, packing.LONGEST_ROW_WITH_KEPT_SCORES])
    assert not packing._keeps_scores(bfloat16, [10, packing.LONGEST_ROW_WITH_KEPT_SCORES + 1])
    assert not packing._keeps_scores(torch.zeros(1), [10])


def test_the_loss_is_the_same_in_chunks(monkeypatch):
    hidden, weight = torch.randn(11, 8, requires_grad=True), torch.randn(50, 8)
    targets = torch.randint(0, 50, (11,))
    plain = nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    (expected,) = torch.autograd.grad(plain, hidden)
    monkeypatch.setitem(packing.LOSS_CHUNK_ELEMENTS, "cpu", 4 * 50)
    ours = packing._LinearCrossEntropy.apply(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(ours / 3, hidden)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gradient, expected / 3)


def test_a_disabled_adapter_leaves_the_base():
    wrapped = adapted_model("llama", torch.float32, custom=True).eval()
    ids = torch.tensor([random_rows()[0]["input_ids"]])
    with torch.no_grad():
        adapted = wrapped(input_ids=ids).logits
        with wrapped.disable_adapter():
            base = wrapped(input_ids=ids).logits
        assert not torch.allclose(adapted, base)
        torch.testing.assert_close(wrapped.unload()(input_ids=ids).logits, base)


WINDOW = {"sliding_window": 16, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}


@pytest.mark.parametrize("more", [{"attention_dropout": 0.1}, WINDOW], ids=["dropout", "window"])
def test_attention_that_is_not_computed_is_refused(more):
    wrapped = adapted_model("qwen2", torch.float32, custom=True, **more)
    with pytest.raises(ValueError, match="packed rows know no"):
        packed_step(wrapped, random_rows())


def test_a_model_with_logits_of_its_own_kind_is_refused():
    """Granite divides its logits by a factor, which a plain product with the output weights does not know."""
    model = random_model(tiny_config("granite", logits_scaling=8.0))
    with packing.attention(model, packing.ATTENTION_NAME), pytest.raises(ValueError, match="unknown"):
        packing.check_loss(model, random_rows()[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_models_in_use_pass_the_check(family, dtype):
    model = adapted_model(family, dtype, custom=True).get_base_model()
    with packing.attention(model, packing.ATTENTION_NAME):
        packing.check_loss(model, random_rows()[0])
    assert model.config._attn_implementation == "sdpa"


def test_noise_is_measured_by_each_row_s_own_length_and_never_over_its_bound():
    rows = packing.pack_rows(random_rows(), noise_alpha=5.0)
    model = adapted_model("qwen2", torch.float32, custom=True).get_base_model()
    noise = packing.noisy_embeddings(model, rows) - model.get_input_embeddings()(rows.input_ids)
    for length, part in zip(LENGTHS, noise[0].split(list(LENGTHS)), strict=True):
        most = 5.0 / (length * part.shape[-1]) ** 0.5
        assert 0.9 * most < part.abs().max() <= most
        assert part.mean().abs() < 0.1 * most


def test_noise_changes_the_loss_and_its_absence_does_not():
    plain, noisy = (packing.pack_rows(random_rows(), noise_alpha=alpha) for alpha in (0.0, 5.0))
    model = adapted_model("qwen2", torch.float32, custom=True).get_base_model()
    with packing.attention(model, packing.ATTENTION_NAME), torch.no_grad():
        assert packing.supervised_loss(model, plain) == packing.supervised_loss(model, plain)
        assert packing.supervised_loss(model, noisy) != packing.supervised_loss(model, plain)
