"""What generates: its protocol, completions, sampling, and a generator that loads its model at first use. No torch."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from lib import wording

Conversation = Sequence[Mapping[str, str]]
FinishReason = Literal["stop", "length"]
Key = str | int


@dataclass(frozen=True)
class Completion:
    """What the model wrote: ids and count without the stop token, text without special tokens."""

    text: str
    finish_reason: FinishReason
    num_output_tokens: int
    num_prompt_tokens: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Sampling:
    """Draw each token from the model's distribution at a temperature above 0, without top-k or top-p.

    The random number of a token is a hash of ``seed``, the key of its conversation and its place in the answer: a row
    draws the same numbers whatever rows are beside it, and no generator has a state to restore.
    """

    temperature: float
    seed: int

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature is {self.temperature}; allowed: above 0 (without sampling it is greedy)")

    def uniform(self, key: Key, place: int) -> float:
        """The random number in [0, 1) of the token at ``place`` (from 0) of the answer to conversation ``key``."""
        digest = hashlib.blake2b(json.dumps([self.seed, key, place]).encode(), digest_size=8).digest()
        # 52 bits: then its product with a sum of probabilities stays below that sum.
        return (int.from_bytes(digest) >> 12) / 2**52


@dataclass
class EngineStats:
    """What the last call cost."""

    wall_s: float = 0.0
    num_rows: int = 0
    num_output_tokens: int = 0
    tokens_per_s: float = 0.0
    num_prefix_tokens: int = 0
    peak_rows: int = 0
    num_halvings: int = 0


class Generator(Protocol):
    """What answers and judges: ``lib.engine.generate.Engine``, a ``LazyGenerator``, or a fake in a test."""

    def generate(self, conversations: Sequence[Conversation], *, max_new_tokens: int, **how: Any) -> list[Completion]:
        """As ``Engine.generate``."""

    def label_probabilities(self, conversations: Sequence[Conversation], **how: Any) -> list[list[float]]:
        """As ``Engine.label_probabilities``."""


class LoadedGenerator(Generator, Protocol):
    """A generator whose model is in memory. ``work_s``: seconds of all calls so far; ``stats``: of the last one.

    ``halved``: half as many rows at once as there would be, and two in place of one.
    """

    work_s: float
    stats: EngineStats
    halved: bool

    def describe(self) -> dict[str, object]:
        """As ``Engine.describe``."""


class LazyGenerator:
    """A generator that ``load(*arguments)`` returns when it is first used; ``loaded``: whether it ever was."""

    def __init__(self, load: Callable[..., LoadedGenerator], *arguments: Any) -> None:
        self._load, self._arguments = load, arguments
        self._engine: LoadedGenerator | None = None
        self._closed_s = 0.0
        self._halved = False
        self.loaded = False
        # Seconds of all loads.
        self.load_s = 0.0

    @property
    def source(self) -> str:
        """Where its answers come from, in words."""
        return "answered here" if self.loaded else "already answered for another preset or an earlier run"

    @property
    def wall_s(self) -> float:
        """Seconds that the generator worked, all calls together; 0 where every row was there."""
        return self._closed_s + (self._engine.work_s if self._engine else 0.0)

    @property
    def speed_text(self) -> str:
        """What the last call cost, in words."""
        stats = self._engine.stats if self._engine else EngineStats()
        return wording.speed_text(stats.num_rows, stats.num_output_tokens, stats.wall_s)

    def describe(self) -> dict[str, object]:
        """As ``Engine.describe``."""
        return self._used().describe()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Engine.generate``."""
        return self._used().generate(*args, **kwargs)

    def label_probabilities(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Engine.label_probabilities``."""
        return self._used().label_probabilities(*args, **kwargs)

    def close(self) -> None:
        """Drop the model from memory; the next call loads it again."""
        self._closed_s, self._engine = self.wall_s, None

    @contextmanager
    def in_half_batches(self, halve: bool = True) -> Iterator[None]:
        """Inside, half as many rows at once (``LoadedGenerator.halved``): rounding is another, for the A/A control."""
        self._halved = halve
        try:
            yield
        finally:
            self._halved = False

    def _used(self) -> LoadedGenerator:
        if self._engine is None:
            started = time.perf_counter()
            self._engine, self.loaded = self._load(*self._arguments), True
            self.load_s += time.perf_counter() - started
        self._engine.halved = self._halved
        return self._engine
