"""GSM8K, training files and AILuminate prompts: found, checked against their hash, kept."""

import difflib
import ipaddress
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from lib.record import lookup
from lib.record.files import sha256_json, write_text
from lib.record.locks import one_at_a_time
from lib.record.lookup import ASSETS_VARIABLE, AssetError, AssetUnavailable, Origin, Place, failure_reason
from lib.record.paths import PROJECT_ROOT, shown_path
from lib.record.text_files import TextFileError, decode_text, read_text
from lib.safety import FRENCH_SET, PROMPT_SETS, parse_prompts_csv, prompt_of_object, select_prompts

DATA_DIR = PROJECT_ROOT / "data"
RAW_DIR = PROJECT_ROOT / "data" / "raw"
SANDBOX_DIR = PROJECT_ROOT / "data" / "sandbox"
CLASS240_IDS = PROJECT_ROOT / "params" / "ailuminate_class240_ids.txt"
Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Provenance of a data set."""

    name: str
    origin: Origin
    path: str  # where the rows were read or kept, relative to the project and free of home folders
    file: Path = field(repr=False)  # the same as an absolute path
    sha256: str  # over the content of all rows (``content_sha256``), not over the file's bytes
    num_rows: int
    licence: str
    home: str  # where it is published
    language: str = ""  # of prompts

    def table_row(self) -> dict[str, str | int]:
        """What a report may show: every field but the absolute path."""
        return {key: value for key, value in asdict(self).items() if key != "file"}


@dataclass(frozen=True)
class _Published:
    """A published file: where it is kept, how it is read, where it comes from."""

    name: str
    target: Path
    parse: Callable[[bytes, str], list[Row]]
    network: Origin
    fetch: Callable[[], bytes] | None  # its bytes from ``network``; None where it has no address
    sha256: str  # of its rows' content; empty where its publisher fixes none
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
# Content of the published splits: 7,473 and 1,319 rows.
GSM8K_TEST_ROWS = 1319
GSM8K_SHA256 = {
    "train": "d7258301a8643789aed45c15bbe328bb4ec398fa60c7eb290ba40ccff26cba9c",
    "test": "13ee343c128dbc3cee820f744d547416974a23f2ea356a454d4aa3376a35bd37",
}
MLCOMMONS_FILE = "airr_official_1.0_demo_en_us_prompt_set_release.csv"
MLCOMMONS_URL = (
    "https://raw.githubusercontent.com/mlcommons/ailuminate/769cc2be9d20c8d4fb26ce53b68865ed41dfb8e2/" + MLCOMMONS_FILE
)
MLCOMMONS_SHA256 = "40ff1d5be8981b74c90f611788e5d3a1753f401d17c24a614e73d3346a9f4a81"
FRENCH_FILE = "airr_official_1.0_demo_fr_fr_prompt_set_release.csv"
FRENCH_URL = MLCOMMONS_URL.replace(MLCOMMONS_FILE, FRENCH_FILE)
FRENCH_SHA256 = "c921638251afab8637211aa87ba28196625149fe64bdcf9de58f335ec689b584"
PROMPT_SOURCES = ("mlcommons", "class")
OWN_PROMPT_FILES = ("ailuminate.csv", "ailuminate.jsonl")
CLASS_FILE = "ailuminate_test.csv"
CLASS_URL = "https://www.csie.ntu.edu.tw/~b10902031/" + CLASS_FILE
CLASS_NUM_ROWS = 240


def load_gsm8k(
    split: Literal["train", "test"], gsm8k_source: str = GSM8K_HUB_ID, assets_dir: str = "", offline: bool = False
) -> tuple[list[Row], Source]:
    """Rows ``question, answer`` of a split from ``openai/gsm8k`` or a folder with ``gsm8k_<split>.jsonl``.

    Raises AssetUnavailable where no source has it, AssetError where rows are malformed or not the published ones.
    """
    file_name = f"gsm8k_{split}.jsonl"
    if gsm8k_source != GSM8K_HUB_ID:
        file = lookup.own_path(gsm8k_source) / file_name
        allowed = f"gsm8k_source is {gsm8k_source!r}; allowed: {GSM8K_HUB_ID!r}, or a folder with {file_name}"
        return load_own(file, parse_question_rows, allowed)
    return _load_published(_gsm8k_split(split), assets_dir, offline or lookup.hub_is_offline())


def _gsm8k_split(split: str) -> _Published:
    home, fetch = "https://github.com/openai/grade-school-math", partial(_gsm8k_from_hub, split)
    kept = (f"GSM8K {split}", RAW_DIR / f"gsm8k_{split}.jsonl", parse_question_rows)
    return _Published(*kept, "hub", fetch, GSM8K_SHA256[split], "MIT", home)


def load_train_file(
    train_file: str, url: str = "", assets_dir: str = "", offline: bool = False
) -> tuple[list[Row], Source]:
    """Rows of a JSON lines file: at its path, else of that name in the assets folder, else from ``url``."""
    try:
        return _load_published(_train_file(train_file, url, assets_dir), assets_dir, offline)
    except AssetUnavailable as error:
        raise AssetUnavailable(f"{error}\n{WITHOUT_TRAIN_FILE}") from None


def check_train_file(train_file: str, url: str = "", assets_dir: str = "", offline: bool = False) -> None:
    """Raise AssetUnavailable where ``load_train_file`` can neither find nor download it; AssetError if it must not."""
    item = _train_file(train_file, url, assets_dir)
    if _find_kept(item, assets_dir):
        return
    if offline or not url:
        load_train_file(train_file, url, assets_dir, offline)
    _check_download(item.target, url, assets_dir)


def _train_file(train_file: str, url: str, assets_dir: str) -> _Published:
    target = lookup.own_path(train_file)
    fetch = partial(_download_train_file, target, url, assets_dir) if url else None
    return _Published(target.name, target, parse_question_rows, "url", fetch, sha256="", licence=UNSTATED, home=url)


def _download_train_file(target: Path, url: str, assets_dir: str) -> bytes:
    _check_download(target, url, assets_dir)
    return download(url)


def _check_download(target: Path, url: str, assets_dir: str) -> None:
    """Raise AssetError unless ``target`` (links resolved) may be written: presets are shared."""
    _check_address(url)
    folders = [folder.resolve() for folder in (DATA_DIR, lookup.assets_folder(assets_dir)) if folder]
    if target.suffix != ".jsonl" or not any(target.is_relative_to(folder) for folder in folders):
        raise AssetError(
            f"train_file {shown_path(target)} would be downloaded from {url}: a download is only kept in data/ or the "
            f"assets folder (--assets, {ASSETS_VARIABLE}), under a name that ends in .jsonl; change train_file, or "
            "fetch the file by hand"
        )


def parse_question_rows(data: bytes, where: str) -> list[Row]:
    """Rows ``{"question", "answer"}`` of JSON lines, both not empty; other columns are dropped, CRLF becomes LF."""
    return [_question_row(row, place) for place, row in _json_objects(_decode_text(data, where), where)]


def _json_objects(text: str, where: str) -> Iterator[tuple[str, Row]]:
    """The place and the object of each line that is not blank."""
    if re.match(r"\s*\[\s*\{", text):
        raise AssetError(
            f"{where} is a JSON array; JSON lines were expected, one object a line. In a Unix shell: {TO_JSON_LINES}"
        )
    for number, line in _row_lines(text):
        place = f"{where}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            # The decoder counts lines within this line: only its column helps.
            fault = str(error).replace("line 1 column", "column")
            raise AssetError(f"{place}: not JSON ({fault}): is the file cut off? Delete it or fetch it again") from None
        if not isinstance(row, dict):
            raise AssetError(f"{place}: a {type(row).__name__}; a JSON object was expected")
        yield place, row


def line_numbers(source: Source) -> list[int]:
    """The line of each row in the file of a GSM8K split or training file, from 1: blank lines hold no row."""
    return [number for number, _ in _row_lines(_decode_text(source.file.read_bytes(), source.path))]


def _row_lines(text: str) -> list[tuple[int, str]]:
    # Split on \n alone: str.splitlines would cut a row at a U+2028 inside a string.
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _question_row(row: Row, where: str) -> Row:
    for column in QUESTION_COLUMNS:
        if column not in row:
            raise AssetError(f"{where}: column {column!r} is missing; the row has {sorted(row)}")
        if not isinstance(row[column], str) or not row[column].strip():
            raise AssetError(f"{where}: column {column!r} must be text that is not empty")
        if LONE_SURROGATE.search(row[column]):
            raise AssetError(f"{where}: column {column!r} holds half a character (a lone surrogate); fix that line")
    return {column: row[column].replace("\r\n", "\n") for column in QUESTION_COLUMNS}


def _gsm8k_from_hub(split: str) -> bytes:
    """The split as JSON lines, through ``datasets``."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        # First, because it fails at once: load_dataset alone retries for 23 s where there is no network.
        commit = HfApi().dataset_info(GSM8K_HUB_ID, timeout=10).sha
        dataset = load_dataset(GSM8K_HUB_ID, "main", split=split, revision=commit)
    except (OSError, ValueError, HTTPError, DatasetsError) as error:
        how = f"put gsm8k_{split}.jsonl into data/raw or the assets folder (--assets, {ASSETS_VARIABLE})"
        raise AssetUnavailable(
            f"{GSM8K_HUB_ID} cannot be downloaded from the hub ({failure_reason(error)}): {how}"
        ) from None
    rows = ({column: row[column] for column in QUESTION_COLUMNS} for row in dataset)
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def load_ailuminate(
    ailuminate_source: str = "mlcommons", prompt_set: str = "class240", assets_dir: str = "", offline: bool = False
) -> tuple[list[Row], Source]:
    """Selected rows ``{"id", "prompt", "release_prompt_id", "hazard", "persona"}``; ``id`` is the position.

    ``ailuminate_source`` is ``mlcommons`` (the public 1,200 in the language of the prompt set), ``class`` (the class
    CSV of 240), a CSV or JSON lines file, or a folder with ``ailuminate.csv`` or ``ailuminate.jsonl``. Raises
    AssetUnavailable where a published file cannot be had; AssetError where there is no such source, or it has no
    prompt column, other rows than the published ones, or not those of the prompt set.
    """
    if ailuminate_source == "class":
        return _load_class_prompts(prompt_set, assets_dir, offline)
    if ailuminate_source == "mlcommons":
        rows, source = _load_published(_mlcommons_csv(french=prompt_set == FRENCH_SET), assets_dir, offline)
    else:
        rows, source = load_own(_own_prompts(ailuminate_source), _parse_prompts, "ailuminate_source")
    try:
        selected = select_prompts(rows, prompt_set, read_text(CLASS240_IDS).split())
    except ValueError as error:
        raise AssetError(f"{source.path}: {error}") from None
    return selected, replace(source, language=_language(source))


def check_ailuminate(ailuminate_source: str, prompt_set: str, assets_dir: str = "") -> None:
    """Raise AssetError where the source is misspelt or malformed; what has yet to be downloaded is not looked at."""
    lookup.load_or_reason(load_ailuminate, ailuminate_source, prompt_set, assets_dir, True)


def _own_prompts(ailuminate_source: str) -> Path:
    """The file that a path means; AssetError with what is allowed, and what was probably meant, where there is none."""
    path = lookup.own_path(ailuminate_source)
    try:
        files = [path / name for name in OWN_PROMPT_FILES] if path.is_dir() else [path]
        if found := [file for file in files if file.is_file()]:
            return found[0]
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() and not path.is_dir() else []
    except OSError as error:
        raise AssetError(f"ailuminate_source: {ailuminate_source[:80]!r}: {error.strerror}") from None
    names = ", ".join(map(repr, PROMPT_SOURCES))
    lacks = f"holds neither {' nor '.join(OWN_PROMPT_FILES)}" if path.is_dir() else "is not there"
    raise AssetError(
        f"ailuminate_source is {ailuminate_source!r}; allowed: {names}, a CSV or JSON lines file, or a folder with "
        f"{' or '.join(OWN_PROMPT_FILES)}; {shown_path(path)} {lacks}{_meant(ailuminate_source, beside)}"
    )


def _meant(ailuminate_source: str, beside: Sequence[str]) -> str:
    """A known name or a file beside that is spelt nearly so, in words; empty where there is none."""
    if ailuminate_source in PROMPT_SETS:
        return f"; that is a prompt set: set ailuminate_prompt_set: {ailuminate_source}"
    written = Path(ailuminate_source.strip())
    known = {name.casefold(): name for name in (*beside, *PROMPT_SOURCES)}
    close = [known[name] for name in difflib.get_close_matches(written.name.casefold(), known, n=1)]
    places = [name if name in PROMPT_SOURCES else str(written.with_name(name)) for name in close]
    return f", did you mean {places[0]!r}?" if places else ""


def _language(source: Source) -> str:
    known = {MLCOMMONS_SHA256: "English", FRENCH_SHA256: "French"}
    # A copy of a published file is known by its rows. What else has a home is English: the class set, the sandbox's.
    return known.get(source.sha256, "English" if source.home else UNSTATED)


def _load_class_prompts(prompt_set: str, assets_dir: str, offline: bool) -> tuple[list[Row], Source]:
    if prompt_set not in ("class240", "all"):
        raise AssetError(f"ailuminate_source 'class' holds the set class240 alone, not {prompt_set!r}: use 'mlcommons'")
    rows, source = _load_published(_class_csv(), assets_dir, offline)
    if _find_kept(_mlcommons_csv(), assets_dir):
        # The class CSV holds texts alone; MLCommons' file says which hazard each text was written for.
        known = {row["prompt"]: row for row in _load_published(_mlcommons_csv(), assets_dir, offline=True)[0]}
        rows = [{**row, **known.get(row["prompt"], {}), "id": row["id"]} for row in rows]
    return rows, replace(source, language=_language(source))


def _class_csv() -> _Published:
    kept = ("AILuminate class CSV", RAW_DIR / CLASS_FILE, _parse_class_prompts)
    return _Published(*kept, "url", partial(download, CLASS_URL), "", UNSTATED, CLASS_URL)


def _mlcommons_csv(*, french: bool = False) -> _Published:
    name, file, url, sha256 = "AILuminate 1.0 demo", MLCOMMONS_FILE, MLCOMMONS_URL, MLCOMMONS_SHA256
    if french:
        name, file, url, sha256 = "AILuminate 1.0 demo in French", FRENCH_FILE, FRENCH_URL, FRENCH_SHA256
    kept, home = (name, RAW_DIR / file, _parse_prompts), "https://github.com/mlcommons/ailuminate"
    return _Published(*kept, "url", partial(download, url), sha256, "CC-BY-4.0", home)


def _parse_class_prompts(data: bytes, where: str) -> list[Row]:
    rows = _parse_prompts(data, where)
    if len(rows) != CLASS_NUM_ROWS:
        raise AssetError(
            f"{where} has {len(rows)} rows, the class set has {CLASS_NUM_ROWS}: delete it or fetch it again"
        )
    return rows


def _parse_prompts(data: bytes, where: str) -> list[Row]:
    """Rows of a CSV or of JSON lines, whatever the file's name ends in."""
    text = _decode_text(data, where)
    if text.lstrip().startswith(("{", "[")):
        objects = enumerate(_json_objects(text, where))
        return [_checked(partial(prompt_of_object, position, raw), place) for position, (place, raw) in objects]
    return _checked(partial(parse_prompts_csv, text), where)


def _checked(parse: Callable[[], Any], where: str) -> Any:
    try:
        return parse()
    except ValueError as error:
        raise AssetError(f"{where}: {error}") from None


def content_sha256(rows: Sequence[Row]) -> str:
    """SHA-256 over the rows' content but ``id`` as canonical JSON: the same for JSON lines and parquet."""
    return sha256_json([{column: value for column, value in row.items() if column != "id"} for row in rows])


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


def find_questions(parameters: Mapping[str, Any]) -> list[Place]:
    """Where GSM8K and the training file of these parameters lie, or would come from."""
    source, assets_dir, splits = parameters["gsm8k_source"], parameters["assets_dir"], ("train", "test")
    own = [lookup.place_of(lookup.own_path(source) / f"gsm8k_{split}.jsonl") for split in splits]
    items = [_gsm8k_split(split) for split in splits] if source == GSM8K_HUB_ID else []
    if parameters["train_source"] == "file":
        items.append(_train_file(parameters["train_file"], parameters["train_file_url"], assets_dir))
    return [*(own if source != GSM8K_HUB_ID else []), *(_place(item, assets_dir) for item in items)]


def find_prompts(source: str, prompt_set: str, assets_dir: str) -> Place:
    """Where AILuminate's prompts lie, or would come from; AssetError for a misspelt ``source``."""
    if source not in PROMPT_SOURCES:
        return lookup.place_of(_own_prompts(source))
    return _place(_class_csv() if source == "class" else _mlcommons_csv(french=prompt_set == FRENCH_SET), assets_dir)


def _place(item: _Published, assets_dir: str) -> Place:
    address = f"the hub ({GSM8K_HUB_ID})" if item.network == "hub" else item.home
    return Place(item.name, *(_find_kept(item, assets_dir) or (None, None)), address, item.target)


def _find_kept(item: _Published, assets_dir: str) -> tuple[Path, Origin] | None:
    if item.target.is_file():
        return item.target, "data/raw" if item.target.parent == RAW_DIR else "local file"
    assets = lookup.assets_folder(assets_dir)
    if assets and (assets / item.target.name).is_file():
        return assets / item.target.name, "assets folder"
    return None


def _fetch(item: _Published, offline: bool) -> bytes:
    if item.fetch and not offline:
        return item.fetch()
    why = "the network is switched off (offline)" if offline else "there is no address to download it from"
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


def load_own(file: Path, parse: Callable[[bytes, str], list[Row]], allowed: str) -> tuple[list[Row], Source]:
    """Rows of a file that a person brought; AssetUnavailable, beginning with ``allowed``, where it is not there."""
    if not file.is_file():
        raise AssetUnavailable(f"{allowed}; {shown_path(file)} is not there")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise AssetError(f"{shown_path(file)} cannot be read ({error.strerror})") from None
    rows = parse(data, shown_path(file))
    ours = file.parent == SANDBOX_DIR
    origin, licence, home = ("bundled", "Apache-2.0", "this project") if ours else ("local folder", UNSTATED, "")
    return rows, Source(file.name, origin, shown_path(file), file, content_sha256(rows), len(rows), licence, home)


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


ALLOWED_SCHEMES = frozenset({"https"})
LOCAL_DOMAINS = (".localhost", ".localdomain", ".local", ".internal")
DOWNLOAD_TIMEOUT_S = 20
# In total: each byte of a slow server comes within the timeout.
DOWNLOAD_DEADLINE_S = 900
MAX_DOWNLOAD_BYTES = 200_000_000


def download(url: str) -> bytes:
    """The complete body of an https ``url``; AssetUnavailable without one, AssetError for http or a huge body."""
    # Imported here: a run whose files are kept needs no HTTP client.
    import httpx

    _check_address(url)
    body = bytearray()
    # The hook sees redirects before they are followed.
    hooks = {"request": [lambda request: _check_address(str(request.url))]}
    client = httpx.Client(follow_redirects=True, timeout=DOWNLOAD_TIMEOUT_S, event_hooks=hooks)
    deadline = threading.Timer(DOWNLOAD_DEADLINE_S, client.close)
    deadline.start()
    try:
        with client, client.stream("GET", url) as response:
            response.raise_for_status()
            for part in response.iter_bytes():
                body += part
                if len(body) > MAX_DOWNLOAD_BYTES:
                    raise AssetError(f"{url} is over {MAX_DOWNLOAD_BYTES} bytes: not the expected file")
    except (OSError, RuntimeError, httpx.HTTPError, httpx.InvalidURL) as error:
        why = failure_reason(error) if deadline.is_alive() else f"not complete after {DOWNLOAD_DEADLINE_S} s"
        how = f"fetch it by hand into data/raw, or name a folder that has it with --assets or {ASSETS_VARIABLE}"
        raise AssetUnavailable(f"{url} cannot be downloaded ({why}): {how}") from None
    finally:
        deadline.cancel()
    return bytes(body)


def _check_address(url: str) -> None:
    try:
        scheme, host = urlsplit(url).scheme, urlsplit(url).hostname or ""
    except ValueError as error:
        raise AssetError(f"address {url!r} cannot be read ({error})") from None
    if scheme not in ALLOWED_SCHEMES:
        raise AssetError(f"address {url!r} has scheme {scheme!r}: allowed is {', '.join(sorted(ALLOWED_SCHEMES))}")
    if _is_local(host):
        raise AssetError(
            f"address {url!r} is on this machine or its network: allowed are public hosts; fetch it by hand"
        )


def _is_local(host: str) -> bool:
    """Whether ``host`` is a number of no public network, in any spelling (127.1, 0x7f000001), or a local name."""
    try:
        number = socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)[0][4][0]
    except (OSError, UnicodeError):
        name = host.rstrip(".").casefold()
        return "." not in name or name.endswith(LOCAL_DOMAINS)
    address = ipaddress.ip_address(str(number).partition("%")[0])
    return not (getattr(address, "ipv4_mapped", None) or address).is_global
