"""Word n-grams that evaluation questions share with training rows and few-shot examples.

Knows questions, nothing about models. Shared words are a hint of contamination, not its proof: "How many apples does he
have left" is eight words that anyone may write. 13 words are GPT-3's measure (Brown et al. 2020, arXiv 2005.14165,
appendix C), 8 GPT-2's (Radford et al. 2019, section 4), 10 lies between. Answers are not read, and a question of fewer
words than n shares none.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lib import gsm8k, stats
from lib.record.rows import row_id

Row = Mapping[str, Any]
Ngram = tuple[str, ...]

SIZES = (8, 10, 13)


def normalised_words(text: str) -> list[str]:
    """Words and numbers of a text in one spelling (``gsm8k.plain_spelling``), without punctuation."""
    return re.findall(r"\w+", gsm8k.plain_spelling(text))


@dataclass(frozen=True)
class Overlap:
    """An evaluation question that shares ``size`` words in a row with rows of a source, the largest of the sizes asked.

    ``row`` is its ``test_index`` (``id`` where that is unknown), ``source_rows`` are positions in the source.
    """

    row: int
    size: int
    source: str
    source_rows: list[int]


def find_overlaps(
    rows: Sequence[Row], sources: Mapping[str, Sequence[Row]], sizes: Sequence[int] = SIZES
) -> list[Overlap]:
    """Overlaps of evaluation questions with each source, the longest first; at most one a question and source.

    Args:
        rows: evaluation rows with ``question`` and ``test_index`` or ``id``.
        sources: rows with ``question`` by a name, for example ``{"train": [...], "fewshot": [...]}``.
        sizes: words in a row that count, at least one number above 0.

    Raises:
        ValueError: a size is no number above 0, or there is none.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes are {list(sizes)}; allowed: numbers above 0, at least one")
    words = [normalised_words(row["question"]) for row in rows]
    found: list[Overlap] = []
    for source, source_rows in sources.items():
        source_words = [normalised_words(row["question"]) for row in source_rows]
        longest: dict[int, Overlap] = {}
        for size in sorted(sizes):
            for position, matches in _matches(words, source_words, size).items():
                longest[position] = Overlap(row_id(rows[position]), size, source, matches)
        found.extend(longest.values())
    return sorted(found, key=lambda overlap: (-overlap.size, overlap.row, overlap.source))


def num_sharing(rows: Sequence[Row], source_rows: Sequence[Row], size: int) -> int:
    """How many questions of ``rows`` share ``size`` words in a row with a question of ``source_rows``."""
    words, source_words = ([normalised_words(row["question"]) for row in each] for each in (rows, source_rows))
    return len(_matches(words, source_words, size))


def _matches(words: Sequence[list[str]], source_words: Sequence[list[str]], size: int) -> dict[int, list[int]]:
    """Position of a question -> positions of the source rows that share an n-gram of this size with it."""
    positions: dict[Ngram, set[int]] = {}
    for position, question in enumerate(words):
        for ngram in _ngrams(question, size):
            positions.setdefault(ngram, set()).add(position)
    matches: dict[int, list[int]] = {}
    for source_position, source_question in enumerate(source_words):
        shared = positions.keys() & set(_ngrams(source_question, size))
        for position in set().union(*(positions[ngram] for ngram in shared)):
            matches.setdefault(position, []).append(source_position)
    return matches


def _ngrams(words: Sequence[str], size: int) -> Iterator[Ngram]:
    return zip(*(words[start:] for start in range(size)), strict=False)


@dataclass(frozen=True)
class Accuracy:
    """Right answers of some rows with Wilson's 95 % interval; None each where there are no rows."""

    num_correct: int
    num_rows: int
    rate: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class OverlapEffect:
    """Rows that share ``size`` words or more with a source, their share of all, the accuracy without and on them."""

    size: int
    num_overlapping: int
    share: float
    clean: Accuracy
    overlapping: Accuracy


def overlap_effects(
    rows: Sequence[Row], overlaps: Sequence[Overlap], sizes: Sequence[int] = SIZES
) -> list[OverlapEffect]:
    """For each size, how many rows overlap and what accuracy is left on the clean ones (strict reading).

    Args:
        rows: answered rows of GSM8K, at least one; scored anew from their text.
        overlaps: of these rows, see ``find_overlaps`` with the same sizes.
        sizes: as there.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("no rows to compare: an accuracy needs at least one")
    correct = {row_id(row): gsm8k.score_row(row)["correct"] for row in rows}
    return [_effect(correct, {overlap.row for overlap in overlaps if overlap.size >= size}, size) for size in sizes]


def _effect(correct: Mapping[int, bool], overlapping: set[int], size: int) -> OverlapEffect:
    touched = [right for row, right in correct.items() if row in overlapping]
    clean = [right for row, right in correct.items() if row not in overlapping]
    return OverlapEffect(size, len(touched), len(touched) / len(correct), _accuracy(clean), _accuracy(touched))


def _accuracy(outcomes: Sequence[bool]) -> Accuracy:
    if not outcomes:
        return Accuracy(0, 0, None, None, None)
    low, high = stats.wilson_interval(sum(outcomes), len(outcomes))
    return Accuracy(sum(outcomes), len(outcomes), sum(outcomes) / len(outcomes), low, high)
