"""Numbers out of answers, rows of a run, scoring that survives a kill; no model, no network."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from lib import gsm8k
from lib.prepare import datasets
from lib.prepare.audit import File
from lib.record.paths import ArtifactError
from lib.record.protocol import answer_protocol
from lib.record.rows import RowLog
from lib.train.learnable import find_learnable
from lib.train.rows import encode_split


@dataclass(frozen=True)
class Completion:
    """What the engine returns for one conversation."""

    text: str
    finish_reason: str = "stop"
    num_output_tokens: int = 7
    num_prompt_tokens: int = 11


class FakeGenerator:
    """Answers each conversation through ``answer(messages)``; finishes the last one first, as a refilled batch may."""

    def __init__(self, answer, stop_after=None):
        self.answer, self.stop_after, self.prompted = answer, stop_after, []

    def generate(self, conversations, *, max_new_tokens, on_completion=None):
        self.prompted.append(list(conversations))
        done = {}
        for index in reversed(range(len(conversations))):
            if self.stop_after is not None and len(done) == self.stop_after:
                raise KeyboardInterrupt
            done[index] = Completion(self.answer(conversations[index]))
            on_completion(index, done[index])
        return [done[index] for index in range(len(conversations))]


def make_rows(count, start=0):
    return [
        {"question": f"What is {n} + 1?", "answer": f"{n} + 1 = <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"}
        for n in range(start, start + count)
    ]


def eval_rows(count):
    return [{"test_index": 100 + n, **row} for n, row in enumerate(make_rows(count))]


# --- numbers --------------------------------------------------------------------------------------------------------

# text -> strict, flexible
ANSWERS = [
    ("so it is 18.\n#### 18", "18", "18"),
    ("####18", "18", "18"),
    ("####\t18  ", "18", "18"),
    ("#### $29.00", "29.00", "29.00"),
    ("#### 1,234.", "1234", "1234"),
    ("#### $1,234,567.50", "1234567.50", "1234567.50"),
    ("#### - 18", "-18", "-18"),
    ("#### -3.5", "-3.5", "-3.5"),
    ("#### \N{MINUS SIGN}18", "-18", "-18"),
    ("#### -$18", "-18", "-18"),
    ("#### $-18", "-18", "-18"),
    ("#### .5", ".5", ".5"),
    ("#### 18.", "18", "18"),
    ("#### 18 apples", "18", "18"),
    ("#### 18apples", "18", "18"),
    ("#### 18%", "18", "18"),
    ("#### 3/4", "3/4", "3/4"),
    ("#### 1 1/2 hours", "1 1/2", "1 1/2"),
    (r"#### \frac{3}{4}", "3/4", "3/4"),
    ("#### **18**", "18", "18"),
    ("**#### 18**", "18", "18"),
    ("#### `18`", "18", "18"),
    (r"#### \boxed{18}", "18", "18"),
    (r"#### $\boxed{-18}$", "-18", "-18"),
    (r"#### \$18", "18", "18"),
    ("#### 1{,}234", "1234", "1234"),
    ("#### 1\u00a0234", "1234", "1234"),
    ("#### 2e3", "2e3", "2e3"),
    ("#### = 18", "18", "18"),
    ("##### 18", "18", "18"),
    # Two answers: the last one counts; a `####` without a number is no answer.
    ("#### 5\nWait.\n#### 7", "7", "7"),
    ("#### 5\nQuestion: two more?\n####", "5", "5"),
    # One number or two: nobody can say, so no part of it is the answer.
    ("#### 1 234", None, None),
    ("#### 12,34", None, None),
    # No number on the line.
    ("#### ,", None, None),
    ("#### ", None, None),
    ("####", None, None),
    ("####\n18", None, "18"),
    ("#### nan", None, None),
    ("#### inf", None, None),
    ("#### -infinity", None, None),
    ("#### eighteen", None, None),
    ("#### 7/0", None, None),
    ("#### 1e999999999", None, None),
    ("#### \u0661\u0668", None, None),
    ("", None, None),
    (None, None, None),
    # Headings of a chat model are no answers.
    ("#### Step 1: add\n3 + 4 is 7.", None, "7"),
    ("#### 1. Add them\n3 + 4 is 7.", None, "7"),
    ("#### 1. Add them\n3 + 4\n#### 7", "7", "7"),
    # No `####`: the last number, wherever it stands.
    ("She has 3 + 4 = 7 apples.", None, "7"),
    ("The answer is \\boxed{7}.", None, "7"),
    ("It is -7.", None, "-7"),
    ("It fell from 20 to 20 - 25 = -5", None, "-5"),
    ("10-18", None, "18"),
    ("20 - 18", None, "18"),
    ("x-18", None, "18"),
    ("Left:\n- 18 apples", None, "18"),
    ("She pays Rs.500", None, "500"),
    ("Choose 1,2,3", None, None),
    ("Choose 1, 2, 3", None, "3"),
    ("in 2020 500 people", None, "500"),
    ("no number at all", None, None),
]


@pytest.mark.parametrize(("text", "strict", "flexible"), ANSWERS)
def test_number_is_read_strictly_and_flexibly(text, strict, flexible):
    assert gsm8k.extract_answer(text) == strict
    assert gsm8k.extract_answer_flexible(text) == flexible


# A notation -> its value, or None: never the value of a part of it. Alone after `####`, and as a text's last number.
NOTATIONS = [
    (r"1\frac{2}{4}", "1.5"),
    (r"1 \frac{1}{2}", "1.5"),
    (r"\boxed{\frac{-6}{2}}", "-3"),
    (r"\frac{6}{-2}", "-3"),
    (r"\frac{-6}{-2}", "3"),
    (r"-\dfrac{-6}{2}", "3"),
    (r"-\frac{1{,}000}{2}", "-500"),
    (r"$\tfrac{1.5}{2}$", "0.75"),
    (r"\frac12", "0.5"),
    (r"\frac 1{20}", "0.05"),
    (r"\frac{1}{2}5", None),
    (r"1\frac{-2}{4}", None),
    (r"\frac{x}{2}", None),
    (r"\frac{\frac{1}{2}}{3}", None),
    (r"0.\overline{3}", None),
    (r"2\sqrt{3}", None),
    (r"\sqrt{16}", None),
    (r"2\pi", None),
    (r"{3 \over 4}", None),
    ("1½", "1.5"),
    ("1 ½", "1.5"),
    ("-1½", "-1.5"),
    ("½", "0.5"),
    ("½5", None),
    ("5.½", None),
    ("1\u20442", "0.5"),
    ("1 3\u20444", "1.75"),
    ("1³\u2044₄", None),
    ("1 and 1/2", None),
    ("1 and a half", None),
    ("1-1/2", None),
    ("1/2/3", None),
    ("70_000", "70000"),
    ("1_234_567", "1234567"),
    ("70_00", None),
    ("1'234", "1234"),
    ("1\u2019234", "1234"),
    ("1\u2009234\u2009567", "1234567"),
    ("1\u202f234", "1234"),
    (r"1\,234", "1234"),
    (r"1\ 234", "1234"),
    ("70\u200b000", "70000"),
    ("1 234 567", None),
    ("1.234.567", None),
    ("1.234,56", None),
    ("1234,567", None),
    ("1,2345", None),
    ("1,00,000", None),
    ("1{,}5", None),
    (",5", None),
    ("1·5", None),
    ("1:30", None),
    ("10^3", None),
    ("10^{-3}", None),
    ("10³", None),
    ("2**3", None),
    ("101₂", None),
    ("1.5e3", "1500"),
    ("1.5E-3", "0.0015"),
    ("1.5e3.5", None),
    ("1e-99999", None),
    ("0x1F", None),
    ("0xFF", None),
    ("0b101", None),
    ("0.333...", None),
    ("0.(3)", None),
    ("0.3\u0305", None),
    ("√16", None),
    ("2π", None),
    ("±3", None),
    ("± 3", None),
    ("--3", None),
    ("2 million", None),
    ("2k", None),
    ("3万", None),
    ("1&frac12;", None),
    ("１８", "18"),
    ("－１．５", "-1.5"),
    ("１，２３４", None),
    ("1٨", None),
    ("٨", None),
    ("25%", "25"),
    (r"25\%", "25"),
    ("18 cm^2", "18"),
    ("18 m²", "18"),
    ("18/hour", "18"),
    ("18-year-old", "18"),
    ("9" * 20_000, None),
    *(
        (f"{minus}{number}", f"-{number}")
        for minus in "-\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d"
        for number in (3, 0.5)
    ),
]


@pytest.mark.parametrize(("notation", "value"), NOTATIONS)
def test_a_notation_is_read_as_its_value_or_not_at_all(notation, value):
    value = value and Fraction(value)
    for shown in (notation, f"**{notation}**", f"{notation} apples.", f"${notation}$"):
        assert gsm8k.parse_number(gsm8k.extract_answer(f"2 + 2 = 4\n#### {shown}")) == value, shown
        assert gsm8k.parse_number(gsm8k.extract_answer_flexible(f"2 + 2 = 4, so it is {shown}")) == value, shown


@pytest.mark.parametrize(
    "expression",
    [
        "3 * 4 = 12",
        "3 + 4",
        "3 - 4",
        "3 x 4",
        r"3 \times 4",
        "(-6)/2",
        "10-15",
        "3 : 4",
        "12 34",
        "3 ± 4",
    ],
)
def test_an_expression_after_the_marks_is_not_its_first_number(expression):
    assert gsm8k.extract_answer(f"#### {expression}") is None
    # No `####` with a number is there: the last number anywhere.
    flexible = None if "±" in expression else expression.split()[-1].rpartition("-")[2].rpartition("/")[2]
    assert gsm8k.extract_answer_flexible(f"#### {expression}") == flexible


def test_a_fraction_equal_to_what_follows_is_read():
    assert gsm8k.extract_answer("#### 12/4 = 3") == "12/4"


def test_the_last_number_decides_even_where_it_is_not_read():
    # An earlier one would be a number that the answer does not end in.
    assert gsm8k.extract_answer("#### 5\nNo:\n#### 1:30") is None
    assert gsm8k.extract_answer_flexible("It is 5 or 10^3.") is None


EQUAL = [
    ("18", "18.0"),
    ("$18.", "18"),
    ("1,018", "1018"),
    ("3/4", "0.75"),
    ("1 1/2", "1.5"),
    (".5", "0.50"),
    ("- 18", "-18"),
    ("\N{MINUS SIGN}18", "-18"),
    ("-0", "0"),
    ("2e3", "2000"),
    ("18 apples", "18"),
    ("18%", "18"),
    ("0.1", "1/10"),
    ("1e400", "1" + "0" * 400),
    ("9" * 5000, "9" * 5000 + ".0"),
]
UNEQUAL = [
    ("18", "-18"),
    ("18", "18.0000000000000000000001"),
    ("10000000000000000000001", "10000000000000000000000"),
    ("9" * 400, "1e400"),
    ("0.333", "1/3"),
    (None, "18"),
    ("18", None),
    (None, None),
    ("", ""),
    ("nan", "nan"),
    ("inf", "inf"),
    ("eighteen", "eighteen"),
    (",", ","),
    ("7/0", "7/0"),
]


@pytest.mark.parametrize(("predicted", "gold"), EQUAL)
def test_equal_numbers_are_correct_both_ways(predicted, gold):
    assert gsm8k.is_correct(predicted, gold) is True
    assert gsm8k.is_correct(gold, predicted) is True


@pytest.mark.parametrize(("predicted", "gold"), UNEQUAL)
def test_unequal_numbers_and_no_number_are_wrong(predicted, gold):
    assert gsm8k.is_correct(predicted, gold) is False
    assert gsm8k.is_correct(gold, predicted) is False


@given(st.integers(), st.sampled_from(["{:,}", "${:,}.", "**{}**", "{}.00", "{} apples", "\\boxed{{{}}}"]))
def test_every_integer_survives_every_spelling(number, spelling):
    text = f"It adds up.\n#### {spelling.format(number)}"
    assert gsm8k.parse_number(gsm8k.extract_answer(text)) == Fraction(number)


@given(st.text())
def test_no_text_breaks_the_reading_and_flexible_agrees_with_strict(text):
    strict, flexible = gsm8k.extract_answer(text), gsm8k.extract_answer_flexible(text)
    assert strict is None or (strict == flexible and gsm8k.parse_number(strict) is not None)


PIECES = [
    "#",
    "9",
    "-",
    "1,",
    "1/",
    "1 ",
    "1e",
    "$",
    "#### ",
    "####\t",
    "#### -",
    "####.",
    "1_",
    "1½",
    "—",
    "√",
    "9^",
    "9)",
]
PIECES += [
    r"\frac{",
    r"\frac{1}{2}",
    r"\frac{1,234,",
    "⟨1/",
    "9 * ",
    "1 000 ",
    "9aaaaaaaaa",
    "minus ",
    "±",
    "\n- ",
    r"9\,",
]


@pytest.mark.parametrize("piece", PIECES)
def test_degenerate_output_is_read_at_once(piece):
    # A model that repeats itself writes pages of one mark. Twice as much may take twice as long and no more: with a
    # pattern that looks back, 16 times as much takes 256 times as long.
    assert gsm8k.extract_answer(piece * 10_000 + "\n#### 18") == "18"
    short, long = (min(_seconds(piece * length) for _ in range(3)) for length in (2_000, 32_000))
    assert long < 64 * short + 0.05


def _seconds(text):
    started = time.process_time()
    gsm8k.extract_answer_flexible(text)
    return time.process_time() - started


@given(st.text("0123456789.,-+/ \\{}_'^½$#:e", min_size=1, max_size=12), st.sampled_from(["", "1", "1.5", "3"]))
def test_what_is_read_is_a_number_that_reads_the_same_again(text, begin):
    for found in (gsm8k.extract_answer(f"#### {begin}{text}"), gsm8k.extract_answer_flexible(begin + text)):
        assert found is None or gsm8k.extract_answer(f"#### {found}") == found


# --- rows -----------------------------------------------------------------------------------------------------------


def test_evaluation_subset_is_the_one_that_earlier_results_are_on():
    indices = gsm8k.eval_indices(1319, 0.2, 42)
    assert len(indices) == 263
    assert indices[:10] == [30, 754, 429, 1010, 1284, 953, 751, 954, 705, 993]
    assert len(set(indices)) == 263
    assert all(type(index) is int for index in indices)


def test_whole_test_split_keeps_its_order():
    assert gsm8k.eval_indices(5, 1.0, 42) == [0, 1, 2, 3, 4]


def test_share_is_taken_as_written():
    # 0.29 * 100 is 28.999999999999996 in floating point.
    assert len(gsm8k.eval_indices(100, 0.29, 1)) == 29


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5, float("nan")])
def test_share_outside_its_range_is_refused(fraction):
    with pytest.raises(ValueError, match=r"gsm8k_eval_fraction is .*allowed: above 0, up to 1"):
        gsm8k.eval_indices(100, fraction, 42)


def test_share_of_no_row_is_refused():
    with pytest.raises(ValueError, match="of 3 rows: no row is left"):
        gsm8k.eval_indices(3, 0.2, 42)


def split(train, rows=None, **settings):
    settings = {"pool_size": 4, "dev_rows": 3, "max_train_rows": 0, "seed": 42} | settings
    return gsm8k.split_train(train, train if rows is None else rows, **settings)


def test_parts_of_a_split_share_no_question():
    train = make_rows(20)
    parts = split(train)
    assert (len(parts.fewshot), len(parts.dev), len(parts.train), parts.num_removed) == (4, 3, 13, 7)
    questions = [row["question"] for part in (parts.fewshot, parts.dev, parts.train) for row in part]
    assert sorted(questions) == sorted(row["question"] for row in train)


def test_pool_comes_from_gsm8k_whatever_the_preset_trains_on():
    train = make_rows(20)
    plain = split(train)
    # The other file asks two of the held-out questions again, in other spelling.
    copies = [
        {"question": "  " + plain.fewshot[0]["question"].upper().replace(" ", "  "), "answer": "#### 1"},
        {"question": plain.dev[0]["question"], "answer": "#### 2"},
    ]
    other = split(train, make_rows(5, start=1000) + copies)
    assert (other.fewshot, other.dev) == (plain.fewshot, plain.dev)
    assert other.train == make_rows(5, start=1000)
    assert other.num_removed == 2


def test_pool_does_not_depend_on_the_other_settings():
    train = make_rows(20)
    assert split(train, dev_rows=0, max_train_rows=3).fewshot == split(train).fewshot
    assert split(train, pool_size=2).fewshot == split(train).fewshot[:2]
    assert split(train, seed=7).fewshot != split(train).fewshot


def test_cut_is_a_seeded_choice_in_the_file_s_order():
    train = make_rows(20)
    cut = split(train, max_train_rows=5).train
    complete = split(train).train
    assert len(cut) == 5
    assert cut == [row for row in complete if row in cut]
    assert cut != complete[:5]
    assert cut == split(train, max_train_rows=5).train
    assert split(train, max_train_rows=500).train == complete


def test_repeated_question_is_drawn_once_and_removed_everywhere():
    train = make_rows(6) * 2
    parts = split(train, pool_size=5, dev_rows=0)
    assert len({row["question"] for row in parts.fewshot}) == 5
    assert (len(parts.train), parts.num_removed) == (2, 10)


def test_pool_and_development_rows_must_fit():
    with pytest.raises(
        ValueError, match="fewshot_pool_size is 15 and dev_rows is 6, together 21; allowed: up to the 20"
    ):
        split(make_rows(20), pool_size=15, dev_rows=6)


def test_no_training_row_left_is_refused():
    with pytest.raises(ValueError, match="no training row is left: 20 rows"):
        split(make_rows(20), pool_size=15, dev_rows=5)


def test_examples_are_the_first_of_the_pool():
    pool = make_rows(4)
    assert gsm8k.fewshot_examples(pool, 2) == pool[:2]
    assert gsm8k.fewshot_examples(pool, 0) == []
    with pytest.raises(ValueError, match="fewshot_k is 5; allowed: 0 to 4"):
        gsm8k.fewshot_examples(pool, 5)


@pytest.mark.parametrize("copy", ["what  is\n1 + 1? ", "WHAT IS 1 + 1?", "What\u00a0is 1 + 1?"])
def test_copied_question_has_one_spelling(copy):
    assert gsm8k.normalise_question(copy) == gsm8k.normalise_question("What is 1 + 1?")


@pytest.mark.parametrize("other", ["What is 1 + 2?", "What is -1 + 1?", "What is 1.1?"])
def test_another_question_keeps_another_spelling(other):
    assert gsm8k.normalise_question(other) != gsm8k.normalise_question("What is 1 + 1?")


ORIGINAL = "Tom's shop - a well-known one - sold 1,000 pears at $1.50 each. How much did 20% of them bring?"


@pytest.mark.parametrize(
    "copy",
    [
        ORIGINAL.removesuffix("?"),
        ORIGINAL.replace("?", " ?"),
        f"Question: {ORIGINAL}",
        f"**Question 12:** {ORIGINAL}",
        f"Q3. {ORIGINAL}\n",
        ORIGINAL.replace("pears", "pe\u200bars"),
        f"\ufeff{ORIGINAL}".replace("known", "kno\u00adwn"),
        ORIGINAL.replace("'", "\u2019").replace(" - ", " \u2014 ").replace("well-", "well\u2011"),
        ORIGINAL.replace("Tom's", "Toms").replace("1,000", "1000"),
        ORIGINAL.replace("pears", "**pears**").replace("each. ", "each! "),
    ],
)
def test_a_copy_in_other_punctuation_is_the_same_question(copy):
    assert copy != ORIGINAL and gsm8k.normalise_question(copy) == gsm8k.normalise_question(ORIGINAL)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("He has 1.5 kg", "He has 15 kg"),
        ("He has 1.5 kg", "He has 1 5 kg"),
        ("He has .5 kg", "He has 5 kg"),
        ("He has 12,34 kg", "He has 1234 kg"),
        ("What is 2/3?", "What is 2*3?"),
        ("What is 2/3?", "What is 23?"),
        ("What is 20 - 5?", "What is 20 5?"),
        ("What is 5\u00b2?", "What is 52?"),
        ("What is 1\u00bd?", "What is 11/2?"),
        ("What is 5% of 20?", "What is 5 of 20?"),
        ("Question 1.5 kg of it", "5 kg of it"),
        ("Is -5 less?", "Is 5 less?"),
        ("???", "!"),
    ],
)
def test_other_numbers_and_operators_are_another_question(one, other):
    assert gsm8k.normalise_question(one) != gsm8k.normalise_question(other)


def test_fractions_have_one_spelling():
    assert gsm8k.normalise_question("1\u00bd cups") == gsm8k.normalise_question("1 1/2 cups")


def test_the_words_of_a_question_tell_the_bundled_ones_apart():
    rows = [row for split in ("train", "test") for row in datasets.load_gsm8k(split, "data/sandbox")[0]]
    assert len({gsm8k.normalise_question(row["question"]) for row in rows}) == len(rows) == 88


@pytest.mark.skipif("ASSETS_DIR" not in os.environ, reason="ASSETS_DIR names no folder of data")
def test_the_words_of_a_question_tell_those_of_gsm8k_apart():
    rows = [row for split in ("train", "test") for row in datasets.load_gsm8k(split, offline=True)[0]]
    # Exactly as many as there are: pool, development and training rows are drawn as by any other spelling.
    assert len({gsm8k.normalise_question(row["question"]) for row in rows}) == len(rows) == 7473 + 1319


def test_calculator_marks_are_taken_out_of_an_answer():
    assert gsm8k.without_calculator_marks("48/2 = <<48/2=24>>24, so 1 << 2\n#### 24") == "48/2 = 24, so 1 << 2\n#### 24"


def test_examples_are_turns_of_the_chat():
    messages = gsm8k.build_messages("Last?", make_rows(2))
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert messages[0]["content"] == gsm8k.SYSTEM_PROMPT
    assert messages[2]["content"] == make_rows(1)[0]["answer"]
    assert messages[-1]["content"] == "Last?"
    assert "#### <number>" in gsm8k.SYSTEM_PROMPT


def test_training_chat_is_the_zero_shot_chat_and_its_answer():
    row = make_rows(1)[0]
    messages = gsm8k.training_messages(row)
    assert messages[:-1] == gsm8k.build_messages(row["question"], [])
    # Calculator marks stay.
    assert messages[-1] == {"role": "assistant", "content": "0 + 1 = <<0+1=1>>1\n#### 1"}


def test_a_system_message_of_a_file_is_the_same_text_in_training_and_evaluation(tmp_path):
    (tmp_path / "mine.txt").write_bytes(b"\xef\xbb\xbfThink first.\r\nEnd with #### <number>.\r\n")
    system = gsm8k.read_system_prompt(str(tmp_path / "mine.txt"))
    assert system == "Think first.\nEnd with #### <number>."
    row = make_rows(1)[0]
    messages = gsm8k.training_messages(row, system)
    assert messages[:-1] == gsm8k.build_messages(row["question"], [], system)
    assert messages[0] == {"role": "system", "content": system}
    # Every row is encoded with it, by 01 and by 02.
    tokenizer = tiny_tokenizer()
    (example,) = encode_split(tokenizer, [row], 1000, system=system).examples
    assert tokenizer.decode(example["input_ids"]).count(system) == 1
    file = File([row], "mine")
    assert find_learnable([row], tokenizer, "drop", file, system).lengths == [len(example["input_ids"])]
    assert find_learnable([row], tokenizer, "drop", file).lengths != [len(example["input_ids"])]


def test_a_file_that_holds_the_built_in_system_message_changes_no_protocol(tmp_path):
    (tmp_path / "mine.txt").write_text(gsm8k.SYSTEM_PROMPT + "\n", encoding="utf-8")
    same = gsm8k.read_system_prompt(str(tmp_path / "mine.txt"))
    assert answer_protocol({}, [], [], [], same, "") == answer_protocol(
        {}, [], [], [], gsm8k.read_system_prompt(""), ""
    )
    assert answer_protocol({}, [], [], [], same + "!", "") != answer_protocol({}, [], [], [], same, "")


# --- scoring --------------------------------------------------------------------------------------------------------

# model output, finish reason -> outcome; the gold answer is 7
OUTCOMES = [
    ("3 + 4 = 7\n#### 7", "stop", "correct"),
    ("#### 7\n\nQuestion: and now?\n#### 7.0", "length", "correct"),
    ("#### 8", "stop", "wrong"),
    ("#### 8", "length", "wrong"),
    ("#### 8 apples in all  \n\n", "stop", "wrong"),
    ("#### 8\nQuestion: and now?", "stop", "run-on"),
    ("#### 7\n\nQuestion: and now?\nIt is 9.\n#### 9", "length", "run-on"),
    ("#### 8\n####", "stop", "run-on"),
    ("The answer is 7.", "stop", "no answer"),
    ("The answer is", "length", "truncated"),
    ("#### ", "length", "truncated"),
    ("", "stop", "no answer"),
    # A pipeline that kept no finish reason.
    ("The answer is", None, "no answer"),
]


@pytest.mark.parametrize(("text", "finish_reason", "expected"), OUTCOMES)
def test_outcome_is_one_of_five(text, finish_reason, expected):
    row = {"model_output": text, "gold_answer": "3 + 4 = 7\n#### 7"}
    if finish_reason:
        row["finish_reason"] = finish_reason
    assert gsm8k.score_row(row)["outcome"] == expected


def test_score_reads_strictly_and_flexibly():
    score = gsm8k.score_row({"model_output": "It is 7.", "gold_answer": "#### 7", "finish_reason": "stop"})
    assert score == {
        "parsed_final": None,
        "correct": False,
        "parsed_flexible": "7",
        "correct_flexible": True,
        "outcome": "no answer",
    }


def test_a_row_is_read_once_and_a_changed_one_anew():
    row = {"model_output": "It is 7.", "gold_answer": "#### 7", "finish_reason": "stop"}
    gsm8k._score.cache_clear()
    first = gsm8k.score_row(row)
    first["correct"] = True
    again = gsm8k.score_row({**row, "id": 5, "correct": True})
    assert again["correct"] is False and gsm8k._score.cache_info().misses == 1
    changed = ({"finish_reason": "length"}, {"model_output": "#### 7"}, {"gold_answer": "#### 8"})
    scores = [gsm8k.score_row({**row, **change}) for change in changed]
    assert [score["outcome"] for score in scores] == ["truncated", "correct", "no answer"]
    assert [score["correct_flexible"] for score in scores] == [True, True, False]


def test_gold_answer_without_a_number_is_refused():
    with pytest.raises(ValueError, match="gold answer of row 3 has no number"):
        gsm8k.score_row({"id": 3, "model_output": "#### 7", "gold_answer": "seven"})


COLUMNS = [
    "id",
    "question",
    "gold_answer",
    "model_output",
    "parsed_final",
    "correct",
    "test_index",
    "parsed_flexible",
    "correct_flexible",
    "outcome",
    "finish_reason",
    "num_prompt_tokens",
    "num_output_tokens",
    "protocol_hash",
]


def right_answer(messages):
    number = int(messages[-1]["content"].split()[2])
    return f"#### {number + 1}"


def test_rows_come_back_in_order_with_their_columns(tmp_path):
    generator = FakeGenerator(right_answer)
    log = RowLog(tmp_path / "rows.jsonl", "protocol")
    rows = gsm8k.evaluate(eval_rows(3), make_rows(2, start=50), generator, max_new_tokens=9, log=log)
    assert [row["id"] for row in rows] == [0, 1, 2]
    assert [row["test_index"] for row in rows] == [100, 101, 102]
    assert list(rows[0]) == COLUMNS
    assert all(row["correct"] and row["correct_flexible"] and row["outcome"] == "correct" for row in rows)
    assert rows[0]["gold_answer"] == eval_rows(1)[0]["answer"]
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == rows
    (conversations,) = generator.prompted
    assert conversations[1] == gsm8k.build_messages("What is 1 + 1?", make_rows(2, start=50))


def test_every_question_is_put_under_the_system_message_of_the_run(tmp_path):
    generator, log = FakeGenerator(right_answer), RowLog(tmp_path / "rows.jsonl", "protocol")
    gsm8k.evaluate(eval_rows(2), [], generator, max_new_tokens=9, log=log, system="Mine.")
    assert [messages[0]["content"] for messages in generator.prompted[0]] == ["Mine.", "Mine."]


def test_interrupted_evaluation_goes_on_where_it_was(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        first = FakeGenerator(right_answer, stop_after=2)
        gsm8k.evaluate(eval_rows(5), [], first, max_new_tokens=9, log=RowLog(path, "protocol"))
    second = FakeGenerator(right_answer)
    resumed = gsm8k.evaluate(eval_rows(5), [], second, max_new_tokens=9, log=RowLog(path, "protocol"))
    assert [messages[-1]["content"] for messages in second.prompted[0]] == [f"What is {n} + 1?" for n in range(3)]
    unbroken = tmp_path / "unbroken.jsonl"
    complete = gsm8k.evaluate(
        eval_rows(5), [], FakeGenerator(right_answer), max_new_tokens=9, log=RowLog(unbroken, "protocol")
    )
    assert resumed == complete
    assert path.read_bytes() == unbroken.read_bytes()


def test_finished_evaluation_asks_nothing(tmp_path):
    path = tmp_path / "rows.jsonl"
    gsm8k.evaluate(eval_rows(2), [], FakeGenerator(right_answer), max_new_tokens=9, log=RowLog(path, "protocol"))
    again = FakeGenerator(right_answer)
    gsm8k.evaluate(eval_rows(2), [], again, max_new_tokens=9, log=RowLog(path, "protocol"))
    assert again.prompted == []


def test_kept_row_is_scored_again_from_its_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    gsm8k.evaluate(eval_rows(2), [], FakeGenerator(right_answer), max_new_tokens=9, log=RowLog(path, "protocol"))
    before = path.read_text()
    path.write_text(before.replace('"correct": true', '"correct": false'))
    again = FakeGenerator(right_answer)
    rows = gsm8k.evaluate(eval_rows(2), [], again, max_new_tokens=9, log=RowLog(path, "protocol"))
    assert all(row["correct"] for row in rows) and path.read_text() == before


def test_row_file_of_other_questions_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    gsm8k.evaluate(eval_rows(2), [], FakeGenerator(right_answer), max_new_tokens=9, log=RowLog(path, "protocol"))
    others = list(reversed(eval_rows(2)))
    with pytest.raises(ValueError, match="another question under id 0"):
        gsm8k.evaluate(others, [], FakeGenerator(right_answer), max_new_tokens=9, log=RowLog(path, "protocol"))


def test_row_that_the_generator_lost_is_an_error(tmp_path):
    class Forgetful(FakeGenerator):
        def generate(self, conversations, *, max_new_tokens, on_completion=None):
            super().generate(conversations[1:], max_new_tokens=max_new_tokens, on_completion=on_completion)

    log = RowLog(tmp_path / "rows.jsonl", "protocol")
    with pytest.raises(ArtifactError, match="1 rows are missing, the first 2"):
        gsm8k.evaluate(eval_rows(3), [], Forgetful(lambda _: "#### 1"), max_new_tokens=9, log=log)


def test_summary_counts_every_row_once():
    texts = ["#### 7", "It is 7.", "#### 8", "#### 8\nQuestion: more?"]
    rows = [{"model_output": text, "gold_answer": "#### 7", "num_output_tokens": n} for n, text in enumerate(texts)]
    assert gsm8k.summarize(rows) == {
        "n": 4,
        "num_correct": 1,
        "accuracy": 0.25,
        "num_correct_flexible": 2,
        "accuracy_flexible": 0.5,
        "outcomes": {"correct": 1, "wrong": 1, "no answer": 1, "truncated": 0, "run-on": 1},
        "mean_output_tokens": 1.5,
    }


def test_summary_does_not_believe_the_columns():
    rows = [{"model_output": "#### 8", "gold_answer": "#### 7", "correct": True, "parsed_final": "7"}]
    assert gsm8k.summarize(rows)["num_correct"] == 0
    assert gsm8k.summarize(rows)["mean_output_tokens"] is None


def test_summary_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no rows to summarise"):
        gsm8k.summarize([])


# --- real rows, where they lie on this machine ----------------------------------------------------------------------


def read_rows(variable, name):
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} is not set")
    lines = Path(folder, name).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def test_earlier_run_scores_as_it_was_reported():
    rows = read_rows("REFERENCE_DIR", "medium/gsm8k_preds_medium.jsonl")
    summary = gsm8k.summarize(rows)
    assert (summary["num_correct"], summary["n"]) == (143, 263)
    for row in rows:
        score = gsm8k.score_row(row)
        assert (score["parsed_final"], score["correct"]) == (row["parsed_final"], row["correct"])


@pytest.mark.parametrize(("split_name", "num_rows"), [("train", 7473), ("test", 1319)])
def test_every_gold_answer_is_read_whole(split_name, num_rows):
    rows = read_rows("ASSETS_DIR", f"gsm8k_{split_name}.jsonl")
    assert len(rows) == num_rows
    for row in rows:
        written = row["answer"].rpartition("####")[2].strip()
        assert gsm8k.extract_answer(row["answer"]) == written.replace(",", "")


# --- boundary -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["gsm8k", "safety", "stats"])
def test_scoring_never_imports_torch(module):
    code = f"import sys; import lib.{module}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
