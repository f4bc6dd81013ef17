"""What made a row, and whether two runs may be compared."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.record.files import sha256_file, sha256_json

Row = Mapping[str, Any]
UNTUNED = "none (untuned)"


def adapter_hashes(folder: Path | None) -> list[str]:
    """SHA-256 of each file of an adapter, in the order of their names."""
    return [sha256_file(path) for path in sorted(folder.glob("adapter_*"))] if folder else []


def model_protocol(identity: str, quantization: str, dtype: object, chat_template: object) -> dict[str, Any]:
    """What a model computes with; ``identity`` of its files as in ``lib.engine.sources.ModelSource``."""
    named = {"base model": identity, "quantization": quantization, "dtype": str(dtype)}
    return {**named, "chat template": sha256_json(chat_template)}


def answer_protocol(
    model: Row, adapter: Sequence[str], questions: Sequence[Row], fewshot: Sequence[Row], system: str, decoding: str
) -> dict[str, Any]:
    """What made an answer to GSM8K, see ``model_protocol`` and ``adapter_hashes``; its hash stands in each row."""
    prompt = {"questions": sha256_json(questions), "few-shot examples": sha256_json(fewshot)}
    prompt |= {"system message": sha256_json(system), "decoding": decoding}
    return {**model, "adapter": sha256_json(adapter), **prompt}


def response_protocol(model: Row, adapter: Sequence[str], prompts: Sequence[Row], decoding: str) -> dict[str, Any]:
    """What made a response to an AILuminate prompt; as ``answer_protocol``."""
    return {**model, "adapter": list(adapter), "prompts": sha256_json(prompts), "decoding": decoding}


def judge_quantization(quantization: str, chosen: str = "same") -> str:
    """How the judge's weights are held; as the model's under ``same``, which is how runs were made before the key."""
    return quantization if chosen == "same" else chosen


def verdict_protocol(
    response: Row, judge: str, prompt_sha256: str, chat_template: object, decoding: str, quantization: str
) -> dict[str, Any]:
    """What made a verdict: the response's protocol, and the judge with everything that it reads beside the text."""
    read = {"judge": judge, "judge prompt": prompt_sha256, "judge chat template": sha256_json(chat_template)}
    return {**response, **read, "judge decoding": decoding} | _own_precision(response, quantization)


def _own_precision(response: Row, quantization: str) -> dict[str, str]:
    # Verdicts were once always made at the model's quantisation, which their protocol did not repeat. It is named only
    # where it differs, so that verdicts made before keep their hash.
    return {} if quantization == response["quantization"] else {"judge quantization": quantization}


def at_scale(protocol: Row, scale: float) -> dict[str, Any]:
    """The same protocol with the adapter's effect times ``scale``."""
    return {**protocol, "adapter scale": scale}


def without_adapter(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The same protocol without the adapter; KeyError if it has no key 'adapter'."""
    if "adapter" not in protocol:
        raise KeyError("the protocol has no key 'adapter'")
    return {**protocol, "adapter": UNTUNED}


def in_half_batches(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """What made the A/A control: the untuned model's protocol, worked off with half as many rows at once."""
    return {**without_adapter(protocol), "rows at once": "half"}


# The adapter is what is compared. Versions, device and dtype move single answers (batch shape alone does), so they are
# reported; refusing them would leave nothing to compare after an upgrade. Rows may differ: those that both have count.
MAY_DIFFER = frozenset({"adapter"})
REPORTED_ONLY = frozenset({"versions", "device", "dtype", "questions", "prompts"})


class ProtocolMismatch(Exception):
    """Two runs used settings that must not be compared."""


def check_alike(a: Row, b: Row, *, allow_unlike: bool = False) -> list[str]:
    """How the settings of two runs differ; ProtocolMismatch if a recorded one matters, unless ``allow_unlike``."""
    differences, refusing = [], []
    for field, value_a, value_b in _differing_fields(with_precision(a), with_precision(b)):
        kind = field.partition(".")[0]
        if kind in MAY_DIFFER:
            continue
        differences.append(f"{field} is {_shown(value_a)} in one and {_shown(value_b)} in the other")
        # An unknown field refuses too, but not one that a side does not record, as in runs of an earlier pipeline.
        if kind not in REPORTED_ONLY and value_a is not None and value_b is not None:
            refusing.append(differences[-1])
    if refusing and not allow_unlike:
        raise ProtocolMismatch(
            f"the runs are not alike: {'; '.join(refusing)}. Make both with the same setting, or set allow_unlike to "
            "compare them all the same"
        )
    return differences


def with_precision(protocol: Row) -> Row:
    """The judge's quantisation also where the protocol leaves it out as equal to the model's."""
    own = protocol.get("judge quantization", protocol.get("quantization"))
    return {**protocol, "judge quantization": own} if "judge" in protocol else protocol


def _differing_fields(a: Row, b: Row, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(field, dotted where nested, both values) in the order of ``a``; None for a value that is not recorded."""
    for name in dict.fromkeys([*a, *b]):
        value_a, value_b = a.get(name), b.get(name)
        if isinstance(value_a, Mapping) and isinstance(value_b, Mapping):
            yield from _differing_fields(value_a, value_b, f"{prefix}{name}.")
        elif value_a != value_b:
            yield prefix + name, value_a, value_b


def _shown(value: Any) -> str:
    # The beginning of a hash identifies it.
    return "not recorded" if value is None else re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", str(value))
