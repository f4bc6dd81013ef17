"""Honest rows of the bundled model in bfloat16 are explained by rounding, and other numbers in them are not."""

import os
import re

import pytest
import torch

from lib import gsm8k
from lib.engine import generate, load, sources
from lib.engine.forced import find_difference
from lib.record.paths import PROJECT_ROOT
from lib.record.rows import read_jsonl

pytestmark = pytest.mark.slow
NUM_ROWS, MAX_NEW_TOKENS = 200, 48


def other_number(text):
    """The text with its last digit changed wherever its last number stands; None without a number."""
    numbers = re.findall(r"\d+", text)
    if not numbers:
        return None
    changed = numbers[-1][:-1] + str((int(numbers[-1][-1]) + 1) % 10)
    return re.sub(rf"(?<!\d){numbers[-1]}(?!\d)", changed, text)


@pytest.mark.skipif("HONEST_ROWS" not in os.environ, reason="long: HONEST_ROWS=1 runs it")
def test_200_honest_rows_raise_no_alarm_and_other_numbers_nearly_always_do():
    train = read_jsonl(PROJECT_ROOT / "data/sandbox/gsm8k_train.jsonl")
    # Other questions by other numbers: the bundled files hold 64.
    questions = [f"{train[n % 64]['question']} Then {n} more come. How many?" for n in range(NUM_ROWS)]
    chats = [gsm8k.build_messages(question, train[:1]) for question in questions]
    folder = sources.resolve_model("smollm2-135m-instruct", offline=True).folder
    engine = generate.load_engine(folder, load.Runtime("cpu", torch.bfloat16, ""), "nf4", batch_size=32)
    claimed = engine.generate(chats, max_new_tokens=MAX_NEW_TOKENS)
    engine.model.float()
    ours = engine.generate(chats, max_new_tokens=MAX_NEW_TOKENS)
    caught = changed = 0
    for chat, row, begun in zip(chats, claimed, ours, strict=True):
        how = {"begun": begun.token_ids, "max_new_tokens": MAX_NEW_TOKENS, "dtype": torch.bfloat16}
        found = find_difference(engine, chat, row.text, row.finish_reason, **how)
        assert not found.counts, found
        if text := other_number(row.text):
            changed += 1
            caught += find_difference(engine, chat, text, row.finish_reason, **how).counts
    assert caught >= 0.9 * changed > 0
