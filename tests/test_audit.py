"""lib.prepare.audit: what must not be trained on is found, named by its row, and refused, dropped or kept."""

import json
import os

import pytest

from lib import gsm8k
from lib.prepare import audit
from lib.prepare.audit import (
    File,
    TrainFileError,
    check_rows,
    count_faults,
    find_too_long,
    find_unlearnable,
    first_offenders,
)
from lib.record.files import read_json
from lib.record.paths import PROJECT_ROOT, run_paths
from lib.record.rows import read_jsonl, write_jsonl


def row(question, number):
    return {"question": question, "answer": f"So it is {number}.\n#### {number}"}


TRAIN = [row(f"Train question {n}?", n) for n in range(20)]
TEST = [row(f"Test question {n}?", 100 + n) for n in range(5)]
FEWSHOT, DEV = TRAIN[:2], TRAIN[2:4]


def check(rows, action="drop"):
    return check_rows(
        rows, gsm8k_train=TRAIN, gsm8k_test=TEST, fewshot=FEWSHOT, dev=DEV, action=action, name="mine.jsonl"
    )


def faults_of(rows):
    return [(fault.row, fault.kind) for fault in check(rows).faults]


PLANTED = [TRAIN[5], row("  TEST\n question 3?", 103), TRAIN[1], row("Train question 7?", 8), TRAIN[9], TRAIN[3]]


def test_planted_rows_are_each_found_and_named():
    assert faults_of(PLANTED) == [
        (2, "test question"),
        (3, "few-shot question"),
        (4, "wrong number"),
        (6, "development question"),
    ]
    reasons = [fault.reason for fault in check(PLANTED).faults]
    assert reasons[0] == "it asks what test row 4 asks"
    assert reasons[2] == "it ends in 8, GSM8K's answer is 7"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("#### 7", None),
        ("first #### 3\nthen\n#### $7.00", None),
        ("#### 8", "wrong number"),
        ("It is 7.", "no number"),
        ("#### seven", "no number"),
    ],
)
def test_numbers_are_compared_as_numbers(answer, kind):
    found = faults_of([{"question": "Train question 7?", "answer": answer}])
    assert found == ([(1, kind)] if kind else [])


def test_a_question_that_gsm8k_does_not_know_is_counted_and_no_fault():
    checked = check([row("Something else?", 1), TRAIN[5]])
    assert (checked.faults, checked.num_unknown, len(checked.rows)) == ([], 1, 2)


def test_a_row_can_have_several_faults():
    assert faults_of([row("Test question 0?", 5)]) == [(1, "test question"), (1, "wrong number")]


def test_a_question_that_gsm8k_holds_twice_may_have_either_number():
    twice = [*TRAIN, row("Train question 7?", 70)]
    found = check_rows(
        [row("Train question 7?", 70)], gsm8k_train=twice, gsm8k_test=TEST, fewshot=[], dev=[], action="drop", name=""
    )
    assert found.faults == []


def test_refuse_names_counts_rows_and_the_remedy():
    with pytest.raises(TrainFileError) as caught:
        check([*PLANTED, *[row("Test question 1?", 101)] * 6], action="refuse")
    text = str(caught.value)
    assert text.startswith("mine.jsonl: 8 of 12 rows must not be trained on (7 x test question, 1 x wrong number)")
    assert "row 2: test question" in text and "row 4: wrong number, it ends in 8" in text and "and 3 more" in text
    assert "train_file_faults to drop" in text


def test_questions_of_pool_and_development_rows_are_never_refused():
    # A rewritten GSM8K holds them of necessity, and split_train takes them out.
    checked = check(TRAIN, action="refuse")
    assert (
        count_faults(checked.faults)["few-shot question"] == count_faults(checked.faults)["development question"] == 2
    )
    assert len(checked.rows) == 20


def test_drop_leaves_the_decided_rows_out_and_keep_none():
    assert check(PLANTED).rows == [TRAIN[5], TRAIN[1], TRAIN[9], TRAIN[3]]
    assert check(PLANTED, action="keep").rows == PLANTED
    table = audit.fault_table(check(PLANTED).faults, "keep")
    assert table[0] == {
        "a row that": "asks what the test split asks",
        "rows": 1,
        "what becomes of them": "TRAINED ON (train_file_faults: keep)",
    }
    assert table[3]["what becomes of them"] == "left out" and table[2]["what becomes of them"] == "none"


def test_rows_that_are_too_long_are_named_by_their_number_in_the_file():
    faults = find_too_long([TRAIN[4], TRAIN[6]], [50, 70], 60, File(TRAIN, "train.jsonl"))
    assert [(fault.row, fault.kind, fault.reason, fault.file) for fault in faults] == [
        (7, "too long", "70 tokens, max_seq_length is 60", "train.jsonl")
    ]


def test_rows_that_cannot_be_learnt_are_refused_by_file_line_and_count_or_left_out():
    file = File(TRAIN, "mine.jsonl", range(1, 41, 2))
    tried, reasons = TRAIN[4:8], {0: "the answer is empty", 2: "its first characters change the prompt"}
    for action in ("drop", "keep"):
        faults = find_unlearnable(tried, reasons, action, file)
        assert [(fault.row, fault.kind, fault.reason, fault.file) for fault in faults] == [
            (9, "not learnable", "the answer is empty", "mine.jsonl"),
            (13, "not learnable", "its first characters change the prompt", "mine.jsonl"),
        ]
        assert count_faults(faults)["not learnable"] == 2
        # No row would be left.
        with pytest.raises(TrainFileError, match="2 of 2 rows"):
            find_unlearnable(tried[::2], dict(enumerate(reasons.values())), action, file)
    with pytest.raises(TrainFileError) as caught:
        find_unlearnable(tried, reasons, "refuse", file)
    text = str(caught.value)
    assert text.startswith(
        "mine.jsonl: 2 of 4 rows must not be trained on (2 x not learnable)\n  - row 9: not learnable"
    )
    assert "train_file_faults to drop" in text and "keep" not in text
    assert find_unlearnable(tried, {}, "refuse", file) == []


def test_rows_are_numbered_by_their_lines_in_their_file():
    # Blank lines stand between the rows.
    lines = range(1, 2 * len(PLANTED) + 1, 2)
    settings = {"gsm8k_train": TRAIN, "gsm8k_test": TEST, "action": "drop", "name": "mine.jsonl", "lines": lines}
    checked = check_rows(PLANTED, **settings)
    assert [(fault.row, fault.kind, fault.file) for fault in checked.faults] == [
        (3, "test question", "mine.jsonl"),
        (7, "wrong number", "mine.jsonl"),
    ]
    assert checked.rows == [PLANTED[at] for at in (0, 2, 4, 5)]
    with pytest.raises(TrainFileError, match="row 3: test question"):
        check_rows(PLANTED, **{**settings, "action": "refuse"})
    (long,) = find_too_long(PLANTED[5:], [9], 8, File(PLANTED, "mine.jsonl", lines))
    assert long.row == 11


def test_the_first_offenders_of_each_kind_stand_first():
    many = [row("Test question 1?", 101)] * 5 + [row("Train question 7?", 8)]
    shown = first_offenders(check(many).faults)
    assert [(entry["row"], entry["what"]) for entry in shown] == [
        ("1", "test question"),
        ("2", "test question"),
        ("6", "wrong number"),
    ]


# --- in the notebook ---------------------------------------------------------------------------------------------


def read_sandbox(split):
    return read_jsonl(PROJECT_ROOT / "data" / "sandbox" / f"gsm8k_{split}.jsonl")


def plant(path):
    """Sandbox rows: row 2 holds its turn's end, 3 is a test question, 5 a few-shot one, 7 has a wrong number."""
    train, test = read_sandbox("train"), read_sandbox("test")
    split = gsm8k.split_train(train, train, pool_size=8, dev_rows=8, max_train_rows=0, seed=42)
    rows = split.train[:8]
    rows[2], rows[4] = test[11], split.fewshot[1]
    rows[1] = {**rows[1], "answer": "<|im_end|>" + rows[1]["answer"]}
    rows[6] = {**rows[6], "answer": rows[6]["answer"].rpartition("####")[0] + "#### 123456"}
    write_jsonl(path, rows)
    return rows


@pytest.mark.slow
def test_notebook_01_finds_names_and_drops_planted_rows(tmp_path):
    from lib.driver import notebook
    from tests.tiny import save_tiny_model

    rows, tiny = plant(tmp_path / "planted.jsonl"), save_tiny_model(tmp_path / "tiny")
    parameters = {"results_dir": str(tmp_path / "results"), "base_model": str(tiny), "train_source": "file"}
    parameters |= {"train_file": str(tmp_path / "planted.jsonl"), "train_file_faults": "drop", "fewshot_k": 1}
    outcome = notebook.execute("01_prepare", tmp_path / "01_prepare.ipynb", {**parameters, "max_seq_length": 900})
    assert not outcome.error, outcome.error
    paths = run_paths(str(tmp_path / "results"), "sandbox_one")
    assert read_jsonl(paths.train_rows) == [rows[at] for at in (0, 3, 5, 7)]
    named = {(fault["row"], fault["kind"]) for fault in read_json(paths.train_rows.with_name("train_faults.json"))}
    assert {(2, "not learnable"), (3, "test question"), (5, "few-shot question"), (7, "wrong number")} <= named
    faults = read_json(paths.manifest("01_prepare"))["facts"]["train_faults"]
    assert (faults["test question"], faults["few-shot question"], faults["wrong number"]) == (1, 1, 1)
    assert faults["not learnable"] == 1
    html = outcome.notebook.with_suffix(".html").read_text(encoding="utf-8")
    assert "it ends in 123456" in html and "it asks what test row 12 asks" in html
    assert "1 training and development rows cannot be learnt" in html and "holds the end-of-turn token" in html


@pytest.mark.slow
def test_notebook_01_draws_no_row_that_asks_what_the_test_split_asks(tmp_path):
    from lib.driver import notebook
    from lib.engine import load
    from lib.train.rows import encode_rows
    from tests.tiny import save_tiny_model

    tiny, train, test = save_tiny_model(tmp_path / "tiny"), read_sandbox("train"), read_sandbox("test")
    # Every second row of this GSM8K's own train split is a test question: some are drawn for pool and development rows.
    folder = tmp_path / "gsm8k"
    write_jsonl(folder / "gsm8k_test.jsonl", test)
    write_jsonl(folder / "gsm8k_train.jsonl", [row for pair in zip(test, train[:24], strict=True) for row in pair])
    lines = [json.dumps(row) for row in [train[30], test[11], *train[31:40]]]
    (tmp_path / "mine.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    # As long as one of the rows is: a count that is one off leaves it out.
    conversations = [gsm8k.training_messages(row) for row in [train[30], *train[31:40]]]
    tokenizer = load.load_tokenizer(tiny)
    sizes = sorted(len(row["input_ids"]) for row in encode_rows(tokenizer, conversations, 10_000).examples)
    parameters = {"results_dir": str(tmp_path / "results"), "base_model": str(tiny), "gsm8k_source": str(folder)}
    parameters |= {"train_source": "file", "train_file": str(tmp_path / "mine.jsonl"), "fewshot_k": 1}
    parameters |= {"train_file_faults": "drop", "max_seq_length": sizes[4], "fewshot_pool_size": 6, "dev_rows": 6}
    outcome = notebook.execute("01_prepare", tmp_path / "01_prepare.ipynb", parameters)
    assert not outcome.error, outcome.error
    paths = run_paths(str(tmp_path / "results"), "sandbox_one")
    clean = gsm8k.split_train(
        train[:24], [train[30], *train[31:40]], pool_size=6, dev_rows=6, max_train_rows=0, seed=42
    )
    assert [read_jsonl(path) for path in (paths.fewshot_rows, paths.dev_rows)] == [clean.fewshot, clean.dev]
    assert read_jsonl(paths.train_rows) == [train[30], *train[31:40]]
    faults = read_json(paths.train_rows.with_name("train_faults.json"))
    # Blank lines count: the second row stands on the third line.
    planted = [fault["row"] for fault in faults if fault["kind"] == "test question" and "mine" in fault["file"]]
    drawable = [fault["row"] for fault in faults if fault["file"].endswith("gsm8k_train.jsonl")]
    assert planted == [3] and drawable == list(range(1, 49, 2))
    facts = read_json(paths.manifest("01_prepare"))["facts"]
    encoded = encode_rows(tokenizer, conversations, sizes[4])
    assert facts["num_too_long"] == len(encoded.too_long) == sum(size > sizes[4] for size in sizes)


@pytest.mark.skipif("ASSETS_DIR" not in os.environ, reason="ASSETS_DIR names no folder of data")
def test_gsm8k_has_no_row_that_may_not_be_drawn():
    from lib.prepare import datasets

    train, test = (datasets.load_gsm8k(split, offline=True)[0] for split in ("train", "test"))
    checked = check_rows(train, gsm8k_train=train, gsm8k_test=test, action="refuse", name="GSM8K train")
    # So pool, development and training rows are those that were drawn before there was this check.
    assert checked.rows == train and checked.faults == []


def test_the_same_file_is_refused_by_default(tmp_path):
    rows, train, test = plant(tmp_path / "planted.jsonl"), read_sandbox("train"), read_sandbox("test")
    with pytest.raises(TrainFileError, match=r"2 of 8 rows must not be trained on") as caught:
        check_rows(rows, gsm8k_train=train, gsm8k_test=test, fewshot=[], dev=[], action="refuse", name="planted.jsonl")
    assert "row 3: test question" in str(caught.value) and "row 7: wrong number" in str(caught.value)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_bundled_rows_are_without_fault(split):
    train, test = read_sandbox("train"), read_sandbox("test")
    known = {"gsm8k_train": train, "gsm8k_test": test, "fewshot": [], "dev": []}
    faults = check_rows(read_sandbox(split), **known, action="keep", name=split).faults
    assert {fault.kind for fault in faults} == ({"test question"} if split == "test" else set())
