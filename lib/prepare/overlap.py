"""Word n-grams that evaluation questions share with training rows and few-shot examples: a hint of contamination.

13 words are GPT-3's measure (Brown et al. 2020, arXiv 2005.14165, appendix C), 8 GPT-2's (Radford et al. 2019,
section 4), 10 lies between. Answers are not read, and a question of fewer than n words has no n-gram.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lib import gsm8k
from lib.record.rows import row_id
from lib.stats import PairedTest, Rate, paired_test

Row = Mapping[str, Any]
Ngram = tuple[str, ...]

SIZES = (8, 10, 13)


@lru_cache(maxsize=1 << 14)
def normalised_words(text: str) -> list[str]:
    """Words and numbers of a text in one spelling (``gsm8k.plain_spelling``), without punctuation."""
    return re.findall(r"\w+", gsm8k.plain_spelling(text))


@dataclass(frozen=True)
class Overlap:
    """A question (``row``: ``test_index``, else ``id``) that shares ``size`` words with rows of a source, at most."""

    row: int
    size: int
    source: str
    source_rows: list[int]


def find_overlaps(
    rows: Sequence[Row], sources: Mapping[str, Sequence[Row]], sizes: Sequence[int] = SIZES
) -> list[Overlap]:
    """Overlaps of evaluation questions with each source, the longest first; at most one per question and source."""
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes are {list(sizes)}; allowed: numbers above 0, at least one")
    longest: dict[tuple[str, int], Overlap] = {}
    for source, source_rows in sources.items():
        for size in sorted(sizes):
            for position, matches in _matches(rows, source_rows, size).items():
                longest[source, position] = Overlap(row_id(rows[position]), size, source, matches)
    return sorted(longest.values(), key=lambda overlap: (-overlap.size, overlap.row, overlap.source))


def num_sharing(rows: Sequence[Row], source_rows: Sequence[Row], size: int) -> int:
    """How many questions of ``rows`` share ``size`` words in a row with a question of ``source_rows``."""
    return len(_matches(rows, source_rows, size))


def _matches(rows: Sequence[Row], source_rows: Sequence[Row], size: int) -> dict[int, list[int]]:
    """Position of a question -> positions of the source rows that share an n-gram of this size with it."""
    positions: dict[Ngram, set[int]] = {}
    for position, row in enumerate(rows):
        for ngram in _ngrams(row["question"], size):
            positions.setdefault(ngram, set()).add(position)
    matches: dict[int, list[int]] = {}
    for source_position, source_row in enumerate(source_rows):
        shared = positions.keys() & set(_ngrams(source_row["question"], size))
        for position in set().union(*(positions[ngram] for ngram in shared)):
            matches.setdefault(position, []).append(source_position)
    return matches


def _ngrams(text: str, size: int) -> Iterator[Ngram]:
    words = normalised_words(text)
    return zip(*(words[start:] for start in range(size)), strict=False)


@dataclass(frozen=True)
class OverlapEffect:
    """Accuracy on the rows that share ``size`` words or more with a source, and on the others; None without rows.

    The changes are tuned - untuned on the same two groups; None also without an untuned model.
    """

    size: int
    clean: Rate | None
    overlapping: Rate | None
    change_clean: PairedTest | None = None
    change_overlapping: PairedTest | None = None

    @property
    def num_overlapping(self) -> int:
        return self.overlapping.n if self.overlapping else 0

    @property
    def share(self) -> float:
        """Share of all rows that overlap."""
        return self.num_overlapping / (self.num_overlapping + (self.clean.n if self.clean else 0))

    @property
    def excess(self) -> tuple[float, float, float] | None:
        """Change on the overlapping rows - change on the others, and its 95 % interval; None where one is missing.

        The untuned model answered both groups, so that one of them being harder cancels. The interval is made from
        those of two independent differences (Zou, Donner 2008, Stat. Med. 27, 1693-1702).
        """
        shared, clean = self.change_overlapping, self.change_clean
        if shared is None or clean is None:
            return None
        excess = shared.difference - clean.difference
        below = math.hypot(shared.difference - shared.low, clean.high - clean.difference)
        above = math.hypot(shared.high - shared.difference, clean.difference - clean.low)
        return excess, excess - below, excess + above

    def record(self) -> dict[str, Any]:
        """JSON values, under the keys of ``comparison.json``."""
        counts = {"size": self.size, "num_overlapping": self.num_overlapping, "share": self.share}
        rates = {"clean": _record(self.clean), "overlapping": _record(self.overlapping)}
        return {**counts, **rates, "excess": self.excess}


def _record(rate: Rate | None) -> dict[str, Any]:
    values = (rate.successes, rate.n, rate.share, rate.low, rate.high) if rate else (0, 0, None, None, None)
    return dict(zip(("num_correct", "num_rows", "rate", "low", "high"), values, strict=True))


def overlap_effects(
    rows: Sequence[Row],
    overlaps: Sequence[Overlap],
    sizes: Sequence[int] = SIZES,
    pairs: Sequence[tuple[Row, Row]] = (),
) -> list[OverlapEffect]:
    """Accuracy (strict) on the rows that overlap at each size, and on the others; rows are scored from their text.

    ``pairs`` are rows with those of the untuned model, for the changes.
    """
    if not rows:
        raise ValueError("no rows to compare: an accuracy needs at least one")
    correct = {row_id(row): _is_right(row) for row in rows}
    both = {row_id(row): (_is_right(row), _is_right(untuned)) for row, untuned in pairs}
    effects = []
    for size in sizes:
        touched = {overlap.row for overlap in overlaps if overlap.size >= size}
        groups = [_split(each, touched) for each in (correct, both)]
        rates = (Rate.of(outcomes) if outcomes else None for outcomes in groups[0])
        changes = (paired_test(*zip(*outcomes, strict=True)) if outcomes else None for outcomes in groups[1])
        effects.append(OverlapEffect(size, *rates, *changes))
    return effects


def _is_right(row: Row) -> bool:
    return gsm8k.score_row(row)["correct"]


def _split(by_row: Mapping[int, Any], touched: set[int]) -> tuple[list[Any], list[Any]]:
    """Values of the rows that are not ``touched``, and of those that are."""
    clean = [value for row, value in by_row.items() if row not in touched]
    return clean, [value for row, value in by_row.items() if row in touched]
