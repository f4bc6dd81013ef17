"""Checks of a training file: questions it must not hold, answers with a wrong number, rows that are too long.

Questions are compared by their words and numbers (``gsm8k.normalise_question``), reworded copies are left to
``overlap``. A row's number is its line in its file, from 1.
"""

from collections import Counter, defaultdict
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
class File:
    """Rows of a file with their lines in it, from 1; no lines: one row per line."""

    rows: list[Row]
    name: str
    lines: Sequence[int] = ()


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
    held_out = {"test": gsm8k_test, "few-shot": fewshot, "development": dev}
    places = {name: _first_places(_questions(known)) for name, known in held_out.items()}
    golds: dict[str, list[str | None]] = defaultdict(list)
    for row in (*gsm8k_train, *gsm8k_test):
        golds[gsm8k.normalise_question(row["question"])].append(gsm8k.extract_answer(row["answer"]))
    questions = _questions(rows)
    lines = lines or range(1, len(rows) + 1)
    faults = []
    for line, question, row in zip(lines, questions, rows, strict=True):
        found = {source: known[question] for source, known in places.items() if question in known}
        reasons = [(f"{source} question", f"it asks what {source} row {at} asks") for source, at in found.items()]
        reasons += _number_faults(row, golds.get(question, []))
        faults += [Fault(line, kind, reason, name) for kind, reason in reasons]
    decided = [fault for fault in faults if fault.kind in DECIDED]
    if decided and action == "refuse":
        raise TrainFileError(_refusal(decided, len(rows), name))
    left_out = {fault.row for fault in decided} if action == "drop" else set()
    kept = [row for line, row in zip(lines, rows, strict=True) if line not in left_out]
    return Checked(kept, faults, sum(question not in golds for question in questions))


def _first_places(keys: Sequence[Any], lines: Sequence[int] = ()) -> dict[Any, int]:
    """Key -> its line, by default its number from 1; of equal keys the first."""
    lines = lines or range(1, len(keys) + 1)
    return dict(zip(reversed(keys), reversed(lines), strict=True))


def _questions(rows: Sequence[Row]) -> list[str]:
    return [gsm8k.normalise_question(row["question"]) for row in rows]


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


def find_unlearnable(tried: Sequence[Row], reasons: Mapping[int, str], action: Action, file: File) -> list[Fault]:
    """Faults of ``tried`` by ``reasons`` (position -> why); TrainFileError under ``refuse`` or if no row is left."""
    numbers = _line_numbers(file)
    faults = [
        Fault(numbers[tried[position]["question"], tried[position]["answer"]], "not learnable", reason, file.name)
        for position, reason in reasons.items()
    ]
    if faults and (action == "refuse" or len(faults) == len(tried)):
        raise TrainFileError(_refusal(faults, len(tried), file.name))
    return faults


def _line_numbers(file: File) -> dict[tuple[str, str], int]:
    return _first_places([(row["question"], row["answer"]) for row in file.rows], file.lines)


def find_too_long(trained: Sequence[Row], lengths: Sequence[int], limit: int, file: File) -> list[Fault]:
    """Rows of more than ``limit`` tokens, named by their line in ``file``; of equal rows, the first."""
    numbers = _line_numbers(file)
    reasons = [f"{length} tokens, max_seq_length is {limit}" if length > limit else "" for length in lengths]
    return [
        Fault(numbers[row["question"], row["answer"]], "too long", reason, file.name)
        for row, reason in zip(trained, reasons, strict=True)
        if reason
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
    by_row = sorted(faults, key=lambda fault: (fault.file, fault.row))
    shown = [fault for kind in MEANINGS for fault in [one for one in by_row if one.kind == kind][:per_kind]]
    return [{"row": str(one.row), "what": one.kind, "reason": one.reason, "file": one.file} for one in shown]
