"""Whether greedy decoding could have written a text: one pass over prompt and text shows how far each token is from it.

Two machines, batches or dtypes round logits differently, and a greedy token may turn wherever two logits nearly tie.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from lib.engine.generate import Engine
from lib.engine.generator import Conversation
from lib.engine.load import render_prompt

# In units of eps times the largest logit, honest bfloat16 texts were up to 1.24 from float32, see docs/method.md.
ROUNDINGS = 3.0
# Sums of a thousand products in another order move a float32 logit by more than its own rounding.
FLOAT32_ROUNDINGS = 64.0
# Instruct models write logits of some ten. An adapter can be made to add a constant to all, or to push one token down
# without end: neither may widen what is allowed.
LARGEST_LOGIT = 100.0


@dataclass(frozen=True)
class Difference:
    """The token of a claimed text that is furthest from greedy decoding; ``claimed`` is empty for the end of it."""

    place: int
    claimed: str
    greedy: str
    margin: float  # highest logit minus that of the claimed token; inf where no token can be there
    allowed: float

    @property
    def counts(self) -> bool:
        """Whether rounding does not explain it."""
        return self.margin > self.allowed


def rounding(largest_logit: float, dtype: torch.dtype) -> float:
    """How far two computations of one logit in ``dtype`` may lie apart, given the largest logit beside it."""
    units = max(ROUNDINGS * torch.finfo(dtype).eps, FLOAT32_ROUNDINGS * torch.finfo(torch.float32).eps)
    return units * min(abs(largest_logit), LARGEST_LOGIT)


def find_difference(
    engine: Engine,
    conversation: Conversation,
    text: str,
    finish_reason: str | None,
    *,
    begun: Sequence[int],
    max_new_tokens: int,
    dtype: torch.dtype,
) -> Difference:
    """Where ``text`` is furthest from greedy decoding of ``engine``, whose model is in float32.

    Args:
        finish_reason: None where it was not recorded: then the text may end in either way.
        begun: what the engine writes itself; its tokens are taken as far as they spell ``text``.
        dtype: what the text was generated in.
    """
    prompt = render_prompt(engine.tokenizer, conversation)
    lengths = range(len(begun), -1, -1)
    known = next(list(begun[:n]) for n in lengths if text.startswith(_decode(engine, begun[:n])))
    while True:
        ids = _continued(engine, known, text)
        reason = finish_reason or ("stop" if len(ids) < max_new_tokens else "length")
        most = max_new_tokens - (reason == "stop")
        ends = "too late" if len(ids) > most else reason if reason == "stop" or len(ids) == most else "too early"
        ids, known = ids[:most], known[:most]
        logits = next_logits(engine, prompt, ids)
        margins = (logits.max(dim=-1).values - _claimed_logits(engine, logits, ids, ends))[len(known) :]
        allowed = torch.tensor([rounding(row.abs().max().item(), dtype) for row in logits[len(known) :]])
        beyond = (margins > allowed).nonzero()
        first = int(beyond[0]) if len(beyond) else int((margins / allowed).argmax())
        place = len(known) + first
        claimed, greedy = map(engine.tokenizer.decode, (ids[place : place + 1], [int(logits[place].argmax())]))
        found = Difference(place, claimed, greedy, margins[first].item(), allowed[first].item())
        again = _near_tie(engine, logits[place], ids[:place], text, found) if found.counts and place < most else None
        if again is None:
            return found
        # The same text in other tokens than the tokenizer's own choice, or a character cut in the middle.
        known = again


def next_logits(engine: Engine, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """Logits (len(ids) + 1, vocabulary) of the token at each place of ``ids`` after ``prompt``, and of the next one."""
    prefix, cache = engine.prefix_of(prompt), DynamicCache()
    for number, (keys, values) in enumerate(prefix.layers if prefix else ()):
        cache.update(keys, values, number)
    tokens = torch.tensor([[*prompt, *ids][len(prefix.tokens) if prefix else 0 :]], device=engine.model.device)
    with torch.inference_mode():
        return engine.model(tokens, past_key_values=cache, logits_to_keep=len(ids) + 1).logits[0].float().cpu()


def _claimed_logits(engine: Engine, logits: Tensor, ids: Sequence[int], ends: str) -> Tensor:
    tokens, stops = torch.tensor(ids, dtype=torch.long), torch.tensor(sorted(engine.stop_ids))
    claimed = logits[:-1].gather(-1, tokens[:, None])[:, 0]
    # Generation would have ended at a stop token.
    claimed = claimed.masked_fill(torch.isin(tokens, stops), -math.inf)
    # At the token limit nothing more is chosen.
    last = {"stop": logits[-1, stops].max(), "length": logits[-1].max()}.get(ends, torch.tensor(-math.inf))
    return torch.cat([claimed, last[None]])


def _near_tie(engine: Engine, logits: Tensor, before: Sequence[int], text: str, found: Difference) -> list[int] | None:
    """Tokens before this place and one that rounding may have put here and that spells ``text`` too; None without."""
    near = (logits.max() - logits <= found.allowed).nonzero()[:, 0].tolist()
    for token in sorted(set(near) - engine.stop_ids, key=lambda token: -logits[token]):
        if text.startswith(_decode(engine, [*before, token])):
            return [*before, token]
    return None


def _continued(engine: Engine, known: list[int], text: str) -> list[int]:
    """Tokens of ``text`` that begin with ``known``."""
    # Not always from the end of ``known``: a tokenizer may put a space before what it takes for a beginning.
    complete = _encode(engine, text)
    if complete[: len(known)] == known:
        return complete
    return known + _encode(engine, text[len(_decode(engine, known)) :])


def _encode(engine: Engine, text: str) -> list[int]:
    return engine.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def _decode(engine: Engine, ids: Sequence[int]) -> str:
    return engine.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
