"""Training rows as tokens and labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from lib import gsm8k
from lib.engine.load import Message, ModelError, end_of_turn_id, render_completion
from lib.train.packing import IGNORED_LABEL, Example


class TrainingError(Exception):
    """Rows that cannot be trained on, or a training that went wrong; the text says which and what to do."""


class RowTooLong(TrainingError):
    """A row has more tokens than ``max_seq_length``; nothing of it is cut away."""


@dataclass(frozen=True)
class EncodedRows:
    """Rows ready for training, and what became of the others."""

    examples: list[Example]  # {"input_ids", "labels"}
    kept: list[int]  # row number of each example, from 0
    too_long: list[int]  # row numbers that were left out
    faults: dict[int, str] = field(default_factory=dict)  # row number -> why nobody could learn from the row

    @property
    def num_tokens(self) -> int:
        return sum(len(example["input_ids"]) for example in self.examples)

    @property
    def num_supervised_tokens(self) -> int:
        return sum(map(num_supervised, self.examples))


def encode_row(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], max_seq_length: int, end: int | None = None
) -> Example:
    """Tokens and labels, equally long, of a conversation that ends in the answer to learn.

    Labelled are the answer's tokens and the token that ends its turn (``end``), so that the model learns to stop; all
    before has the label -100. What a template adds after the end of the turn is left out: it is never generated.
    """
    prompt, completion = render_completion(tokenizer, messages)
    end = end_of_turn_id(tokenizer) if end is None else end
    if completion.count(end) != 1:
        raise TrainingError(f"the answer holds the end-of-turn token {tokenizer.decode([end])!r} as text; take it out")
    answer = completion[: completion.index(end) + 1]
    if not messages[-1]["content"].strip() or len(answer) < 2:
        raise TrainingError("the answer is empty: a row needs at least one token to learn")
    length = len(prompt) + len(answer)
    if length > max_seq_length:
        raise RowTooLong(f"{length} tokens, max_seq_length is {max_seq_length}")
    return {"input_ids": prompt + answer, "labels": [IGNORED_LABEL] * len(prompt) + answer}


def try_rows(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]], max_seq_length: int
) -> EncodedRows:
    """Encode conversations; those over ``max_seq_length``, and those that cannot be learnt, are left out."""
    rows = EncodedRows([], [], [])
    end = end_of_turn_id(tokenizer)
    for number, messages in enumerate(conversations):
        try:
            rows.examples.append(encode_row(tokenizer, messages, max_seq_length, end))
        except RowTooLong:
            rows.too_long.append(number)
        except (TrainingError, ModelError) as error:
            rows.faults[number] = str(error)
        else:
            rows.kept.append(number)
    return rows


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    max_seq_length: int,
    use: str = "training",
) -> EncodedRows:
    """As ``try_rows``; TrainingError where a row cannot be learnt or no row is left, with ``use`` in its text."""
    rows = try_rows(tokenizer, conversations, max_seq_length)
    if rows.faults:
        number, why = next(iter(rows.faults.items()))
        raise TrainingError(f"{use} row {number}: {why} ({len(rows.faults)} of {len(conversations)} rows have a fault)")
    if not rows.examples:
        raise TrainingError(
            f"{use} rows: none of {len(conversations)} rows has at most max_seq_length = {max_seq_length} tokens; "
            "raise max_seq_length"
        )
    return rows


def encode_split(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, str]],
    max_seq_length: int,
    use: str = "training",
    system: str = gsm8k.SYSTEM_PROMPT,
) -> EncodedRows:
    """``encode_rows`` of rows ``question, answer``; without rows there are no examples."""
    if not rows:
        return EncodedRows([], [], [])
    return encode_rows(tokenizer, [gsm8k.training_messages(row, system) for row in rows], max_seq_length, use)


def num_supervised(example: Example) -> int:
    """Tokens of a row that have a label; the first token of a row is never predicted."""
    return sum(label != IGNORED_LABEL for label in example["labels"][1:])
