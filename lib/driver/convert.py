"""``--convert-preset``: a preset of this project from the nested YAML of another pipeline."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lib.driver.cli import UsageError
from lib.params import (
    LORA_TARGETS,
    MAX_SHOWN,
    PARAMS_DIR,
    Params,
    find_faults,
    find_presets,
    leaves,
    listed,
    own_key,
    preset_path,
)
from lib.record.files import write_text
from lib.record.paths import ArtifactError, run_paths
from lib.record.preset_yaml import ParamsError, read_mapping, read_value
from lib.record.terminal import as_typed, tell
from lib.record.text_files import read_text

# What other projects write as the value of a key, in lower case.
OTHER_VALUES: dict[str, dict[str, Any]] = {
    "quantization": {
        **dict.fromkeys(("true", "yes", "on", "4", "4bit"), "nf4"),
        **dict.fromkeys(("false", "no", "off", "16"), "none"),
    },
    "lora_target_modules": {"all-linear": [*LORA_TARGETS]},
    "compute_dtype": {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"},
    "optimizer": {
        **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw"),
        **{"adamw_bnb_8bit": "adamw_8bit", "paged_adamw_32bit": "paged_adamw"},
    },
}
NUMBERS = {key for key, field in Params.model_fields.items() if "float" in str(field.annotation)}


def convert_preset(args: argparse.Namespace) -> int:
    """Write ``<params-dir>/<stem>.yaml`` and print which keys were taken; UsageError where it cannot be made."""
    source, bases = args.convert_preset, args.presets or ["simple"]
    target = args.params_dir / f"{source.stem}.yaml"
    if len(bases) > 1:
        raise UsageError(f"--convert-preset fills what is missing from one preset, --presets names {len(bases)}")
    try:
        run_paths("", source.stem)
        if target.exists() or target.is_symlink():
            raise ParamsError(
                f"{as_typed(target)} exists and is kept: rename {source.name}, or name another --params-dir"
            )
        folder = args.params_dir if bases[0] in find_presets(args.params_dir) else PARAMS_DIR
        base = preset_path(bases[0], folder)
        taken, left = _translate(read_mapping(source))
        text = _checked_text(source, base, taken)
    except (ParamsError, ArtifactError) as error:
        raise UsageError(f"--convert-preset: {error}") from None
    write_text(target, text)
    tell(f"written: {as_typed(target)}; every key that is not named here is as in {base.name}")
    tell("taken: " + listed([f"{name} as {key}" for key, (name, _) in taken.items()]))
    tell("no counterpart here: " + (listed(left) or "none"))
    return 0


def _translate(values: Mapping[Any, Any]) -> tuple[dict[str, tuple[str, Any]], list[str]]:
    """Our key -> (their name, the value), and their names without a counterpart; ParamsError for two that disagree."""
    taken: dict[str, tuple[str, Any]] = {}
    left = []
    for path, value in leaves(values):
        name, key = ".".join(path)[:MAX_SHOWN], own_key(path)
        value = _own_value(key, value)
        if not key or value is None or not _is_file(path, key, value):
            left.append(name if not key else f"{name} ({_why_left(key, value)})")
        elif key in taken and taken[key][1] != value:
            raise ParamsError(f"{taken[key][0]} and {name} are both {key} here, and differ: keep one")
        else:
            taken.setdefault(key, (name, value))
    if not taken:
        raise ParamsError(
            f"no key has a counterpart here: {listed(left) or 'it is empty'}; params/simple.yaml shows ours"
        )
    return taken, left


def _is_file(path: tuple[str, ...], key: str, value: Any) -> bool:
    """False where ours names a file and theirs is the text itself, or a data set of the hub."""
    if key == "system_prompt_file":
        return path[-1] == key
    return key != "train_file" or str(value).endswith(".jsonl") or value == ""


def _why_left(key: str, value: Any) -> str:
    if value is None:
        return "null"
    return {"train_file": f"{value!r} is no JSON lines file"}.get(
        key, f"write the text to a file, and its name as {key}"
    )


def _own_value(key: str, value: Any) -> Any:
    spelt = str(value).lower().removeprefix("torch.")
    value = OTHER_VALUES.get(key, {}).get(spelt, spelt if key == "compute_dtype" else value)
    # YAML 1.1 reads 1e-4 as text, and their code called float().
    is_number = key in NUMBERS and isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d{1,3}", value)
    return float(value) if is_number else value


def _checked_text(source: Path, base: Path, taken: Mapping[str, tuple[str, Any]]) -> str:
    """The base preset's lines with the values that were taken; ParamsError with every fault under both names."""
    values = {key: value for key, (_, value) in taken.items()}
    if values.get("train_file"):
        values.setdefault("train_source", "file")
    values.setdefault("description", f"converted from {source.name}; the rest as in {base.stem}")
    merged = read_mapping(base) | values
    if faults := find_faults(merged):
        named = [f"{taken[key][0]} as {fault}" if (key := fault.split(":")[0]) in taken else fault for fault in faults]
        raise ParamsError(f"{source.name}: {len(faults)} fault(s)\n" + "\n".join(f"  - {fault}" for fault in named))
    # The first comment describes the base preset.
    head = f"# {source.stem}: converted from {source.name}; what that does not name is as in {base.stem}.\n"
    text = head + re.sub(r"\A#.*\n", "", _replaced(read_text(base), values))
    if read_value(text) != merged:
        raise ParamsError(f"{base.name}: its lines cannot be filled in; write each key as one `key: value` line")
    return text


def _replaced(text: str, values: Mapping[str, Any]) -> str:
    """The YAML ``text`` with other values, its comments kept; keys that it lacks come last."""
    places = {key.value: node for key, node in yaml.compose(text, Loader=yaml.SafeLoader).value}
    for key in sorted(values.keys() & places.keys(), key=lambda key: -places[key].start_mark.index):
        start, value = places[key].start_mark.index, _spelt(values[key])
        # A list of several lines ends, for the parser, after the comments that follow it.
        old = re.sub(r"(\n[ \t]*(#[^\n]*)?)+\Z", "", text[start : places[key].end_mark.index])
        end = start + len(old)
        gap = len(text[end:]) - len(text[end:].lstrip(" "))
        # Comments stay in their column where there is room.
        space = " " * max(2, gap + end - start - len(value)) if text[end + gap :].startswith("#") else ""
        text = f"{text[:start].rstrip(' ')} {value}{space}{text[end + gap :]}"
    added = [f"{key}: {_spelt(value)}\n" for key, value in values.items() if key not in places]
    return text.rstrip("\n") + "\n" + "".join(added)


def _spelt(value: Any) -> str:
    style = '"' if "\n" in str(value) else None
    in_list = yaml.safe_dump([value], default_flow_style=True, width=10**9, allow_unicode=True, default_style=style)
    return in_list.strip()[1:-1]
