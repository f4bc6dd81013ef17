"""Preset schema: load a flat YAML file, override keys, and name every fault of a file in one message.

Knows what each parameter may be and which contradict each other; knows nothing about what a stage does with them.
"""

import difflib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, TypeAdapter, ValidationError

from lib.record.paths import DRIVER_VARIABLE, PRESET_VARIABLE, PROJECT_ROOT
from lib.record.text_files import decode_text

PARAMS_DIR = PROJECT_ROOT / "params"
# Characters of a wrong value that a message repeats.
MAX_SHOWN = 200
# Names that a list in a message holds.
MAX_LISTED = 30

Count = Annotated[int, Field(ge=1)]
CountOrAll = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NonEmpty = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class ParamsError(Exception):
    """A preset cannot be used; the text lists every fault with its key, value and what is allowed."""


class Params(BaseModel):
    """One preset. The comments in ``params/*.yaml`` say each key's effect, unit and source.

    ``origin`` tells where each value came from (the file's name, or the override's).
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    description: NonEmpty
    benchmark: bool

    base_model: NonEmpty
    base_model_revision: NonEmpty
    safeguard_model: NonEmpty
    safeguard_revision: NonEmpty
    quantization: Literal["nf4", "none"]
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"]
    device: Literal["auto", "cpu", "cuda"]

    gsm8k_source: NonEmpty
    train_source: Literal["gsm8k", "file", "self_distilled"]
    train_file: str
    train_file_url: str
    train_file_faults: Literal["refuse", "drop", "keep"]
    distil_num_samples: Count
    distil_temperature: Annotated[float, Field(gt=0, le=2)]
    distil_keep: Count
    distil_choice: Literal["shortest", "random"]
    distil_fallback: Literal["drop", "gold"]
    max_train_rows: CountOrAll
    dev_rows: CountOrAll
    dev_safety_rows: CountOrAll
    gsm8k_eval_fraction: Annotated[float, Field(gt=0, le=1)]
    max_gsm8k_rows: CountOrAll
    ailuminate_source: NonEmpty
    ailuminate_prompt_set: Literal["class240", "demo1200", "all"]
    max_ailuminate_rows: CountOrAll
    fewshot_k: CountOrAll
    fewshot_pool_size: CountOrAll
    data_seed: Seed
    seed: Seed

    num_epochs: Count
    learning_rate: Annotated[float, Field(gt=0, le=1)]
    warmup_share: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Annotated[float, Field(ge=0, le=1)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    lora_r: Count
    lora_alpha: Count
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    train_batch_size: Count
    gradient_accumulation_steps: Count
    max_seq_length: Annotated[int, Field(ge=16)]
    save_steps: Count
    checkpoint_sweep: bool
    max_sweep_checkpoints: Count
    sweep_metric: Literal["accuracy", "safety", "sum"]
    sweep_on_test: bool

    gsm8k_max_new_tokens: Count
    ailuminate_max_new_tokens: Count
    eval_batch_size: CountOrAll
    evaluate_untuned: bool
    adapter_scales: list[Annotated[float, Field(ge=0, le=2)]]

    judge_mode: Literal["probabilities", "generate"]
    judge_context: Literal["response", "prompt_and_response"]
    judge_max_new_tokens: Count
    guidelines_file: NonEmpty
    judge_card_rows: CountOrAll
    judge_labels_file: str

    baseline_accuracy: Share
    baseline_safety: Share
    published_adapter: str
    submission_gsm8k_rows: Count
    submission_ailuminate_rows: Count
    smoke_train_rows: Count
    smoke_gsm8k_rows: Count
    smoke_ailuminate_rows: Count

    _origin: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def origin(self) -> dict[str, str]:
        """Where each value came from."""
        return self._origin


# Settings of a run, not of an experiment: notebooks may declare them, presets may not.
RUN_SETTINGS: dict[str, type] = {
    "run_name": str,
    "results_dir": str,
    "assets_dir": str,
    "offline": bool,
    "checkpoint": str,
}
RUN_SETTINGS |= {"run_names": list, "require_rows": bool, "redact": bool, "allow_unlike": bool}

Rule = tuple[tuple[str, ...], Callable[..., bool], str]
# Keys that must agree: the keys, whether they contradict each other, and what is allowed.
CONTRADICTIONS: tuple[Rule, ...] = (
    (
        ("fewshot_k", "fewshot_pool_size"),
        lambda k, pool: k > pool,
        "fewshot_k is {0} but the pool holds {1}: allowed is 0 to fewshot_pool_size",
    ),
    (
        ("train_source", "train_file"),
        lambda source, file: source == "file" and not file,
        "train_source is 'file' but train_file is empty: name a JSON lines file, or set train_source to 'gsm8k'",
    ),
    (
        ("train_source", "train_file"),
        lambda source, file: source != "file" and bool(file),
        "train_source is {0!r} but train_file is {1!r}: set train_source to 'file', or train_file to ''",
    ),
    (
        ("train_file", "train_file_url"),
        lambda file, url: bool(url) and not file,
        "train_file_url is set but train_file is empty: name the file that the download is kept in",
    ),
    (
        ("distil_keep", "distil_num_samples"),
        lambda keep, samples: keep > samples,
        "distil_keep is {0} but distil_num_samples is {1}: no question has more answers to keep",
    ),
    (
        ("checkpoint_sweep", "dev_rows", "sweep_on_test"),
        lambda sweep, rows, on_test: sweep and rows == 0 and not on_test,
        "checkpoint_sweep is true but dev_rows is 0: checkpoints are chosen on development rows",
    ),
    (
        ("checkpoint_sweep", "dev_safety_rows"),
        lambda sweep, rows: rows > 0 and not sweep,
        "dev_safety_rows is {1} but checkpoint_sweep is false: nothing is chosen on them; set checkpoint_sweep: true",
    ),
    (
        ("checkpoint_sweep", "sweep_on_test"),
        lambda sweep, on_test: on_test and not sweep,
        "sweep_on_test is true but checkpoint_sweep is false: no checkpoint is chosen; set one of them otherwise",
    ),
    (
        ("sweep_metric", "checkpoint_sweep"),
        lambda metric, sweep: metric != "accuracy" and not sweep,
        "sweep_metric is {0!r} but checkpoint_sweep is false: no checkpoint is chosen; set checkpoint_sweep: true",
    ),
    (
        ("sweep_metric", "dev_safety_rows", "sweep_on_test", "checkpoint_sweep"),
        lambda metric, rows, on_test, sweep: sweep and metric != "accuracy" and rows == 0 and not on_test,
        "sweep_metric is {0!r} but dev_safety_rows is 0: name the number of prompts, or set sweep_metric: accuracy",
    ),
    (
        ("sweep_on_test", "dev_safety_rows"),
        lambda on_test, rows: on_test and rows > 0,
        "sweep_on_test is true but dev_safety_rows is {1}: evaluation prompts are asked then; set dev_safety_rows: 0",
    ),
    (
        ("dev_safety_rows", "ailuminate_source", "ailuminate_prompt_set", "max_ailuminate_rows"),
        lambda rows, source, chosen, most: rows > 0 and source != "class" and chosen != "class240" and most == 0,
        "dev_safety_rows is {0} but ailuminate_prompt_set {2!r} evaluates every prompt, so none is left to choose on: "
        "use class240, or max_ailuminate_rows",
    ),
    (
        ("device", "compute_dtype"),
        lambda device, dtype: device == "cpu" and dtype == "float16",
        "device is 'cpu' but compute_dtype is 'float16': allowed on a CPU are auto, bfloat16 and float32",
    ),
    (
        ("adapter_scales", "evaluate_untuned"),
        lambda scales, untuned: bool(scales) and not untuned,
        "adapter_scales is {0} but evaluate_untuned is false: the untuned model is scale 0 of the curve",
    ),
    (
        ("ailuminate_source", "ailuminate_prompt_set"),
        lambda source, chosen: source == "class" and chosen == "demo1200",
        "ailuminate_source is 'class' (240 prompts) but ailuminate_prompt_set is 'demo1200': use class240",
    ),
)


# What other projects call our keys, by our name; a key of a section is looked up with the section's name before it too.
_OTHER_NAMES = {
    "base_model": "model model_name model_id model_path model_name_or_path base_model_name pretrained_model",
    "base_model_revision": "model_revision revision",
    "safeguard_model": "judge judge_model judge_name safeguard safeguard_name guard_model",
    "quantization": "quant load_in_4bit bits",
    "compute_dtype": "dtype torch_dtype bnb_4bit_compute_dtype precision",
    "train_file": "train_path train_data train_dataset data_path dataset_path",
    "max_train_rows": "max_train_samples num_train_samples train_size",
    "fewshot_k": "n_shot n_shots num_shots num_fewshot fewshot shots",
    "seed": "random_seed train_seed",
    "num_epochs": "epochs num_train_epochs n_epochs",
    "learning_rate": "lr",
    "warmup_share": "warmup warmup_ratio",
    "weight_decay": "wd",
    "max_grad_norm": "grad_clip gradient_clipping clip_grad_norm",
    "lora_r": "r rank lora_rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "train_batch_size": "batch_size per_device_train_batch_size micro_batch_size",
    "gradient_accumulation_steps": "grad_accum grad_accum_steps gradient_accumulation accumulation_steps",
    "max_seq_length": "max_length max_len max_seq_len seq_len sequence_len cutoff_len",
    "eval_batch_size": "per_device_eval_batch_size",
    "gsm8k_max_new_tokens": "max_new_tokens max_tokens",
}
OTHER_NAMES = {name: ours for ours, names in _OTHER_NAMES.items() for name in names.split()}


class _PresetLoader(yaml.SafeLoader):
    """Safe YAML in which a value is what a reader takes it for, and a key given twice is refused.

    YAML 1.1 reads 010 as 8, 1:30 as 90, 2026-01-01 as a date and no as false. Here only true and false, null and
    decimal numbers are more than text; the schema then refuses the rest where it wants a number.

    Aliases and tags are refused too: a flat preset needs none, and a few lines of aliases unfold to gigabytes.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        found = f"alias *{event.anchor}" if isinstance(event, yaml.AliasEvent) else f"tag {getattr(event, 'tag', None)}"
        if found != "tag None":
            raise ParamsError(
                f"line {event.start_mark.line + 1}: not YAML of a preset: no {found}; write a plain value"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ParamsError(f"key {key!r} is given {keys.count(key)} times; keep one")
        return super().construct_mapping(node, deep)


# Each also a number, truth or null of YAML 1.1: what its writers leave without quotes is text here too.
for _tag, _spelling, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
):
    _PresetLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_spelling})\Z"), _first)


def load_params(
    path: str | Path, overrides: Mapping[str, Any] | None = None, origins: Mapping[str, str] | None = None
) -> Params:
    """Load one preset, put ``overrides`` over it and check the whole.

    Args:
        path: the YAML file.
        overrides: key -> value, typed as in the YAML.
        origins: key -> where the override came from; ``override`` where it is not said.

    Raises:
        ParamsError: the file cannot be read, or any key is unknown, missing, of the wrong type, out of its range or
            in contradiction with another; every fault is listed.
    """
    path, overrides, origins = Path(path), dict(overrides or {}), dict(origins or {})
    values = _read_mapping(path)
    faults = find_faults({**values, **overrides})
    if faults:
        raise ParamsError(f"{path.name}: {len(faults)} fault(s)\n" + "\n".join(f"  - {fault}" for fault in faults))
    params = Params(**{**values, **overrides})
    params._origin.update({key: path.name for key in values})
    params._origin.update({key: origins.get(key, "override") for key in overrides})
    return params


def _read_mapping(path: Path) -> dict[str, Any]:
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


def find_faults(values: Mapping[Any, Any]) -> list[str]:
    """Every fault of a preset's values, in words; empty when there is none."""
    # Every key would be missing or unknown beside it: one fault and no list of them.
    if any(isinstance(value, dict) for value in values.values()):
        return [_nested_fault(values)]
    faults, good = [], {}
    for key in sorted(values.keys() - Params.model_fields.keys(), key=str):
        faults.append(f"{str(key)[:MAX_SHOWN]}: unknown key{_suggest(key, Params.model_fields)}")
    for key in Params.model_fields:
        if key not in values:
            faults.append(f"{key}: missing; {_allowed(key)}")
        elif fault := _field_fault(key, values[key]):
            faults.append(fault)
        else:
            good[key] = values[key]
    return faults + _contradictions(good)


def _nested_fault(values: Mapping[Any, Any]) -> str:
    """One sentence for a preset with sections: what it is, and how its keys are called here."""
    unknown = {key: value for key, value in values.items() if isinstance(value, dict) or key not in Params.model_fields}
    sections = [str(key)[:MAX_SHOWN] for key, value in unknown.items() if isinstance(value, dict)]
    ours, others = [], []
    for path in _leaves(unknown):
        name, own = ".".join(path)[:MAX_SHOWN], _own_key(path)
        (ours if own else others).append(f"{name} as {own}" if own else name)
    known = f"; write {_listed(ours)}" if ours else ""
    rest = f"; there is no such key here for {_listed(others)}" if others else ""
    return (
        f"nested sections ({_listed(sections)}): a preset here is flat, one `key: value` per line, with the keys of "
        f"params/simple.yaml{known}{rest}"
    )


def _leaves(values: Mapping[Any, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        path = (*above, str(key))
        if isinstance(value, dict):
            yield from _leaves(value, path)
        else:
            yield path


def _own_key(path: tuple[str, ...]) -> str:
    """This project's name for a key of a nested preset: `lora: {r: ...}` is lora_r; empty where none is known."""
    for name in ("_".join(path[-2:]), path[-1]):
        name = name.lower().replace("-", "_")
        if own := OTHER_NAMES.get(name, name if name in Params.model_fields else ""):
            return own
    return ""


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    # A rule is asked only where all its keys are sound, so that one fault is not told twice.
    found = []
    for keys, contradicts, message in CONTRADICTIONS:
        if all(key in values for key in keys):
            chosen = [values[key] for key in keys]
            if contradicts(*chosen):
                found.append(message.format(*chosen))
    return found


@cache
def _field_adapter(key: str) -> TypeAdapter:
    field = Params.model_fields[key]
    annotation = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    return TypeAdapter(annotation, config=ConfigDict(strict=True))


def _field_fault(key: str, value: Any) -> str:
    try:
        _field_adapter(key).validate_python(value)
    except ValidationError as error:
        why = error.errors()[0]["msg"]
        found = f"{key}: {_shown(value)} ({type(value).__name__})"
        return f"{found} is refused: {why}; {_allowed(key)}{_remedy(key, value)}"
    # pydantic's ge/le let NaN and infinity through where no bound is set on that side.
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return f"{key}: {value!r} is refused: a finite number is needed"
    return "" if value == value else f"{key}: {value!r} is refused: a finite number is needed"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


_TRUTHS = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}


def _remedy(key: str, value: Any) -> str:
    """How to write what was probably meant, where that can be said."""
    schema = _field_adapter(key).json_schema()
    if "enum" in schema:
        return ""
    if schema["type"] == "string":
        if value is None:
            return "" if schema.get("minLength") else ': write ""'
        return ": put it in quotes" if isinstance(value, int | float) else ""
    if schema["type"] == "boolean":
        meant = _TRUTHS.get(str(value).lower())
        return f": write {meant}" if meant else ""
    texts = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]
    return next((remedy for text in texts if (remedy := _number_remedy(text, schema["type"]))), "")


def _number_remedy(text: str, kind: str) -> str:
    # Long texts are no slips of writing a number, and may be costly to read as one.
    if not re.fullmatch(r"[-+.]*\d[-+.:\w]{0,40}", text):
        return ""
    meant = _numbers_meant(text, kind)
    reading = _yaml_1_1(text)
    why = "without quotes" if str(reading) == text else f"(YAML 1.1 reads {text} as {reading})"
    if isinstance(reading, str):
        why = f"(YAML 1.1 reads {text} as text)"
    return f": write {' or '.join(meant)} {why}" if meant else ""


def _numbers_meant(text: str, kind: str) -> list[str]:
    """Decimal spellings of what a reader takes ``text`` for, then of what YAML 1.1 does; empty for no number."""
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


def _allowed(key: str) -> str:
    schema = _field_adapter(key).json_schema()
    if "enum" in schema:
        return "allowed: " + ", ".join(map(str, schema["enum"]))
    words = {
        "minimum": "at least {}",
        "exclusiveMinimum": "more than {}",
        "maximum": "at most {}",
        "exclusiveMaximum": "less than {}",
        "minLength": "at least {} character(s)",
    }
    bounds = [text.format(schema[name]) for name, text in words.items() if name in schema]
    return "allowed: " + ", ".join([schema["type"], *bounds])


def _suggest(key: Any, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(str(key), known, n=1)
    return f", did you mean {close[0]!r}?" if close else "; params/simple.yaml shows every key"


def parse_assignment(text: str) -> tuple[str, Any]:
    """``KEY=VALUE`` of the command line, typed as the same text in the YAML would be.

    Raises:
        ParamsError: there is no ``=``, or the key is unknown.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise ParamsError(f"--set {text!r}: KEY=VALUE was expected")
    if key not in Params.model_fields:
        raise ParamsError(f"--set {text!r}: {key!r} is an unknown key{_suggest(key, Params.model_fields)}")
    if "string" in str(_field_adapter(key).json_schema().get("type")):
        return key, value
    try:
        return key, yaml.load(value, Loader=_PresetLoader)
    except (yaml.YAMLError, RecursionError, ValueError, ParamsError):
        # The schema tells what is wrong with it as a text.
        return key, value


def from_notebook(namespace: MutableMapping[str, Any]) -> dict[str, Any]:
    """The parameters that a notebook declares, checked by the same schema that checks the presets.

    Where its ``PRESET``, or else the environment variable of that name, names a preset, that preset's values and run
    first take the place of those declared, in ``namespace`` too.

    Args:
        namespace: ``globals()`` of the notebook, right after its parameters cell.

    Raises:
        ParamsError: there is no such preset; or a value is of the wrong type or out of range, every fault is listed.
    """
    _apply_preset(namespace)
    declared = {key: namespace[key] for key in (*RUN_SETTINGS, *Params.model_fields) if key in namespace}
    faults = [fault for key in declared if key not in RUN_SETTINGS and (fault := _field_fault(key, declared[key]))]
    for key in declared.keys() & RUN_SETTINGS.keys():
        if not isinstance(declared[key], RUN_SETTINGS[key]):
            faults.append(f"{key}: {declared[key]!r} is not a {RUN_SETTINGS[key].__name__}")
    faults += _contradictions(declared)
    if faults:
        raise ParamsError(f"parameters cell: {len(faults)} fault(s)\n" + "\n".join(f"  - {fault}" for fault in faults))
    return declared


def _apply_preset(namespace: MutableMapping[str, Any]) -> None:
    # The driver has injected every value: a PRESET that somebody exported in their shell must not replace them.
    if PRESET_VARIABLE not in namespace or os.environ.get(DRIVER_VARIABLE):
        return
    preset, place = namespace[PRESET_VARIABLE], "parameters cell"
    if not preset:
        preset, place = os.environ.get(PRESET_VARIABLE, ""), "environment variable"
    if not preset:
        return
    try:
        values = load_params(preset_path(str(preset), PARAMS_DIR)).model_dump() | {"run_name": preset}
    except ParamsError as error:
        raise ParamsError(f"{PRESET_VARIABLE} ({place}): {error}") from None
    namespace.update({key: value for key, value in values.items() if key in namespace})


def find_presets(params_dir: Path = PARAMS_DIR) -> list[str]:
    """Names of the presets in a folder, in the order small to large settings are usually run."""
    order = {"sandbox_one": 0, "simple": 1, "medium": 2, "strong": 3, "distilled": 4}
    return sorted((path.stem for path in params_dir.glob("*.yaml")), key=lambda name: (order.get(name, 9), name))


def preset_path(name: str, params_dir: Path = PARAMS_DIR) -> Path:
    """The YAML file of the preset ``name``.

    Raises:
        ParamsError: there is no such preset; those that exist are named.
    """
    known = find_presets(params_dir)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise ParamsError(
            f"preset {name!r} is unknown{hint} (presets in {params_dir.name}/: {', '.join(known) or 'none'})"
        )
    return params_dir / f"{name}.yaml"
