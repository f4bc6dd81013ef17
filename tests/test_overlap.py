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


def paired(tuned, untuned):
    """Tuned and untuned answers, right (1) or wrong (0), to the same questions with ``test_index`` from 0."""
    about = [{"id": 0, "test_index": at, "question": f"{at}?", "gold_answer": "#### 1"} for at in range(len(tuned))]
    sides = (
        [{**row, "model_output": f"#### {right}"} for row, right in zip(about, side, strict=True)]
        for side in (tuned, untuned)
    )
    return [*zip(*sides, strict=True)]


# Overlapping questions come first: their answers tuned and untuned, then those of the others; the excess.
EXCESSES = {
    "memory": ([1] * 10, [0] * 10, [0] * 90, [0] * 90, 1.0),
    "easier questions, for both models": ([1] * 10, [1] * 10, [0] * 90, [0] * 90, 0.0),
    "the same gain": ([1] * 10, [0] * 5 + [1] * 5, [1] * 90, [0] * 45 + [1] * 45, 0.0),
    "less gain": ([0] * 10, [0] * 10, [1] * 90, [0] * 90, -1.0),
}


@pytest.mark.parametrize("name", EXCESSES)
def test_the_gain_on_shared_words_is_compared_with_that_on_the_others(name):
    *sides, expected = EXCESSES[name]
    pairs = paired(sides[0] + sides[2], sides[1] + sides[3])
    overlaps = [Overlap(at, 8, "train", [0]) for at in range(10)]
    (effect,) = overlap.overlap_effects([row for row, _ in pairs], overlaps, (8,), pairs)
    excess, low, high = effect.excess
    assert excess == pytest.approx(expected) and low <= excess <= high
    shared = stats.paired_test(*sides[:2])
    assert effect.change_overlapping == shared and effect.change_clean == stats.paired_test(*sides[2:])
    # Wider than either of the two, and never than their sum.
    assert shared.high - shared.low <= high - low <= 2 * (shared.high - shared.low)
    assert list(effect.record()["excess"]) == [excess, low, high]


def test_without_untuned_rows_or_a_group_there_is_no_excess():
    pairs = paired([1, 0], [0, 0])
    rows = [row for row, _ in pairs]
    assert overlap.overlap_effects(rows, [Overlap(0, 8, "train", [0])], (8,))[0].excess is None
    assert overlap.overlap_effects(rows, [], (8,), pairs)[0].excess is None
    assert (
        overlap.overlap_effects(rows, [Overlap(0, 8, "a", [0]), Overlap(1, 8, "a", [0])], (8,), pairs)[0].excess is None
    )


def test_the_interval_of_the_excess_covers_it():
    """3 of 40 and 12 of 200 rows discordant on average, changes of +10 and +2 points: 95 % coverage, up to chance."""
    generator = random.Random(1)

    def draw(num, gained, lost):
        moves = generator.choices([(1, 0), (0, 1), (1, 1)], [gained, lost, 1 - gained - lost], k=num)
        return [*zip(*moves, strict=True)]

    covered = 0
    for _ in range(300):
        tests = [stats.paired_test(*draw(*one)) for one in ((200, 0.04, 0.02), (40, 0.125, 0.025))]
        _, low, high = overlap.OverlapEffect(8, None, None, *tests).excess
        covered += low <= 0.08 <= high
    assert 0.92 <= covered / 300 <= 0.985


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
