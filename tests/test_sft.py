"""What carries a label, the same update however a step is cut, a resumed run that equals an unbroken one."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from lib.engine import load
from lib.record.files import sha256_json
from lib.train import checkpoints, memory_plan, packing, sft, trainer
from lib.train.rows import EncodedRows, TrainingError, encode_row, encode_rows, num_supervised, try_rows
from lib.train.settings import TrainSettings

TOKENIZERS = os.environ.get("TOKENIZERS_DIR", "")
needs_tokenizers = pytest.mark.skipif(not TOKENIZERS, reason="TOKENIZERS_DIR names no folder with qwen2.5 and qwen3")
FLOAT32 = load.Runtime("cpu", torch.float32, "test")
BFLOAT16 = load.Runtime("cpu", torch.bfloat16, "test")
SETTINGS = TrainSettings(
    base_model="owner/base",
    base_identity="random",
    num_epochs=2,
    learning_rate=5e-3,
    lora_r=4,
    lora_alpha=8,
    lora_dropout=0.1,
    train_batch_size=2,
    gradient_accumulation_steps=2,
    save_steps=4,
    seed=42,
    warmup_share=0.1,
)


def conversation(number, answer=None):
    return [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": f"{number} + {number}?" + "!" * (number % 5)},
        {"role": "assistant", "content": answer or f"#### {2 * number}"},
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="module")
def examples():
    return encode_rows(tiny_tokenizer(), [conversation(number) for number in range(20)], 100).examples


def run(
    folder,
    examples,
    output_dir,
    settings=SETTINGS,
    runtime=FLOAT32,
    quantization="none",
    dev=(),
    num_checkpoints=0,
    say=lambda line: None,
    load_weights=load.load_dense,
):
    model = load_weights(folder, runtime, quantization).train()
    options = {"dev_examples": dev, "num_checkpoints": num_checkpoints, "say": say}
    return sft.train(model, examples, settings, output_dir, **options)


@pytest.fixture(scope="module")
def unbroken(folder, examples, tmp_path_factory):
    return run(folder, examples, tmp_path_factory.mktemp("unbroken"))


def adapter(result_or_folder):
    folder = getattr(result_or_folder, "adapter_dir", result_or_folder)
    return load_file(folder / "adapter_model.safetensors")


def checkpoint_names(output_dir):
    return [path.name for path in checkpoints.list_checkpoints(output_dir / "checkpoints")]


def losses(result):
    return [row["loss"] for row in result.log]


def assert_same_adapter(one, other, **tolerance):
    one, other = adapter(one), adapter(other)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerance)


# --- labels ---------------------------------------------------------------------------------------------------------


def labelled_text(tokenizer, example):
    return tokenizer.decode([label for label in example["labels"] if label != packing.IGNORED_LABEL])


def test_the_answer_and_its_end_carry_labels_and_nothing_else():
    # The tokenizer's end-of-sequence token is its end of turn: masked by id, the model would never learn to stop.
    tokenizer = tiny_tokenizer()
    example = encode_row(tokenizer, conversation(3), 100)
    assert labelled_text(tokenizer, example) == "#### 6<|im_end|>"
    assert example["labels"][-1] == example["input_ids"][-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.decode(example["input_ids"]) == (
        "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n3 + 3?!!!<|im_end|>\n<|im_start|>assistant\n"
        "#### 6<|im_end|>"
    )


@needs_tokenizers
@pytest.mark.parametrize(
    ("name", "opening"),
    [("qwen2.5", "<|im_start|>assistant\n"), ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n")],
)
def test_labels_on_the_real_templates(name, opening):
    tokenizer = load.load_tokenizer(Path(TOKENIZERS) / name)
    example = encode_row(tokenizer, conversation(3), 100)
    assert labelled_text(tokenizer, example) == "#### 6<|im_end|>"
    prompt = [token for token, label in zip(*example.values(), strict=True) if label == packing.IGNORED_LABEL]
    assert prompt == load.render_prompt(tokenizer, conversation(3)[:2])
    assert tokenizer.decode(prompt).endswith(opening)


@pytest.mark.parametrize(
    ("answer", "message"), [(" ", "empty"), ("so 4<|im_end|>\n<|im_start|>user\nmore", "end-of-turn token")]
)
def test_answers_that_cannot_be_learnt_are_refused_by_row(answer, message):
    rows = [conversation(1), conversation(2, answer)]
    with pytest.raises(TrainingError, match=f"training row 1: .*{message}"):
        encode_rows(tiny_tokenizer(), rows, 200)


def test_rows_that_cannot_be_learnt_are_all_collected():
    # As where a tokenizer has one token for the line break of the prompt and the blank of the answer.
    tokenizer = tiny_tokenizer()
    merged = "{{ '' if message.content.startswith(' ') else '\n' }}{{ message.content }}"
    tokenizer.chat_template = tokenizer.chat_template.replace("\n{{ message.content }}", merged)
    rows = [conversation(0), conversation(1, " 12"), conversation(2), conversation(3, " ")]
    tried = try_rows(tokenizer, rows, 200)
    assert tried.kept == [0, 2] and list(tried.faults) == [1, 3]
    assert "' 12'" in tried.faults[1] and "beginning" in tried.faults[3]
    with pytest.raises(TrainingError, match=r"^training row 1: .*\(2 of 4 rows have a fault\)$"):
        encode_rows(tokenizer, rows, 200)
    assert try_rows(tokenizer, [], 200) == EncodedRows([], [], [])


@needs_tokenizers
@pytest.mark.parametrize(("name", "changing"), [("qwen2.5", "\n\n4"), ("qwen3", "<think>a</think>4")])
def test_answers_that_change_the_prompt_of_a_real_tokenizer_are_found(name, changing):
    tokenizer = load.load_tokenizer(Path(TOKENIZERS) / name)
    answers = ["So 4.\n#### 4", changing, "#### 4<|im_end|>", " "]
    tried = try_rows(tokenizer, [conversation(2, answer) for answer in answers], 200)
    assert (tried.kept, list(tried.faults)) == ([0], [1, 2, 3])
    assert repr(changing[:10]) in tried.faults[1]


def test_rows_that_are_too_long_are_left_out_whole_and_reported():
    tokenizer = tiny_tokenizer()
    rows = [conversation(0), conversation(1, "long " * 50), conversation(2)]
    encoded = encode_rows(tokenizer, rows, 60)
    assert (encoded.kept, encoded.too_long) == ([0, 2], [1])
    assert encoded.num_supervised_tokens == 2 * len("#### 0|")
    assert encoded.num_tokens == sum(len(encode_row(tokenizer, rows[i], 60)["input_ids"]) for i in (0, 2))
    with pytest.raises(TrainingError, match="none of 3 rows"):
        encode_rows(tokenizer, rows, 10)


def test_errors_about_development_rows_name_them():
    tokenizer, rows = tiny_tokenizer(), [conversation(0), conversation(1, " ")]
    with pytest.raises(TrainingError, match=r"^development rows: none of 1 rows .*; raise max_seq_length$"):
        encode_rows(tokenizer, rows[:1], 10, "development")
    with pytest.raises(TrainingError, match=r"^development row 1: .*empty"):
        encode_rows(tokenizer, rows, 100, "development")


# --- steps ----------------------------------------------------------------------------------------------------------


def test_every_epoch_is_a_shuffle_of_all_rows_and_the_seed_decides_it():
    steps = sft.step_rows(50, 16, 2, seed=7)
    assert [len(step) for step in steps] == [16, 16, 16, 2] * 2
    first, second = ([row for step in epoch for row in step] for epoch in (steps[:4], steps[4:]))
    assert sorted(first) == sorted(second) == list(range(50)) and first != second
    assert steps == sft.step_rows(50, 16, 2, seed=7) != sft.step_rows(50, 16, 2, seed=8)
    assert len(sft.step_rows(7473, 16, 1, seed=42)) == 468


def test_micro_batches_keep_every_row_and_the_limit():
    rows = [{"input_ids": [0] * length, "labels": [0] * length} for length in (5, 4, 3, 20, 1)]
    parts = memory_plan.cut_micro_batches(rows, 9)
    assert [[len(row["input_ids"]) for row in part] for part in parts] == [[5, 4], [3], [20], [1]]


def test_an_update_does_not_depend_on_how_its_step_is_cut(folder, examples, tmp_path):
    settings = replace(SETTINGS, lora_dropout=0.0, train_batch_size=2, gradient_accumulation_steps=8)
    unbroken = run(folder, examples, tmp_path / "unbroken", replace(settings, micro_batch_tokens=4096))
    cut = run(folder, examples, tmp_path / "cut", replace(settings, micro_batch_tokens=90))
    turned = run(
        folder, examples, tmp_path / "turned", replace(settings, train_batch_size=16, gradient_accumulation_steps=1)
    )
    assert losses(cut) == pytest.approx(losses(unbroken), rel=1e-5)
    assert_same_adapter(cut, unbroken, rtol=1e-4, atol=1e-5)
    assert_same_adapter(turned, unbroken, rtol=1e-4, atol=1e-5)


def fail_in(monkeypatch, when, error):
    """Lets the backward pass of a micro-batch run out of memory, with half of its gradients already added."""
    original, sizes = trainer.supervised_loss, []

    def limited(model, rows):
        sizes.append(rows.num_tokens)
        loss = original(model, rows)
        if torch.is_grad_enabled() and when(rows, sizes):
            loss.backward()
            raise error
        return loss

    monkeypatch.setattr(trainer, "supervised_loss", limited)
    return sizes


SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", SHORTAGES, ids=["out of memory", "cuBLAS"])
def test_where_memory_runs_out_training_goes_on_with_half_the_micro_batch(
    folder, examples, dev, tmp_path, monkeypatch, error
):
    longest = max(len(example["input_ids"]) for example in examples)
    small = replace(SETTINGS, micro_batch_tokens=2 * longest)
    expected = run(folder, examples, tmp_path / "small", replace(small, lora_dropout=0.0), dev=dev)
    sizes = fail_in(monkeypatch, lambda rows, sizes: rows.num_tokens > 2 * longest, error)
    wanted = replace(SETTINGS, lora_dropout=0.0, micro_batch_tokens=8 * longest)
    with pytest.warns(UserWarning, match="out of memory with .* tokens in a micro-batch, going on with"):
        result = run(folder, examples, tmp_path / "halved", wanted, dev=dev)
    # Found out once, in the first step; the batch of an update stays the same.
    assert [size > 2 * longest for size in sizes].count(True) == 1
    assert result.micro_batch_tokens <= 2 * longest
    assert result.num_tokens == expected.num_tokens and result.num_steps == expected.num_steps
    assert_same_adapter(result, expected, rtol=1e-3, atol=1e-5)


def test_a_step_that_memory_ended_late_draws_and_adds_as_if_it_had_not_been(folder, examples, tmp_path, monkeypatch):
    longest = max(len(example["input_ids"]) for example in examples)
    expected = run(folder, examples, tmp_path / "one", replace(SETTINGS, micro_batch_tokens=longest))
    # The second half of the first step: gradients of the first are there, and dropout has drawn for it.
    fail_in(monkeypatch, lambda rows, sizes: len(sizes) == 2, SHORTAGES[0])
    with pytest.warns(UserWarning, match=f"going on with {longest}:"):
        result = run(folder, examples, tmp_path / "two", replace(SETTINGS, micro_batch_tokens=2 * longest))
    assert result.adapter_sha256 == expected.adapter_sha256


def test_a_row_that_does_not_fit_alone_is_an_error(folder, examples, tmp_path, monkeypatch):
    fail_in(monkeypatch, lambda rows, sizes: True, SHORTAGES[0])
    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError):
        run(folder, examples, tmp_path)


def test_the_first_loss_is_the_mean_over_the_supervised_tokens_of_the_step(folder, examples, tmp_path):
    """By transformers' own loss, row by row: long answers weigh more than short ones."""
    model = load.load_base(folder, FLOAT32, "none")
    first = sft.step_rows(len(examples), 4, 1, SETTINGS.seed)[0]
    sums, counts = 0.0, 0
    for number in first:
        row = {name: torch.tensor([ids]) for name, ids in examples[number].items()}
        count = num_supervised(examples[number])
        sums, counts = sums + model(**row).loss.item() * count, counts + count
    assert losses(run(folder, examples, tmp_path))[0] == pytest.approx(sums / counts, rel=1e-5)


RECORDED = {
    "qwen2": [6.2313, 6.0103, 5.5653],
    "qwen3": [6.3556, 6.3408, 5.8735],
    "llama": [5.9638, 6.2126, 5.7973],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_first_losses_are_those_recorded(tmp_path, examples, family):
    """Whatever changes these changes the training of every preset: say so when they are recorded again."""
    result = run(save_tiny_model(tmp_path / "base", family), examples, tmp_path / "run", quantization="nf4")
    assert losses(result)[:3] == pytest.approx(RECORDED[family], abs=2e-3)
    assert losses(result)[-1] < 0.7 * losses(result)[0]
    assert result.num_steps == 10 and result.num_rows == 40


def test_packed_and_dense_weights_train_the_same(folder, examples, tmp_path):
    packed, dense = (
        run(folder, examples, tmp_path / weights, runtime=BFLOAT16, quantization="nf4", load_weights=load_weights)
        for weights, load_weights in (("packed", load.load_base), ("dense", load.load_dense))
    )
    assert losses(packed) == losses(dense)
    assert_same_adapter(packed, dense, rtol=0, atol=0)


def test_computing_activations_twice_changes_nothing(folder, examples, tmp_path, unbroken):
    twice = run(folder, examples, tmp_path, replace(SETTINGS, gradient_checkpointing=True))
    assert (unbroken.gradient_checkpointing, twice.gradient_checkpointing) == (False, True)
    assert_same_adapter(unbroken, twice, rtol=0, atol=0)


def test_checkpointing_and_small_micro_batches_come_with_little_memory(folder, examples, monkeypatch):
    model = load.load_dense(folder, FLOAT32, "none").train()
    with sft._adapted(model, SETTINGS):
        ample = memory_plan.plan_memory(model, examples, SETTINGS)
        monkeypatch.setattr(memory_plan, "memory_for_work_bytes", lambda model: 2**20)
        tight = memory_plan.plan_memory(model, examples, SETTINGS)
    assert not ample.gradient_checkpointing and ample.micro_batch_tokens == 2048
    assert tight.gradient_checkpointing and tight.micro_batch_tokens < 1024


# --- what is left behind --------------------------------------------------------------------------------------------


def test_what_training_writes(unbroken):
    result = unbroken
    assert sorted(path.name for path in result.adapter_dir.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((result.adapter_dir / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/base"
    assert {tensor.dtype for tensor in adapter(result).values()} == {torch.float32}
    assert len(adapter(result)) == 2 * 7 * 2, "A and B of all seven linear layers of both blocks"
    assert [path.name for path in result.checkpoints] == ["checkpoint-4", "checkpoint-8", "checkpoint-10"]
    assert_same_adapter(result.checkpoints[-1], result, rtol=0, atol=0)
    written = {path.name for path in result.adapter_dir.parent.rglob("*")}
    assert not written & {"README.md", "training_args.bin", "adapter_model.bin"}


def test_the_log_has_a_row_a_step(examples, unbroken):
    result = unbroken
    lines = (result.adapter_dir.parent / "training_log.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in lines]
    assert written == result.log
    assert [row["step"] for row in written] == list(range(1, 11))
    assert [row["epoch"] for row in written] == pytest.approx([0.2 * step for step in range(1, 11)])
    # One warm-up step of ten (learning rate 0 to full), then half a cosine down to 0.
    assert written[0]["learning_rate"] == 0 and written[1]["learning_rate"] == 5e-3
    assert 0 < written[-1]["learning_rate"] < 5e-4
    assert sum(row["num_tokens"] for row in written) == result.num_tokens
    assert result.num_supervised_tokens == 2 * sum(map(num_supervised, examples))
    assert result.num_trainable == sum(tensor.numel() for tensor in adapter(result).values())


def test_the_model_comes_back_as_it_was(folder, examples, tmp_path):
    model = load.load_dense(folder, FLOAT32, "none").train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    messages = []
    sft.train(model, examples, replace(SETTINGS, num_epochs=1), tmp_path, say=messages.append)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert model.config._attn_implementation == "sdpa"
    assert messages[0].startswith("micro-batches of up to") and messages[-1].startswith("step 5/5  loss")
    # A notebook that is kept holds no bar, however long the training took.
    assert len(messages) == 2 and "  5 steps made here in " in messages[-1]


def test_the_adapter_is_evaluated_as_it_was_trained(folder, examples, tmp_path):
    result = run(folder, examples, tmp_path, replace(SETTINGS, num_epochs=6, lora_dropout=0.0), quantization="nf4")
    row = {name: torch.tensor([ids]) for name, ids in examples[0].items()}
    untuned, tuned = (
        load.load_dense(folder, FLOAT32, "nf4", path)(**row).loss.item() for path in (None, result.adapter_dir)
    )
    assert tuned < 0.5 * untuned


# --- resume ---------------------------------------------------------------------------------------------------------


def assert_equals_unbroken(resumed, unbroken):
    """Bit for bit on the same machine: order, dropout, optimizer and schedule all continue."""
    assert losses(resumed) == losses(unbroken)
    assert [row["learning_rate"] for row in resumed.log] == [row["learning_rate"] for row in unbroken.log]
    assert_same_adapter(resumed, unbroken, rtol=0, atol=0)


def interrupt_at(monkeypatch, step):
    real = trainer.StepTrainer.training_step

    def stop(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step + 1 == step:
            raise KeyboardInterrupt
        return real(self, model, inputs, num_items_in_batch)

    monkeypatch.setattr(trainer.StepTrainer, "training_step", stop)


@pytest.mark.parametrize("step", [3, 9])
def test_a_resumed_run_equals_an_unbroken_one(folder, examples, tmp_path, unbroken, monkeypatch, step):
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        with pytest.raises(KeyboardInterrupt):
            run(folder, examples, tmp_path)
    assert not (tmp_path / "training.json").exists()
    resumed = run(folder, examples, tmp_path)
    assert resumed.resumed_from == {3: None, 9: 8}[step]
    assert_equals_unbroken(resumed, unbroken)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from lib.train import trainer
from lib.train.rows import encode_rows
import test_sft as tests
import torch
torch.set_num_threads(int(sys.argv[4]))

real = trainer.Recorder.on_save
def kill(self, args, state, control, **kwargs):
    if state.global_step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, args, state, control, **kwargs)
trainer.Recorder.on_save = kill
rows = [tests.conversation(number) for number in range(20)]
tests.run(Path(sys.argv[2]), encode_rows(tests.tiny_tokenizer(), rows, 100).examples, Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_a_save_resumes_from_the_checkpoint_before(folder, examples, tmp_path, unbroken):
    arguments = [str(Path(__file__).parent), str(folder), str(tmp_path), str(torch.get_num_threads())]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "checkpoints" / "checkpoint-8" / "trainer_state.json").exists()
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path / "checkpoints")] == ["checkpoint-4"]
    resumed = run(folder, examples, tmp_path)
    assert resumed.resumed_from == 4
    assert_equals_unbroken(resumed, unbroken)


def test_a_run_killed_after_its_last_step_only_writes_the_adapter(folder, examples, tmp_path, unbroken, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sft, "_finish", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(folder, examples, tmp_path)
    resumed = run(folder, examples, tmp_path)
    assert resumed.resumed_from == 10
    assert_equals_unbroken(resumed, unbroken)


def test_a_complete_training_is_not_repeated(folder, examples, tmp_path, monkeypatch):
    first = run(folder, examples, tmp_path)
    interrupt_at(monkeypatch, 1)
    again = run(folder, examples, tmp_path)
    assert again.reused and not first.reused
    assert replace(again, reused=False) == first


def test_a_final_adapter_that_was_replaced_comes_back(folder, examples, tmp_path):
    """A sweep puts the adapter of an earlier checkpoint in its place."""
    first = run(folder, examples, tmp_path)
    final = adapter(first)
    (first.adapter_dir / "adapter_model.safetensors").write_bytes(
        (first.checkpoints[0] / "adapter_model.safetensors").read_bytes()
    )
    again = run(folder, examples, tmp_path)
    assert again.reused
    assert all(torch.equal(final[name], tensor) for name, tensor in adapter(again).items())


def test_training_needs_no_rights_and_times_of_files(folder, examples, tmp_path, monkeypatch):
    """As on vfat and in buckets: training, and an adapter that comes back from its checkpoint."""

    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    for name in ("chmod", "utime", "link", "fsync"):
        monkeypatch.setattr(os, name, refuse)
    first = run(folder, examples, tmp_path)
    (first.adapter_dir / "adapter_model.safetensors").write_bytes(b"another one")
    assert run(folder, examples, tmp_path).reused


def test_a_final_adapter_that_is_lost_is_written_again(folder, examples, tmp_path, unbroken):
    first = run(folder, examples, tmp_path)
    for path in (first.adapter_dir, first.checkpoints[-1]):
        (path / "adapter_model.safetensors").write_bytes(b"torn")
    shutil.rmtree(first.checkpoints[-1])
    again = run(folder, examples, tmp_path)
    assert not again.reused and again.resumed_from == 8
    assert_equals_unbroken(again, unbroken)


@pytest.mark.parametrize("change", ["settings", "rows"])
def test_what_another_training_left_is_not_taken(folder, examples, tmp_path, change):
    first = run(folder, examples, tmp_path)
    settings = replace(SETTINGS, learning_rate=1e-3) if change == "settings" else SETTINGS
    second = run(folder, examples[:-1] if change == "rows" else examples, tmp_path, settings)
    assert not second.reused and second.resumed_from is None
    assert second.fingerprint != first.fingerprint


def test_checkpoints_sort_by_step_and_not_by_name(tmp_path):
    for step in (1000, 500, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / checkpoints.COMPLETE).touch()
    (tmp_path / "checkpoint-1500").mkdir()
    names = [path.name for path in checkpoints.list_checkpoints(tmp_path)]
    assert names == ["checkpoint-20", "checkpoint-500", "checkpoint-1000"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoints(folder, examples, tmp_path, monkeypatch):
    real, calls = packing.supervised_loss, []

    def break_at_step_6(model, rows):
        calls.append(rows)
        return real(model, rows) * (torch.nan if len(calls) > 5 else 1.0)

    monkeypatch.setattr(trainer, "supervised_loss", break_at_step_6)
    with pytest.raises(TrainingError, match=r"loss is nan at step 6.*learning_rate"):
        run(folder, examples, tmp_path)
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path / "checkpoints")] == ["checkpoint-4"]
    assert not (tmp_path / "adapter").exists()


# --- what can be trusted --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dev():
    return encode_rows(tiny_tokenizer(), [conversation(number) for number in range(30, 36)], 100).examples


def dev_losses(result):
    return {row["step"]: row["dev_loss"] for row in result.log if "dev_loss" in row}


def test_development_rows_are_measured_and_change_nothing(folder, examples, dev, tmp_path, unbroken):
    # Dropout is on in training: a measurement that drew random numbers would change every later step.
    measured = run(folder, examples, tmp_path, dev=dev)
    assert list(dev_losses(measured)) == [1, 4, 8, 10], "the first step, and every step that is saved"
    assert_equals_unbroken(measured, unbroken)
    assert measured.fingerprint != unbroken.fingerprint, "its log holds something else"
    again = run(folder, examples, tmp_path, dev=dev)
    assert again.reused and dev_losses(again) == dev_losses(measured)
    assert not run(folder, examples, tmp_path, dev=dev[:-1]).reused


def test_the_loss_on_development_rows_is_that_of_the_saved_adapter_without_dropout(folder, examples, dev, tmp_path):
    """By transformers' own loss on the model that is evaluated, row by row."""
    result = run(folder, examples, tmp_path, dev=dev, quantization="nf4")
    tuned = load.load_dense(folder, FLOAT32, "nf4", result.checkpoints[0])
    sums, counts = 0.0, 0
    for example in dev:
        row = {name: torch.tensor([ids]) for name, ids in example.items()}
        count = num_supervised(example)
        sums, counts = sums + tuned(**row).loss.item() * count, counts + count
    assert dev_losses(result)[4] == pytest.approx(sums / counts, rel=1e-4)


def test_packed_weights_give_the_same_development_loss_as_dense_ones(folder, examples, dev, tmp_path):
    # In eval mode packed NF4 layers on a CPU compute another function; what is measured must be what is trained.
    packed, dense = (
        run(
            folder,
            examples,
            tmp_path / weights,
            runtime=BFLOAT16,
            quantization="nf4",
            dev=dev,
            load_weights=load_weights,
        )
        for weights, load_weights in (("packed", load.load_base), ("dense", load.load_dense))
    )
    assert dev_losses(packed) == dev_losses(dense)
    assert losses(packed) == losses(dense)


def test_a_resumed_run_has_the_same_development_losses(folder, examples, dev, tmp_path, unbroken, monkeypatch):
    unbroken = run(folder, examples, tmp_path / "unbroken", dev=dev)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            run(folder, examples, tmp_path / "broken", dev=dev)
    resumed = run(folder, examples, tmp_path / "broken", dev=dev)
    assert resumed.resumed_from == 8
    assert dev_losses(resumed) == dev_losses(unbroken)
    assert_equals_unbroken(resumed, unbroken)


def test_every_step_has_its_gradient_norm_and_speed(unbroken):
    assert all(row["grad_norm"] > 0 for row in unbroken.log)
    assert all(row["tokens_per_s"] == row["num_tokens"] / row["wall_s"] for row in unbroken.log)


@pytest.mark.parametrize(
    ("loss", "earlier", "words"),
    [
        (9.9, [1.0] * 6, ""),
        (10.1, [1.0] * 6, "10 times the median 1"),
        # A well-learnt set has small losses: ten times of little is no explosion while it is near the first loss.
        (1.9, [1.0] + [0.01] * 30, ""),
        (2.1, [1.0] + [0.01] * 30, "10 times the median 0.01"),
        (11.4, [4.0] * 6, ""),
        (11.6, [4.0] * 6, "guessing every token alike"),
        # Untrained weights may begin worse than guessing.
        (20.0, [15.0] * 6, ""),
        (10.1, [1.0] * 4, ""),
        (300.0, [], ""),
        # Only the last twenty count: a high beginning does not hide a jump.
        (9.0, [4.4] * 5 + [0.5] * 20, "10 times the median 0.5"),
    ],
)
def test_what_counts_as_exploded(loss, earlier, words):
    message = trainer.why_exploded(loss, earlier, vocab_size=100_000)
    assert (words in message) if words else (message == "")


def test_a_loss_that_explodes_stops_the_run_and_names_the_last_good_checkpoint(
    folder, examples, tmp_path, unbroken, monkeypatch
):
    real, calls = packing.supervised_loss, []

    def explode_at_step_9(model, rows):
        calls.append(rows)
        return real(model, rows) * (60.0 if len(calls) > 8 else 1.0)

    monkeypatch.setattr(trainer, "supervised_loss", explode_at_step_9)
    # checkpoint-8 holds the very weights that gave the loss of step 9.
    with pytest.raises(TrainingError, match=r"exploded: .* at step 9; .*good checkpoint, checkpoint-4, is kept"):
        run(folder, examples, tmp_path)
    # What is named is what is gone on from: checkpoint-8 may be looked at, and is no more than that.
    assert checkpoint_names(tmp_path) == ["checkpoint-4"] and not (tmp_path / "adapter").exists()
    assert (tmp_path / "checkpoints" / "checkpoint-8" / "adapter_model.safetensors").exists()
    monkeypatch.setattr(trainer, "supervised_loss", real)
    messages = []
    resumed = run(folder, examples, tmp_path, say=messages.append)
    assert resumed.resumed_from == 4 and messages[0] == "deleting checkpoint-8: its weights were found unsound"
    assert_equals_unbroken(resumed, unbroken)


# --- broken numbers -------------------------------------------------------------------------------------------------


class BrokenGradient(torch.autograd.Function):
    """A sound value whose gradient is not: what an overflow in the backward pass leaves."""

    @staticmethod
    def forward(context, loss):
        return loss.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * torch.nan


def break_gradient_at(patch, step):
    real, calls = packing.supervised_loss, []

    def broken(model, rows):
        loss = real(model, rows)
        if not torch.is_grad_enabled():
            return loss
        calls.append(rows)
        return BrokenGradient.apply(loss) if len(calls) == step else loss

    patch.setattr(trainer, "supervised_loss", broken)


@pytest.mark.parametrize(("step", "kept"), [(8, ["checkpoint-4"]), (10, ["checkpoint-4", "checkpoint-8"]), (3, [])])
def test_a_broken_gradient_stops_before_it_changes_a_weight(
    folder, examples, tmp_path, unbroken, monkeypatch, step, kept
):
    """At a step that is saved, at the last one, and before any was: the loss of none of them shows it."""
    with monkeypatch.context() as patch:
        break_gradient_at(patch, step)
        with pytest.raises(TrainingError, match=f"norm of the gradient is nan at step {step};") as stopped:
            run(folder, examples, tmp_path)
    assert checkpoint_names(tmp_path) == kept
    assert (f"checkpoint, {kept[-1]}, is kept" if kept else "no checkpoint was saved") in str(stopped.value)
    assert "with another setting training starts over" in str(stopped.value)
    assert not (tmp_path / "adapter").exists() and not (tmp_path / "training.json").exists()
    for path in (tmp_path / "checkpoints").glob("*/adapter_model.safetensors"):
        assert all(weight.isfinite().all() for weight in load_file(path).values()), path
    resumed = run(folder, examples, tmp_path)
    assert resumed.resumed_from == (int(kept[-1].rpartition("-")[2]) if kept else None)
    assert_equals_unbroken(resumed, unbroken)


@pytest.mark.parametrize("step", [8, 10])
def test_weights_that_are_not_finite_are_never_saved(folder, examples, tmp_path, unbroken, monkeypatch, step):
    real = trainer.StepTrainer._save

    def poison(self, *arguments, **named):
        if self.state.global_step == step:
            next(weight for weight in self.model.parameters() if weight.requires_grad).data[0, 0] = torch.inf
        real(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.StepTrainer, "_save", poison)
        with pytest.raises(TrainingError, match=f"weights of the adapter are not finite after step {step}"):
            run(folder, examples, tmp_path)
    before = {8: "checkpoint-4", 10: "checkpoint-8"}[step]
    assert checkpoint_names(tmp_path)[-1] == before and not (tmp_path / "adapter").exists()
    assert_equals_unbroken(run(folder, examples, tmp_path), unbroken)


def test_a_result_that_is_not_finite_is_not_finished_and_its_checkpoint_not_gone_on_from(
    folder, examples, tmp_path, unbroken, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(sft, "_finish", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(folder, examples, tmp_path)
    path = tmp_path / "checkpoints" / "checkpoint-10" / "adapter_model.safetensors"
    save_file({name: weight * torch.nan for name, weight in load_file(path).items()}, path)
    with pytest.raises(TrainingError, match="not finite after step 10; the last good checkpoint, checkpoint-8"):
        run(folder, examples, tmp_path)
    assert not (tmp_path / "training.json").exists() and checkpoint_names(tmp_path)[-1] == "checkpoint-8"
    assert_equals_unbroken(run(folder, examples, tmp_path), unbroken)


def test_a_development_loss_that_is_not_finite_is_told(folder, examples, dev, tmp_path, monkeypatch):
    real = packing.supervised_loss
    steps = []

    def break_at_checkpoint_8(model, rows):
        loss = real(model, rows)
        if torch.is_grad_enabled():
            steps.append(rows)
            return loss
        return loss * (torch.inf if len(steps) == 8 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "supervised_loss", break_at_checkpoint_8)
        with pytest.raises(TrainingError, match=r"loss on development rows is inf after step 8; .* checkpoint-4,"):
            run(folder, examples, tmp_path, dev=dev)
    assert checkpoint_names(tmp_path) == ["checkpoint-4"] and not (tmp_path / "adapter").exists()
    assert run(folder, examples, tmp_path, dev=dev).resumed_from == 4


def test_float16_skips_what_its_loss_scaling_overflows(folder, examples, tmp_path, monkeypatch):
    """Needs no GPU: the Trainer is set to scale, and its update is left to the scaler."""
    norms = []

    def as_with_float16(self, model, grad_norm=None):
        self.args.fp16 = True
        norms.append(real(self, model, grad_norm))
        raise KeyboardInterrupt

    real = trainer.StepTrainer._get_grad_norm
    break_gradient_at(monkeypatch, 1)
    monkeypatch.setattr(trainer.StepTrainer, "_get_grad_norm", as_with_float16)
    with pytest.raises(KeyboardInterrupt):
        run(folder, examples, tmp_path)
    assert len(norms) == 1 and math.isnan(norms[0])


# --- checkpoints that are needed afterwards -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deleted", "goes_on_from"),
    [((4, 8, 10), None), ((8,), 4), ((10,), 8), ((4, 10), None)],
)
def test_a_complete_training_without_the_checkpoints_that_are_needed_goes_on(
    folder, examples, tmp_path, unbroken, deleted, goes_on_from
):
    run(folder, examples, tmp_path)
    for step in deleted:
        shutil.rmtree(tmp_path / "checkpoints" / f"checkpoint-{step}")
    assert run(folder, examples, tmp_path).reused, "no checkpoint is needed"
    messages = []
    again = run(folder, examples, tmp_path, num_checkpoints=3, say=messages.append)
    assert not again.reused and again.resumed_from == goes_on_from
    assert messages[0].startswith("complete already, but checkpoint-") and "training again" in messages[0]
    assert checkpoint_names(tmp_path) == ["checkpoint-4", "checkpoint-8", "checkpoint-10"]
    assert_equals_unbroken(again, unbroken)
    assert run(folder, examples, tmp_path, num_checkpoints=3).reused


def test_only_the_checkpoints_that_are_needed_count(folder, examples, tmp_path):
    run(folder, examples, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-4")
    assert run(folder, examples, tmp_path, num_checkpoints=2).reused
    assert not run(folder, examples, tmp_path, num_checkpoints=30).reused


def test_an_interrupted_training_makes_the_checkpoints_that_are_needed_and_gone(
    folder, examples, tmp_path, unbroken, monkeypatch
):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            run(folder, examples, tmp_path, num_checkpoints=3)
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-4")
    resumed = run(folder, examples, tmp_path, num_checkpoints=3)
    assert resumed.resumed_from is None and len(resumed.checkpoints) == 3
    assert_equals_unbroken(resumed, unbroken)


def test_checkpoints_are_saved_at_the_steps_that_are_counted_with(unbroken):
    assert checkpoints.checkpoint_steps(10, 4) == [4, 8, 10] == [int(path.name[11:]) for path in unbroken.checkpoints]
    assert checkpoints.checkpoint_steps(8, 4) == [4, 8] and checkpoints.checkpoint_steps(3, 400) == [3]


# --- peft's other keys ----------------------------------------------------------------------------------------------

LATER = [{"use_rslora": True}, {"use_dora": True}, {"init_lora_weights": "gaussian"}, {"neftune_noise_alpha": 5.0}]
LATER += [{"lora_target_modules": ("q_proj", "down_proj")}, {"lr_scheduler": "linear"}, {"optimizer": "adamw_8bit"}]


def test_a_training_made_before_these_keys_is_the_same_training(folder, examples):
    model = load.load_base(folder, FLOAT32, "none")
    # As it was hashed then.
    known = {name: getattr(SETTINGS, name) for name in BEFORE}
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    before = sha256_json([known, sft.rows_sha256(examples), str(model.dtype), targets])
    assert sft.training_fingerprint(model, examples, SETTINGS) == before
    changed = [sft.training_fingerprint(model, examples, replace(SETTINGS, **later)) for later in LATER]
    assert len({before, *changed}) == len(LATER) + 1


BEFORE = ("base_model", "base_identity", "num_epochs", "learning_rate", "lora_r", "lora_alpha", "lora_dropout")
BEFORE += ("train_batch_size", "gradient_accumulation_steps", "save_steps", "seed", "warmup_share", "weight_decay")
BEFORE += ("max_grad_norm",)


@pytest.mark.parametrize("later", LATER, ids=str)
def test_each_key_changes_the_training_and_its_adapter_is_evaluated_as_trained(folder, examples, tmp_path, later):
    settings = replace(SETTINGS, lora_dropout=0.0, learning_rate=2e-2, **later)
    result = run(folder, examples, tmp_path, settings, quantization="nf4")
    assert result.log[-1]["loss"] < result.log[0]["loss"]
    config = json.loads((result.adapter_dir / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == set(settings.lora_target_modules)
    assert (config["use_dora"], config["use_rslora"]) == (settings.use_dora, settings.use_rslora)
    ids = torch.tensor([examples[0]["input_ids"]])
    with torch.no_grad():
        base = load.load_dense(folder, FLOAT32, "nf4")
        beside = PeftModel.from_pretrained(base, str(result.adapter_dir)).eval()(ids).logits
        merged = load.load_dense(folder, FLOAT32, "nf4", result.adapter_dir)(ids).logits
    torch.testing.assert_close(merged, beside, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"use_rslora": True}, {"use_dora": True, "use_rslora": True}])
def test_after_two_steps_plain_peft_and_the_evaluation_compute_the_same(folder, examples, tmp_path, kind):
    settings = replace(SETTINGS, lora_dropout=0.0, learning_rate=2e-2, num_epochs=1, **kind)
    result = run(folder, examples[:8], tmp_path, settings)
    assert len(result.log) == 2
    ids = torch.tensor([examples[0]["input_ids"]])
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        untuned = base(ids).logits
        plain = PeftModel.from_pretrained(base, str(result.adapter_dir)).eval()(ids).logits
        evaluated = load.load_dense(folder, FLOAT32, "none", result.adapter_dir)(ids).logits
    torch.testing.assert_close(evaluated, plain, rtol=1e-5, atol=1e-4)
    # Far above what is allowed: the adapter does something.
    assert (plain - untuned).abs().max() > 0.1


@pytest.mark.parametrize("later", [{"use_dora": True, "neftune_noise_alpha": 5.0, "optimizer": "adamw_8bit"}], ids=str)
def test_a_resumed_training_equals_an_unbroken_one_with_them_too(folder, examples, tmp_path, monkeypatch, later):
    settings = replace(SETTINGS, **later)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            run(folder, examples, tmp_path / "resumed", settings)
    resumed = run(folder, examples, tmp_path / "resumed", settings)
    assert resumed.resumed_from == 8
    assert_equals_unbroken(resumed, run(folder, examples, tmp_path / "unbroken", settings))


@pytest.mark.parametrize(
    ("later", "words"),
    [
        (
            {"lora_target_modules": ("q_proj", "c_attn", "fc1")},
            "names c_attn, fc1; Qwen2ForCausalLM has q_proj, k_proj,",
        ),
        ({"lora_target_modules": ("lm_head",)}, "names lm_head; "),
        ({"lora_target_modules": ("embed_tokens",)}, "names embed_tokens; "),
        ({"lora_target_modules": ("proj",)}, "names proj; "),
        ({"optimizer": "paged_adamw_8bit"}, "optimizer is 'paged_adamw_8bit', which moves its state"),
    ],
)
def test_what_the_model_or_machine_does_not_have_is_refused_before_anything_is_deleted(
    folder, examples, tmp_path, later, words
):
    first = run(folder, examples, tmp_path)
    with pytest.raises(TrainingError, match=words):
        run(folder, examples, tmp_path, replace(SETTINGS, **later))
    assert first.adapter_dir.is_dir() and all(path.is_dir() for path in first.checkpoints)


def test_dora_says_that_it_is_slower(folder, examples, tmp_path):
    said = []
    run(folder, examples, tmp_path, replace(SETTINGS, use_dora=True, num_epochs=1), say=said.append)
    assert any("peft's own layers, in float32" in line for line in said)
