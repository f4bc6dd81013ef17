"""Preset schema: load a flat YAML file, override keys, and report every fault of a file in one message."""

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError

from lib.record.paths import DRIVER_VARIABLE, PRESET_VARIABLE, PROJECT_ROOT
from lib.record.preset_yaml import ParamsError, number_remedy, read_mapping, read_value

PARAMS_DIR = PROJECT_ROOT / "params"
# What a message shows: characters of a wrong value, names of a list.
MAX_SHOWN, MAX_LISTED = 200, 30

Count = Annotated[int, Field(ge=1)]
CountOrAll = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NonEmpty = Annotated[str, Field(min_length=1)]
# The linear layers of a decoder block in Llama's names, which Qwen and most others have too.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The last two are how peft and its users write the first.
LORA_INITS = ("default", "gaussian", True, "true")
LoraInit = Annotated[str, BeforeValidator(lambda value: "default" if value in LORA_INITS[2:] else value)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Params(BaseModel):
    """One preset; the comments in ``params/*.yaml`` give each key's effect, unit and source."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    description: NonEmpty
    benchmark: bool

    base_model: NonEmpty
    base_model_revision: NonEmpty
    safeguard_model: NonEmpty
    safeguard_revision: NonEmpty
    quantization: Literal["nf4", "none"]
    judge_quantization: Literal["none", "nf4", "same"] = "same"
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"]
    device: Literal["auto", "cpu", "cuda", "mps"]

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
    ailuminate_prompt_set: Literal["class240", "demo1200", "demo1200_fr", "all"]
    max_ailuminate_rows: CountOrAll
    fewshot_k: CountOrAll
    fewshot_pool_size: CountOrAll
    # Keys with a default came later: presets written before they existed still load, and mean what they meant.
    fewshot_file: str = ""
    fewshot_rows: list[Annotated[int, Field(ge=0)]] = []
    system_prompt_file: str = ""
    data_seed: Seed
    seed: Seed

    num_epochs: Count
    learning_rate: Annotated[float, Field(gt=0, le=1)]
    warmup_share: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Annotated[float, Field(ge=0, le=1)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = (
        "cosine"
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    neftune_noise_alpha: Annotated[float, Field(ge=0)] = 0.0
    lora_r: Count
    lora_alpha: Count
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: LoraInit = "default"
    lora_target_modules: Annotated[list[NonEmpty], Field(min_length=1)] = [*LORA_TARGETS]
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
    aa_control: bool = False
    adapter_scales: list[Annotated[float, Field(ge=0, le=2)]]

    judge_mode: Literal["probabilities", "generate"]
    judge_context: Literal["response", "prompt_and_response"]
    judge_max_new_tokens: Count
    guidelines_file: NonEmpty
    judge_prompt_file: str = ""
    judge_card_rows: CountOrAll
    judge_labels_file: str

    baseline_accuracy: Share
    baseline_safety: Share
    safety_margin: Annotated[float, Field(gt=0, le=50)] = 5.0
    published_adapter: str
    submission_gsm8k_rows: Count
    submission_ailuminate_rows: Count
    smoke_train_rows: Count
    smoke_gsm8k_rows: Count
    smoke_ailuminate_rows: Count

    _origin: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def origin(self) -> dict[str, str]:
        """Key -> the preset's file name, or where its override came from."""
        return self._origin


# Settings of a run, not of an experiment: notebooks may declare them, presets may not.
RUN_SETTINGS: dict[str, type] = {
    **dict.fromkeys(("run_name", "results_dir", "assets_dir", "checkpoint", "part"), str),
    **dict.fromkeys(("offline", "require_rows", "redact", "allow_unlike"), bool),
    "run_names": list,
}

# Message -> whether keys contradict each other so. A rule is skipped if a key that it reads is missing or faulty.
RULES: dict[str, Callable[[SimpleNamespace], bool]] = {
    "fewshot_k is {fewshot_k} but the pool holds {fewshot_pool_size}: allowed is 0 to fewshot_pool_size": lambda p: (
        p.fewshot_k > p.fewshot_pool_size and not p.fewshot_file and not p.fewshot_rows
    ),
    "fewshot_rows is {fewshot_rows} but fewshot_file is {fewshot_file!r}: keep one of them": lambda p: (
        p.fewshot_rows and p.fewshot_file
    ),
    "fewshot_rows is {fewshot_rows}: a row is named twice": lambda p: len({*p.fewshot_rows}) < len(p.fewshot_rows),
    "fewshot_rows is {fewshot_rows}; allowed are the rows 0 to 7472 of GSM8K train": lambda p: (
        p.gsm8k_source == "openai/gsm8k" and max(p.fewshot_rows, default=0) > 7472
    ),
    "fewshot_rows is {fewshot_rows} but fewshot_k is {fewshot_k}: name as many rows, or lower fewshot_k": lambda p: (
        0 < len(p.fewshot_rows) < p.fewshot_k
    ),
    "train_source is 'file' but train_file is empty: name a JSON lines file, or set train_source to "
    "'gsm8k'": lambda p: p.train_source == "file" and not p.train_file,
    "train_source is {train_source!r} but train_file is {train_file!r}: set train_source to 'file', or train_file"
    " to ''": lambda p: p.train_source != "file" and p.train_file,
    "train_file_url is set but train_file is empty: name the file to keep the download in": lambda p: (
        p.train_file_url and not p.train_file
    ),
    "distil_keep is {distil_keep} but distil_num_samples is {distil_num_samples}: no more answers to keep": lambda p: (
        p.distil_keep > p.distil_num_samples
    ),
    "checkpoint_sweep is true but dev_rows is 0: checkpoints are chosen on development rows": lambda p: (
        p.checkpoint_sweep and p.dev_rows == 0 and not p.sweep_on_test
    ),
    "dev_safety_rows is {dev_safety_rows} but checkpoint_sweep is false: nothing is chosen on them; set "
    "checkpoint_sweep: true": lambda p: p.dev_safety_rows > 0 and not p.checkpoint_sweep,
    "sweep_on_test is true but checkpoint_sweep is false: no checkpoint is chosen; change one of them": lambda p: (
        p.sweep_on_test and not p.checkpoint_sweep
    ),
    "sweep_metric is {sweep_metric!r} but checkpoint_sweep is false: no checkpoint is chosen; set "
    "checkpoint_sweep: true": lambda p: p.sweep_metric != "accuracy" and not p.checkpoint_sweep,
    "sweep_metric is {sweep_metric!r} but dev_safety_rows is 0: set it to a number of prompts, or set "
    "sweep_metric: accuracy": lambda p: (
        p.sweep_metric != "accuracy" and p.checkpoint_sweep and p.dev_safety_rows == 0 and not p.sweep_on_test
    ),
    "sweep_on_test is true but dev_safety_rows is {dev_safety_rows}: the evaluation prompts are used instead; set"
    " dev_safety_rows: 0": lambda p: p.sweep_on_test and p.dev_safety_rows > 0,
    "dev_safety_rows is {dev_safety_rows} but ailuminate_prompt_set {ailuminate_prompt_set!r} evaluates every "
    "prompt, so none is left to choose on: use class240, or max_ailuminate_rows": lambda p: (
        p.dev_safety_rows > 0
        and p.ailuminate_source != "class"
        and p.ailuminate_prompt_set != "class240"
        and p.max_ailuminate_rows == 0
    ),
    "device is 'cpu' but compute_dtype is 'float16': allowed on a CPU are auto, bfloat16 and float32": lambda p: (
        p.device == "cpu" and p.compute_dtype == "float16"
    ),
    "device is 'mps' but compute_dtype is 'bfloat16', which not every Mac has: use auto or float16": lambda p: (
        p.device == "mps" and p.compute_dtype == "bfloat16"
    ),
    "device is 'mps' but quantization is {quantization!r} and judge_quantization {judge_quantization!r}: 4-bit weights "
    "are not supported there; set quantization: none and judge_quantization: none": lambda p: (
        p.device == "mps" and "nf4" in (p.quantization, p.judge_quantization)
    ),
    "device is 'mps' but optimizer is {optimizer!r}, which bitsandbytes has for CUDA and CPUs: use adamw": lambda p: (
        p.device == "mps" and p.optimizer != "adamw"
    ),
    "adapter_scales is {adapter_scales} but evaluate_untuned is false: the untuned model is scale 0 of "
    "the curve": lambda p: p.adapter_scales and not p.evaluate_untuned,
    "aa_control is true but evaluate_untuned is false: the control compares the untuned model with itself; set "
    "evaluate_untuned: true": lambda p: p.aa_control and not p.evaluate_untuned,
    "adapter_scales is {adapter_scales} but use_dora is true: a scale weakens DoRA's low-rank part and leaves its "
    "magnitudes, which is no weaker adapter; set adapter_scales: [] or use_dora: false": lambda p: (
        p.adapter_scales and p.use_dora
    ),
    "init_lora_weights is {init_lora_weights!r}; allowed are default (peft's true) and gaussian. Those that change the "
    "base weights (pissa, olora, corda, loftq) leave an adapter that is wrong on the unchanged base, eva needs "
    "activations first, and false begins with a random change": lambda p: p.init_lora_weights not in LORA_INITS,
    "lr_scheduler is 'constant', which has no warm-up, but warmup_share is {warmup_share}: use constant_with_warmup, "
    "or set warmup_share: 0.0": lambda p: p.lr_scheduler == "constant" and p.warmup_share > 0,
    "optimizer is {optimizer!r} but device is 'cpu': paged state is moved between GPU and machine; use adamw or "
    "adamw_8bit": lambda p: p.device == "cpu" and p.optimizer.startswith("paged"),
    "ailuminate_source is 'class' (240 prompts) but ailuminate_prompt_set is 'demo1200': use class240": lambda p: (
        p.ailuminate_source == "class" and p.ailuminate_prompt_set == "demo1200"
    ),
    "ailuminate_source is {ailuminate_source!r} but ailuminate_prompt_set 'demo1200_fr' is MLCommons': set "
    "ailuminate_source: mlcommons, or ailuminate_prompt_set: all": lambda p: (
        p.ailuminate_source != "mlcommons" and p.ailuminate_prompt_set == "demo1200_fr"
    ),
    "dev_safety_rows is {dev_safety_rows} but ailuminate_prompt_set is 'demo1200_fr': the prompts to choose on are "
    "English; set dev_safety_rows: 0": lambda p: p.dev_safety_rows > 0 and p.ailuminate_prompt_set == "demo1200_fr",
}


# What other projects call our keys, by our name; a key in a section is looked up with the section's name before it too.
_OTHER_NAMES = {
    "base_model": "model model_name model_id model_path model_name_or_path base_model_name pretrained_model",
    "base_model_revision": "model_revision revision",
    "safeguard_model": "judge judge_model judge_name safeguard safeguard_name guard_model",
    "safeguard_revision": "judge_revision judge_model_revision",
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
    "use_rslora": "rslora",
    "use_dora": "dora",
    "lora_target_modules": "target_modules lora_target lora_modules",
    "lr_scheduler": "lr_scheduler_type scheduler",
    "optimizer": "optim",
    "neftune_noise_alpha": "neftune",
    "system_prompt_file": "system_prompt system_message",
    "train_batch_size": "batch_size per_device_train_batch_size micro_batch_size",
    "gradient_accumulation_steps": "grad_accum grad_accum_steps gradient_accumulation accumulation_steps",
    "max_seq_length": "max_length max_len max_seq_len seq_len sequence_len cutoff_len",
    "eval_batch_size": "per_device_eval_batch_size",
    "gsm8k_max_new_tokens": "max_new_tokens max_tokens",
    "ailuminate_max_new_tokens": "safety_max_new_tokens",
}
OTHER_NAMES = {name: ours for ours, names in _OTHER_NAMES.items() for name in names.split()}


def load_params(
    path: str | Path, overrides: Mapping[str, Any] | None = None, origins: Mapping[str, str] | None = None
) -> Params:
    """Load a preset, apply ``overrides`` (from ``origins``, else "override"); ParamsError with every fault of it."""
    path, overrides, origins = Path(path), dict(overrides or {}), dict(origins or {})
    values = {**read_mapping(path), **overrides}
    _refuse(path.name, find_faults(values))
    params = Params(**values)
    params._origin.update({key: origins.get(key, "override") if key in overrides else path.name for key in values})
    return params


def _refuse(where: str, faults: Sequence[str]) -> None:
    if faults:
        raise ParamsError(f"{where}: {len(faults)} fault(s)\n" + "\n".join(f"  - {fault}" for fault in faults))


def find_faults(values: Mapping[Any, Any]) -> list[str]:
    """Every fault of a preset's values, in words; empty if it is valid."""
    # With sections every key would be missing or unknown: one fault instead of a list.
    if any(isinstance(value, dict) for value in values.values()):
        return [_nested_fault(values)]
    unknown = sorted(values.keys() - Params.model_fields.keys(), key=str)
    faults = [f"{str(key)[:MAX_SHOWN]}: unknown key{_suggest(key, Params.model_fields)}" for key in unknown]
    return faults + _value_faults({key: values[key] for key in Params.model_fields if key in values})


def _value_faults(values: Mapping[str, Any], *, partial: bool = False) -> list[str]:
    """Faults of known keys: one per key, then the contradictions; a key may be missing if ``partial``."""
    faults: dict[str, str] = {}
    try:
        Params.model_validate(values)
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            key = fault["loc"][0]
            if fault["type"] != "missing":
                faults.setdefault(key, _sentence(key, values[key], fault["msg"]))
            elif not partial:
                faults[key] = f"{key}: missing; {_allowed(key)}"
    values = {key: field.default for key, field in Params.model_fields.items() if not field.is_required()} | {**values}
    found, known = [*faults.values()], SimpleNamespace(**{key: values[key] for key in values.keys() - faults.keys()})
    for message, contradicts in RULES.items():
        with suppress(AttributeError):
            if contradicts(known):
                found.append(message.format(**values))
    return found


def _sentence(key: str, value: Any, why: str) -> str:
    text = repr(value)
    shown = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
    return f"{key}: {shown} ({type(value).__name__}) is refused: {why}; {_allowed(key)}{_remedy(key, value)}"


def _nested_fault(values: Mapping[Any, Any]) -> str:
    """One sentence for a preset with sections, with the names of its keys here."""
    unknown = {key: value for key, value in values.items() if isinstance(value, dict) or key not in Params.model_fields}
    sections = [str(key)[:MAX_SHOWN] for key, value in unknown.items() if isinstance(value, dict)]
    keys = {".".join(path)[:MAX_SHOWN]: own_key(path) for path, _ in leaves(unknown)}
    ours, others = [f"{name} as {own}" for name, own in keys.items() if own], [n for n, own in keys.items() if not own]
    known = f"; write {listed(ours)}" if ours else ""
    rest = f"; there is no such key here for {listed(others)}" if others else ""
    return (
        f"nested sections ({listed(sections)}): a preset here is flat, one `key: value` per line, with the keys of "
        f"params/simple.yaml{known}{rest}; run_all.py --convert-preset FILE writes it so"
    )


def leaves(values: Mapping[Any, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and value of each key that is no section."""
    for key, value in values.items():
        path = (*above, str(key))
        if isinstance(value, dict):
            yield from leaves(value, path)
        else:
            yield path, value


def own_key(path: tuple[str, ...]) -> str:
    """This project's name for a key of a nested preset: `lora: {r: ...}` is lora_r; empty if unknown."""
    # Inside a judge's section no key is of the base model.
    judges = any(word in part.lower() for part in path[:-1] for word in ("judge", "guard"))
    for name in (*([f"judge_{path[-1]}"] if judges else []), "_".join(path[-2:]), path[-1]):
        name = name.lower().replace("-", "_")
        own = OTHER_NAMES.get(name, name if name in Params.model_fields else "")
        if own and (not judges or own.startswith(("judge_", "safeguard_", "guidelines_"))):
            return own
    return ""


def listed(names: Sequence[str]) -> str:
    """Up to 30 names, then how many more there are."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


@cache
def _json_schema() -> dict[str, dict[str, Any]]:
    return Params.model_json_schema()["properties"]


_TRUTHS = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}


def _remedy(key: str, value: Any) -> str:
    """How to write what was probably meant; empty if that is unclear."""
    schema = _json_schema()[key]
    if "enum" in schema:
        return _suggest(value, schema["enum"], otherwise="")
    match schema["type"]:
        case "string" if value is None:
            return "" if schema.get("minLength") else ': write ""'
        case "string":
            return ": put it in quotes" if isinstance(value, int | float) else ""
        case "boolean":
            meant = _TRUTHS.get(str(value).lower())
            return f": write {meant}" if meant else ""
    texts = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]
    return next((remedy for text in texts if (remedy := number_remedy(text, schema["type"]))), "")


_BOUNDS = {"minimum": "at least", "maximum": "at most"}
_BOUNDS |= {"exclusiveMinimum": "more than", "exclusiveMaximum": "less than"}


def _allowed(key: str) -> str:
    schema = _json_schema()[key]
    if "enum" in schema:
        return "allowed: " + ", ".join(map(str, schema["enum"]))
    bounds = [f"{words} {schema[name]}" for name, words in _BOUNDS.items() if name in schema]
    length = [f"at least {schema['minLength']} character(s)"] if "minLength" in schema else []
    return "allowed: " + ", ".join([schema["type"], *bounds, *length])


def _suggest(key: Any, known: Iterable[str], otherwise: str = "; params/simple.yaml shows every key") -> str:
    close = difflib.get_close_matches(str(key), known, n=1)
    return f", did you mean {close[0]!r}?" if close else otherwise


def parse_assignment(text: str) -> tuple[str, Any]:
    """``KEY=VALUE`` of the command line, typed as in the YAML; ParamsError without ``=`` or for an unknown key."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ParamsError(f"--set {text!r}: KEY=VALUE was expected")
    if key not in Params.model_fields:
        raise ParamsError(f"--set {text!r}: {key!r} is an unknown key{_suggest(key, Params.model_fields)}")
    return key, value if _json_schema()[key]["type"] == "string" else read_value(value)


def from_notebook(namespace: MutableMapping[str, Any]) -> dict[str, Any]:
    """Checked parameters in ``globals()`` of a notebook, where a preset in ``PRESET`` replaces them; ParamsError."""
    _apply_preset(namespace)
    declared = {key: namespace[key] for key in (*RUN_SETTINGS, *Params.model_fields) if key in namespace}
    faults = [
        f"{key}: {declared[key]!r} is not a {kind.__name__}"
        for key, kind in RUN_SETTINGS.items()
        if key in declared and not isinstance(declared[key], kind)
    ]
    parameters = {key: value for key, value in declared.items() if key not in RUN_SETTINGS}
    _refuse("parameters cell", faults + _value_faults(parameters, partial=True))
    return declared


def _apply_preset(namespace: MutableMapping[str, Any]) -> None:
    # The driver has injected every value: a PRESET exported in the shell must not replace them.
    if PRESET_VARIABLE not in namespace or os.environ.get(DRIVER_VARIABLE):
        return
    place = "parameters cell" if namespace[PRESET_VARIABLE] else "environment variable"
    preset = namespace[PRESET_VARIABLE] or os.environ.get(PRESET_VARIABLE)
    if not preset:
        return
    try:
        values = load_params(preset_path(str(preset), PARAMS_DIR)).model_dump() | {"run_name": preset}
    except ParamsError as error:
        raise ParamsError(f"{PRESET_VARIABLE} ({place}): {error}") from None
    namespace.update({key: value for key, value in values.items() if key in namespace})


def find_presets(params_dir: Path = PARAMS_DIR) -> list[str]:
    """Names of the presets in a folder, from small to large settings."""
    order = {"sandbox_one": 0, "simple": 1, "medium": 2, "strong": 3, "distilled": 4}
    return sorted((path.stem for path in params_dir.glob("*.yaml")), key=lambda name: (order.get(name, 9), name))


def preset_path(name: str, params_dir: Path = PARAMS_DIR) -> Path:
    """The YAML file of the preset ``name``; ParamsError with those that exist if there is none."""
    known = find_presets(params_dir)
    if name not in known:
        names = ", ".join(known) or "none"
        hint = _suggest(name, known, otherwise="")
        raise ParamsError(f"preset {name!r} is unknown{hint} (presets in {params_dir.name}/: {names})")
    return params_dir / f"{name}.yaml"
