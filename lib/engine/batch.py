"""The rows of a batch on their way through the model."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.engine.attention import SharedPrefix, SlotCache, forward_step, pack_step
from lib.engine.generator import EngineStats, FinishReason

# Entering rows are prefilled in portions of about this many tokens: enough to keep the matrix units busy, and few
# enough that activations stay in the caches of a CPU, or leave most of a GPU's memory to slots. A GPU's number is an
# estimate: no GPU was measured yet.
PREFILL_TOKENS = {"cpu": 768, "cuda": 8192, "mps": 768}


@dataclass
class PromptRow:
    """One prompt on its way: its own tokens are those after the shared prefix."""

    index: int
    prompt: list[int]
    num_prompt_tokens: int
    output: list[int] = field(default_factory=list)
    cached: int = 0

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output


class SlotBatch:
    """The rows under way: row ``i`` of ``active`` has its keys and values in slot ``i``."""

    def __init__(self, model: PreTrainedModel, prefix: SharedPrefix | None, num_slots: int, stats: EngineStats) -> None:
        self.model, self.prefix, self.stats = model, prefix, stats
        self.cache = SlotCache(model.config, num_slots, model.dtype, model.device)
        self.active: list[PromptRow] = []

    def admit(self, waiting: deque[PromptRow]) -> None:
        """Take waiting rows in: as many as there are free slots for and fit one portion, but at least one."""
        free, num_tokens = self.cache.num_slots - len(self.active), 0
        most_tokens = PREFILL_TOKENS[self.model.device.type]
        while waiting and free:
            num_tokens += len(waiting[0].tokens)
            if num_tokens > most_tokens and num_tokens > len(waiting[0].tokens):
                break
            self.active.append(waiting.popleft())
            free -= 1

    def forward(self, num_parked: int = 0) -> Tensor:
        """Feed each row the tokens not in its slot yet; logits (rows, vocabulary) after the last token of each row fed.

        A failure changes nothing but the slots, so the rows can start again. The first ``num_parked`` rows are fed
        nothing, and all others must then be rows that enter.
        """
        fed = self.active[num_parked:]
        decoding = [(row.tokens[row.cached], row.cached) for row in fed if row.cached]
        entering = [row.tokens for row in fed if not row.cached]
        offset = len(self.prefix.tokens) if self.prefix is not None else 0
        step = pack_step(self.cache, decoding, entering, offset, num_parked)
        logits = forward_step(self.model, self.cache, step, self.prefix)
        for row in fed:
            row.cached = len(row.tokens)
        self.stats.peak_rows = max(self.stats.peak_rows, len(self.active))
        return logits

    def remove_finished(self, reasons: Sequence[FinishReason | None]) -> list[tuple[PromptRow, FinishReason]]:
        """Free the slots of rows with a reason; the last row moves into each, so that the first slots stay in use."""
        finished = [(row, reason) for row, reason in zip(self.active, reasons, strict=True) if reason is not None]
        for position in reversed(range(len(reasons))):
            if reasons[position] is not None:
                last = self.active.pop()
                if position < len(self.active):
                    self.cache.move(len(self.active), position, last.cached)
                    self.active[position] = last
        return finished


def score_labels(batch: SlotBatch, waiting: deque[PromptRow], labels: list[list[int]]) -> Tensor:
    """Log-probabilities (rows, labels) in float32 on the CPU; the labels' further tokens go for all rows at once."""
    portions = []
    while waiting and len(batch.active) < batch.cache.num_slots:
        num_parked = len(batch.active)
        batch.admit(waiting)
        for row in batch.active[num_parked:]:
            # What memory running out has left of an earlier attempt.
            row.output = []
        portions.append(torch.log_softmax(batch.forward(num_parked).float(), dim=-1))
    first = torch.cat(portions)
    scores = []
    for label in labels:
        score = first[:, label[0]]
        for row in batch.active:
            # Each label starts right after the prompt and overwrites the tokens of the one before.
            row.output, row.cached = [], len(row.prompt)
        for token, following in pairwise(label):
            for row in batch.active:
                row.output.append(token)
            score = score + torch.log_softmax(batch.forward().float(), dim=-1)[:, following]
        scores.append(score)
    return torch.stack(scores, dim=-1).cpu()
