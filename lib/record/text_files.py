"""Text files that a user names (data, labels, guidelines, presets), read without what an editor adds."""

import codecs
import csv
import io
from pathlib import Path

from lib.record.paths import display_path

REMEDY = "save it as UTF-8 (in Excel: 'CSV UTF-8'), or fetch it again"


class TextFileError(ValueError):
    """A file cannot be read as text; the message names it, the place and the remedy."""


def read_text(path: Path) -> str:
    """The text of a file, as ``decode_text``; TextFileError if it cannot be read, or is not UTF-8 text."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TextFileError(f"{display_path(path)} cannot be read ({error.strerror})") from None
    return decode_text(data, display_path(path))


def read_filled(path: Path, remedy: str) -> str:
    """``read_text``; TextFileError with ``remedy`` where the file holds no text."""
    text = read_text(path)
    if not text.strip():
        raise TextFileError(f"{display_path(path)} is empty: {remedy}")
    return text


def read_prompt(path: Path) -> str:
    """A prompt, without the line break that editors add at its end, as ``read_filled``."""
    return read_filled(path, "write the prompt, or leave the key empty for the built-in one").rstrip("\n")


def decode_text(data: bytes, where: str) -> str:
    """UTF-8 without byte order mark, line ends as ``\\n``; TextFileError with ``where`` if it is not, or holds NUL."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start
        # A byte order mark of UTF-16 is also the beginning of UTF-32's.
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        fault = "it is UTF-16" if wide else f"line {_line_of(data, at)}: byte {at} of the file is 0x{data[at]:02X}"
        raise TextFileError(f"{where} is not UTF-8 text ({fault}): {REMEDY}") from None
    if "\0" in text:
        fault = f"line {_line_of(data, data.index(0))} holds a NUL byte: UTF-16, or not text at all"
        raise TextFileError(f"{where} is not UTF-8 text ({fault}): {REMEDY}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _line_of(data: bytes, place: int) -> int:
    return data.count(b"\n", 0, place) + 1


def csv_reader(text: str) -> csv.DictReader:
    """Rows of a CSV with a header, separated by commas, semicolons or tabs; an open quote is a ``csv.Error``."""
    header = text.lstrip("\n").partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    return csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
