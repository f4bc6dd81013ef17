"""Where models and adapters come from: bundled, a folder or the hub; each is checked before it is used."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lib.engine import bundled
from lib.record import lookup
from lib.record.files import sha256_file, sha256_json
from lib.record.lookup import ASSETS_VARIABLE, AssetError, AssetUnavailable, Origin, Place
from lib.record.paths import shown_path


@dataclass(frozen=True)
class ModelSource:
    """A model or adapter on this disk."""

    name: str
    folder: Path
    identity: str  # <hub id>@<commit>, folder sha256:<12 hex> or bundled ...; equal where the same bytes are loaded
    origin: Origin


# As transformers and the hub name them: model.safetensors, model-00001-of-00002.safetensors; it reads no others.
WEIGHT_FILES = "model*.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TOKENIZER_FILES = ("tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json")
CHAT_FILES = ("chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt")
MODEL_FILES = ("config.json", "generation_config.json", WEIGHT_FILES, INDEX_FILE, *TOKENIZER_FILES, *CHAT_FILES)
# Other names may be of a kernel on the hub, code that transformers would fetch.
ATTENTION_NAMES = (None, "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
ADAPTER_FILES = ("adapter_config.json", ADAPTER_WEIGHTS)
SHARD_NAME = re.compile(r"model[\w.-]{0,100}\.safetensors", re.ASCII)
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def resolve_model(name: str, revision: str = "main", assets_dir: str = "", offline: bool = False) -> ModelSource:
    """The folder of a causal language model, downloaded where it is missing.

    ``name`` is ``smollm2-135m-instruct`` (bundled, converted once), a folder, or a hub id, which is looked for in the
    assets folder (``models/<org>__<name>`` or ``<name>``) before the hub. Raises AssetUnavailable where it is in none
    of these, AssetError where it is incomplete, not safetensors, unreadable, or needs code from its folder.
    """
    if name == bundled.BUNDLED_MODEL:
        return _resolve_bundled()
    with _named(f"model {_shortened(name)!r}"):
        source = _resolve_folder(name, MODEL_FILES, revision, assets_dir, offline)
        _check_model_folder(source.folder)
    return source


def resolve_adapter(checkpoint: str, base_model_name: str, assets_dir: str = "", offline: bool = False) -> ModelSource:
    """The folder of a LoRA adapter made for ``base_model_name``; AssetUnavailable, or AssetError where it is unfit."""
    with _named(f"checkpoint {_shortened(checkpoint)!r}"):
        source = _resolve_folder(checkpoint, ADAPTER_FILES, "main", assets_dir, offline)
        _check_adapter_folder(source.folder, checkpoint, base_model_name)
    return source


def find_model(name: str, revision: str, assets_dir: str, base_model: str = "") -> Place:
    """Where a model, or an adapter for ``base_model``, lies: checked, but nothing fetched, hashed or converted."""
    if name == bundled.BUNDLED_MODEL:
        folder = bundled.MODELS_DIR / name
        return Place(name, folder if bundled.is_converted(folder) else bundled.bundled_gguf(), "bundled")
    with _named(f"{'checkpoint' if base_model else 'model'} {_shortened(name)!r}"):
        folders = _candidate_folders(name, assets_dir) if "\0" not in name else []
        folder, origin = next((place for place in folders if place[0].is_dir()), (None, None))
        if folder is None and HUB_ID.fullmatch(name):
            with suppress(AssetUnavailable):
                patterns = ADAPTER_FILES if base_model else MODEL_FILES
                folder, origin = _snapshot(name, revision, patterns, offline=True), "hub"
        if folder and base_model:
            _check_adapter_folder(folder, name, base_model)
        elif folder:
            _check_model_folder(folder)
    return Place(name, folder, origin, f"the hub (revision {revision})" if HUB_ID.fullmatch(name) else "")


def _check_adapter_folder(folder: Path, checkpoint: str, base_model_name: str) -> None:
    hint = f"checkpoint {checkpoint!r} has to be the folder that peft saved"
    config = _read_config(folder / "adapter_config.json", hint)
    made_for = str(config.get("base_model_name_or_path") or "")
    if _bare_name(made_for) != _bare_name(base_model_name):
        raise AssetError(
            f"checkpoint {checkpoint!r} was made for base model {made_for!r}, the run has base_model "
            f"{base_model_name!r}: set base_model to the former, or name a checkpoint of the latter"
        )
    _check_weights(folder, ADAPTER_WEIGHTS)
    # Other kinds may name further adapters, which peft then reads from anywhere, pickled ones too.
    if config.get("peft_type") != "LORA":
        raise AssetError(
            f"checkpoint {checkpoint!r} is an adapter of peft_type {_shortened(repr(config.get('peft_type')))}: "
            "allowed is 'LORA'"
        )


@contextmanager
def _named(what: str) -> Iterator[None]:
    """The operating system's own error does not name the model."""
    try:
        yield
    except OSError as error:
        raise AssetError(f"{what} cannot be read ({error.strerror or error}): name the folder that holds it") from None


def _shortened(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:120]}…"


def _resolve_folder(name: str, patterns: tuple[str, ...], revision: str, assets_dir: str, offline: bool) -> ModelSource:
    # No path of any system holds a null byte.
    for folder, origin in _candidate_folders(name, assets_dir) if "\0" not in name else []:
        if folder.is_dir():
            files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
            digest = sha256_json([[file.name, sha256_file(file)] for file in files])
            return ModelSource(name, folder, f"folder sha256:{digest[:12]}", origin)
    if not HUB_ID.fullmatch(name):
        raise AssetUnavailable(f"{name!r} is not a folder here, nor a hub id (<organisation>/<name>): fix the path")
    folder = _snapshot(name, revision, patterns, offline)
    # The hub's cache names the folder of a snapshot after its commit.
    return ModelSource(name, folder, f"{name}@{folder.name}", "hub")


def _candidate_folders(name: str, assets_dir: str) -> list[tuple[Path, Origin]]:
    assets = lookup.assets_folder(assets_dir)
    places = [assets / "models" / name.replace("/", "__"), assets / name.rsplit("/", 1)[-1]] if assets else []
    named = [(place, "assets folder") for place in places if HUB_ID.fullmatch(name)]
    return [(lookup.own_path(name), "local folder"), *named]


def _snapshot(name: str, revision: str, patterns: tuple[str, ...], offline: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, RevisionResolutionError

    cached_only = offline or lookup.hub_is_offline()
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(patterns), local_files_only=cached_only)
        )
    except (OSError, HTTPError, HFValidationError, RevisionResolutionError) as error:
        not_cached = "is not in the hub's cache, and the network is switched off (offline)"
        tried = not_cached if cached_only else "cannot be downloaded"
        raise AssetUnavailable(
            f"{name!r} (revision {revision!r}) is not a folder here and {tried} [{lookup.failure_reason(error)}]: copy "
            f"its folder to <assets>/models/{name.replace('/', '__')} and name <assets> with --assets or "
            f"{ASSETS_VARIABLE}, point HF_HOME to a cache that has it, or check the name and, where it is gated or "
            "private, set HF_TOKEN"
        ) from None


def _check_model_folder(folder: Path) -> None:
    hint = "a model folder holds config.json, *.safetensors and tokenizer files"
    _refuse_code(folder / "config.json", hint)
    for name in _attention_names(_read_config(folder / "config.json", hint)):
        if name not in ATTENTION_NAMES:
            allowed = ", ".join(filter(None, ATTENTION_NAMES))
            raise AssetError(
                f"{shown_path(folder / 'config.json')} has attn_implementation {_shortened(repr(name))}: allowed are "
                f"{allowed}; remove that line"
            )
    if (folder / "tokenizer_config.json").exists():
        _refuse_code(folder / "tokenizer_config.json", hint)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise AssetError(f"{shown_path(folder)} has no tokenizer.json: {hint}; save the tokenizer there too")
    _check_weights(folder, WEIGHT_FILES)
    if not any((folder / name).exists() for name in ("model.safetensors", INDEX_FILE)):
        raise AssetError(f"{shown_path(folder)} has neither model.safetensors nor {INDEX_FILE}: fetch it again")
    _check_shards(folder / INDEX_FILE, hint)
    adapters = sorted(file.name for pattern in ("adapter_config*", "adapter_model*") for file in folder.glob(pattern))
    if adapters:
        # transformers would apply it without a message.
        raise AssetError(
            f"{shown_path(folder)} holds an adapter beside the model ({', '.join(adapters)}): move it to a folder of "
            "another name, and use it with --checkpoint"
        )


def _refuse_code(config_file: Path, hint: str) -> None:
    # Refused here: transformers would wait in a notebook for an answer on the terminal.
    if "auto_map" in _read_config(config_file, hint):
        raise AssetError(
            f"{shown_path(config_file)} needs code from its folder (auto_map): refused; take another model"
        )


def _attention_names(config: dict[str, Any]) -> Iterator[Any]:
    """Values of ``attn_implementation`` in a configuration and those inside it."""
    for key, value in config.items():
        if key in ("attn_implementation", "_attn_implementation"):
            yield from value.values() if isinstance(value, dict) else [value]
        elif isinstance(value, dict):
            yield from _attention_names(value)


def _check_shards(index: Path, hint: str) -> None:
    named = _read_config(index, hint).get("weight_map", {}) if index.exists() else {}
    shards = list(named.values()) if isinstance(named, dict) else [named]
    strange = [shard for shard in shards if not (isinstance(shard, str) and SHARD_NAME.fullmatch(shard))]
    if strange:
        shown = _shortened(repr(strange[0]))
        raise AssetError(
            f"{shown_path(index)} names {shown} as weights: allowed are names as {WEIGHT_FILES}, beside it"
        )
    missing = sorted({shard for shard in shards if not (index.parent / shard).is_file()})
    if missing:
        raise AssetError(f"{shown_path(index.parent)} lacks {', '.join(missing)}: incomplete, fetch it again")


def _read_config(path: Path, hint: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AssetError(f"{shown_path(path)} is missing: {hint}") from None
    except (ValueError, RecursionError) as error:
        raise AssetError(f"{shown_path(path)} is not JSON ({error}): fetch it again") from None
    if not isinstance(config, dict):
        raise AssetError(f"{shown_path(path)} holds a {type(config).__name__}, a JSON object was expected")
    return config


def _check_weights(folder: Path, pattern: str) -> None:
    weights = sorted(folder.glob(pattern))
    pickles = sorted(file.name for suffix in ("*.bin", "*.pt", "*.pth") for file in folder.glob(suffix))
    if not weights:
        held = f"only {', '.join(pickles)} (pickle, refused: loading it can run code)" if pickles else "no weights"
        raise AssetError(f"{shown_path(folder)} has {held}: {pattern} is needed; save again with safe serialization")
    for file in weights:
        try:
            # Reads the header and compares it with the size of the file: a cut-off file or a pointer to one fails.
            with safe_open(file, "numpy"):
                pass
        except SafetensorError as error:
            reason = f"is not a complete safetensors file ({error}): fetch it again"
            raise AssetError(f"{shown_path(file)} {reason}") from None


def _bare_name(model: str) -> str:
    """``Qwen2.5-1.5B-Instruct`` of a hub id, of a folder, of ``<org>__<name>`` and of a snapshot in the hub's cache."""
    parts = model.replace("\\", "/").rstrip("/").split("/")
    cached = [part for part in parts if part.startswith("models--")]
    name = cached[-1].rsplit("--", 1)[-1] if cached else parts[-1].rsplit("__", 1)[-1]
    # The hub's ready-made NF4 copies hold the same weights; adapters trained on one name the copy.
    return re.sub(r"(-unsloth)?-bnb-4bit$", "", name.lower())


def _resolve_bundled() -> ModelSource:
    name, note = bundled.BUNDLED_MODEL, bundled.BUNDLED_NOTE
    folder = bundled.MODELS_DIR / name
    if not bundled.is_converted(folder):
        bundled.convert_once(bundled.bundled_gguf(), folder)
    made_from = f"gguf sha256:{bundled.GGUF_SHA256[:12]}, conversion {note['conversion']}"
    return ModelSource(name, folder, f"bundled {name} ({made_from})", "bundled")
