"""The form of the files of a run."""

from collections.abc import Iterator, Mapping
from typing import Any

# What a JSON object holds, by key.
Kinds = Mapping[str, type | tuple[type, ...]]


NONE = type(None)


MANIFEST: Kinds = {
    "stage": str,
    "status": str,
    "skipped_because": str,
    "parameters": dict,
    "metrics": dict,
    "facts": dict,
    "inputs": dict,
    "outputs": dict,
    "code_sha256": str,
}


# A file that was looked for and is not there has a stamp too, of nulls.
STAMP: Kinds = {"sha256": (str, NONE), "size": (int, NONE), "mtime_ns": (int, NONE)}


def manifest_faults(where: str, manifest: Any) -> Iterator[str]:
    """What a stage's manifest lacks or holds in another form; ``where`` begins each sentence."""
    faults = list(wrong_kinds(where, manifest, MANIFEST))
    yield from faults
    for group in () if faults else ("inputs", "outputs"):
        for name, stamp in manifest[group].items():
            yield from wrong_kinds(f"{where}, {group}, {name}", stamp, STAMP)


def wrong_kinds(where: str, value: Any, kinds: Kinds, *, required: bool = True) -> Iterator[str]:
    """Keys of a JSON object that are of another kind than ``kinds`` says, or that are missing where ``required``."""
    if not isinstance(value, dict):
        yield f"{where}: a JSON object was expected, got {kind_name(value)}"
        return
    for key, kind in kinds.items():
        if key not in value:
            if required:
                yield f"{where}: {key!r} is missing"
        # A bool is an int to Python; true is no id and no score.
        elif not isinstance(value[key], kind) or (isinstance(value[key], bool) and kind is not bool):
            yield f"{where}: {key!r} is {kind_name(value[key])}, {_kind_names(kind)} was expected"


def kind_name(value: Any) -> str:
    """What a JSON value is, in a word."""
    return "null" if value is None else type(value).__name__


def _kind_names(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join("null" if one is NONE else one.__name__ for one in kinds)
