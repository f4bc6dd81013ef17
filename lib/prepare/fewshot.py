"""Worked examples that a person fixes: a file that the first run makes and no run changes, or rows of GSM8K train."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lib import gsm8k
from lib.prepare import datasets
from lib.prepare.audit import File
from lib.prepare.datasets import Source
from lib.record.locks import one_at_a_time
from lib.record.lookup import AssetError, own_path
from lib.record.paths import shown_path
from lib.record.rows import write_jsonl

Row = dict[str, Any]


def load_file(
    fewshot_file: str, fewshot_k: int, gsm8k_test: Sequence[Row], draw: Callable[[], Sequence[Row]]
) -> tuple[File, Source]:
    """The examples of the file, made of ``draw()`` where there is none; AssetError where they cannot be used."""
    file = own_path(fewshot_file)
    # Of two runs that find no file, one makes it and the other reads it.
    with one_at_a_time(file):
        if not file.exists():
            _make_file(file, draw(), fewshot_k)
    return _read_file(file, fewshot_k, gsm8k_test)


def check_file(fewshot_file: str, fewshot_k: int, fewshot_pool_size: int, gsm8k_test: Sequence[Row]) -> None:
    """Raise AssetError where ``load_file`` would; without test questions, contamination is not looked for."""
    file = own_path(fewshot_file)
    if file.exists():
        _read_file(file, fewshot_k, gsm8k_test)
    else:
        _check_making(file, fewshot_pool_size, fewshot_k)


def named_rows(positions: Sequence[int], fewshot_k: int, gsm8k_train: File, gsm8k_test: Sequence[Row]) -> File:
    """The rows of GSM8K train at these positions, from 0, as examples; AssetError where they cannot be used."""
    last = len(gsm8k_train.rows) - 1
    if max(positions) > last:
        raise AssetError(f"fewshot_rows names row {max(positions)}; {gsm8k_train.name} has the rows 0 to {last}")
    rows = [gsm8k_train.rows[position] for position in positions]
    _check(File(rows, f"fewshot_rows of {gsm8k_train.name}", positions), "row", fewshot_k, gsm8k_test)
    return File(rows, f"rows {', '.join(map(str, positions))} of GSM8K train", positions)


def _check_making(file: Path, fewshot_pool_size: int, fewshot_k: int) -> None:
    # Presets are shared: one must not make a file that something else runs at the next login.
    if file.suffix != ".jsonl":
        raise AssetError(f"fewshot_file {shown_path(file)} is not there: it is made only under a name ending in .jsonl")
    if fewshot_pool_size < max(1, fewshot_k):
        raise AssetError(
            f"fewshot_file {shown_path(file)} is to be made of fewshot_pool_size ({fewshot_pool_size}) examples, but "
            f"fewshot_k is {fewshot_k}: raise fewshot_pool_size to {max(1, fewshot_k)} or more"
        )


def _make_file(file: Path, rows: Sequence[Row], fewshot_k: int) -> None:
    _check_making(file, len(rows), fewshot_k)
    try:
        write_jsonl(file, rows)
    except OSError as error:
        raise AssetError(f"fewshot_file {shown_path(file)} cannot be made ({error.strerror}): name another") from None


def _read_file(file: Path, fewshot_k: int, gsm8k_test: Sequence[Row]) -> tuple[File, Source]:
    if file.is_dir():
        raise AssetError(f"fewshot_file {shown_path(file)} is a folder: name a JSON lines file, there or to be made")
    rows, source = datasets.load_own(file, datasets.parse_question_rows, "fewshot_file")
    examples = File(rows, source.path, datasets.line_numbers(source))
    _check(examples, "line", fewshot_k, gsm8k_test)
    return examples, source


def _check(examples: File, unit: str, fewshot_k: int, gsm8k_test: Sequence[Row]) -> None:
    """Raise AssetError with every example that cannot be shown, by its line or row."""
    tested = {gsm8k.normalise_question(row["question"]) for row in gsm8k_test}
    places: dict[str, int] = {}
    faults = []
    for number, row in zip(examples.lines, examples.rows, strict=True):
        where, question = f"{examples.name}, {unit} {number}", gsm8k.normalise_question(row["question"])
        if gsm8k.extract_answer(row["answer"]) is None:
            faults.append(f"{where}: its answer has no number after ####; end it in a line as `#### 18`")
        if question in tested:
            faults.append(f"{where}: asks what GSM8K's test split asks (contamination); take another question")
        if question in places:
            faults.append(f"{where}: asks what {unit} {places[question]} asks; keep one of them")
        places.setdefault(question, number)
    if len(examples.rows) < fewshot_k:
        faults.append(
            f"{examples.name} has {len(examples.rows)} examples but fewshot_k is {fewshot_k}: add some, or lower it"
        )
    if faults:
        raise AssetError("\n".join(faults))
