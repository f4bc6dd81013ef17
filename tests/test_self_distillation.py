"""Own correct answers as training data; kills at any moment leave the bytes of an unbroken run."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lib.prepare import self_distillation
from lib.prepare.self_distillation import Asking, choose_training_rows, sample_answers
from lib.record.files import read_json, sha256_json
from lib.record.paths import PROJECT_ROOT, run_paths
from lib.record.rows import RowLog, read_jsonl, write_jsonl

HASH = "p" * 64
SAMPLING = SimpleNamespace(temperature=0.7, seed=5)
ASKING = Asking(SAMPLING, num_samples=3, max_new_tokens=50, device="cpu", batch_size=0)
QUESTIONS = [
    {"question": f"What is {n} + {n}?", "answer": f"It is <<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n}"} for n in range(9)
]


@dataclasses.dataclass(frozen=True)
class Completion:
    text: str
    finish_reason: str = "stop"
    num_output_tokens: int = 7
    num_prompt_tokens: int = 11
    token_ids: tuple = ()


class Fake:
    """Answers by the key alone, as seeded draws do, in another order; can be stopped after some rows."""

    def __init__(self, rows_until_kill=None):
        self.calls, self.left, self.wall_s = [], rows_until_kill, 0.0

    def generate(self, conversations, *, max_new_tokens, on_completion, sampling, keys):
        assert (max_new_tokens, sampling) == (ASKING.max_new_tokens, ASKING.sampling)
        self.calls.append(list(keys))
        self.wall_s += 1.5
        order = list(range(len(keys)))
        random.Random(keys[0]).shuffle(order)
        for index in order:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left = None if self.left is None else self.left - 1
            on_completion(index, self.answer(keys[index], conversations[index]))

    def answer(self, key, conversation):
        number = int(conversation[-1]["content"].split()[2])
        luck = random.Random(key)
        value = 2 * number if luck.random() < 0.4 else 1
        text = " so" * luck.randrange(1, 5)
        return Completion(f"It is{text}.\n#### {value}", num_output_tokens=len(text))


def run(folder, generator, asking=ASKING, questions=QUESTIONS):
    """Sample and choose as 01 does; the bytes of both files."""
    log = RowLog(folder / "samples.jsonl", HASH)
    sampled = sample_answers(questions, [], generator, asking, log)
    chosen = choose_training_rows(sampled, keep=1, choice="shortest", fallback="gold", seed=1)
    write_jsonl(folder / "train.jsonl", chosen.rows)
    return (folder / "samples.jsonl").read_bytes(), (folder / "train.jsonl").read_bytes()


@pytest.fixture
def small_calls(monkeypatch):
    """Two questions, six rows a call."""
    monkeypatch.setitem(self_distillation.ROWS_PER_CALL, "cpu", 6)


# --- asking, and going on ---------------------------------------------------------------------------------------------


def test_rows_come_in_order_with_their_scores(tmp_path, small_calls):
    fake = Fake()
    run(tmp_path, fake)
    rows = read_jsonl(tmp_path / "samples.jsonl")
    assert [row["id"] for row in rows] == list(range(27))
    assert [(row["question_number"], row["sample"]) for row in rows[:4]] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert rows[4]["question"] == "What is 1 + 1?" and rows[4]["outcome"] in ("correct", "wrong")
    assert all(row["correct"] == (row["parsed_final"] == str(2 * row["question_number"])) for row in rows)
    assert [len(keys) for keys in fake.calls] == [6, 6, 6, 6, 3]
    assert fake.calls[0][:4] == ["0:What is 0 + 0?", "1:What is 0 + 0?", "2:What is 0 + 0?", "0:What is 1 + 1?"]


def test_a_run_stopped_after_any_row_ends_in_the_bytes_of_an_unbroken_one(tmp_path, small_calls):
    unbroken = Fake()
    expected = run(tmp_path / "unbroken", unbroken)
    for stop in range(27):
        folder = tmp_path / f"stopped after {stop}"
        with pytest.raises(KeyboardInterrupt):
            run(folder, Fake(rows_until_kill=stop))
        again = Fake()
        assert run(folder, again) == expected
        # Every call that is made has the rows that it has in an unbroken run: its shapes, so its rounding.
        assert again.calls == unbroken.calls[stop // 6 :]


def test_a_file_torn_at_any_byte_ends_in_the_same_bytes(tmp_path, small_calls):
    expected = run(tmp_path, Fake())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", Fake(rows_until_kill=9))
    torn = (tmp_path / "stopped" / "samples.jsonl").read_bytes()
    for length in random.Random(0).sample(range(len(torn)), 40):
        (tmp_path / "stopped" / "samples.jsonl").write_bytes(torn[:length])
        assert run(tmp_path / "stopped", Fake()) == expected


# Stands still when so many rows are in the file, and says so: however slow the machine, it is killed there.
KILLED = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import test_self_distillation
from lib.prepare import self_distillation
from lib.record.rows import RowLog

class StandingStill(RowLog):
    def append(self, row):
        super().append(row)
        if len(self.rows) == int(sys.argv[2]):
            print("standing still", flush=True)
            sys.stdin.read()

self_distillation.ROWS_PER_CALL["cpu"] = 6
test_self_distillation.RowLog = StandingStill
test_self_distillation.run(Path(sys.argv[1]), test_self_distillation.Fake())
"""


def test_three_kills_minus_nine_at_seeded_moments_change_no_byte(tmp_path, small_calls):
    expected = run(tmp_path / "unbroken", Fake())
    code = KILLED.format(root=str(PROJECT_ROOT), tests=str(PROJECT_ROOT / "tests"))
    samples = tmp_path / "killed" / "samples.jsonl"
    for num_rows in sorted(random.Random(7).sample(range(1, 27), 3)):
        command = [sys.executable, "-c", code, str(tmp_path / "killed"), str(num_rows)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=PROJECT_ROOT, **pipes) as process:
            assert process.stdout.readline() == "standing still\n"
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        assert samples.read_bytes().count(b"\n") == num_rows
    assert run(tmp_path / "killed", Fake()) == expected


def test_a_finished_file_is_reused_without_asking(tmp_path):
    run(tmp_path, Fake())
    fake = Fake()
    log = RowLog(tmp_path / "samples.jsonl", HASH)
    sampled = sample_answers(QUESTIONS, [], fake, ASKING, log)
    assert (fake.calls, sampled.num_new, sampled.num_new_tokens, sampled.wall_s) == ([], 0, 0, 0.0)
    assert len(sampled.rows) == 27


def test_what_a_call_added_is_counted(tmp_path, small_calls):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Fake(rows_until_kill=8))
    sampled = sample_answers(QUESTIONS, [], Fake(), ASKING, RowLog(tmp_path / "samples.jsonl", HASH))
    assert (sampled.num_new, sampled.wall_s) == (19, 4 * 1.5)


def test_a_file_with_another_question_is_refused(tmp_path):
    run(tmp_path, Fake())
    other = [{**QUESTIONS[0], "question": "What is 7 + 0?"}, *QUESTIONS[1:]]
    for questions in (other, QUESTIONS[:4]):
        with pytest.raises(ValueError, match=r"samples\.jsonl holds another question under id"):
            sample_answers(questions, [], Fake(), ASKING, RowLog(tmp_path / "samples.jsonl", HASH))


def test_kept_rows_are_scored_by_todays_rules(tmp_path):
    run(tmp_path, Fake())
    rows = read_jsonl(tmp_path / "samples.jsonl")
    write_jsonl(tmp_path / "samples.jsonl", [{**row, "correct": False, "outcome": "wrong"} for row in rows])
    again = sample_answers(QUESTIONS, [], Fake(), ASKING, RowLog(tmp_path / "samples.jsonl", HASH))
    assert again.rows == rows and any(row["correct"] for row in rows)


def test_the_protocol_holds_what_can_change_an_answer():
    def hashed(asking=ASKING, questions=QUESTIONS, quantization="nf4", dtype="torch.float32", template="t"):
        return self_distillation.protocol("base@1", quantization, dtype, questions, QUESTIONS[:1], template, asking)

    changed = [
        hashed(dataclasses.replace(ASKING, sampling=SimpleNamespace(temperature=0.7, seed=6))),
        hashed(dataclasses.replace(ASKING, sampling=SimpleNamespace(temperature=0.8, seed=5))),
        hashed(dataclasses.replace(ASKING, num_samples=4)),
        hashed(dataclasses.replace(ASKING, max_new_tokens=51)),
        hashed(dataclasses.replace(ASKING, batch_size=8)),
        hashed(dataclasses.replace(ASKING, device="cuda")),
        hashed(dataclasses.replace(ASKING, system="Mine.")),
        hashed(questions=QUESTIONS[1:]),
        hashed(quantization="none"),
        hashed(dtype="torch.bfloat16"),
        hashed(template="u"),
    ]
    texts = [json.dumps(one, sort_keys=True) for one in [hashed(), *changed]]
    assert len(set(texts)) == len(texts)


def test_the_protocol_keeps_its_hash():
    """Rows are found by it: a hash that moves would sample every answer of earlier runs again."""
    made_by = self_distillation.protocol("base@1", "nf4", "torch.float32", QUESTIONS, QUESTIONS[:1], "t", ASKING)
    assert sha256_json(made_by) == "65f3f674dd6e8c74e82b6312eccf242a71e15c1e393d080852c51c2caebc5415"


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "expected"),
    [(4, 0, (64, 64)), (5, 0, (60, 60)), (100, 0, (100, 100)), (4, 8, (64, 8))],
)
def test_rows_of_a_call_are_fixed_by_device_and_samples(num_samples, batch_size, expected):
    asking = Asking(SAMPLING, num_samples, 50, "cpu", batch_size)
    assert (asking.rows_per_call, asking.rows_at_once) == expected


# --- choosing ---------------------------------------------------------------------------------------------------------


def answered(*samples):
    """Sampled answers to one question whose answer is 4, from (text, tokens, finish reason)."""
    rows = [
        self_distillation._scored_row(
            {"id": at, "question_number": 0, "sample": at, "question": "2 + 2?", "answer": "#### 4"},
            Completion(text, reason, tokens),
        )
        for at, (text, tokens, reason) in enumerate(samples)
    ]
    return self_distillation.Sampled(rows, len(samples), len(rows), 0, 0.0)


def answers_of(sampled, **choosing):
    settings = {"keep": 1, "choice": "shortest", "fallback": "gold", "seed": 0, **choosing}
    return [row["answer"] for row in choose_training_rows(sampled, **settings).rows]


MANY = answered(
    ("long way\n#### 4", 9, "stop"),
    ("wrong\n#### 5", 1, "stop"),
    (" short\n#### 4\n", 3, "stop"),
    ("short\n#### 4", 3, "stop"),
    ("cut\n#### 4 and", 2, "length"),
    ("other\n#### 4.0", 5, "stop"),
)


def test_shortest_correct_whole_and_different_answers_are_kept():
    assert answers_of(MANY) == ["short\n#### 4"]
    assert answers_of(MANY, keep=4) == ["short\n#### 4", "other\n#### 4.0", "long way\n#### 4"]


def test_random_choice_is_seeded_and_reaches_every_answer():
    found = {seed: answers_of(MANY, choice="random", seed=seed) for seed in range(30)}
    assert found == {seed: answers_of(MANY, choice="random", seed=seed) for seed in range(30)}
    assert {text for texts in found.values() for text in texts} == {
        "short\n#### 4",
        "other\n#### 4.0",
        "long way\n#### 4",
    }


def test_a_question_without_a_correct_answer_is_dropped_or_falls_back_on_gold():
    none = answered(("no\n#### 5", 1, "stop"), ("cut\n#### 4", 2, "length"))
    assert answers_of(none, fallback="gold") == ["#### 4"]
    with pytest.raises(ValueError, match="raise distil_num_samples"):
        answers_of(none, fallback="drop")
    both = self_distillation.Sampled(
        [*none.rows, *answered(("yes\n#### 4", 1, "stop"), ("no", 1, "stop")).rows], 2, 4, 0, 0.0
    )
    dropped = choose_training_rows(both, keep=1, choice="shortest", fallback="drop", seed=0)
    assert (len(dropped.rows), dropped.num_gold, dropped.num_dropped) == (1, 0, 1)
    summary = self_distillation.summarize(both, dropped)
    assert (summary["coverage"], summary["num_covered"], summary["num_own"]) == (0.5, 1, 1)


def test_every_answer_has_one_outcome():
    assert self_distillation.count_outcomes(MANY) == {
        "correct": 4,
        "wrong": 1,
        "no answer": 0,
        "truncated": 0,
        "run-on": 0,
        "correct, cut off": 1,
    }


def test_coverage_grows_with_the_samples():
    late = answered(("no", 1, "stop"), ("cut\n#### 4", 1, "length"), ("yes\n#### 4", 1, "stop"))
    both = self_distillation.Sampled([*late.rows, *MANY.rows[:3]], 3, 6, 0, 0.0)
    assert self_distillation.coverage(both) == {1: (1, 2), 2: (1, 2), 3: (2, 2)}


def by_characters(text, add_special_tokens):
    """A tokenizer: a token a character."""
    assert not add_special_tokens
    return {"input_ids": list(text)}


def test_lengths_are_those_of_the_kept_answers_and_of_the_gold_ones():
    kept = choose_training_rows(MANY, keep=2, choice="shortest", fallback="drop", seed=0)
    own, _, gold, _, every = self_distillation.length_rows(MANY, kept, by_characters)
    assert (own["n"], own["shortest"], own["mean"], own["longest"]) == (2, 3, 4.0, 5)
    assert (gold["median"], gold["n"], every["n"]) == (len("#### 4"), 2, 6)
    empty = self_distillation.length_rows(MANY, dataclasses.replace(kept, chosen=[]), by_characters)
    assert empty[0]["n"] == 0 and empty[0]["median"] is None


def test_lengths_are_given_with_and_without_calculator_marks():
    row = {**MANY.rows[0], "model_output": "2+2=<<2+2=4>>4\n#### 4", "gold_answer": "It is <<4=4>>4.\n#### 4"}
    kept = self_distillation.Distilled([], [row], num_gold=0, num_dropped=0)
    table = self_distillation.length_rows(MANY, kept, by_characters)
    lengths = {entry["answers"]: entry["mean"] for entry in table}
    assert lengths["the same without calculator marks"] == len("2+2=4\n#### 4")
    assert lengths["GSM8K's, to the same questions"] == len(row["gold_answer"])
    assert lengths["GSM8K's without calculator marks"] == len("It is 4.\n#### 4")


# --- with the engine, and in the notebook --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from tests.tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def test_the_engine_itself_goes_on_to_the_same_bytes(tmp_path, tiny, monkeypatch):
    from lib.engine.generate import load_engine
    from lib.engine.generator import LazyGenerator, Sampling
    from lib.engine.load import resolve_runtime

    monkeypatch.setitem(self_distillation.ROWS_PER_CALL, "cpu", 6)
    asking = Asking(Sampling(0.9, 1), 3, 12, "cpu")
    runtime = resolve_runtime("cpu", "bfloat16")
    stop_after = {"rows": None}

    class Stopping(RowLog):
        def append(self, row):
            super().append(row)
            if len(self.rows) == stop_after["rows"]:
                raise KeyboardInterrupt

    def sample():
        engine = LazyGenerator(load_engine, tiny, runtime, "none", asking.rows_at_once)
        log = Stopping(tmp_path / "samples.jsonl", HASH)
        sample_answers(QUESTIONS, QUESTIONS[:1], engine, asking, log)
        return (tmp_path / "samples.jsonl").read_bytes()

    expected = sample()
    (tmp_path / "samples.jsonl").unlink()
    for stop_after["rows"] in (4, 13, 20):
        with pytest.raises(KeyboardInterrupt):
            sample()
    stop_after["rows"] = None
    assert sample() == expected
    texts = {row["model_output"] for row in read_jsonl(tmp_path / "samples.jsonl")}
    assert len(texts) > 20


@pytest.mark.slow
def test_notebook_01_asks_the_model_and_trains_on_what_it_says(tmp_path, tiny):
    from lib.driver import notebook

    parameters = {"results_dir": str(tmp_path / "results"), "base_model": str(tiny), "quantization": "none"}
    parameters |= {"train_source": "self_distilled", "distil_fallback": "gold", "distil_num_samples": 2}
    parameters |= {"max_train_rows": 6, "gsm8k_max_new_tokens": 8, "fewshot_k": 0, "max_gsm8k_rows": 2}
    outcome = notebook.execute("01_prepare", tmp_path / "01_prepare.ipynb", parameters)
    assert not outcome.error, outcome.error
    paths = run_paths(str(tmp_path / "results"), "sandbox_one")
    facts = read_json(paths.manifest("01_prepare"))["facts"]
    # Random weights are never right: every row is GSM8K's answer, and the report says so.
    assert (facts["distil"]["coverage"], facts["distil"]["num_gold"], facts["distil"]["num_answers"]) == (0.0, 6, 12)
    assert facts["model_work_s"] > 0 and facts["distil"]["protocol"]["answers"] == "2 a question"
    assert len(read_jsonl(paths.train_rows)) == 6 and read_json(paths.overlap) == []
    samples = list((tmp_path / "results" / "untuned").glob("distil_samples_*.jsonl"))
    assert len(samples) == 1 and len(read_jsonl(samples[0])) == 12
    html = (tmp_path / "01_prepare.html").read_text(encoding="utf-8")
    assert "6 rows are GSM8K" in html and "What became of 12 answers" in html
    assert "Kept, the first two" in html and "Rejected, the first two" in html
    assert "GSM8K's without calculator marks" in html.replace("&#x27;", "'").replace("&#39;", "'")


@pytest.mark.slow
def test_every_seed_is_trained_on_the_same_answers_and_keep_keeps_them(tmp_path, tiny):
    from lib.driver import notebook

    folder, results = tmp_path / "gsm8k", str(tmp_path / "results")
    sandbox = PROJECT_ROOT / "data" / "sandbox"
    train, test = (read_jsonl(sandbox / f"gsm8k_{split}.jsonl") for split in ("train", "test"))
    write_jsonl(folder / "gsm8k_test.jsonl", test)
    # The model answers a test question too, which `keep` trains on: no error after all the sampling.
    write_jsonl(folder / "gsm8k_train.jsonl", [*train[:19], test[3]])
    parameters = {"results_dir": results, "base_model": str(tiny), "quantization": "none", "gsm8k_source": str(folder)}
    parameters |= {"train_source": "self_distilled", "distil_fallback": "gold", "distil_num_samples": 2}
    parameters |= {"gsm8k_max_new_tokens": 4, "fewshot_k": 0, "max_gsm8k_rows": 2, "fewshot_pool_size": 1}
    parameters |= {"dev_rows": 1, "train_file_faults": "keep", "data_seed": 3}
    for seed in (1, 2):  # the driver would not even inject it: 01 does not declare it
        run = {"run_name": f"mine_seed{seed}", "seed": seed}
        outcome = notebook.execute("01_prepare", tmp_path / f"{seed}.ipynb", parameters | run)
        assert not outcome.error, outcome.error
    one, two = (run_paths(results, f"mine_seed{seed}") for seed in (1, 2))
    assert one.train_rows.read_bytes() == two.train_rows.read_bytes() and test[3] in read_jsonl(one.train_rows)
    first, second = (read_json(paths.manifest("01_prepare")) for paths in (one, two))
    assert "seed 3" in first["facts"]["distil"]["protocol"]["decoding"]
    assert first["facts"]["distil"] == second["facts"]["distil"]
    # The second seed asks nothing: it found the answers of the first.
    assert len(list((tmp_path / "results" / "untuned").glob("distil_samples_*.jsonl"))) == 1
    assert first["facts"]["model_work_s"] > 0 == second["facts"]["model_work_s"]
