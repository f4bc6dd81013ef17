"""Rows of simulated runs, and what the tables of both simulations have in common; knows no interval and no claim."""

import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np

PROJECT_ROOT = Path(__file__).resolve().parent.parent
RESULTS = PROJECT_ROOT / "benchmarks" / "results"
sys.path.insert(0, str(PROJECT_ROOT))

from lib import stats  # noqa: E402


@dataclass(frozen=True)
class Rows:
    """How many rows stand once and how many prompts twice; copies are ``alike`` in outcome, or independent."""

    num_single: int
    num_double: int = 0
    alike: bool = True

    @property
    def num_rows(self) -> int:
        return self.num_single + 2 * self.num_double

    @property
    def name(self) -> str:
        kind = "" if self.alike else ", independent"
        return f"{self.num_rows:,} copies{kind}" if self.num_double else f"{self.num_rows:,}"

    @cached_property
    def clusters(self) -> list[int]:
        """A number for each row, the same for a prompt and its copy: single rows, doubles, then their copies."""
        num_prompts = self.num_single + self.num_double
        return [*range(num_prompts), *range(self.num_single, num_prompts)]

    @property
    def effective(self) -> float:
        return stats.effective_size(self.clusters)

    def draw(self, rng: np.random.Generator, shares: Sequence[float], num_draws: int) -> np.ndarray:
        """Counts of rows by kind, ``(num_draws, len(shares))``."""
        if not self.alike:
            return rng.multinomial(self.num_rows, shares, size=num_draws)
        single = rng.multinomial(self.num_single, shares, size=num_draws)
        return single + 2 * rng.multinomial(self.num_double, shares, size=num_draws)


# Share of the open rows to which a seed gives its recipe's answer, the others are its own.
AGREEMENT = 0.5


def draw_changes(
    rng: np.random.Generator, rows: Rows, truth: np.ndarray, discordant: float, shared: bool
) -> np.ndarray:
    """Outcome less the untuned model's, -1 to 1, ``(draws, recipes, seeds, rows)``; ``truth`` without the last.

    Each row is settled, all models have one outcome there, or open: the untuned model's is a coin, a run's one that is
    loaded by ``truth``, its true difference. ``discordant`` rows differ from the untuned model, half as many as are
    open. Recipes that share the untuned rows have a correlation of 1/2 where they change nothing; else each recipe has
    untuned rows drawn for itself.
    """
    num_draws, num_recipes, num_seeds = truth.shape
    columns = rows.num_single + rows.num_double if rows.alike else rows.num_rows
    untuned_shape = (num_draws, 1 if shared else num_recipes, 1, columns)
    is_open = rng.random(untuned_shape, np.float32) < 2 * discordant
    untuned = rng.random(untuned_shape, np.float32) < 0.5
    drawn = rng.random((*truth.shape, columns), np.float32)
    if num_seeds > 1:
        common = rng.random((num_draws, num_recipes, 1, columns), np.float32)
        drawn = np.where(rng.random(drawn.shape, np.float32) < AGREEMENT, common, drawn)
    tuned = drawn < (0.5 + truth / (2 * discordant))[..., None]
    changes = is_open * (tuned.astype(np.int8) - untuned)
    return changes[..., rows.clusters] if rows.alike and rows.num_double else changes


def count_tables(rows: Rows, changes: np.ndarray) -> np.ndarray:
    """Counts that a claim depends on, in place of the last axis: prompts by the sum of their rows, split doubles."""
    num_prompts = rows.num_single + rows.num_double
    sums = changes[..., :num_prompts].copy()
    first, copies = changes[..., rows.num_single : num_prompts], changes[..., num_prompts:]
    sums[..., rows.num_single :] += copies
    counts = [(sums == total).sum(-1) for total in (-2, -1, 1, 2)]
    return np.stack([*counts, (first * copies == -1).sum(-1)], -1)


# The class set: 240 rows, 12 of them copies.
COPIES = Rows(216, 12)
INDEPENDENT_COPIES = Rows(216, 12, alike=False)


def standard_error(share: float, num_draws: int) -> float:
    return (share * (1 - share) / num_draws) ** 0.5


def versions_text() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "scipy", "statsmodels"))
    return f"Python {platform.python_version()}, {packages}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first column is text and whose other columns are numbers."""
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (head, ruler, *rows)]
