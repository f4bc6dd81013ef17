"""Generation through transformers' own ``generate``, for models that the engine does not take."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from lib.engine.batch import PromptRow
from lib.engine.picking import Picker


def greedy_config(max_new_tokens: int, stop_ids: Iterable[int]) -> GenerationConfig:
    """Greedy decoding with every field that could change a logit set to do nothing."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        encoder_repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=0,
        eos_token_id=sorted(stop_ids),
        pad_token_id=min(stop_ids),
        use_cache=True,
    )


@contextmanager
def own_generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Put ``config`` in the place of the model's, which ``generate`` would fill in wherever ours is None."""
    shipped, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = shipped


class DrawProcessor(LogitsProcessor):
    """Leaves each row the one token that is drawn for it, so that ``model.generate`` takes it greedily."""

    def __init__(self, pick: Picker, rows: Sequence[PromptRow]) -> None:
        self.pick, self.rows = pick, rows
        self.longest = max(len(row.prompt) for row in rows)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``input_ids`` (rows, tokens so far), ``scores`` (rows, vocabulary) before any other change."""
        # Prompts are padded to the longest, so all rows are at the same place.
        place = input_ids.shape[1] - self.longest
        tokens = torch.tensor(self.pick(scores, self.rows, [place] * len(self.rows)), device=scores.device)
        return torch.full_like(scores, -math.inf).scatter_(1, tokens[:, None], 0.0)


def generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Iterable[int],
    draw: LogitsProcessor | None = None,
) -> list[list[int]]:
    """``model.generate`` over left-padded prompts: new tokens per row, with what follows a stop token."""
    input_ids, attention_mask = left_pad(prompts, model.device)
    drawing = {"logits_processor": LogitsProcessorList([draw])} if draw else {}
    with own_generation_config(model, greedy_config(max_new_tokens, stop_ids)):
        output = model.generate(input_ids=input_ids, attention_mask=attention_mask, **drawing)
    return output[:, input_ids.shape[1] :].tolist()


def score_batch(model: PreTrainedModel, prompts: Sequence[Sequence[int]], label: Sequence[int]) -> Tensor:
    """Log-probability of ``label`` after each prompt, (rows,) in float32, by one full forward pass."""
    input_ids, attention_mask = left_pad([[*prompt, *label] for prompt in prompts], model.device)
    position_ids = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
    # The last logits but one for each label token: what was predicted in its place.
    places = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    logits = model(**places, use_cache=False, logits_to_keep=len(label) + 1).logits[:, -len(label) - 1 : -1]
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    target = torch.tensor(label, device=model.device)[None, :, None].expand(len(prompts), -1, 1)
    return log_probabilities.gather(-1, target).sum(dim=(1, 2))


def left_pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (rows, longest), padded on the left; the padding's id plays no part."""
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
