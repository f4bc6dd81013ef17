"""Checks of a training file: questions it must not hold, answers with a wrong number, rows that are too long.

Questions are compared by their words and numbers (``gsm8k.normalise_question``), reworded copies are left to
``overlap``. A row's number is its line in its file, from 1.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lib import gsm8k

Row = dict[str, Any]
Action = Literal["refuse", "drop", "keep"]
FaultKind = str  # a key of MEANINGS

# Decided on by `train_file_faults`. All others leave training whatever it says: a rewritten copy of GSM8K's train split
# necessarily holds the questions of pool and development rows, and a row that is too long would teach a cut answer.
DECIDED: tuple[FaultKind, ...] = ("test question", "wrong number", "no number")
HELD_OUT: tuple[FaultKind, ...] = ("few-shot question", "development question")
MEANINGS: dict[FaultKind, str] = {
    "test question": "asks what the test split asks",
    "wrong number": "ends in another number than GSM8K's answer to the question",
    "no number": "GSM8K has the question, the answer has no number after ####",
    "few-shot question": "asks what a few-shot example of this run asks",
    "development question": "asks what a development row of this run asks",
    "not learnable": "has an answer that cannot follow the prompt",
    "too long": "has more tokens than max_seq_length",
}
NUM_NAMED = 5


class TrainFileError(ValueError):
    """Training rows that `train_file_faults: refuse` does not accept; the text counts them and names the first."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row; ``row`` is its line in ``file``, from 1. A row can have several."""

    row: int
    kind: FaultKind
    reason: str
    file: str


@dataclass(frozen=True)
class Checked:
    """Rows that stay, and every fault in the order of the rows."""

    rows: list[Row]
    faults: list[Fault]
    num_unknown: int  # rows whose question GSM8K does not have: their numbers cannot be compared


def check_rows(
    rows: Sequence[Row],
    *,
    gsm8k_train: Sequence[Row],
    gsm8k_test: Sequence[Row],
    fewshot: Sequence[Row] = (),
    dev: Sequence[Row] = (),
    action: Action,
    name: str,
    lines: Sequence[int] = (),
) -> Checked:
    """Look for questions that must not be trained on and for answers whose number is not GSM8K's.

    Args:
        rows: training rows ``question, answer``; or GSM8K train, before rows are drawn from it.
        fewshot, dev: reported here, where they are drawn already; ``gsm8k.split_train`` removes their questions.
        action: on faults of ``DECIDED``: ``refuse`` raises TrainFileError, ``drop`` leaves rows out, ``keep`` reports.
        lines: of the rows in their file ``name``, from 1; empty: one row per line.
    """
    places = {
        "test question": _first_places(gsm8k_test),
        "few-shot question": _first_places(fewshot),
        "development question": _first_places(dev),
    }
    golds = _gold_numbers([*gsm8k_train, *gsm8k_test])
    questions = [gsm8k.normalise_question(row["question"]) for row in rows]
    lines = lines or range(1, len(rows) + 1)
    faults = []
    for line, question, row in zip(lines, questions, rows, strict=True):
        found = [kind for kind, known in places.items() if question in known]
        reasons = [
            (kind, f"it asks what {kind.removesuffix(' question')} row {places[kind][question]} asks") for kind in found
        ]
        reasons += _number_faults(row, golds.get(question, []))
        faults += [Fault(line, kind, reason, name) for kind, reason in reasons]
    decided = [fault for fault in faults if fault.kind in DECIDED]
    if decided and action == "refuse":
        raise TrainFileError(_refusal(decided, len(rows), name))
    left_out = {fault.row for fault in decided} if action == "drop" else set()
    kept = [row for line, row in zip(lines, rows, strict=True) if line not in left_out]
    return Checked(kept, faults, sum(question not in golds for question in questions))


def _first_places(rows: Sequence[Row]) -> dict[str, int]:
    """Question -> its number from 1."""
    places: dict[str, int] = {}
    for place, row in enumerate(rows, start=1):
        places.setdefault(gsm8k.normalise_question(row["question"]), place)
    return places


def _gold_numbers(rows: Sequence[Row]) -> dict[str, list[str | None]]:
    golds: dict[str, list[str | None]] = {}
    for row in rows:
        golds.setdefault(gsm8k.normalise_question(row["question"]), []).append(gsm8k.extract_answer(row["answer"]))
    return golds


def _number_faults(row: Row, golds: Sequence[str | None]) -> list[tuple[FaultKind, str]]:
    if not golds:
        return []
    found = gsm8k.extract_answer(row["answer"])
    if found is None:
        return [("no number", f"GSM8K's answer is {golds[0]}")]
    # Any of them: another GSM8K file may hold a question twice.
    if any(gsm8k.is_correct(found, gold) for gold in golds):
        return []
    return [("wrong number", f"it ends in {found[:40]}, GSM8K's answer is {golds[0]}")]


def _refusal(faults: Sequence[Fault], num_rows: int, name: str) -> str:
    counts = ", ".join(f"{count} x {kind}" for kind, count in count_faults(faults).items() if count)
    named = "\n".join(f"  - row {fault.row}: {fault.kind}, {fault.reason}" for fault in faults[:NUM_NAMED])
    more = f"\n  - and {len(faults) - NUM_NAMED} more" if len(faults) > NUM_NAMED else ""
    keep = " or keep (train on them)" if all(fault.kind in DECIDED for fault in faults) else ""
    return (
        f"{name}: {len({fault.row for fault in faults})} of {num_rows} rows must not be trained on ({counts})\n{named}"
        f"{more}\nfix the file, or set train_file_faults to drop (leave these rows out){keep}"
    )


def find_unlearnable(
    tried: Sequence[Row],
    reasons: Mapping[int, str],
    *,
    action: Action,
    rows: Sequence[Row],
    name: str,
    lines: Sequence[int] = (),
) -> list[Fault]:
    """Faults of ``tried`` by ``reasons`` (position -> why); TrainFileError under ``refuse`` or if no row is left."""
    numbers = _line_numbers(rows, lines)
    faults = [
        Fault(numbers[tried[position]["question"], tried[position]["answer"]], "not learnable", reason, name)
        for position, reason in reasons.items()
    ]
    if faults and (action == "refuse" or len(faults) == len(tried)):
        raise TrainFileError(_refusal(faults, len(tried), name))
    return faults


def _line_numbers(rows: Sequence[Row], lines: Sequence[int]) -> dict[tuple[str, str], int]:
    """Question and answer -> line, from 1; of equal rows the first."""
    numbers: dict[tuple[str, str], int] = {}
    for line, row in zip(lines or range(1, len(rows) + 1), rows, strict=True):
        numbers.setdefault((row["question"], row["answer"]), line)
    return numbers


def find_too_long(
    trained: Sequence[Row],
    lengths: Sequence[int],
    limit: int,
    *,
    rows: Sequence[Row],
    name: str,
    lines: Sequence[int] = (),
) -> list[Fault]:
    """Rows of more than ``limit`` tokens, named by ``lines`` of the loaded ``rows``; of equal rows, the first."""
    numbers = _line_numbers(rows, lines)
    return [
        Fault(numbers[row["question"], row["answer"]], "too long", f"{length} tokens, max_seq_length is {limit}", name)
        for row, length in zip(trained, lengths, strict=True)
        if length > limit
    ]


def count_faults(faults: Sequence[Fault]) -> dict[FaultKind, int]:
    """Rows of each kind of fault, 0 included."""
    counts = Counter(fault.kind for fault in faults)
    return {kind: counts[kind] for kind in MEANINGS}


def fault_table(faults: Sequence[Fault], action: Action) -> list[dict[str, Any]]:
    """Rows of a table: each kind that ``check_rows`` finds, how many rows, what becomes of them."""
    decided = {"refuse": "refused", "drop": "left out", "keep": "TRAINED ON (train_file_faults: keep)"}[action]
    becomes = {**dict.fromkeys(DECIDED, decided), **dict.fromkeys(HELD_OUT, "left out")}
    counts = count_faults(faults)
    return [
        {"a row that": MEANINGS[kind], "rows": counts[kind], "what becomes of them": what if counts[kind] else "none"}
        for kind, what in becomes.items()
    ]


def first_offenders(faults: Sequence[Fault], per_kind: int = 2) -> list[dict[str, Any]]:
    """Rows of a table: the first faults of each kind, by file and row number, those of ``DECIDED`` first."""
    shown = []
    for kind in MEANINGS:
        these = sorted((fault for fault in faults if fault.kind == kind), key=lambda fault: (fault.file, fault.row))
        shown += [
            {"row": str(fault.row), "what": kind, "reason": fault.reason, "file": fault.file}
            for fault in these[:per_kind]
        ]
    return shown
