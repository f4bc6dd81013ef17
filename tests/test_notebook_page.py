"""The HTML of a filled notebook, as a browser shows it: the summary first, readable by all, complete on paper."""

import json
import re
import time
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

import nbformat
import pytest
from chromium import Chromium, find_chromium

from lib.driver.notebook import COMPLETE_MARK, Outcome, _keep, source_notebook
from lib.record.paths import PROJECT_ROOT, STAGES
from lib.reports import html, notebook_page, tables
from lib.reports.pages import is_made_here

AXE = Path(__file__).parent / "vendor" / "axe.min.js"
LONG_LINE = "values = [" + ", ".join(str(number) for number in range(200)) + "]"
SUMMARY_TOP = "[...document.querySelectorAll('h2')].find(title => title.id === 'Summary').getBoundingClientRect().top"
INJECTED = "# Parameters\n" + "\n".join(f"value_{number} = {number}" for number in range(40))


def outputs_of(shown):
    data = shown._repr_mimebundle_()
    return [nbformat.v4.new_output("execute_result", data=data, execution_count=1)]


def code_cell(source, *outputs):
    return nbformat.v4.new_code_cell(source, outputs=list(outputs), execution_count=1)


def fill(stage, path):
    """A stage's own notebook as papermill leaves it, but for its outputs: those of the setup and of texts stand in."""
    content = nbformat.read(source_notebook(stage), as_version=4)
    content.metadata["papermill"] = {"parameters": {"run_name": "made_up"}}
    cells = content.cells
    injected = code_cell(INJECTED)
    injected.metadata["tags"] = ["injected-parameters"]
    place = next(place for place, cell in enumerate(cells) if re.search(r"from_notebook|open_stage\(", cell.source))
    setup = [html.purpose_note("made_up", "a run", False), *tables.setup_tables(stage, {"seed": 42}, "CPU")]
    cells[place].outputs = outputs_of(html.stack(setup))
    cells[place + 2].outputs = outputs_of(html.sentences(["54.4 % right"]))
    cells.insert(place, injected)
    texts = html.examples([{"id": 1, "text": "word " * 3000}], {"text": "Answer"}, "row {id}")
    masked = html.masked_row([1, 2, 3], [-100, 2, 3], str)
    cells += [code_cell(LONG_LINE, *outputs_of(texts), *outputs_of(masked))]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(content, path)
    _keep(path, Outcome(), "")
    return path


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A notebook of each stage, filled: stage -> its path."""
    folder = tmp_path_factory.mktemp("reports")
    return {stage: fill(stage, folder / f"{stage}.ipynb") for stage in STAGES}


def faults(browser):
    """What axe finds on the page, with every fold open: (impact, rule, first place)."""
    browser.run("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    browser.run("document.getElementById('show-code').checked = true")
    browser.run(AXE.read_text(encoding="utf-8") + "; null")
    found = browser.run("axe.run().then(report => report.violations)")
    return [(fault["impact"], fault["id"], fault["nodes"][0]["html"]) for fault in found]


# --- the record -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_hidden_stands_in_the_notebook_whole(filled):
    source = nbformat.read(PROJECT_ROOT / "notebooks" / "03_eval_gsm8k.ipynb", as_version=4)
    kept = nbformat.read(filled["03_eval_gsm8k"], as_version=4)
    sources = [cell.source for cell in kept.cells]
    assert [text for text in sources if text not in (INJECTED, LONG_LINE)] == [cell.source for cell in source.cells]
    hidden = [cell.source for cell in kept.cells if cell.metadata.get("jupyter", {}).get("source_hidden")]
    first_section = next(place for place, cell in enumerate(kept.cells) if cell.source.startswith("## "))
    assert hidden == [cell.source for cell in kept.cells[:first_section] if cell.cell_type == "code"]
    assert len(hidden) == 3 and INJECTED in hidden
    assert json.loads(filled["03_eval_gsm8k"].read_text())["metadata"][COMPLETE_MARK]["complete"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A notebook that says on top why it stopped."""
    path = fill("03_eval_gsm8k", tmp_path_factory.mktemp("stopped") / "03_eval_gsm8k.ipynb")
    _keep(path, Outcome("it broke", headline="The kernel died."), "python run_all.py")
    return path


def test_a_banner_stands_above_and_hides_nothing(stopped):
    page = stopped.with_suffix(".html").read_text(encoding="utf-8")
    assert page.index("The kernel died.") < page.index("value_39") < page.index('id="Summary"')


# --- the page -------------------------------------------------------------------------------------------------------


def page_of(folder, *cells):
    """The page of a notebook with these cells: Markdown, or (code, whether it shows something)."""
    made = [
        nbformat.v4.new_markdown_cell(cell)
        if isinstance(cell, str)
        else code_cell(cell[0], *(outputs_of(html.note(f"shown by {cell[0]}")) if cell[1] else []))
        for cell in cells
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=made), folder / "page.ipynb")
    return notebook_page.write_html(folder / "page.ipynb").read_text(encoding="utf-8")


def test_a_section_whose_code_shows_nothing_is_not_on_the_page(tmp_path):
    page = page_of(
        tmp_path,
        "# Title",
        ("setup", False),
        "## Seen\n\nWhy.",
        ("a", True),
        ("b", False),
        # A heading inside a cell begins a section too.
        "Meaning.\n\n## Silent\n\nWhy not.",
        ("c", False),
        "No meaning.",
        "## Prose alone\n\nStays.",
    )
    assert all(text in page for text in ("Title", "Seen", "shown by a", "Meaning.", "Prose alone"))
    assert not any(text in page for text in ("Silent", "Why not.", "No meaning."))


def test_the_contents_lead_to_every_section(tmp_path):
    titles = ["Summary", "Are they right?", "What it bought, and what it cost", "A & B"]
    page = page_of(tmp_path, "# Title", *(f"## {title}\n\nWhy." for title in titles))
    anchors = re.findall(r'<h2 id="([^"]+)"', page)
    contents = page.partition("<nav")[2].partition("</nav>")[0]
    assert [unquote(link) for link in re.findall(r'href="#([^"]+)"', contents)] == [unescape(one) for one in anchors]
    assert [unescape(text) for text in re.findall(r">([^<]+)</a>", contents)] == titles


# What an output or a Markdown cell could hold: each sets the mark, leaves the page, or fetches from HOST.
MARK = "void(document.documentElement.dataset.ran='yes')"
MARK_ABOVE = MARK.replace("document", "parent.document")
PLANTED = f"""
<script>{MARK}</script>
<SCRIPT
>{MARK}</SCRIPT>
<script src="HOST/script.js"></script>
<script type="module">import "HOST/module.js"</script>
<img src="x" onerror="{MARK}">
<svg onload="{MARK}"><script>{MARK}</script><a href="javascript:{MARK}" class="planted">x</a></svg>
<details open ontoggle="{MARK}"><summary>x</summary></details>
<a class="planted" href="javascript:{MARK}">x</a>
<a class="planted" href="JavaScript:{MARK}" target="_blank">x</a>
<iframe srcdoc="<script>{MARK_ABOVE}</script>"></iframe>
<iframe src="HOST/frame"></iframe>
<iframe src="javascript:{MARK_ABOVE}"></iframe>
<object data="HOST/object"></object><embed src="HOST/embed">
<img src="HOST/image.png"><video src="HOST/video" autoplay></video><input type="image" src="HOST/input.png">
<link rel="stylesheet" href="HOST/link.css"><link rel="prefetch" href="HOST/prefetch">
<style>@import url("HOST/import.css"); body {{ background: url("HOST/background.png") }}</style>
<div style="background: url('HOST/attribute.png')">x</div>
<base href="HOST/">
"""
REDIRECTION = '<META/http-equiv="refresh" content="0;url=HOST/elsewhere">'
FORM = '<form action="HOST/elsewhere"><button class="planted">x</button></form>'
ATTACKS = pytest.mark.parametrize("planted", [PLANTED, REDIRECTION, FORM], ids=["planted", "redirection", "form"])


@pytest.fixture
def host():
    """A server on this machine: its address, and the paths that were fetched from it."""
    fetched = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            fetched.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", fetched
        server.shutdown()


@pytest.fixture(scope="module")
def online():
    """A browser with the network that a person has."""
    if not find_chromium():
        pytest.skip("no chromium on this machine")
    with Chromium() as browser:
        yield browser


def act(browser, page):
    """Open a page and click on what is planted; did a script run, and where is the browser then?"""
    browser.open(page)
    # Not a promise of the page: it may be left.
    time.sleep(0.5)
    links = "document.querySelectorAll('.planted')"
    for number in range(browser.run(f"{links}.length")):
        browser.run(f"{links}[{number}]?.dispatchEvent(new MouseEvent('click', {{bubbles: true, cancelable: true}}))")
        time.sleep(0.2)
    return browser.run("document.documentElement.dataset.ran || 'no'"), browser.run("location.href")


@ATTACKS
@pytest.mark.parametrize("place", ["output", "markdown", "markdown output"])
def test_nothing_that_is_planted_in_a_cell_runs_or_fetches(tmp_path, online, host, planted, place):
    address, fetched = host
    planted = planted.replace("HOST", address)
    kind = {"output": "text/html", "markdown output": "text/markdown"}.get(place)
    outputs = [nbformat.v4.new_output("display_data", data={kind: planted})] if kind else []
    cells = [code_cell("pass", *outputs)] if kind else [nbformat.v4.new_markdown_cell(planted)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "page.ipynb")
    page = notebook_page.write_html(tmp_path / "page.ipynb")
    assert act(online, page) == ("no", page.as_uri()) and fetched == []


@ATTACKS
def test_without_the_policy_what_is_planted_does_both(tmp_path, online, host, planted):
    address, fetched = host
    (tmp_path / "page.html").write_text(planted.replace("HOST", address))
    ran, place = act(online, tmp_path / "page.html")
    assert (ran == "yes" and len(set(fetched)) > 10) if planted == PLANTED else "/elsewhere" in place


def test_a_page_allows_no_script_and_holds_none(tmp_path):
    page = page_of(tmp_path, "# Title", "## Seen\n\nWhy.", ("a", True))
    head = page.partition("</head>")[0]
    policy = re.search(r'<meta content="([^"]*)" http-equiv="Content-Security-Policy"', head)[1]
    assert policy.startswith("default-src 'none'; ") and "script-src 'none'; img-src data:; base-uri 'none'" in policy
    assert head.index(policy) < head.index("<style") and "<script" not in page and "cdnjs" not in page
    assert is_made_here(tmp_path / "page.html")


# --- in a browser ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_summary_is_seen_without_scrolling(chromium, filled, stage):
    chromium.window(1200, 900)
    chromium.open(filled[stage].with_suffix(".html"))
    assert chromium.run(SUMMARY_TOP) < 650
    assert "54.4 % right" in chromium.run("document.body.innerText")
    # Contents and code are a click away.
    folds = chromium.run("[...document.querySelectorAll('details')].map(fold => fold.textContent)")
    assert any(text.startswith("Contents") and "Summary" in text for text in folds)
    assert "value_39" not in chromium.run("document.body.innerText")
    chromium.run("document.getElementById('show-code').click()")
    assert "value_39" in chromium.run("document.body.innerText")
    assert chromium.run("document.title") == f"made_up · {stage}"
    assert chromium.errors == [] and all(not address.startswith("http") for address in chromium.requests)


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_nothing_on_a_filled_notebook(chromium, filled, stopped, dark):
    chromium.window(1200, 900, dark=dark)
    for notebook in (filled["02_train"], stopped):
        chromium.open(notebook.with_suffix(".html"))
        assert faults(chromium) == []
    assert chromium.run("axe.run().then(report => report.passes.length)") > 20
    paper = chromium.run("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") is not dark


@pytest.mark.slow
def test_no_code_is_cut_off_on_paper(chromium, filled):
    chromium.window(760, 900)
    chromium.open(filled["02_train"].with_suffix(".html"))
    chromium.run("document.getElementById('show-code').click()")
    wide = "[...document.querySelectorAll('.highlight pre')].filter(pre => pre.scrollWidth > pre.clientWidth).length"
    assert chromium.run(wide) > 0
    chromium.command("Emulation.setEmulatedMedia", media="print")
    assert chromium.run(wide) == 0
    chromium.command("Emulation.setEmulatedMedia", media="")
