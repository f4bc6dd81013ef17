"""YAML of a preset, read as a person would read it, and how to write a number that YAML reads differently."""

import math
import re
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import yaml

from lib.record.text_files import decode_text


class ParamsError(Exception):
    """A preset cannot be used; the message lists every fault with its key, value and what is allowed."""


class _PresetLoader(yaml.SafeLoader):
    """Safe YAML that reads a value as a person would, and refuses a key given twice.

    YAML 1.1 reads 010 as 8, 1:30 as 90, 2026-01-01 as a date and no as false. Here anything but true, false, null and
    decimal numbers is text, which the schema refuses where it expects a number. Aliases and tags are refused: a flat
    preset needs neither, and a few lines of aliases expand to gigabytes.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        found = f"alias *{event.anchor}" if isinstance(event, yaml.AliasEvent) else f"tag {getattr(event, 'tag', None)}"
        if found != "tag None":
            line = event.start_mark.line + 1
            raise ParamsError(f"line {line}: not YAML of a preset: no {found}; write a plain value")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ParamsError(f"key {key!r} is given {keys.count(key)} times; keep one")
        return super().construct_mapping(node, deep)


# Each is a bool, null or number in YAML 1.1 too: what its writers leave without quotes is text here as well.
for _tag, _spelling, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
):
    _PresetLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_spelling})\Z"), _first)


def read_mapping(path: Path) -> dict[Any, Any]:
    """The unchecked keys and values of a YAML file; ParamsError if it cannot be read or is not YAML of a preset."""
    try:
        values = yaml.load(decode_text(path.read_bytes(), "it"), Loader=_PresetLoader)
    except FileNotFoundError:
        raise ParamsError(f"{path.name}: there is no such file in {path.parent.name}/") from None
    except OSError as error:
        raise ParamsError(f"{path.name}: cannot be read ({type(error).__name__})") from None
    # The constructor of very long numbers raises a plain ValueError, and a file that is no text a TextFileError.
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        place = getattr(error, "problem_mark", None)
        where = f", line {place.line + 1}" if place else ""
        raise ParamsError(f"{path.name}{where}: not YAML ({getattr(error, 'problem', error)})") from None
    except ParamsError as error:
        raise ParamsError(f"{path.name}: {error}") from None
    if not isinstance(values, dict):
        raise ParamsError(f"{path.name}: `key: value` lines were expected, got {type(values).__name__}")
    return values


def read_value(text: str) -> Any:
    """``text`` as a value in a preset's YAML; the text itself if it is not YAML, for the schema to refuse."""
    try:
        return yaml.load(text, Loader=_PresetLoader)
    except (yaml.YAMLError, RecursionError, ValueError, ParamsError):
        return text


def number_remedy(text: str, kind: str) -> str:
    """How to write the number that ``text`` probably means; empty if unclear. ``kind`` is its JSON type."""
    # Long texts are not misspelt numbers, and may be costly to read as one.
    if not re.fullmatch(r"[-+.]*\d[-+.:\w]{0,40}", text):
        return ""
    meant, reading = _numbers_meant(text, kind), _yaml_1_1(text)
    why = f"(YAML 1.1 reads {text} as {'text' if isinstance(reading, str) else reading})"
    if not isinstance(reading, str) and str(reading) == text:
        why = "without quotes"
    return f": write {' or '.join(meant)} {why}" if meant else ""


def _numbers_meant(text: str, kind: str) -> list[str]:
    """Decimal spellings of ``text`` as a person reads it, then as YAML 1.1 does; empty if it is not a number."""
    if kind != "integer" and (found := re.fullmatch(r"([-+]?\d+)(\.\d*)?[eE]([-+]?)(\d+)", text)):
        return [f"{found[1]}{found[2] or '.0'}e{found[3] or '+'}{found[4]}"]
    wanted, meant = int if kind == "integer" else int | float, []
    for read in (int, float, _yaml_1_1, partial(int, base=0)):
        with suppress(ValueError):
            number = read(text)
            number = int(number) if isinstance(number, float) and number.is_integer() else number
            if isinstance(number, wanted) and abs(number) < math.inf:
                meant.append(str(number))
    return list(dict.fromkeys(meant))


def _yaml_1_1(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text
