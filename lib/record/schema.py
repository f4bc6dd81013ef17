"""The schema of a manifest, and the faults that pydantic finds in a file of a run, as sentences."""

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError

MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4000
# Characters of a name or value that a message repeats: files from elsewhere hold texts of any length.
MAX_SHOWN = 80


class Record(BaseModel):
    """A JSON object; columns that it does not name are allowed. Strict: ``true`` is neither an id nor a number."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


def _file_name(name: str) -> str:
    """Refuse a relative path that the operating system rejects: its own error names no place."""
    encoded = name.encode("utf-8", "surrogatepass")
    longest = max(map(len, encoded.split(b"/")))
    if b"\0" in encoded or not 0 < longest <= MAX_NAME_BYTES or len(encoded) > MAX_PATH_BYTES:
        raise ValueError(f"{shown(name)} is not a file name")
    return name


FileName = Annotated[str, AfterValidator(_file_name)]


class Stamp(Record):
    """Identity of a file; all null for one that did not exist."""

    sha256: str | None
    size: int | None
    mtime_ns: int | None


class Manifest(Record):
    """What the driver needs of a stage's ``manifest.json``."""

    stage: str
    status: str
    skipped_because: str
    parameters: dict[str, Any]
    metrics: dict[str, Any]
    facts: dict[str, Any]
    inputs: dict[FileName, Stamp]
    outputs: dict[FileName, Stamp]
    code_sha256: str


def one_of(*kinds: type) -> AfterValidator:
    """For ``Any``, in place of a union: one fault, not one per member."""

    def check(value: Any) -> Any:
        if type(value) not in kinds:
            raise ValueError(f"is {kind_name(value)}, expected {' or '.join(kind.__name__ for kind in kinds)}")
        return value

    return AfterValidator(check)


# Building a validator takes longer than using it.
_adapter = cache(TypeAdapter)


def find_faults(where: str, form: Any, value: Any, context: Any = None) -> list[str]:
    """One sentence per fault of ``value`` against the type ``form``, beginning with ``where``; empty if valid."""
    try:
        _adapter(form).validate_python(value, context=context)
    except ValidationError as error:
        return [_sentence(where, fault) for fault in error.errors(include_url=False)]
    return []


def _sentence(where: str, fault: Mapping[str, Any]) -> str:
    # "[key]" marks a fault of the key itself, which is the part before it.
    place = [f"entry {part}" if isinstance(part, int) else part[:MAX_SHOWN] for part in fault["loc"] if part != "[key]"]
    if fault["type"] in ("missing", "extra_forbidden"):
        *place, key = place
        return f"{', '.join([where, *place])}: {key!r} is {'missing' if fault['type'] == 'missing' else 'not allowed'}"
    if fault["type"] == "value_error":
        return f"{', '.join([where, *place])}: {fault['ctx']['error']}"
    expected = fault["msg"].removeprefix("Input should be ").partition(" or instance of ")[0]
    value, wrong_type = fault["input"], fault["type"].endswith("_type")
    # A text of the wrong type may be a harmful prompt: only its type is shown.
    found = kind_name(value) if wrong_type and not isinstance(value, int | float) else shown(value)
    return f"{', '.join([where, *place])}: is {found}, expected {expected}"


def kind_name(value: Any) -> str:
    """What a JSON value is, in a word."""
    return "null" if value is None else type(value).__name__


def shown(value: Any) -> str:
    """``value`` as a message shows it: quoted, escaped and short."""
    return repr(value[:MAX_SHOWN]) if isinstance(value, str) else repr(value)[:MAX_SHOWN]
