"""A planted token, home folder and user name are found nowhere in what is written for others.

The real notebooks 01 and 05 run in a driver whose environment holds them; then every byte that was written is searched.
"""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import nbformat
import pytest
from small_notebooks import copy_project, write_notebook

from lib.record import redaction
from lib.record.manifest import stale_reason, start_stage
from lib.record.paths import PROJECT_ROOT
from lib.record.rows import RowLog, write_jsonl
from tests.tiny import save_tiny_model

TOKEN = "hf_PlantedTokenPlantedToken0123456789"
PLAIN_SECRET = "planted-secret-without-a-form"
USER = "planted-user"
SECRETS = (TOKEN, PLAIN_SECRET, USER)
PICTURE = "iVBORw0KGgo" + "A" * 80


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """An environment with secrets, and a home folder that holds the assets and the models of the run."""
    home = tmp_path / "home" / USER
    home.mkdir(parents=True)
    for name, value in {
        "HOME": str(home),
        "USER": USER,
        "LOGNAME": USER,
        "HF_TOKEN": TOKEN,
        "SOME_API_KEY": PLAIN_SECRET,
        "XDG_CACHE_HOME": str(home / ".cache"),
    }.items():
        monkeypatch.setenv(name, value)
    return home


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("File ~/x and /home/planted-user/x", "File ~/x and ~/x"),
        ('"\\n/home/planted-user"', '"\\n~"'),
        ("../../home/planted-user/out", "~/out"),
        ("file:///home/planted-user/a.py:12", "file://~/a.py:12"),
        ("/scratch/planted-user/run", "/scratch/user/run"),
        ("planted-user@host", "user@host"),
        ("/home/planted-user2/x", "/home/planted-user2/x"),
        ("{'USER': 'planted-user'} LOGNAME=planted-user", "{'USER': 'user'} LOGNAME=user"),
        ("planted-user has 5 apples", "planted-user has 5 apples"),
        (f"HF_TOKEN={TOKEN}", "HF_TOKEN=***"),
        ("Bearer hf_abcdefghijklmnopqrstuvwx!", "Bearer ***!"),
        (f"key {PLAIN_SECRET}.", "key ***."),
        ("https://me:pass@example.org/x", "https://***@example.org/x"),
        ("hf_hub_download and task-specific words stay", "hf_hub_download and task-specific words stay"),
        ("base64,/home/planted-user/AAAA==", "base64,~/AAAA=="),
        (f"base64,{PICTURE}/home/planted-user", f"base64,{PICTURE}/home/planted-user"),
    ],
)
def test_what_is_cleaned_and_what_stays(monkeypatch, text, expected):
    for name, value in {"HOME": "/home/planted-user", "USER": USER, "HF_TOKEN": TOKEN, "X_KEY": PLAIN_SECRET}.items():
        monkeypatch.setenv(name, value)
    assert redaction.clean(text) == expected


LETTERS = "Ab3dEf6hIj9lMn2pQr5tUv8xYz1B"
PEM = f"-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\n{LETTERS * 2}\nAb3=\n-----END RSA PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ssh://me:pass@host/x", "ssh://***@host/x"),
        ("git+https://oauth2:abc@example.org/x.git", "git+https://***@example.org/x.git"),
        ("mongodb+srv://u:p@c0.example.net/db and postgres://u:p@ss@db:5432/x", None),
        ("s3://KEY:SECRET@bucket/x", "s3://***@bucket/x"),
        ("https://x.org/a?token=abc&n=1", "https://x.org/a?token=***&n=1"),
        ("https://x.org/a?n=1&access_token=abc#top", "https://x.org/a?n=1&access_token=***#top"),
        ("?X-Amz-Credential=AK%2F2026&X-Amz-Signature=0f9e&X-Amz-Date=1", None),
        ("/blob?sv=2022&sig=a%2Bb%3D", "/blob?sv=2022&sig=***"),
        ("?key=AIx&api_key=b&apikey=c&password=d&client_secret=e", None),
        ("a?x=1&amp;token=abc</a>", "a?x=1&amp;token=***</a>"),
        ('{"next": "https://x.org/a?n=1\\u0026token=abc"}', '{"next": "https://x.org/a?n=1\\u0026token=***"}'),
        (f"sk-proj-{LETTERS}_x-y sk-ant-api03-{LETTERS}-z", "*** ***"),
        (f"github_pat_{LETTERS}_{LETTERS} ghr_{LETTERS}", "*** ***"),
        (f"glpat-{LETTERS} npm_{LETTERS} dckr_pat_{LETTERS} gsk_{LETTERS}", "*** *** *** ***"),
        ("xoxb-1234567890-abcdefghij xoxp-1234567890-abcdefghij", "*** ***"),
        ("'AKIAIOSFODNN7EXAMPLE' ASIAIOSFODNN7EXAMPLE", "'***' ***"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmN-_x", "***"),
        (f"AIza{LETTERS}1234567 pypi-AgEIcHlwaS5vcmc{LETTERS}", "*** ***"),
        (f'"\\nsk-ant-{LETTERS}" \x1b[31mAKIAIOSFODNN7EXAMPLE', '"\\n***" \x1b[31m***'),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ('{"authorization": "Basic dTpw", "x-api-key": "abc"}', '{"authorization": "Basic ***", "x-api-key": "***"}'),
        (f"curl -H 'Bearer {LETTERS}'", "curl -H 'Bearer ***'"),
        (f"a {PEM} b", "a *** b"),
        (json.dumps(PEM), '"***"'),
        (f"-----BEGIN OPENSSH PRIVATE KEY-----\n{LETTERS * 2}\n{LETTERS * 2}\n\nAnd so on", "***\n\nAnd so on"),
        (f"base64,{LETTERS} base64,AKIAIOSFODNN7EXAMPLE", f"base64,{LETTERS} base64,***"),
    ],
)
def test_credentials_are_known_by_their_form(text, expected):
    cleaned = redaction.clean(text)
    if expected is not None:
        assert cleaned == expected
    assert "***" in cleaned and not re.search(r":p@|p@ss|=AK|0f9e|=AIx|=[bcde]\b", cleaned)


@pytest.mark.parametrize(
    "text",
    [
        "ask-ant-colony-optimisation-methods task-project-management-plans the bearer of 25 internationalisation notes",
        "pypi-mirrors-of-the-university npm_config_registry_of_the_user AKIA eyJ.a.b xoxo-hugs",
        "The key = 5 and token = 7; what is key=5? Pay 3&4, a&b=c. https://example.org/a?page=2&monkey=1&sort=key",
        "-----BEGIN PUBLIC KEY-----\nabc\n-----END PUBLIC KEY----- and -----BEGIN PRIVATE KEY----- begins one",
        '("x-api-key", "x-auth-token") and authorization, bearer of news',
        "http://example.org/@user and mail me@example.org, s3://bucket/key, file:///x@y",
    ],
)
def test_ordinary_words_are_no_credentials(text):
    assert redaction.clean(text).replace("***", "-----BEGIN PRIVATE KEY-----") == text


@pytest.mark.parametrize("secret", ['pa"ss\\word', "line\nbreak-é", "p@ss/w:rd 1"])
def test_a_secret_is_found_as_json_python_and_addresses_spell_it(as_user, secret):
    as_user("somebody", secret=secret)
    spelled = [secret, json.dumps({"key": secret}), json.dumps(secret, ensure_ascii=False), repr({"a": secret})]
    for text in [*spelled, f"ftp://x.org/{quote(secret, safe='')}", f"base64,{secret}"]:
        assert redaction.clean(text).count("***") == 1, text


def test_a_users_name_that_every_machine_has_is_left_alone(monkeypatch):
    for name in ("USER", "LOGNAME", "USERNAME"):
        monkeypatch.setenv(name, "data")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-but-long-enough")
    assert redaction.clean("../data/raw false-but-long-enough") == "../data/raw false-but-long-enough"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b]0;title\x07\x1b[2J", "\\x1b]0;title\\x07\\x1b[2J"),
        ("back\rspace\x08", "back\\rspace\\x08"),
        ("\u202eright to left", "\\u202eright to left"),
        ("\ud800", "\\ud800"),
        ("a\u200bb\u200fc\u061cd\ufeffe", "a\\u200bb\\u200fc\\u061cd\\ufeffe"),
        ("so\xadft \u2060\u180e\u3164", "so\\xadft \\u2060\\u180e\\u3164"),
        ("tag \U000e0041\U000e007f", "tag \\U000e0041\\U000e007f"),
        ("selector \ufe0f\U000e0100", "selector \\ufe0f\\U000e0100"),
        ("two\nlines\tand é 漢", "two\nlines\tand é 漢"),
    ],
)
def test_a_terminal_sees_control_characters_and_does_not_obey_them(text, expected):
    assert redaction.visible(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run_x\n0 mismatches", "run_x\\n0 mismatches"),
        ("a\tb\r\nc\x85d\u2028e\x0bf", "a\\tb\\r\\nc\\x85d\\u2028e\\x0bf"),
        ("hf_abcdefghijklmnopqrstuvwx\u200f", "***\\u200f"),
        ("Grüße 漢", "Grüße 漢"),
    ],
)
def test_a_value_of_one_line_cannot_forge_another(text, expected):
    assert redaction.one_line(text) == expected


# --- the words of a format are no texts ---------------------------------------------------------------------------

FORMAT_USERS = ["code", "div", "class", "span", "markdown", "python", "text", "stream", "plain", "png", "output_type"]
FORMAT_SECRETS = ["markdown", "cell_type", "text/html", "execution_count", "container", "nbformat_minor"]


@pytest.fixture
def as_user(monkeypatch):
    """A function that gives this process a user's name, a home folder and a secret."""

    def become(user, home="/home/nobody-at-all", secret="a-secret-of-nobody"):
        for name, value in {"HOME": home, "USER": user, "LOGNAME": user, "USERNAME": user, "X_KEY": secret}.items():
            monkeypatch.setenv(name, value)

    return become


def every_kind_of_output():
    """A notebook as it lies on disk: texts as lists of lines, words of the format everywhere."""
    nb = nbformat.v4
    page = '<div class="code text"><span id="x_code" style="color:red">a</span><code>b</code></div><br/>'
    picture = f'<img alt="" src="data:image/png;base64,{"A" * 40}"><style>.text{{a:b}}</style>'
    script = '<script type="text/javascript">if (kind === 1 / text) { show() }</script>'
    outputs = [
        nb.new_output("stream", name="stdout", text="one\ntwo\n"),
        nb.new_output("display_data", {"text/html": page + picture + script, "text/plain": "<Html>"}),
        nb.new_output("execute_result", {"text/markdown": "a *b* <span>c</span>", "image/png": "iVBORw0KGgo="}),
        nb.new_output("display_data", {"text/latex": r"$\text{hours}\div 2$", "application/json": {"plain": [1]}}),
        nb.new_output("error", ename="KeyError", evalue="'x'", traceback=["\x1b[31mKeyError\x1b[0m"]),
    ]
    markdown = nb.new_markdown_cell('<details><summary>s</summary><div class="text">`a`</div></details>')
    cells = [markdown, nb.new_code_cell("x = 1\ny = 2", outputs=outputs, metadata={"tags": ["parameters"]})]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    metadata["language_info"] = {"name": "python", "mimetype": "text/x-python", "codemirror_mode": {"name": "ipython"}}
    return json.loads(nbformat.writes(nb.new_notebook(cells=cells, metadata=metadata)))


@pytest.mark.parametrize("user", FORMAT_USERS)
@pytest.mark.parametrize("home", ["/home/nobody-at-all", "/code", "/text"])
def test_a_notebook_without_a_secret_stays_as_it_is_whatever_the_user_is_called(as_user, user, home):
    as_user(user, home)
    content = every_kind_of_output()
    assert redaction.clean_notebook(content) == content


@pytest.mark.parametrize("secret", FORMAT_SECRETS)
def test_a_secret_that_is_a_word_of_the_format_leaves_a_valid_notebook(as_user, secret):
    as_user("somebody", secret=secret)
    content = every_kind_of_output()
    content["cells"][1]["outputs"][0]["text"] = [f"my secret is {secret}\n"]
    cleaned = redaction.clean_notebook(content)
    assert cleaned["cells"][1]["outputs"][0]["text"] == ["my secret is ***\n"]
    assert cleaned["cells"][1]["outputs"][1:] == content["cells"][1]["outputs"][1:]
    nbformat.validate(nbformat.from_dict(cleaned))


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("text/plain", ["{'HOME': '/home/planted-user',\n", f" 'X': '{PLAIN_SECRET}'}}"]),
        ("text/html", f'<a href="/home/planted-user/x" title="{TOKEN}">{PLAIN_SECRET}</a> &#x27;planted-user&#x27;'),
        ("text/html", f"<script>const where = '/home/planted-user', key = \"{TOKEN}\"</script>"),
        ("text/html", "<p data-path='/scratch/planted-user/x'>1 < 2 and /scratch/planted-user</p>"),
        ("text/markdown", ["<https://me:planted-user@example.org>\n", "and `/home/planted-user`, <planted-user@host>"]),
        ("text/html", r"<td>C:\Users\planted-user</td>"),
        ("image/svg+xml", '<svg><text x="1">/home/planted-user</text></svg>'),
        ("text/latex", r"C:\Users\planted-user\x"),
        ("application/json", {"where": ["/home/planted-user", {"key": TOKEN}]}),
        ("application/vnd.custom+json", {"where": "/home/planted-user"}),
        ("application/javascript", f"show('{TOKEN}')"),
    ],
)
def test_what_is_planted_in_an_output_of_any_kind_is_cleaned(as_user, kind, data):
    as_user(USER, "/home/planted-user", PLAIN_SECRET)
    content = every_kind_of_output()
    content["cells"][1]["outputs"][1]["data"] = {kind: data}
    text = json.dumps(redaction.clean_notebook(content))
    assert not [secret for secret in SECRETS if secret in text]


def test_secrets_that_json_or_html_would_spell_otherwise_are_found(as_user):
    secret = 'two lines\n"quoted" & <more>'
    as_user("somebody", secret=secret)
    content = every_kind_of_output()
    cell = content["cells"][1]
    cell["outputs"][0]["text"] = f"is {secret}!".splitlines(keepends=True)
    cell["outputs"][1]["data"] = {"text/html": f"<b>is {html.escape(secret)}!</b>"}
    cell["source"] = f"# {secret}".splitlines(keepends=True)
    found = redaction.clean_notebook(content)["cells"][1]
    assert found["outputs"][0]["text"] == ["is ***!"] and found["source"] == ["# ***"]
    assert found["outputs"][1]["data"]["text/html"] == "<b>is ***!</b>"


def test_a_line_that_is_the_users_name_is_cleaned_in_what_was_printed_alone(as_user):
    as_user(USER)
    content = every_kind_of_output()
    content["cells"][1]["outputs"][0]["text"] = [f"{USER}\n", f"{USER} has 5 apples\n"]
    cleaned = redaction.clean_notebook(content)["cells"][1]["outputs"][0]["text"]
    assert cleaned == ["user\n", f"{USER} has 5 apples\n"]


def test_keys_and_names_that_something_refers_to_are_no_texts(as_user):
    as_user("one", "/code", "accuracy_key")
    value = {"accuracy_key": "/code/x", "link": "run_one/01_prepare.html", "printed": "/srv/one"}
    assert redaction.clean_value(value, keep=["link"]) == {**value, "accuracy_key": "~/x", "printed": "/srv/user"}


@pytest.mark.parametrize("user", ["code", "div", "text", "python"])
def test_a_filled_notebook_and_its_page_are_valid_whatever_the_user_is_called(tmp_path, as_user, monkeypatch, user):
    from lib.driver import notebook as driver_notebook

    monkeypatch.setattr(driver_notebook, "NOTEBOOKS_DIR", tmp_path / "notebooks")
    # In the source itself "code" would be a text.
    shown = "from IPython.display import HTML\nHTML('<div class={0}code{0}><code>text</code></div>'.format(chr(34)))"
    write_notebook(tmp_path / "notebooks" / "01_prepare.ipynb", "print('python')", shown)

    def run(folder):
        outcome = driver_notebook.execute("01_prepare", tmp_path / folder / "01.ipynb", {"run_name": "sandbox_one"})
        assert outcome.error == "" and driver_notebook.is_complete(outcome.notebook)
        return outcome.notebook

    as_user(user)
    notebook = run("out")
    nbformat.validate(nbformat.read(notebook, as_version=4))
    kinds = [cell["cell_type"] for cell in json.loads(notebook.read_text())["cells"]]
    assert set(kinds) == {"code"}
    page = notebook.with_suffix(".html").read_text()
    assert '<div class="code"><code>text</code></div>' in page
    assert page.count("<div") == page.count("</div>") and "</user>" not in page and 'class="user' not in page


def test_a_notebook_of_another_form_is_named_with_its_place(tmp_path):
    from lib.record.paths import ArtifactError
    from lib.reports import notebook_page

    content = every_kind_of_output()
    content["cells"][1]["cell_type"] = "user"
    (tmp_path / "01.ipynb").write_text(json.dumps(content))
    with pytest.raises(
        ArtifactError, match=r"01\.ipynb is not a valid notebook at cells\.1: .*'user'.*run its stage again"
    ):
        notebook_page.write_html(tmp_path / "01.ipynb")


def run_driver(project: Path, *argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "run_all.py", "--presets", "sandbox_one", "--output-dir", "out", *argv]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300)


def plant_answers(run_dir: Path) -> None:
    """Rows of an evaluation, so that 05 has something to compare."""
    rows = [{"id": 0, "question": "?", "gold_answer": "#### 7", "model_output": "#### 7", "parsed_final": "7"}]
    finish = {"correct": True, "finish_reason": "stop", "num_output_tokens": 3}
    write_jsonl(run_dir / "gsm8k_preds_sandbox_one.jsonl", [{**row, **finish} for row in rows])


def written(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_nothing_planted_is_in_anything_that_three_real_stages_write(tmp_path, planted):
    model = save_tiny_model(planted / "models" / "base")
    assets = planted / "assets"
    shutil.copytree(PROJECT_ROOT / "data" / "sandbox", assets)
    sources = ["--set", f"base_model={model}", f"gsm8k_source={assets}", f"ailuminate_source={assets}"]
    project = copy_project(tmp_path)
    plant_answers(project / "out" / "run_sandbox_one")
    sources += ["max_train_rows=4", "dev_rows=2", "num_epochs=1", "save_steps=1", "gsm8k_max_new_tokens=4"]
    sources += ["max_seq_length=4096", "fewshot_k=1", "device=cpu"]
    done = run_driver(project, "--stages", "01", "02", "05", "--assets", str(assets), "--offline", *sources)
    assert done.returncode == 0, done.stdout + done.stderr
    files = written(project / "out")
    assert b"~/models/base" in files["run_sandbox_one/02_train/adapter/adapter_config.json"]
    assert "reports/05_compare.html" in files
    assert "reports/run_sandbox_one/01_prepare.html" in files and "run_sandbox_one/config_resolved.json" in files
    for name, content in {**files, "terminal": (done.stdout + done.stderr).encode()}.items():
        assert not [secret for secret in SECRETS if secret.encode() in content], name
    # The same again: what was cleaned in the manifest must not look like a change.
    again = run_driver(project, "--stages", "01", "--assets", str(assets), "--offline", *sources)
    assert "01_prepare: unchanged, kept" in again.stdout, again.stdout


def test_a_failing_notebook_that_prints_its_environment_leaks_nothing(tmp_path, planted, monkeypatch):
    from lib.driver import notebook as driver_notebook

    content = nbformat.v4.new_notebook()
    content.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    codes = ['run_name: str = "x"  # name', "import os\nprint(dict(os.environ))\nprint(os.path.expanduser('~'))"]
    codes += ["raise OSError(os.environ['HF_TOKEN'] + ' in ' + os.environ['HOME'])"]
    content.cells = [nbformat.v4.new_code_cell(code) for code in codes]
    content.cells[0].metadata["tags"] = ["parameters"]
    monkeypatch.setattr(driver_notebook, "NOTEBOOKS_DIR", tmp_path / "notebooks")
    (tmp_path / "notebooks").mkdir()
    nbformat.write(content, tmp_path / "notebooks" / "01_prepare.ipynb")
    outcome = driver_notebook.execute("01_prepare", tmp_path / "out" / "01.ipynb", {"run_name": str(planted / "x")})
    assert outcome.error.startswith("OSError")
    for name, text in written(tmp_path / "out").items():
        assert not [secret for secret in SECRETS if secret.encode() in text], name


def test_a_manifest_of_cleaned_parameters_still_holds(tmp_path, planted):
    (planted / "in.jsonl").write_text("in")
    manifest = tmp_path / "run" / "manifest.json"
    parameters = {"base_model": str(planted / "models" / "x"), "seed": 1}
    record = start_stage(manifest, "01_prepare", "x", parameters)
    record.finish(inputs=[planted / "in.jsonl"], outputs=[], facts={"where": str(planted)})
    noted = json.loads(manifest.read_text())
    assert not [secret for secret in SECRETS if secret in manifest.read_text()]
    assert noted["parameters"]["base_model"] == "~/models/x" and list(noted["inputs"]) == ["~/in.jsonl"]
    assert stale_reason(manifest, "01_prepare", parameters) == ""
    (planted / "in.jsonl").write_text("other")
    assert "in.jsonl changed" in stale_reason(manifest, "01_prepare", parameters)


def test_row_files_are_the_record_and_stay_as_they_are(tmp_path, planted):
    row = {"id": 0, "response": f"the path is {os.environ['HOME']} and {TOKEN}"}
    RowLog(tmp_path / "rows.jsonl", "p").append(row)
    write_jsonl(tmp_path / "others.jsonl", [row])
    assert TOKEN in (tmp_path / "rows.jsonl").read_text() and USER in (tmp_path / "others.jsonl").read_text()
