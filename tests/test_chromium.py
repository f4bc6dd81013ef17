"""The browser of the tests itself: one that hangs is an error with a name, and never a test that hangs."""

import os

import chromium
import pytest


@pytest.fixture
def browser_that(tmp_path, monkeypatch):
    """A function that puts a shell script in the browser's place."""
    monkeypatch.setattr(chromium, "TIMEOUT_S", 0.5)

    def write(script):
        program = tmp_path / "browser"
        program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(chromium, "find_chromium", lambda: str(program))

    return write


@pytest.mark.parametrize("script", ["exec sleep 600", "trap '' TERM; while true; do sleep 0.05; done"])
def test_a_browser_that_never_answers_is_told_and_ended(browser_that, tmp_path, script):
    browser_that(script)
    with pytest.raises(chromium.PageError, match=r"the browser says nothing for 0\.5 s"):
        chromium.Chromium()
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_browser_that_never_reads_is_told(browser_that):
    answer = r'{"id": %d, "result": {"targetId": "t", "sessionId": "s"}}\0'
    browser_that(f"for id in 1 2 3 4 5 6; do printf '{answer}' $id >&4; done; exec sleep 600")
    with chromium.Chromium() as browser, pytest.raises(chromium.PageError, match="the browser reads no command"):
        browser.run("1;" * 100_000)


def test_a_browser_that_ends_is_told(browser_that):
    browser_that("exit 3")
    with pytest.raises(chromium.PageError, match="the browser ended"):
        chromium.Chromium()
