"""The engine writes what plain greedy decoding writes, whatever the batch, the prefix and the memory."""

import math
import warnings

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lib.engine import attention, batch, generate, kernels, memory, picking, plain
from lib.engine.attention import attend_by_products, attend_in_portions, merge
from lib.engine.generate import Engine, common_prefix_length, why_not_shared
from lib.engine.generator import Sampling
from lib.engine.load import render_prompt
from lib.engine.memory import is_out_of_memory
from lib.engine.picking import pick_tokens

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHAPE = dict(
    vocab_size=300,
    hidden_size=48,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=512,
    # Far wider than usual: small random weights write one token for ever.
    initializer_range=0.4,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=256,
)
FAMILIES = {
    "llama": lambda **kwargs: LlamaForCausalLM(LlamaConfig(**SHAPE, **kwargs)),
    "qwen2": lambda **kwargs: Qwen2ForCausalLM(Qwen2Config(**SHAPE, **kwargs)),
    "qwen3": lambda **kwargs: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16, **kwargs)),
}
INSTRUCTION = "Answer in one word, and keep to what was asked before."
# As few-shot evaluation has them: a long common beginning, then texts of very unlike length.
QUESTIONS = [
    "a",
    "How many eggs?",
    "12 + 7 = ",
    "What is left of the pie when three friends ate half?",
    "b",
    "??",
    "Ok.",
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, and an end-of-turn token."""
    vocabulary = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", extra_special_tokens=["<|pad|>"])
    made.chat_template = TEMPLATE
    return made


def make_model(family, seed=0, **kwargs):
    torch.manual_seed(seed)
    return FAMILIES[family](**kwargs).eval()


def conversations(instruction=INSTRUCTION, questions=QUESTIONS):
    system = [{"role": "system", "content": instruction}] if instruction else []
    return [[*system, {"role": "user", "content": question}] for question in questions]


def greedy_reference(model, tokenizer, conversation, max_new_tokens, stop_ids):
    """The definition of greedy decoding: the complete text read again for each token."""
    prompt = render_prompt(tokenizer, conversation)
    output = []
    while len(output) < max_new_tokens:
        with torch.no_grad():
            token = int(model(torch.tensor([prompt + output])).logits[0, -1].argmax())
        if token in stop_ids:
            return output, "stop"
        output.append(token)
    return output, "length"


def written(completions):
    return [(list(done.token_ids), done.finish_reason) for done in completions]


def references(model, tokenizer, rows, max_new_tokens, stop_ids=(256,)):
    return [greedy_reference(model, tokenizer, row, max_new_tokens, stop_ids) for row in rows]


def make_stop(model, tokenizer, rows, place):
    """Makes the token that row 0 writes at ``place`` one that stops, so that rows end at many lengths."""
    token = greedy_reference(model, tokenizer, rows[0], place + 1, ())[0][place]
    model.generation_config.eos_token_id = [256, token]
    return (256, token)


# --- the same tokens as plain decoding ------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_engine_writes_what_plain_greedy_writes(family, batch_size, tokenizer):
    model, rows = make_model(family), conversations()
    stop_ids = make_stop(model, tokenizer, rows, 7)
    engine = Engine(model, tokenizer, batch_size=batch_size)
    completions = engine.generate(rows, max_new_tokens=12)
    expected = references(model, tokenizer, rows, 12, stop_ids)
    assert written(completions) == expected
    # Otherwise neither refilling nor the limit would have been tried.
    assert {reason for _, reason in expected} == {"stop", "length"}
    assert engine.stats.num_prefix_tokens > 50
    assert engine.stats.peak_rows == min(batch_size, len(rows))


@pytest.mark.parametrize("plain_way", [False, True])
@pytest.mark.parametrize(
    ("batch_size", "num_rows", "halved"), [(4, 6, 2), (5, 6, 2), (64, 6, 3), (1, 6, 2), (1, 1, 1), (0, 6, 3)]
)
def test_half_batches_have_another_number_of_rows_and_write_the_same(
    batch_size, num_rows, halved, plain_way, tokenizer
):
    model, rows = make_model("qwen2"), conversations()[:num_rows]
    engine = Engine(model, tokenizer, batch_size=batch_size)
    engine.refusal = "requested by this test" if plain_way else ""
    first, most = written(engine.generate(rows, max_new_tokens=6)), engine.stats.peak_rows
    scores = engine.label_probabilities(rows, labels=["SAFE", "UNSAFE"])
    engine.halved = True
    assert written(engine.generate(rows, max_new_tokens=6)) == first
    assert engine.stats.peak_rows == halved and (halved != most or num_rows == 1)
    again = engine.label_probabilities(rows, labels=["SAFE", "UNSAFE"])
    assert engine.stats.peak_rows == halved
    # Equal but for the rounding of float32, which other rows beside a row change.
    assert torch.allclose(torch.tensor(again), torch.tensor(scores), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_without_a_common_beginning(family, tokenizer):
    model = make_model(family)
    rows = conversations(instruction="", questions=QUESTIONS)
    rows[1] = [{"role": "system", "content": "Other."}, *rows[1]]
    engine = Engine(model, tokenizer, batch_size=3)
    assert written(engine.generate(rows, max_new_tokens=6)) == references(model, tokenizer, rows, 6)
    assert engine.stats.num_prefix_tokens == 0


@pytest.mark.parametrize("max_new_tokens", [1, 2])
def test_few_new_tokens_and_one_row(max_new_tokens, tokenizer):
    model, rows = make_model("qwen2"), conversations()
    engine = Engine(model, tokenizer)
    expected = references(model, tokenizer, rows, max_new_tokens)
    assert written(engine.generate(rows, max_new_tokens=max_new_tokens)) == expected
    assert written(engine.generate(rows[:1], max_new_tokens=max_new_tokens)) == expected[:1]


def test_equal_prompts_keep_a_token_of_their_own(tokenizer):
    model, rows = make_model("llama"), conversations(questions=["same", "same", "same"])
    completions = Engine(model, tokenizer).generate(rows, max_new_tokens=5)
    assert written(completions) == references(model, tokenizer, rows, 5)


def test_portions_smaller_than_the_batch(tokenizer, monkeypatch):
    monkeypatch.setitem(batch.PREFILL_TOKENS, "cpu", 30)
    model, rows = make_model("qwen3"), conversations()
    engine = Engine(model, tokenizer)
    assert written(engine.generate(rows, max_new_tokens=8)) == references(model, tokenizer, rows, 8)


def test_plain_way_writes_the_same(tokenizer):
    model, rows = make_model("qwen2"), conversations()
    stop_ids = make_stop(model, tokenizer, rows, 7)
    engine = Engine(model, tokenizer, batch_size=3)
    engine.refusal = "requested by this test"
    assert written(engine.generate(rows, max_new_tokens=12)) == references(model, tokenizer, rows, 12, stop_ids)
    assert engine.describe()["engine"] == "plain batches"


@pytest.mark.parametrize("refusal", ["", "requested by this test"])
def test_a_shipped_repetition_penalty_changes_nothing(refusal, tokenizer):
    # Qwen2.5-0.5B-Instruct ships 1.1, and generate(do_sample=False) applies it, to the prompt's tokens too.
    model, rows = make_model("llama"), conversations()
    shipped = GenerationConfig(repetition_penalty=1.5, temperature=0.7, do_sample=True, eos_token_id=256, top_k=20)
    model.generation_config = shipped
    engine = Engine(model, tokenizer)
    engine.refusal = refusal
    assert written(engine.generate(rows, max_new_tokens=10)) == references(model, tokenizer, rows, 10)
    assert model.generation_config is shipped


def test_no_logits_processor_is_active_in_the_plain_way():
    model = make_model("llama")
    model.generation_config = GenerationConfig(repetition_penalty=1.5, no_repeat_ngram_size=2, eos_token_id=256)
    config = plain.greedy_config(5, [256])
    with plain.own_generation_config(model, config):
        merged, _ = model._prepare_generation_config(None)
        processors = model._get_logits_processor(merged, input_ids_seq_length=3)
    assert list(processors) == []


# --- how results come back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("refusal", ["", "requested by this test"])
def test_each_row_is_reported_once_when_it_is_done(refusal, tokenizer):
    model, rows = make_model("qwen2"), conversations()
    make_stop(model, tokenizer, rows, 7)
    engine = Engine(model, tokenizer, batch_size=2)
    engine.refusal = refusal
    seen = []
    completions = engine.generate(
        rows, max_new_tokens=12, on_completion=lambda index, completion: seen.append((index, completion))
    )
    assert sorted(index for index, _ in seen) == list(range(len(rows)))
    assert all(completions[index] == completion for index, completion in seen)


def test_completion_counts_and_text(tokenizer):
    model, rows = make_model("llama"), conversations(questions=["x", "longer"])
    one, other = Engine(model, tokenizer).generate(rows, max_new_tokens=9)
    assert one.num_output_tokens == len(one.token_ids) <= 9
    assert other.num_prompt_tokens - one.num_prompt_tokens == len("longer") - len("x")
    assert one.num_prompt_tokens == len(render_prompt(tokenizer, rows[0]))
    assert one.text == tokenizer.decode(one.token_ids, skip_special_tokens=True)


def test_stats_and_no_rows(tokenizer):
    engine = Engine(make_model("llama"), tokenizer)
    completions = engine.generate(conversations(), max_new_tokens=4)
    stats = engine.stats
    assert stats.num_output_tokens == sum(done.num_output_tokens for done in completions)
    assert stats.wall_s > 0
    assert engine.generate([], max_new_tokens=4) == []
    assert engine.label_probabilities([], labels=["A", "B"]) == []


def test_the_model_is_left_as_it_was(tokenizer):
    model, rows = make_model("llama"), conversations()
    ids = torch.tensor([[1, 2, 3]])
    before = model.config._attn_implementation, model(ids).logits
    Engine(model, tokenizer).generate(rows, max_new_tokens=2)
    assert model.config._attn_implementation == before[0]
    assert torch.equal(model(ids).logits, before[1])


def test_a_kept_prefix_serves_later_calls_and_only_where_it_fits(tokenizer, monkeypatch):
    model, rows = make_model("llama"), conversations()
    computed = []
    original = generate.compute_prefix
    monkeypatch.setattr(
        generate,
        "compute_prefix",
        lambda model, tokens, portion: computed.append(len(tokens)) or original(model, tokens),
    )
    engine = Engine(model, tokenizer)
    engine.share_prefix(rows)
    assert len(computed) == 1 and engine.prefix_of(render_prompt(tokenizer, rows[0])).tokens
    engine.generate(rows, max_new_tokens=2)
    assert written(engine.generate(rows[3:4], max_new_tokens=5)) == references(model, tokenizer, rows[3:4], 5)
    assert len(computed) == 1
    other = conversations(instruction="Something else altogether, and just as long as that was.")
    assert written(engine.generate(other, max_new_tokens=5)) == references(model, tokenizer, other, 5)
    assert len(computed) == 2


# --- memory ----------------------------------------------------------------------------------------------------------


def fail_above(rows, error, monkeypatch, calls=None):
    """Lets forward passes over more than ``rows`` rows run out of memory."""
    original = batch.forward_step

    def limited(model, cache, step, prefix):
        if len(step.last_index) > rows:
            raise error
        return original(model, cache, step, prefix)

    monkeypatch.setattr(batch, "forward_step", limited)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 TB")],
)
def test_out_of_memory_halves_the_batch_and_loses_nothing(error, tokenizer, monkeypatch):
    model, rows = make_model("qwen2"), conversations()
    stop_ids = make_stop(model, tokenizer, rows, 7)
    expected = references(model, tokenizer, rows, 12, stop_ids)
    fail_above(2, error, monkeypatch)
    seen = []
    engine = Engine(model, tokenizer, batch_size=7)
    with pytest.warns(UserWarning, match="out of memory with 7 rows, going on with 3"):
        completions = engine.generate(rows, max_new_tokens=12, on_completion=lambda index, _: seen.append(index))
    assert written(completions) == expected
    assert sorted(seen) == list(range(len(rows)))
    assert engine.stats.num_halvings == 2


@pytest.mark.parametrize("portions", [1, 2, 8])
def test_a_shared_prefix_is_read_in_portions_where_memory_runs_out(portions, tokenizer, monkeypatch):
    model, rows = make_model("qwen3"), conversations()
    original, most = attention.forward_step, 80 // portions

    def limited(model, cache, step, prefix):
        if step.input_ids.shape[1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, cache, step, prefix)

    monkeypatch.setattr(attention, "forward_step", limited)
    engine = Engine(model, tokenizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert written(engine.generate(rows, max_new_tokens=9)) == references(model, tokenizer, rows, 9)
    assert engine.stats.num_prefix_tokens == 69
    assert [str(one.message)[:60] for one in caught if "shared prefix" in str(one.message)] == [
        f"out of memory with {69 // 2**n} tokens of the shared prefix, going on w"[:60]
        for n in range(portions.bit_length() - 1)
    ]


def test_out_of_memory_in_the_middle_keeps_what_is_written(tokenizer, monkeypatch):
    model, rows = make_model("llama"), conversations()
    stop_ids = make_stop(model, tokenizer, rows, 7)
    expected = references(model, tokenizer, rows, 12, stop_ids)
    steps = []
    original = batch.forward_step

    def fails_once(model, cache, step, prefix):
        steps.append(len(step.last_index))
        if len(steps) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, cache, step, prefix)

    monkeypatch.setattr(batch, "forward_step", fails_once)
    with pytest.warns(UserWarning, match="out of memory"):
        completions = Engine(model, tokenizer, batch_size=4).generate(rows, max_new_tokens=12)
    assert written(completions) == expected


def test_out_of_memory_with_one_row_is_an_error(tokenizer, monkeypatch):
    fail_above(0, torch.OutOfMemoryError("CUDA out of memory"), monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(torch.OutOfMemoryError):
            Engine(make_model("llama"), tokenizer).generate(conversations(), max_new_tokens=2)


def test_other_errors_are_not_taken_for_a_shortage(tokenizer, monkeypatch):
    fail_above(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"), monkeypatch)
    with pytest.raises(RuntimeError, match="shapes"):
        Engine(make_model("llama"), tokenizer).generate(conversations(), max_new_tokens=2)
    assert not is_out_of_memory(RuntimeError("shapes"))


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_shortages_that_have_no_exception_of_their_kind_are_recognised(words):
    assert is_out_of_memory(torch.AcceleratorError(words)) and is_out_of_memory(RuntimeError(words))
    assert not is_out_of_memory(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))


def test_the_cpu_allocator_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)


def test_batch_is_bounded_by_free_memory(tokenizer, monkeypatch):
    model = make_model("llama")
    engine = Engine(model, tokenizer)
    one_row = generate.row_bytes(model, 100)
    portion = generate.step_bytes(model, batch.PREFILL_TOKENS["cpu"])
    for rows in (1, 5):
        free = int((portion + rows * one_row + 1) / generate.MEMORY_SHARE) + 1
        monkeypatch.setattr(memory, "free_memory_bytes", lambda device, free=free: free)
        assert engine._num_slots(1000, 100) == rows
    monkeypatch.setattr(memory, "free_memory_bytes", lambda device: 0)
    assert engine._num_slots(1000, 100) == 1


# --- sampling --------------------------------------------------------------------------------------------------------


SAMPLING = Sampling(temperature=0.8, seed=3)


def sampled_reference(model, tokenizer, conversation, max_new_tokens, key, sampling=SAMPLING, stop_ids=(256,)):
    """The definition of sampling by one number a token: the first token whose summed probability exceeds it."""
    prompt, output = render_prompt(tokenizer, conversation), []
    while len(output) < max_new_tokens:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + output])).logits[0, -1]
        below = torch.softmax(logits.double() / sampling.temperature, dim=-1).cumsum(dim=-1)
        token = int((below <= sampling.uniform(key, len(output)) * below[-1]).sum())
        if token in stop_ids:
            return output, "stop"
        output.append(token)
    return output, "length"


@pytest.mark.parametrize("refusal", ["", "requested by this test"])
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_sampled_rows_are_those_of_the_definition_whatever_the_batch(batch_size, refusal, tokenizer):
    model, rows = make_model("qwen2"), conversations()
    keys = [f"row {index}" for index in range(len(rows))]
    expected = [sampled_reference(model, tokenizer, row, 8, key) for row, key in zip(rows, keys, strict=True)]
    engine = Engine(model, tokenizer, batch_size=batch_size)
    engine.refusal = refusal
    assert written(engine.generate(rows, max_new_tokens=8, sampling=SAMPLING, keys=keys)) == expected
    # Without rows 0 to 3 and in another order: the keys, not the places, decide.
    found = engine.generate(rows[:3:-1], max_new_tokens=8, sampling=SAMPLING, keys=keys[:3:-1])
    assert written(found) == expected[:3:-1]
    assert expected != references(model, tokenizer, rows, 8)


def test_keys_seeds_and_places_draw_apart_and_the_index_is_the_default_key(tokenizer):
    model, same = make_model("llama"), conversations(questions=["same"] * 3)
    engine = Engine(model, tokenizer)
    rows = written(engine.generate(same, max_new_tokens=8, sampling=SAMPLING))
    assert rows[0] != rows[1] != rows[2]
    assert written(engine.generate(same, max_new_tokens=8, sampling=SAMPLING, keys=[2, 2, 0])) == [
        rows[2],
        rows[2],
        rows[0],
    ]
    assert written(engine.generate(same, max_new_tokens=8, sampling=Sampling(0.8, seed=4)))[0] != rows[0]
    numbers = {SAMPLING.uniform(key, place) for key in ("a", "b", 1, 11) for place in range(20)}
    assert len(numbers) == 80 and all(0 <= number < 1 for number in numbers)


def test_the_random_numbers_never_change():
    # Row files are kept by a hash of seed and temperature: another way to number would mix two draws in one file.
    assert Sampling(1.0, 42).uniform("a", 0) == 0.19847539857049457
    assert Sampling(1.0, 42).uniform(7, 3) == 0.6112780467390464


def test_draws_follow_the_distribution_and_skip_what_has_no_probability():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    uniforms = [SAMPLING.uniform("draw", place) for place in range(4000)]
    tokens = picking.draw_tokens(probabilities.log().expand(4000, -1), uniforms, 1.0)
    shares = torch.bincount(torch.tensor(tokens), minlength=6) / 4000
    assert torch.allclose(shares, probabilities, atol=0.03) and set(tokens) == {1, 3, 4}
    largest = 1 - 2**-52
    assert picking.draw_tokens(probabilities.log().expand(2, -1), [0.0, largest], 1.0) == [1, 4]
    # Colder: more of the likeliest. 0.5 ** 2 of 0.38 is 66 %.
    cold = torch.tensor(picking.draw_tokens(probabilities.log().expand(4000, -1), uniforms, 0.5))
    assert (cold == 1).float().mean().item() == pytest.approx(0.25 / 0.38, abs=0.03)


def test_a_sampled_call_computes_its_own_prefix(tokenizer):
    model, engine_rows = make_model("llama"), conversations()
    engine = Engine(model, tokenizer)
    engine.generate(engine_rows, max_new_tokens=1)
    kept = engine._prefix
    engine.generate(engine_rows, max_new_tokens=1, sampling=SAMPLING)
    assert engine._prefix is not kept and engine._prefix.tokens == kept.tokens


def test_a_shortage_in_the_middle_changes_no_draw(tokenizer, monkeypatch):
    model, rows = make_model("llama"), conversations()
    expected = [sampled_reference(model, tokenizer, row, 8, index) for index, row in enumerate(rows)]
    fail_above(2, torch.OutOfMemoryError("CUDA out of memory"), monkeypatch)
    with pytest.warns(UserWarning, match="out of memory"):
        found = Engine(model, tokenizer, batch_size=4).generate(rows, max_new_tokens=8, sampling=SAMPLING)
    assert written(found) == expected


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperatures_that_draw_nothing_are_refused(temperature):
    with pytest.raises(ValueError, match="temperature is"):
        Sampling(temperature, seed=0)


def test_a_key_for_each_conversation(tokenizer):
    with pytest.raises(ValueError, match="2 keys for 7 conversations"):
        Engine(make_model("llama"), tokenizer).generate(conversations(), max_new_tokens=2, keys=["a", "b"])


def test_logits_that_are_no_numbers_are_not_drawn_from():
    with pytest.raises(FloatingPointError, match="float32"):
        picking.draw_tokens(torch.tensor([[1.0, 2.0], [float("nan"), 1.0]]), [0.5, 0.5], 1.0)


# --- labels ----------------------------------------------------------------------------------------------------------


def label_reference(model, tokenizer, conversation, labels):
    """Log-probabilities read off one full forward pass a label."""
    prompt, totals = render_prompt(tokenizer, conversation), []
    for label in labels:
        ids = tokenizer(label, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        totals.append(torch.log_softmax(logits, dim=-1)[range(len(ids)), ids].sum())
    return torch.softmax(torch.stack(totals), dim=0).tolist()


@pytest.mark.parametrize("refusal", ["", "requested by this test"])
@pytest.mark.parametrize("family", FAMILIES)
def test_label_probabilities_are_those_of_full_forward_passes(family, refusal, tokenizer):
    model, rows, labels = make_model(family), conversations(), ["A", "BCD", "EF"]
    engine = Engine(model, tokenizer, batch_size=3)
    engine.refusal = refusal
    seen = {}
    found = engine.label_probabilities(rows, labels=labels, on_result=seen.__setitem__)
    expected = [label_reference(model, tokenizer, row, labels) for row in rows]
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-5)
    assert [seen[index] for index in range(len(rows))] == found
    assert torch.tensor(found).sum(dim=-1).allclose(torch.ones(len(rows)))


def test_label_probabilities_survive_a_shortage(tokenizer, monkeypatch):
    model, rows, labels = make_model("qwen2"), conversations(), ["SAFE", "UNSAFE"]
    expected = Engine(model, tokenizer).label_probabilities(rows, labels=labels)
    fail_above(2, torch.OutOfMemoryError("CUDA out of memory"), monkeypatch)
    with pytest.warns(UserWarning, match="out of memory"):
        found = Engine(model, tokenizer).label_probabilities(rows, labels=labels)
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize(
    ("labels", "message"), [(["A"], "two or more"), (["A", ""], "not empty"), (["SAFE", "SAFER"], "begin those of")]
)
def test_labels_that_cannot_be_compared_are_refused(labels, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        Engine(make_model("llama"), tokenizer).label_probabilities(conversations(), labels=labels)


# --- which models ----------------------------------------------------------------------------------------------------


def test_sliding_windows_take_the_plain_way_and_say_so(tokenizer):
    model = make_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    engine, rows = Engine(model, tokenizer, batch_size=3), conversations()
    assert "sliding_attention" in engine.describe()["why"]
    assert engine.describe()["engine"] == "plain batches"
    # One by one here: with a window, the reference's prompts are not padded either.
    engine.batch_size = 1
    assert written(engine.generate(rows, max_new_tokens=5)) == references(model, tokenizer, rows, 5)


def test_other_families_take_the_plain_way(tokenizer):
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=256)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    assert "GPT2LMHeadModel is not one of" in why_not_shared(model)
    rows = conversations(questions=["one", "and another"])
    assert written(Engine(model, tokenizer).generate(rows, max_new_tokens=5)) == references(model, tokenizer, rows, 5)


def test_positions_that_depend_on_the_batch_are_refused():
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert "dynamic" in why_not_shared(make_model("llama", rope_parameters=scaled))


def test_what_cannot_be_done_is_an_error(tokenizer):
    model = make_model("llama")
    with pytest.raises(ValueError, match="512 positions"):
        Engine(model, tokenizer).generate(conversations(questions=["x" * 600]), max_new_tokens=4)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        Engine(model, tokenizer).generate(conversations(), max_new_tokens=0)
    with pytest.raises(ValueError, match="batch_size is -1"):
        Engine(model, tokenizer, batch_size=-1)
    with pytest.raises(ValueError, match=r"model\.eval"):
        Engine(make_model("llama").train(), tokenizer)


def test_logits_that_are_not_numbers_are_an_error():
    assert pick_tokens(torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 3.0]])) == [1, 0]
    with pytest.raises(FloatingPointError, match="float32"):
        pick_tokens(torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]))


# --- parts -----------------------------------------------------------------------------------------------------------


def plain_attention(query, key, value, scale):
    """(R, Hkv, G, T, D) over (R, Hkv, S, D) with the last T of S tokens as queries, by the definition."""
    scores = torch.einsum("rhgtd,rhsd->rhgts", query, key) * scale
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + key.shape[-2] - query.shape[-2])
    scores = scores.masked_fill(future, -torch.inf)
    return torch.einsum("rhgts,rhsd->rhgtd", scores.softmax(dim=-1), value), scores.logsumexp(dim=-1)


@pytest.mark.parametrize("kernel", [True, False])
def test_causal_attention(kernel, monkeypatch):
    monkeypatch.setattr(attention, "kernel_of", lambda query: "flash_cpu" if kernel else "products")
    monkeypatch.setitem(attention.NUM_QUERIES, "cpu", 3)
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 4, 7, 16), torch.randn(2, 3, 7, 16), torch.randn(2, 3, 7, 16)
    found = attention.attend_causally(query, key, value, 0.3)
    for one, other in zip(found, plain_attention(query, key, value, 0.3), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_attention_kernel_and_written_out():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 7, 16), torch.randn(2, 3, 9, 16), torch.randn(2, 3, 9, 16)
    assert kernels.kernel_of(query) == "flash_cpu"
    expected = attend_by_products(query, key, value, 0.3)
    for one, other in zip(attention.attend(query, key, value, 0.3), expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(("amx", "kernel"), [(True, "flash_cpu"), (False, "products")])
def test_a_cpu_without_tiles_for_bfloat16_multiplies_itself(monkeypatch, amx, kernel):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, length, 64).bfloat16() for length in (300, 200, 200))
    monkeypatch.setattr(kernels, "has_amx", lambda: amx)
    assert kernels.kernel_of(query) == kernel
    expected = attend_by_products(query.float(), key.float(), value.float(), 0.3)
    for one, other in zip(attention.attend(query, key, value, 0.3), expected, strict=True):
        assert torch.allclose(one.float(), other, atol=0.02)


def test_bfloat16_portions_agree_with_float32():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, length, 64).bfloat16() for length in (300, 200, 200))
    before = torch.backends.mkldnn.matmul.fp32_precision
    out, log_sum = attend_in_portions(query, key, value, 0.3)
    expected, expected_log_sum = attend_by_products(query.float(), key.float(), value.float(), 0.3)
    # Scores are exact up to the order of sums; the weights are rounded to bfloat16.
    assert torch.allclose(log_sum, expected_log_sum, atol=1e-4)
    assert torch.allclose(out, expected, atol=0.02)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("way", [attend_by_products, attend_in_portions])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_beyond_float16_stay_numbers(way, dtype):
    # Qwen2.5 has large key biases: q @ k is 1e5 here, float16 ends at 65,504, and so do 700 values of 100.
    query, key = torch.full((1, 1, 3, 10), 100.0, dtype=dtype), torch.full((1, 1, 700, 10), 100.0, dtype=dtype)
    value = torch.full((1, 1, 700, 10), 100.0, dtype=dtype)
    out, log_sum = way(query, key, value, 10**-0.5)
    torch.testing.assert_close(out.float(), torch.full((1, 1, 3, 10), 100.0), atol=0.5, rtol=0)
    torch.testing.assert_close(log_sum, torch.full((1, 1, 3), 1e5 * 10**-0.5 + math.log(700)), atol=0, rtol=4e-3)


def test_merging_two_sets_of_keys_is_attention_over_their_union():
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    complete, _ = attend_by_products(query, key, value, 1.0)
    parts = [attend_by_products(query, key[:, :, part], value[:, :, part], 1.0) for part in (slice(5), slice(5, 9))]
    assert torch.allclose(merge(*parts[0], *parts[1]), complete, atol=1e-5)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2], [1, 2]], 1), ([[1], [1, 2]], 0), ([[5], [6]], 0), ([[1, 2, 3]], 2)],
)
def test_common_prefix_leaves_each_row_a_token(prompts, expected):
    assert common_prefix_length(prompts) == expected
