"""Pages that others hand in are named and not linked, and nothing is written or read through a link."""

import base64
import os
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from made_up import make_results

import run_all
from lib.record.manifest import start_stage
from lib.record.paths import ArtifactError, run_paths
from lib.reports import pages, site

SCRIPT = "<script>alert(1)</script>"
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII=")


@pytest.fixture
def results(tmp_path):
    """A results folder with one run and a page of each kind: made here, and handed in."""
    folder = make_results(tmp_path / "out", ["simple"], questions=3, prompts=3)
    for name in ("run_simple/03_eval_gsm8k", "run_simple/04_eval_safety", "05_compare"):
        write(folder / "reports" / f"{name}.html", f"{SCRIPT}{folder}{name}")
    pages.note_page(folder / "reports" / "run_simple" / "03_eval_gsm8k.html")
    return folder


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def index(results):
    """The page that ``--report-only`` writes, and the pages that it links."""
    assert run_all.main(["--report-only", "--output-dir", str(results)]) == 0
    text = (results / "reports" / "index.html").read_text(encoding="utf-8")
    return text, re.findall(r'href="([^"#]*\.html)"', text)


# --- what the index links -------------------------------------------------------------------------------------------


def test_the_index_links_only_pages_that_were_made_here(results):
    text, links = index(results)
    assert links == ["run_simple/03_eval_gsm8k.html"]
    assert "<code>04_eval_safety.html</code> (as handed in, not checked)" in text
    assert "<code>05_compare.html</code>, is as handed in, not checked" in text
    assert text.count("Opening one may run scripts of whoever wrote it.") == 1
    for name in ("run_simple/04_eval_safety", "05_compare"):
        pages.note_page(results / "reports" / f"{name}.html")
    text, links = index(results)
    assert len(links) == 3 and "handed in, not checked" not in text


def test_a_page_that_was_made_here_and_then_edited_is_not_linked(results):
    page = results / "reports" / "run_simple" / "03_eval_gsm8k.html"
    before = page.read_text()
    page.write_text(before + SCRIPT)
    assert index(results)[1] == []
    # As long as before.
    page.write_text(before.replace("alert(1)", "alert(2)"))
    assert index(results)[1] == []
    page.write_text(before)
    assert index(results)[1] == ["run_simple/03_eval_gsm8k.html"]


def test_a_page_is_known_in_a_results_folder_that_was_moved_and_to_no_other_checkout(results, tmp_path, monkeypatch):
    moved = Path(shutil.move(results, tmp_path / "moved"))
    assert index(moved)[1] == ["run_simple/03_eval_gsm8k.html"]
    monkeypatch.setenv(pages.LEDGER_VARIABLE, str(tmp_path / "of another checkout"))
    assert index(moved)[1] == []


def test_a_name_of_a_run_is_no_markup_where_its_pages_are_named(tmp_path):
    folder = make_results(tmp_path, ["x"], questions=3, prompts=3)
    (folder / "run_x").rename(folder / "run_<b>x")
    for path in (folder / "run_<b>x").glob("*_x.*"):
        path.rename(path.with_name(path.name.replace("_x.", "_<b>x.")))
    write(folder / "reports" / "run_<b>x" / "03_eval_gsm8k.html", SCRIPT)
    text, links = index(folder)
    assert links == [] and "<b>x" not in text.partition('<script type="application/json"')[0]
    assert "<code>03_eval_gsm8k.html</code> (as handed in, not checked)" in text


def test_a_picture_that_05_did_not_record_is_captioned_as_handed_in(results):
    plots = results / "05_compare" / "plots"
    plots.mkdir(parents=True)
    (plots / "accuracy_safety.png").write_bytes(PIXEL)
    caption = "(as handed in: not recorded by 05_compare)"
    assert caption in index(results)[0]
    record = start_stage(plots.parent / "manifest.json", "05_compare", "all runs", {})
    record.finish(inputs=[], outputs=[plots], facts={})
    assert caption not in index(results)[0]
    (plots / "accuracy_safety.png").write_bytes(PIXEL + b"\0")
    assert caption in index(results)[0]


# --- the ledger -----------------------------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page, and an empty ledger of this test."""
    monkeypatch.setenv(pages.LEDGER_VARIABLE, str(tmp_path / "ledger.txt"))
    write(tmp_path / "page.html", "a page")
    return tmp_path / "page.html"


def test_without_a_ledger_that_can_be_written_a_page_is_not_known(page, tmp_path, monkeypatch):
    target = tmp_path / "elsewhere"
    target.write_text("kept")
    (tmp_path / "link").symlink_to(target)
    for place in ("no/such/folder/ledger", ".", "link"):
        monkeypatch.setenv(pages.LEDGER_VARIABLE, str(tmp_path / place))
        pages.note_page(page)
        assert not pages.is_made_here(page)
    assert target.read_text() == "kept"


def test_a_line_that_is_cut_short_takes_no_other_with_it(page, tmp_path):
    (tmp_path / "ledger.txt").write_text(f"{'0' * 40}\n\n {len('a page')}\n")
    assert not pages.is_made_here(page)
    pages.note_page(page)
    assert pages.is_made_here(page)
    (tmp_path / "ledger.txt").write_bytes(b"\xff\n" + (tmp_path / "ledger.txt").read_bytes())
    assert not pages.is_made_here(page), "a ledger that is no text knows no page"


def _note_own(folder):
    for number in range(40):
        write(folder / f"{number}.html", f"{folder.name} {number}")
        pages.note_page(folder / f"{number}.html")


def test_jobs_note_their_pages_side_by_side(page, tmp_path):
    folders = [tmp_path / f"job{number}" for number in range(4)]
    with ProcessPoolExecutor(len(folders)) as jobs:
        list(jobs.map(_note_own, folders))
    made = [path for folder in folders for path in folder.iterdir()]
    assert len(made) == 160 and all(map(pages.is_made_here, made))
    assert not pages.is_made_here(page)


def test_what_is_no_plain_file_of_a_known_size_is_not_read(page, tmp_path, monkeypatch):
    pages.note_page(page)
    (tmp_path / "link.html").symlink_to(page)
    os.mkfifo(tmp_path / "pipe.html")
    with (tmp_path / "sparse.html").open("wb") as stream:
        stream.truncate(1 << 40)

    def refuse(path):
        raise AssertionError(f"{path} is read")

    monkeypatch.setattr(pages, "sha256_file", refuse)
    others = [tmp_path / f"{name}.html" for name in ("link", "pipe", "sparse", "absent")]
    assert not any(map(pages.is_made_here, [*others, tmp_path, Path("/proc/self/maps"), Path("/dev/zero")]))
    with pytest.raises(AssertionError, match="is read"):
        pages.is_made_here(page)


# --- links ----------------------------------------------------------------------------------------------------------


def link_folder(results, victim):
    shutil.rmtree(results / "reports")
    (results / "reports").symlink_to(victim)


def link_run(results, victim):
    shutil.rmtree(results / "reports" / "run_simple")
    (results / "reports" / "run_simple").symlink_to(victim)


def link_file(results, victim):
    (results / "reports" / "index.html").symlink_to(victim / "index.html")


def link_to_nothing(results, victim):
    (results / "reports" / "run_simple" / "01_prepare.ipynb").symlink_to(victim / "new.ipynb")


@pytest.mark.parametrize("make_link", [link_folder, link_run, link_file, link_to_nothing])
@pytest.mark.parametrize("command", [["--report-only"], ["--presets", "simple"]], ids=["report", "run"])
def test_nothing_is_written_through_a_link_of_the_reports(results, tmp_path, capsys, make_link, command):
    victim = tmp_path / "public_html"
    for name in ("index.html", "05_compare.html", ".x.tmp"):
        write(victim / name, "theirs")
    make_link(results, victim)
    assert run_all.main([*command, "--output-dir", str(results)]) == (1 if command == ["--report-only"] else 2)
    printed = capsys.readouterr().err
    assert "is a link: a results folder holds plain files" in printed
    assert {path.name: path.read_text() for path in victim.iterdir()} == dict.fromkeys(
        ("index.html", "05_compare.html", ".x.tmp"), "theirs"
    )


@pytest.mark.parametrize("name", ["lm_eval", "lm_eval/simple"])
def test_nothing_is_exported_through_a_link(results, tmp_path, capsys, name):
    victim = tmp_path / "public_html"
    victim.mkdir()
    (results / name).parent.mkdir(exist_ok=True)
    (results / name).symlink_to(victim)
    assert run_all.main(["--export", "lm-eval", "--output-dir", str(results)]) == 1
    assert "is a link" in capsys.readouterr().err and not list(victim.iterdir())


def test_a_model_is_not_exported_through_a_link(results, tmp_path):
    from lib.reports.to_transformers import export_model

    (results / "models").symlink_to(tmp_path)
    with pytest.raises(ArtifactError, match="is a link"):
        export_model(run_paths(str(results), "simple"))


def test_a_folder_that_is_named_on_the_command_line_may_be_a_link(results, tmp_path):
    (tmp_path / "link").symlink_to(results)
    assert index(tmp_path / "link")[1] == ["run_simple/03_eval_gsm8k.html"]
    with pytest.raises(ArtifactError, match="is a link"):
        site.write_site(str(results), tmp_path / "link")
