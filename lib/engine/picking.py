"""The next token of each row: the most likely one, or a seeded draw."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.engine.batch import PromptRow
from lib.engine.generator import Key, Sampling


@dataclass(frozen=True)
class Picker:
    """Chooses the next token of each row: the most likely one, or a drawn one where there is a ``sampling``."""

    sampling: Sampling | None
    keys: Sequence[Key]

    def __call__(self, logits: Tensor, rows: Sequence[PromptRow], places: Sequence[int]) -> list[int]:
        """``logits`` (rows, vocabulary); ``places`` of the tokens to choose in their answers."""
        if self.sampling is None:
            return pick_tokens(logits)
        uniforms = [self.sampling.uniform(self.keys[row.index], place) for row, place in zip(rows, places, strict=True)]
        return draw_tokens(logits, uniforms, self.sampling.temperature)


def pick_tokens(logits: Tensor) -> list[int]:
    """The most likely token of each row of (rows, vocabulary); FloatingPointError where logits are not numbers."""
    # Not argmax: over bfloat16 it takes the CPU six times as long. Both give the first of equals.
    best, tokens = logits.max(dim=-1)
    # One transfer for both: -1 marks a row whose best logit is not a number.
    return _require_numbers(tokens.masked_fill(best.isnan(), -1).tolist())


def draw_tokens(logits: Tensor, uniforms: Sequence[float], temperature: float) -> list[int]:
    """A token per row, drawn from softmax(logits / temperature): the one at the share ``uniforms`` of its sum."""
    if logits.device.type == "mps":
        logits = logits.cpu()  # it has no float64
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    # In float64: over 150,000 tokens a float32 sum is off by more than the rarer tokens weigh.
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    shares = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None]
    # The first token whose sum is above the share: never one without probability.
    tokens = torch.searchsorted(cumulative, shares * total, right=True)
    return _require_numbers(tokens.masked_fill(total.isnan(), -1).squeeze(-1).tolist())


def _require_numbers(picked: list[int]) -> list[int]:
    if -1 in picked:
        raise FloatingPointError("the model's logits are NaN, its dtype overflows; use compute_dtype: float32")
    return picked
