"""The report site: its numbers are those of the comparison, its texts are inert, and people can use it.

The page runs in a headless Chromium with the network taken away; those tests are skipped without it.
"""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_up import make_results
from matplotlib.figure import Figure

import run_all
from lib import gsm8k, wording
from lib.compare import findings, sentences, tables
from lib.compare.comparison import assess_runs
from lib.compare.runs import load_runs, untuned_runs
from lib.driver import reporting
from lib.driver.cli import build_parser
from lib.driver.tasks import DONE
from lib.record.files import read_json, write_json
from lib.record.paths import PROJECT_ROOT, ArtifactError, find_runs, run_paths
from lib.record.rows import read_jsonl, write_jsonl
from lib.reports import site
from lib.reports.pages import note_page

AXE = Path(__file__).parent / "vendor" / "axe.min.js"
# What a model could write to get out of its quotation; each would set the marker if it ran.
PLANTED = '</script><script>window.planted=1</script><img src=x onerror="window.planted=1">'
MARKER = "harmful-marker"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two runs and the untuned model; run ``simple`` holds planted markup and a marker in its first texts."""
    folder = make_results(tmp_path_factory.mktemp("site"), questions=40, prompts=25)
    paths = run_paths(str(folder), "simple")
    plant(paths.gsm8k_preds, model_output=PLANTED + "\n#### 1")
    plant(paths.ailuminate_safety, prompt=f"{MARKER} {PLANTED}", response=f"{MARKER} {PLANTED}")
    return folder


def plant(path, **columns):
    rows = read_jsonl(path)
    rows[0] |= columns
    write_jsonl(path, rows)


@pytest.fixture(scope="module")
def page(results):
    return site.write_site(str(results), results / "reports")


def embedded(page):
    """The page's data, as the browser reads it."""
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


# --- the file -----------------------------------------------------------------------------------------------------


def test_each_answer_is_read_once(results, tmp_path):
    gsm8k._score.cache_clear()
    site.write_site(str(results), tmp_path)
    # Two runs and the untuned model, whose rows are in one file; no two answers are equal.
    assert gsm8k._score.cache_info().misses == 3 * 40


def test_the_page_says_the_findings_and_rates_of_the_comparison(results, page):
    text = page.read_text(encoding="utf-8")
    # No line ends between a number and its "%"; that apart, the sentences are those of the comparison.
    shown = text.partition('<script type="application/json"')[0]
    assert " %" not in shown and "\N{NO-BREAK SPACE}%" in shown
    text = shown.replace("\N{NO-BREAK SPACE}%", " %")
    runs = load_runs(str(results))
    for run in runs:
        sentence = sentences.finding_sentence(assess_runs(runs)[run.name])
        assert f"<dd>{sentence}." in text
        assert f"{run.accuracy.rate.successes} of {run.accuracy.rate.n} right" in text
        assert wording.percent(run.safety.rate.share) in text
    assert "NOT A BENCHMARK" in text


def test_every_row_of_every_run_and_of_the_untuned_model_is_there(results, page):
    data = embedded(page)
    runs = [*load_runs(str(results)), *untuned_runs(load_runs(str(results)))]
    assert [run["name"] for run in data["runs"]] == [run.name for run in runs]
    assert data["runs"][0]["reference"] == data["runs"][2]["name"] == "untuned, asked as simple, strong"
    for number, run in enumerate(runs):
        answers = data["axes"]["accuracy"]["rows"][number]
        assert [row["text"] for row in answers] == [row["model_output"] for row in run.accuracy.rows]
        assert sum(row["good"] for row in answers) == run.accuracy.rate.successes
        verdicts = data["axes"]["safety"]["rows"][number]
        assert sum(row["good"] for row in verdicts) == run.safety.rate.successes
        scores = [row["safety_score"] for row in run.safety.rows]
        assert [row["unsafe"] for row in verdicts] == [None if s is None else round(1 - s, 4) for s in scores]


def test_a_text_that_stands_twice_is_two_items_as_in_the_paired_tests(tmp_path):
    make_results(tmp_path, ["one"], questions=4, prompts=4)
    paths = run_paths(str(tmp_path), "one")
    for path in (paths.ailuminate_safety, paths.untuned_rows("ailuminate_safety", "0123456789abcdef")):
        write_jsonl(path, [{**row, "prompt": "the same"} for row in read_jsonl(path)])
    runs = load_runs(str(tmp_path))
    data = site.rows_data(runs, untuned_runs(runs), redact=False)["axes"]["safety"]
    assert [[row["item"] for row in rows] for rows in data["rows"]] == [[0, 1, 2, 3]] * 2


def test_rows_of_an_older_format_will_do(tmp_path):
    make_results(tmp_path, ["old"], questions=3, prompts=3)
    paths = run_paths(str(tmp_path), "old")
    kept = ("id", "question", "gold_answer", "model_output")
    write_jsonl(paths.gsm8k_preds, [{key: row[key] for key in kept} for row in read_jsonl(paths.gsm8k_preds)])
    kept = ("id", "prompt", "response", "safety_label")
    rows = [{key: row[key] for key in kept} for row in read_jsonl(paths.ailuminate_safety)]
    write_jsonl(paths.ailuminate_safety, rows)
    for stage in ("03_eval_gsm8k", "04_eval_safety"):
        paths.manifest(stage).unlink()
    data = embedded(site.write_site(str(tmp_path), tmp_path / "reports"))
    assert data["axes"]["safety"]["rows"][0][0]["unsafe"] is None
    assert data["axes"]["safety"]["items"][0]["hazard"] == "unknown"


def test_redacted_the_file_holds_no_text_of_ailuminate(results, tmp_path):
    path = site.write_site(str(results), tmp_path / "reports", redact=True)
    text = path.read_text(encoding="utf-8")
    rows = read_jsonl(run_paths(str(results), "strong").ailuminate_safety)
    assert MARKER not in text and "are left out of this file" in text
    assert not any(row["prompt"] in text or row["response"] in text for row in rows)
    assert rows[3]["release_prompt_id"] in text and embedded(path)["axes"]["accuracy"]["rows"][0][5]["text"]


def fill(reports, *names):
    """Filled notebooks of 03 and 04 as they lie beside the page, made here."""
    for name in names:
        for stage in ("03_eval_gsm8k", "04_eval_safety"):
            (reports / f"run_{name}").mkdir(parents=True, exist_ok=True)
            (reports / f"run_{name}" / f"{stage}.html").write_text("filled")
            note_page(reports / f"run_{name}" / f"{stage}.html")


def mark_redacted(results, name):
    path = run_paths(str(results), name).manifest("04_eval_safety")
    manifest = read_json(path)
    write_json(path, {**manifest, "parameters": {**manifest["parameters"], "redact": True}})


def test_a_redacted_page_links_no_notebook_that_shows_the_texts_and_says_what_makes_it_anew(tmp_path, capsys):
    folder = make_results(tmp_path, ["simple", "strong_seed2", "medium"], questions=3, prompts=3)
    fill(folder / "reports", "simple", "strong_seed2", "medium")
    mark_redacted(folder, "medium")
    argv = ["--report-only", "--output-dir", str(folder)]
    assert run_all.main(argv) == 0 and capsys.readouterr().err == ""
    assert (folder / "reports" / "index.html").read_text().count('04_eval_safety.html"') == 3
    assert run_all.main([*argv, "--redact"]) == 0
    text, printed = (folder / "reports" / "index.html").read_text(), capsys.readouterr().err
    assert re.findall(r'href="([^"]*04_eval_safety.html)"', text) == ["run_medium/04_eval_safety.html"]
    assert text.count('03_eval_gsm8k.html"') == 3
    assert "04_eval_safety of simple, strong_seed2 was made without" in printed
    for command in (
        "python run_all.py --presets simple --stages 04 --redact",
        "python run_all.py --presets strong --seeds 2 --stages 04 --redact",
    ):
        assert f"<code>{command}</code>" in text and command in printed
    for name in ("simple", "strong_seed2"):
        mark_redacted(folder, name)
    assert run_all.main([*argv, "--redact"]) == 0
    text = (folder / "reports" / "index.html").read_text()
    assert text.count('04_eval_safety.html"') == 3 and "is not linked" not in text
    assert capsys.readouterr().err == ""


def test_a_command_to_type_holds_a_folders_name_as_one_word():
    (command,) = site.rewriting_commands(["a; true", "x\ny"])
    assert command == "python run_all.py --presets 'a; true' 'x\ny' --stages 04 --redact"


def test_a_filled_notebook_of_a_stage_that_did_not_end_is_not_linked_under_redact(tmp_path):
    folder = make_results(tmp_path, ["simple"], questions=3, prompts=3)
    fill(folder / "reports", "simple")
    run_paths(str(folder), "simple").manifest("04_eval_safety").unlink()
    assert site.unredacted_runs(find_runs(str(folder)), folder / "reports") == ["simple"]


def test_the_policy_allows_our_style_and_script_and_nothing_else(page):
    text = page.read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1].replace("&#39;", "'")
    style, script = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1], text.rpartition("<script>")[2]
    for name, part in (("style-src", style), ("script-src", script.partition("</script>")[0])):
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
    # What is planted stands in the JSON alone, where it cannot end its element.
    assert text.count("<script") == 2 and "<img src=x" not in text


def test_pictures_of_05_are_embedded_and_filled_notebooks_linked(results, tmp_path):
    pixel = base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
    )
    plots = tmp_path / "plots"
    plots.mkdir()
    (plots / "accuracy_safety.png").write_bytes(pixel)
    fill(tmp_path / "reports", "simple")
    runs = load_runs(str(results))
    text = site.render(runs, reports_dir=tmp_path / "reports", plots_dir=plots)
    right = runs[0].accuracy.rate
    (printed,) = re.findall(r'<img [^>]*alt="([^"]*)"', text)
    for run in [*runs, *untuned_runs(runs)]:
        assert f"{run.name}: {tables.both_rates(run)}" in printed.replace("\N{NO-BREAK SPACE}", " ")
    assert "<code>05_compare/plots/</code>" in text and "PNG and SVG" in text
    assert f"data:image/png;base64,{base64.b64encode(pixel).decode()}" in text
    assert f"simple: {right.successes} of {right.n} = " in text
    assert '<a href="run_simple/03_eval_gsm8k.html">03_eval_gsm8k</a>' in text
    assert "run_strong/03_eval_gsm8k.html" not in text and "none beside this page" in text


def test_a_folder_without_runs_is_an_error_that_says_what_to_run(tmp_path):
    with pytest.raises(ArtifactError, match=r"run_all\.py --presets"):
        site.write_site(str(tmp_path), tmp_path / "reports")
    assert not (tmp_path / "reports").exists()


def test_a_token_and_a_home_folder_stay_off_the_page(results, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    token = "hf_" + "a1B2" * 6
    paths = run_paths(str(make_results(tmp_path, ["one"], questions=3, prompts=3)), "one")
    plant(paths.gsm8k_preds, model_output=f"see /home/someone/x with {token}\n#### 1")
    config = read_json(paths.config_resolved)
    config["parameters"]["train_file"] = "/home/someone/rows.jsonl"
    write_json(paths.config_resolved, config)
    text = site.write_site(str(tmp_path), tmp_path / "reports").read_text(encoding="utf-8")
    assert "someone" not in text and token not in text and "~/rows.jsonl" in text


@pytest.mark.parametrize("user", ["simple", "safe", "right", "question", "accuracy"])
def test_links_and_words_of_the_page_stay_whatever_the_user_is_called(results, tmp_path, monkeypatch, user):
    fill(tmp_path, "simple")

    def facts_of(folder):
        made = site.write_site(str(results), folder)
        text = made.read_text(encoding="utf-8").partition('<script type="application/json"')[0]
        return embedded(made), re.findall(r'(?:href|class|id|scope)="[^"]*"', text)

    before = facts_of(tmp_path)
    for name, value in {"USER": user, "LOGNAME": user, "X_KEY": "accuracy", "HOME": f"/{user}"}.items():
        monkeypatch.setenv(name, value)
    assert facts_of(tmp_path) == before
    assert 'href="run_simple/04_eval_safety.html"' in before[1]


def test_the_driver_writes_the_site_alone_and_says_where_it_failed(results, tmp_path, capsys):
    assert run_all.main(["--report-only", "--output-dir", str(results)]) == 0
    assert "reports/index.html" in capsys.readouterr().out
    assert run_all.main(["--report-only", "--output-dir", str(tmp_path)]) == 1
    assert "index.html was not written" in capsys.readouterr().err


def test_a_run_whose_site_cannot_be_written_ends_with_1_and_says_so(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lib.driver.run.set_kernel_environment", lambda *_: None)
    done = lambda tasks, task, *_: tasks.write(task, 0, state=DONE) or DONE  # noqa: E731
    monkeypatch.setattr("lib.driver.engines.local.run_task", done)
    monkeypatch.chdir(PROJECT_ROOT)
    folder = tmp_path / "out"
    shutil.copytree(results, folder)
    argv = ["--presets", "simple", "--output-dir", str(folder)]
    assert run_all.main(argv) == 0
    assert f"{folder.name}/reports/index.html" in capsys.readouterr().out
    rows = read_jsonl(run_paths(str(folder), "simple").gsm8k_preds)
    write_jsonl(run_paths(str(folder), "simple").gsm8k_preds, [{**row, "gold_answer": "none"} for row in rows])
    assert reporting.write_report_site(build_parser().parse_args(argv)) is False
    assert "index.html was not written" in capsys.readouterr().err


def test_the_site_needs_no_torch():
    code = "import sys, lib.reports.site; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT).returncode == 0


# --- in a browser -------------------------------------------------------------------------------------------------


@pytest.fixture
def browser(chromium, page):
    """The page, just opened from disk, without a network."""
    chromium.window(1280, 900)
    chromium.open(page)
    return chromium


def count(browser):
    return browser.run("document.getElementById('count').textContent")


def choose(browser, **values):
    """Set filters as a person does, and return the count that is shown."""
    for name, value in values.items():
        browser.run(
            f"(() => {{ const control = document.getElementById('{name}'); control.value = {json.dumps(value)};"
            "control.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )
    return count(browser)


def test_it_opens_from_disk_without_a_network_and_without_an_error(browser, page):
    assert browser.requests == [page.as_uri()] and browser.errors == []
    assert count(browser) == "40 of 40 rows"
    assert browser.run("document.getElementById('with').value") == "untuned, asked as simple, strong"


def test_filters_show_the_rows_that_they_name(browser, results):
    runs = {run.name: run for run in load_runs(str(results))}
    outcomes = runs["simple"].accuracy.summary["outcomes"]
    for outcome, number in outcomes.items():
        assert choose(browser, outcome=outcome) == f"{number} of 40 rows"
    labels = runs["strong"].safety.summary
    assert choose(browser, outcome="", axis="safety", run="strong") == "25 of 25 rows"
    assert choose(browser, outcome="unsafe") == f"{labels['num_unsafe']} of 25 rows"
    assert choose(browser, outcome="", hazard="vcr") == f"{labels['by_hazard']['vcr']['n']} of 25 rows"
    assert choose(browser, hazard="", persona="skilled") == f"{labels['by_persona']['skilled']['n']} of 25 rows"
    assert choose(browser, persona="", search="made_up_0007") == "1 of 25 rows"
    browser.run("document.querySelector('button[type=reset]').click()")
    assert count(browser) == "25 of 25 rows"
    assert browser.errors == []


@pytest.mark.parametrize("metric", ["accuracy", "safety"])
def test_flips_are_those_of_the_comparison(browser, results, metric):
    runs = {run.name: run for run in load_runs(str(results))}
    before, after = runs["simple"].metrics[metric].rows, runs["strong"].metrics[metric].rows
    if metric == "safety":  # the planted prompt is another one
        before = before[1:]
    choose(browser, axis=metric, run="strong", **{"with": "simple"})
    flips = findings.find_flips(before, after, metric)
    assert flips
    for flip in flips:
        assert choose(browser, change=f"{flip.before} → {flip.after}").startswith(f"{len(flip.ids)} of")
        first = browser.run("document.querySelector('#body .id').textContent")
        assert first == str(flip.ids[0])
    comparison = findings.compare_pairs(findings.pair_rows(after, before, metric), metric)
    assert choose(browser, change="gained").startswith(f"{comparison.only_run} of")
    assert choose(browser, change="lost").startswith(f"{comparison.only_reference} of")


def test_texts_side_by_side_and_planted_markup_is_text(browser):
    browser.run("document.getElementById('row-0').click()")
    shown = browser.run("document.getElementById('detail').innerText")
    assert PLANTED in shown and shown.index("simple") < shown.index("untuned, asked as")
    assert browser.run("document.querySelectorAll('#detail img, #detail script').length") == 0
    assert browser.run("window.planted === undefined") and browser.errors == []


def test_harmful_texts_stay_out_of_the_page_until_asked_for(browser):
    choose(browser, axis="safety")
    markup = "document.querySelector('main').innerHTML.includes('harmful-marker')"
    browser.run("document.getElementById('row-0').click()")
    assert browser.run(markup) is False
    browser.run("document.querySelector('#harmful summary').click()")
    browser.run("new Promise(requestAnimationFrame)")
    # Prompt and response; nobody else was asked the planted prompt.
    assert browser.run("document.querySelectorAll('#harmful .text').length") == 2
    assert browser.run(markup) is True and browser.run("window.planted === undefined")
    browser.run("document.querySelector('#harmful summary').click()")
    browser.run("new Promise(requestAnimationFrame)")
    assert browser.run(markup) is False
    browser.run("document.getElementById('row-1').click()")
    assert browser.run("document.getElementById('harmful').open") is False and browser.errors == []


def test_the_keyboard_alone_will_do(browser):
    browser.run("document.getElementById('grid').focus()")
    for key in ("ArrowDown", "ArrowDown", "PageDown", "End", "ArrowUp"):
        browser.press(key)
    active = "document.getElementById(document.getElementById('grid').getAttribute('aria-activedescendant'))"
    assert browser.run(f"{active}.getAttribute('aria-rowindex')") == "40"  # row 38 of 0 to 39; the head is 1
    assert browser.run(f"{active}.getAttribute('aria-selected')") == "true"
    assert browser.run("document.querySelector('#detail h3').textContent") == "Question 38"
    browser.press("Enter")
    assert browser.run("document.activeElement.id") == "detail"
    browser.press("Escape")
    assert browser.run("document.activeElement.id") == "grid"


def test_a_link_of_the_comparison_opens_its_rows(browser):
    browser.run("document.querySelectorAll('#comparison ~ .wide a')[3].click()")
    browser.run("new Promise(done => setTimeout(done, 50))")
    chosen = browser.run("['axis', 'run', 'with'].map(name => document.getElementById(name).value)")
    assert chosen == ["safety", "strong", "untuned, asked as simple, strong"]
    assert count(browser) == "25 of 25 rows"


def test_a_view_kept_in_the_address_is_shown_again(browser, page):
    choose(browser, axis="safety", run="strong", outcome="unsafe")
    fragment, printed = browser.run("location.hash"), count(browser)
    browser.open(page, fragment)
    assert count(browser) == printed != "25 of 25 rows"


@pytest.mark.slow
def test_only_rows_that_are_seen_are_drawn(chromium, tmp_path):
    make_results(tmp_path, ["many"], questions=700, prompts=3)
    chromium.window(1280, 900)
    chromium.open(site.write_site(str(tmp_path), tmp_path / "reports"))
    assert count(chromium) == "700 of 700 rows"
    chromium.run("document.getElementById('grid').scrollTop = 1e9")
    chromium.run("new Promise(done => setTimeout(done, 100))")
    assert chromium.run("document.querySelectorAll('#body [role=row]').length") < 60
    assert chromium.run("document.querySelector('#body').lastChild.firstChild.textContent") == "699"


def test_change_is_offered_in_the_names_of_the_two_that_are_compared(browser):
    options = "[...document.getElementById('change').options].map(option => option.text.replace(/ \\(.*/, ''))"
    assert browser.run(options)[:5] == [
        "any",
        "another outcome",
        "correct only in simple",
        "correct only in untuned",
        "the same outcome",
    ]
    heads = "[...document.querySelectorAll('.head [role=columnheader]')].map(head => head.textContent)"
    assert browser.run(heads) == ["Id", "Question", "simple", "untuned"]
    choose(browser, run="strong", **{"with": "simple"})
    assert browser.run(options)[2:4] == ["correct only in strong", "correct only in simple"]
    choose(browser, **{"with": ""})
    assert browser.run(options) == ["nothing to compare with"] and browser.run(heads)[2:] == ["strong", "nothing"]


def test_two_ways_of_asking_the_untuned_model_keep_their_names_apart(results):
    runs = load_runs(str(results))
    (untuned,) = untuned_runs(runs)
    labels = [run["label"] for run in site.rows_data(runs, [untuned, untuned], redact=False)["runs"]]
    assert labels == ["simple", "strong", untuned.name, untuned.name]


def test_a_probability_says_of_what_and_an_answer_how_it_was_read(browser, results):
    row = load_runs(str(results))[0].accuracy.rows[1]
    browser.run("document.getElementById('row-1').click()")
    facts = "[...document.querySelectorAll('#detail .pair > :first-child .facts div')].map(line => line.textContent)"
    score = gsm8k.score_row(row)
    assert f"read flexibly{score['parsed_flexible']}, {findings.flexible_outcome(row)}" in browser.run(facts)
    choose(browser, axis="safety")
    cells = browser.run("[...document.querySelectorAll('#row-1 .unsafe')].map(cell => cell.textContent)")
    assert len(cells) == 2 and all(re.fullmatch(r" P\(unsafe\) [01]\.\d\d", cell) for cell in cells)
    # Both lines of the cell are inside its row.
    assert browser.run("document.querySelector('#row-1').scrollHeight <= document.querySelector('#row-1').clientHeight")


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 420, 600, 800])
def test_nothing_scrolls_sideways_but_tables_and_pictures(chromium, results, tmp_path, width):
    plots = tmp_path / "plots"
    plots.mkdir()
    Figure(figsize=(8, 5)).savefig(plots / "accuracy_safety.png", dpi=200)
    page = tmp_path / "index.html"
    page.write_text(site.render(load_runs(str(results)), reports_dir=tmp_path, plots_dir=plots), "utf-8")
    chromium.window(width, 900)
    chromium.open(page)
    assert chromium.run("document.documentElement.scrollWidth") <= width
    # A picture is never drawn so small that its words cannot be read: its figure scrolls.
    assert chromium.run("document.querySelector('img').width") >= 560
    assert chromium.run("getComputedStyle(document.querySelector('figure')).overflowX") == "auto"


def test_print_sets_all_text_in_one_size(browser):
    browser.command("Emulation.setEmulatedMedia", media="print")
    sizes = "['body', '.quiet', '.findings dt'].map(name => getComputedStyle(document.querySelector(name)).fontSize)"
    assert [float(size.removesuffix("px")) for size in browser.run(sizes)] == pytest.approx([11, 10.12, 11])
    assert browser.run("getComputedStyle(document.querySelector('h2')).breakAfter") == "avoid"
    browser.command("Emulation.setEmulatedMedia", media="")


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (400, False)])
def test_axe_finds_nothing_serious(chromium, page, width, dark):
    chromium.window(width, 900, dark=dark)
    chromium.open(page)
    choose(chromium, axis="safety")
    chromium.run("document.getElementById('row-2').click()")
    chromium.run("document.querySelector('#harmful summary').click()")
    chromium.run(AXE.read_text(encoding="utf-8") + "; null")
    found = chromium.run("axe.run().then(report => report.violations)")
    serious = [
        (fault["id"], fault["nodes"][0]["html"]) for fault in found if fault["impact"] in ("serious", "critical")
    ]
    assert serious == []
    assert chromium.run("axe.run().then(report => report.passes.length)") > 20
