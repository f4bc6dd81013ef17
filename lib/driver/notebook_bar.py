"""The progress of a long call, in the notebook itself: one line, updated in place, for a person at JupyterLab.

Shows what the driver shows on a terminal, from the same row files; the driver's own kernels and tests
show nothing, so that a filled notebook holds no debris of a bar.
"""

import html
import threading
import time
from collections.abc import Mapping
from contextvars import copy_context
from dataclasses import replace
from itertools import count
from typing import Any

from lib.driver.display import Look, RowFile, StageWatch, duration
from lib.record.manifest import someone_looks
from lib.record.paths import RunPaths
from lib.reports.html import Html, show_in_place

SECONDS_BETWEEN_LOOKS = 1.0
# Of a line: nothing is left out, the page wraps it.
UNLIMITED = 10_000
_numbers = count(1)


class NotebookBar:
    """Shows how far a call is while a ``with`` block runs, and at its end one line that stays; may be used again.

    Args:
        paths: the run.
        stage: full name of the stage.
        parameters: of the stage.
        kind: what the rows are, where their file's name does not say it.
        total: how many rows there will be, where no file of the run says it; 0 for unknown.
    """

    def __init__(
        self, paths: RunPaths, stage: str, parameters: Mapping[str, Any], *, kind: str = "", total: int = 0
    ) -> None:
        self._of = (paths, stage, parameters)
        self._kind, self._total = kind, total
        self._stop_asked = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "NotebookBar":
        if someone_looks():
            self._begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread is None:
            return
        self._stop_asked.set()
        self._thread.join()
        self._thread = None
        show_in_place(self._final(stopped=kind is not None), self._display_id, update=True)

    def _begin(self) -> None:
        paths, stage, parameters = self._of
        self._watch = _CallWatch(f"{paths.name} {stage[:2]}", paths, stage, parameters, self._total)
        self._display_id, self._begun_at = f"bar-{next(_numbers)}", time.perf_counter()
        self._stop_asked.clear()
        show_in_place(line_of(self._look()), self._display_id)
        # In the cell's context: what is shown from another thread otherwise belongs to no cell.
        self._thread = threading.Thread(target=copy_context().run, args=(self._show_looks,), daemon=True)
        self._thread.start()

    def _show_looks(self) -> None:
        while not self._stop_asked.wait(SECONDS_BETWEEN_LOOKS):
            show_in_place(line_of(self._look()), self._display_id, update=True)

    def _look(self) -> Look:
        look = self._watch.look(time.perf_counter())
        return replace(look, kind=self._kind) if look.kind and self._kind else look

    def _final(self, stopped: bool) -> Html:
        self._look()
        lines = [self._named(line) for line in self._watch.final_lines()] or ["no new row"]
        word = "stopped" if stopped else "done"
        took = duration(time.perf_counter() - self._begun_at)
        return _plain_line(f"{self._watch.label}  {word} after {took}: {'; '.join(lines)}")

    def _named(self, line: str) -> str:
        return f"{line.split()[0]} {self._kind}" if self._kind else line


class _CallWatch(StageWatch):
    """A watch over one call, which may know better than the files how many rows there will be."""

    def __init__(
        self, label: str, paths: RunPaths, stage: str, parameters: Mapping[str, Any], num_expected: int
    ) -> None:
        self._num_expected = num_expected
        super().__init__(label, paths, stage, parameters)

    def _total(self, file: RowFile) -> int:
        return self._num_expected or super()._total(file)


def line_of(look: Look) -> Html:
    """A look as one line with a bar before it, where it is known how many rows there will be."""
    line = look.line(UNLIMITED)
    bar = f'<progress max="{look.total}" value="{look.done}" aria-hidden="true"></progress> ' if look.total else ""
    return Html(f'<div role="status">{bar}{html.escape(line)}</div>', line)


def _plain_line(line: str) -> Html:
    return Html(f'<div role="status">{html.escape(line)}</div>', line)
