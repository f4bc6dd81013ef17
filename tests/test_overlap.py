"""Shared word n-grams: found in any spelling, by row number; accuracy without them."""

import json
import os
import random
from pathlib import Path

import pytest

from lib import stats
from lib.prepare import overlap
from lib.prepare.overlap import Overlap

TEN_WORDS = "one two three four five six seven eight nine ten"


def question(text, **more):
    return {"question": text, **more}


def test_words_have_one_spelling():
    assert overlap.normalised_words("Tom's  “10” Apples,\ncost $1.50 — each?") == (
        ["tom", "s", "10", "apples", "cost", "1", "50", "each"]
    )


def test_characters_that_nobody_sees_part_no_words():
    assert overlap.normalised_words("ap\u00adples\u200b and pears") == ["apples", "and", "pears"]


def test_longest_size_is_kept_with_the_rows_that_share_it():
    train = [
        question("nothing here"),
        question(f"Start: {TEN_WORDS.upper()}."),
        question(TEN_WORDS.removesuffix(" nine ten")),
    ]
    found = overlap.find_overlaps([question(f"So, {TEN_WORDS}!", test_index=42)], {"train": train}, (5, 8, 10, 13))
    # Row 2 holds the first eight words and so shares 8, not 10.
    assert found == [Overlap(42, 10, "train", [1])]
    assert overlap.find_overlaps([question(TEN_WORDS, id=0)], {"train": train}, (8,)) == [
        Overlap(0, 8, "train", [1, 2])
    ]


def test_words_must_stand_in_a_row():
    assert overlap.find_overlaps([question("a b c x d e f", id=0)], {"train": [question("a b c d e f")]}, (4,)) == []


def test_each_source_is_told_apart_and_the_longest_comes_first():
    rows = [question("a b c d e", test_index=7), question("v w x y z a b", test_index=3)]
    found = overlap.find_overlaps(rows, {"train": rows, "fewshot": [question("a b c d")]}, (4, 5, 7))
    assert found == [
        Overlap(3, 7, "train", [1]),
        Overlap(7, 5, "train", [0]),
        Overlap(7, 4, "fewshot", [0]),
    ]


def test_questions_that_share_words_are_counted_once():
    held_out = [question(TEN_WORDS), question(f"{TEN_WORDS} eleven"), question("one two three")]
    train = [question(f"so {TEN_WORDS}"), question(TEN_WORDS.upper())]
    assert [overlap.num_sharing(held_out, train, size) for size in (3, 8, 11)] == [3, 2, 0]
    assert overlap.num_sharing([], train, 8) == overlap.num_sharing(held_out, [], 8) == 0


def test_short_questions_and_empty_sources_share_nothing():
    assert overlap.find_overlaps([question("How many?", id=0)], {"train": [question("How many?")]}) == []
    assert overlap.find_overlaps([question(TEN_WORDS, id=0)], {"train": [], "fewshot": []}) == []
    assert overlap.find_overlaps([], {"train": [question(TEN_WORDS)]}) == []


@pytest.mark.parametrize("sizes", [(), (8, 0)])
def test_sizes_must_be_numbers_above_0(sizes):
    with pytest.raises(ValueError, match="allowed: numbers above 0, at least one"):
        overlap.find_overlaps([], {}, sizes)


def test_search_finds_what_a_plain_one_finds():
    rng = random.Random(5)
    texts = [" ".join(rng.choices("abc", k=rng.randint(0, 9))) for _ in range(60)]
    rows = [question(text, id=number) for number, text in enumerate(texts[:30])]
    train = [question(text) for text in texts[30:]]
    expected = {}
    for row in rows:
        numbers = [n for n, other in enumerate(train) if _shares(row["question"].split(), other["question"].split(), 4)]
        if numbers:
            expected[row["id"]] = numbers
    found = overlap.find_overlaps(rows, {"train": train}, (4,))
    assert expected and {each.row: each.source_rows for each in found} == expected


def _shares(words, other, size):
    return any(
        words[i : i + size] == other[j : j + size]
        for i in range(len(words) - size + 1)
        for j in range(len(other) - size + 1)
    )


def test_accuracy_without_the_overlapping_rows():
    rows = [
        {"id": n, "test_index": 10 + n, "question": f"{n}?", "gold_answer": "#### 1", "model_output": f"#### {right}"}
        for n, right in enumerate([1, 1, 0, 1, 0])
    ]
    overlaps = [Overlap(10, 13, "train", [0]), Overlap(10, 8, "fewshot", [0]), Overlap(12, 8, "train", [4])]
    eight, thirteen = overlap.overlap_effects(rows, overlaps, (8, 13))
    assert (eight.num_overlapping, eight.share) == (2, 0.4)
    assert (eight.clean, eight.overlapping) == (stats.Rate.of_counts(2, 3), stats.Rate.of_counts(1, 2))
    assert (thirteen.num_overlapping, thirteen.clean) == (1, stats.Rate.of_counts(2, 4))
    none = overlap.overlap_effects(rows, [], (8,))[0]
    assert none.overlapping is None and none.clean.share == 0.6 and none.share == 0.0
    with pytest.raises(ValueError, match="no rows"):
        overlap.overlap_effects([], [])


@pytest.mark.skipif("ASSETS_DIR" not in os.environ, reason="ASSETS_DIR names no folder of data")
def test_gsm8k_test_against_train():
    train, test = (
        [json.loads(line) for line in (Path(os.environ["ASSETS_DIR"]) / name).read_text(encoding="utf-8").splitlines()]
        for name in ("gsm8k_train.jsonl", "gsm8k_test.jsonl")
    )
    rows = [{**row, "test_index": number} for number, row in enumerate(test)]
    found = overlap.find_overlaps(rows, {"train": train})
    # 80 of 1,319 (6.1 %) share 8 words, 9 share 10, 3 share 13.
    assert [sum(each.size >= size for each in found) for size in overlap.SIZES] == [80, 9, 3]
    assert all(each.source_rows for each in found)
