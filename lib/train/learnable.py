"""Which rows can be trained on: those that the tokenizer can encode, and how long they are."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lib import gsm8k
from lib.prepare.audit import Action, Fault, File, find_too_long, find_unlearnable
from lib.prepare.self_distillation import OWN_ANSWERS
from lib.train.rows import try_rows

Row = dict[str, Any]


@dataclass(frozen=True)
class Learnable:
    """Rows that can be trained on, their ``lengths`` in tokens as training counts them, and faults of the others."""

    rows: list[Row]
    lengths: list[int]
    faults: list[Fault]

    def too_long(self, limit: int, file: File) -> list[Fault]:
        """Rows of more than ``limit`` tokens, which training leaves out; ``file``: where they are counted."""
        if file.name == OWN_ANSWERS:
            # They are in no file of their own: count them where 01 writes them.
            file = File(self.rows, "01_prepare/train.jsonl")
        return find_too_long(self.rows, self.lengths, limit, file)


def find_learnable(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    action: Action,
    file: File,
    system: str = gsm8k.SYSTEM_PROMPT,
) -> Learnable:
    """Leave out rows whose answer cannot follow their prompt; ``file``: where they are from, for the faults."""
    encoded = try_rows(tokenizer, [gsm8k.training_messages(row, system) for row in rows], sys.maxsize)
    faults = find_unlearnable(rows, encoded.faults, action, file)
    lengths = [len(example["input_ids"]) for example in encoded.examples]
    return Learnable([rows[number] for number in encoded.kept], lengths, faults)
