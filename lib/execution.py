"""One notebook, executed and kept: which parameters it declares, papermill, progress outside, HTML.

Knows nothing about presets or the order of stages (``run_all.py``), nor about what a notebook computes. Never imports
torch: the driver must start in under a second, so papermill and nbconvert are imported where they are used.
"""

import ast
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.artifacts import PROJECT_ROOT, display_path, write_text

NOTEBOOKS_DIR = PROJECT_ROOT / "notebooks"
# Two kernels that start at once can race for a port, and a loaded machine can be slow to answer: papermill #511.
KERNEL_START_TRIES = 3
KERNEL_START_TIMEOUT_S = 120


@dataclass(frozen=True)
class Outcome:
    """What became of one notebook; ``error`` is empty when every cell ran."""

    notebook: Path
    wall_s: float
    error: str = ""
    cell: int = 0
    interrupted: bool = False


def source_notebook(stage: str) -> Path:
    """The notebook that a person opens, without outputs."""
    return NOTEBOOKS_DIR / f"{stage}.ipynb"


def declared_parameters(stage: str) -> dict[str, Any]:
    """Names and default values of the stage's ``parameters`` cell, in its order.

    Raises:
        ValueError: the notebook has no such cell, or a line of it is not ``name: type = literal``.
    """
    cells = json.loads(source_notebook(stage).read_text(encoding="utf-8"))["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"notebooks/{stage}.ipynb: {len(tagged)} cells are tagged 'parameters', one is needed")
    statements = ast.parse("".join(tagged[0]["source"])).body
    for statement in statements:
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value):
            raise ValueError(
                f"notebooks/{stage}.ipynb: parameters cell, line {statement.lineno}: not `name: type = literal`"
            )
    return {statement.target.id: ast.literal_eval(statement.value) for statement in statements}


def execute(stage: str, output: Path, parameters: Mapping[str, Any]) -> Outcome:
    """Run the stage's notebook with ``parameters`` and keep it, filled, at ``output``.

    A cell that raises, a kernel that dies and a kernel that never starts are all told in the outcome; the partly
    filled notebook is kept. An interrupt of the person at the keyboard is told as ``interrupted``.
    """
    started = time.perf_counter()
    output.parent.mkdir(parents=True, exist_ok=True)
    error, cell, interrupted = _run_papermill(stage, output, dict(parameters))
    if output.exists():
        write_html(output)
    return Outcome(output, time.perf_counter() - started, error, cell, interrupted)


def _run_papermill(stage: str, output: Path, parameters: dict[str, Any]) -> tuple[str, int, bool]:
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from traitlets.config import Config

    for attempt in range(1, KERNEL_START_TRIES + 1):
        try:
            papermill.execute_notebook(
                # Relative paths: papermill writes them into the notebook, and a home folder is nobody's business.
                display_path(source_notebook(stage)),
                display_path(output),
                parameters=parameters,
                kernel_name="python3",
                cwd=str(PROJECT_ROOT),
                progress_bar=False,
                start_timeout=KERNEL_START_TIMEOUT_S,
                # Sockets in a private folder in place of TCP ports: nobody else can listen, and no two kernels race.
                config=Config({"KernelManager": {"transport": "ipc"}}),
            )
        except papermill.PapermillExecutionError as failure:
            # The first line alone: the whole message lists every fault, and the notebook holds the traceback.
            return f"{failure.ename}: {failure.evalue}", failure.cell_index, failure.ename == "KeyboardInterrupt"
        except KeyboardInterrupt:
            return "interrupted", 0, True
        except (DeadKernelError, CellTimeoutError) as failure:
            return f"the kernel died or hung ({type(failure).__name__}): often out of memory; {failure}", 0, False
        except RuntimeError as failure:
            if "Kernel didn't respond" not in str(failure):
                raise
            if attempt == KERNEL_START_TRIES:
                return f"the kernel did not start in {KERNEL_START_TRIES} tries: {failure}", 0, False
            print(f"  the kernel did not start (try {attempt} of {KERNEL_START_TRIES}), trying again", flush=True)
        else:
            return "", 0, False
    raise AssertionError("unreachable: the last try returns")


def write_html(notebook: Path) -> Path:
    """The filled notebook as one self-contained HTML file beside it."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="lab", embed_images=True)
    # Two assets that the template would load from a network: reports are read on machines without one.
    exporter.require_js_url = exporter.mathjax_url = ""
    body, _ = exporter.from_filename(str(notebook))
    target = notebook.with_suffix(".html")
    write_text(target, body)
    return target


class RowWatch(threading.Thread):
    """Says on the terminal how far a long cell is, by counting the rows that it has written so far.

    papermill counts cells, so a stage of one long cell would look dead; the row files are the truth, and reading
    them needs no word from the kernel.

    Args:
        label: what stands before each line.
        rows_done: gives (rows written, rows expected); (0, 0) while nothing is known.
        every_s: seconds between two looks.
    """

    def __init__(self, label: str, rows_done: Callable[[], tuple[int, int]], every_s: float = 15.0) -> None:
        super().__init__(daemon=True)
        self.label, self.rows_done, self.every_s = label, rows_done, every_s
        self._stop_asked = threading.Event()

    def run(self) -> None:
        first, started, told = self.rows_done()[0], time.perf_counter(), -1
        while not self._stop_asked.wait(self.every_s):
            done, total = self.rows_done()
            if done in (told, first) or not total:
                continue
            told, rate = done, (done - first) / (time.perf_counter() - started)
            left = (total - done) / rate if rate > 0 else 0.0
            print(f"  {self.label}: {done} of {total} rows, {rate:.2f} rows/s, {left:.0f} s left", flush=True)

    def __enter__(self) -> "RowWatch":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_asked.set()
        self.join()


def count_lines(path: Path) -> int:
    """Finished rows of a row file: its newlines; 0 where there is no file."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def fail(message: str) -> None:
    """A message for the person at the keyboard, on standard error."""
    print(message, file=sys.stderr, flush=True)
