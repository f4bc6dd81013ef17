"""One notebook, executed and kept: which parameters it declares, papermill, progress outside, HTML.

Knows nothing about presets or the order of stages (``run_all.py``), nor about what a notebook computes. Never imports
torch: the driver must start in under a second, so papermill and nbconvert are imported where they are used.
"""

import ast
import html
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.record.files import full_disk_text, json_text, write_text
from lib.record.paths import PRESET_VARIABLE, PROJECT_ROOT, display_path
from lib.record.redaction import clean, clean_notebook, visible
from lib.record.terminal import tell
from lib.reports.notebook_page import MAX_ERROR_LENGTH, write_html

if TYPE_CHECKING:
    from lib.driver.kernel import Interrupts


NOTEBOOKS_DIR = PROJECT_ROOT / "notebooks"


# A loaded machine can be slow to answer: a kernel that does not start is tried once more.
KERNEL_START_TRIES = 2


KERNEL_START_TIMEOUT_S = 120


# A cell's outputs come on a way of their own, on a starved machine long after its end; nbclient waits 4 s for them.
OUTPUT_TIMEOUT_S = 120


# What nbclient and jupyter_client say of a kernel that did not come up, and of outputs that did not come.
NO_START = ("Kernel didn't respond", "Kernel died before replying")


NO_OUTPUT = "Timeout waiting for IOPub output"


BANNER_TAG = "run-stopped"


# Key of a notebook's metadata; it is set last, so that a notebook whose driver was killed never looks whole.
COMPLETE_MARK = "run_all"


# What a section of a notebook begins with; above the first one stands what every notebook needs and few read.
SECTION = "## "


@dataclass(frozen=True)
class Outcome:
    """What became of one notebook; ``error`` is empty when every cell ran."""

    notebook: Path
    wall_s: float
    error: str = ""
    cell: int = 0
    interrupted: bool = False


@dataclass(frozen=True)
class _Stop:
    """Why a notebook stopped; ``headline`` stands on top of it where papermill says nothing itself."""

    error: str = ""
    cell: int = 0
    interrupted: bool = False
    headline: str = ""


def source_notebook(stage: str) -> Path:
    """The notebook that a person opens, without outputs."""
    return NOTEBOOKS_DIR / f"{stage}.ipynb"


def declared_parameters(stage: str) -> dict[str, Any]:
    """Names and default values of the stage's ``parameters`` cell, in its order; without ``PRESET``, which sets them.

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
    values = {statement.target.id: ast.literal_eval(statement.value) for statement in statements}
    return {name: value for name, value in values.items() if name != PRESET_VARIABLE}


def execute(
    stage: str, output: Path, parameters: Mapping[str, Any], *, cell_timeout_s: int = 0, go_on: str = ""
) -> Outcome:
    """Run the stage's notebook with ``parameters`` and keep it, filled, at ``output``.

    A cell that raises, a kernel that dies or hangs and one that never starts are all told in the outcome; the partly
    filled notebook is kept and says on top what happened. An interrupt (one lets the row in work finish) is told as
    ``interrupted``.

    Args:
        cell_timeout_s: seconds that a cell may take; 0 for no limit.
        go_on: the command that goes on from here, for the notebook to name.

    Raises:
        DiskFull: the notebook cannot be saved.
        ArtifactError: what was saved is no valid notebook.
    """
    from lib.driver.kernel import Interrupts

    started = time.perf_counter()
    output.parent.mkdir(parents=True, exist_ok=True)
    with Interrupts(tell) as interrupts:
        stop = _run_papermill(stage, output, dict(parameters), cell_timeout_s, interrupts)
        interrupted = stop.interrupted or interrupts.count > 0
        if output.exists():
            _keep(output, stop, go_on)
    error = _with_free_space(stop.error, output)
    return Outcome(output, time.perf_counter() - started, error, stop.cell, interrupted)


def _run_papermill(
    stage: str, output: Path, parameters: dict[str, Any], cell_timeout_s: int, interrupts: "Interrupts"
) -> _Stop:
    for attempt in range(1, KERNEL_START_TRIES + 1):
        try:
            return _run_once(stage, output, parameters, cell_timeout_s, interrupts)
        except RuntimeError as failure:
            if not str(failure).startswith(NO_START):
                raise
            if interrupts.count:
                return _stopped_by_hand()
            if attempt < KERNEL_START_TRIES:
                tell(f"  the kernel did not start (try {attempt} of {KERNEL_START_TRIES}), trying again")
                continue
            error = f"the kernel did not start in {KERNEL_START_TRIES} tries: {failure}"
            return _Stop(error, headline="The kernel did not start: no cell was run.")
    raise AssertionError("unreachable: the last try returns")


def _run_once(
    stage: str, output: Path, parameters: dict[str, Any], cell_timeout_s: int, interrupts: "Interrupts"
) -> _Stop:
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    from lib.driver.kernel import OwnKernelManager, StopAsked, last_words

    _use_record_files()
    try:
        papermill.execute_notebook(
            # Relative paths: papermill writes them into the notebook, and a home folder is nobody's business.
            _as_typed(display_path(source_notebook(stage))),
            _as_typed(display_path(output)),
            parameters=parameters,
            # Words of the protocol, whatever the notebook was last saved with; no kernelspec is looked up.
            kernel_name="python3",
            language="python",
            cwd=str(PROJECT_ROOT),
            progress_bar=False,
            start_timeout=KERNEL_START_TIMEOUT_S,
            execution_timeout=cell_timeout_s or None,
            iopub_timeout=OUTPUT_TIMEOUT_S,
            kernel_manager_class=OwnKernelManager,
            on_cell_start=interrupts.refuse_cell,
        )
    except papermill.PapermillExecutionError as failure:
        # The first line alone: the whole message lists every fault, and the notebook holds the traceback.
        by_hand = failure.ename == "KeyboardInterrupt"
        headline = _stopped_by_hand().headline if by_hand else ""
        error = ": ".join(part for part in (failure.ename, failure.evalue) if part)
        return _Stop(error[:MAX_ERROR_LENGTH], failure.cell_index, by_hand, headline)
    except (KeyboardInterrupt, StopAsked):
        return _stopped_by_hand()
    except DeadKernelError:
        if interrupts.count:
            return _stopped_by_hand()
        words = clean(last_words())
        said = f"; its last words: {words}" if words else ""
        return _Stop(f"the kernel died: often there was too little memory{said}", headline=DEAD_KERNEL)
    except CellTimeoutError as failure:
        if NO_OUTPUT in str(failure):
            error = (
                f"the outputs of a cell did not come within {OUTPUT_TIMEOUT_S} s of its end: is the machine starved?"
            )
            return _Stop(error, headline="The outputs of a cell that had ended did not come.")
        error = f"a cell took over {cell_timeout_s} s (--cell-timeout), its kernel was ended"
        return _Stop(error, headline=f"A cell took over {cell_timeout_s} s (--cell-timeout): its kernel was ended.")
    return _Stop()


def _as_typed(path: str) -> str:
    # papermill fills parameters into `{name}`.
    return path.replace("{", "{{").replace("}", "}}")


DEAD_KERNEL = (
    "The kernel died while a cell was running. The operating system often ends it when memory runs out: "
    "a smaller eval_batch_size, train_batch_size or model needs less."
)


def _stopped_by_hand() -> _Stop:
    return _Stop("interrupted", interrupted=True, headline="Stopped by hand (Ctrl-C or a signal to end).")


@cache
def _use_record_files() -> None:
    from papermill.iorw import papermill_io

    # papermill writes in place, so a kill would leave half a notebook, and what kernels print may name a home.
    papermill_io.register("", _RecordFiles())


class _RecordFiles:
    """papermill's reading and writing of notebooks, relative to the project: whole files, cleaned."""

    def read(self, path: str) -> str:
        return (PROJECT_ROOT / path).read_text(encoding="utf-8")

    def write(self, content: str, path: str) -> None:
        _save(PROJECT_ROOT / path, json.loads(content))

    def pretty_path(self, path: str) -> str:
        return path

    def cwd(self, folder: str | None) -> str | None:
        # papermill notes here where paths start; ours start at the project, whatever the working directory is.
        return folder


def _save(path: Path, notebook: dict[str, Any]) -> None:
    write_text(path, json_text(clean_notebook(notebook), indent=1))


def _keep(notebook: Path, stop: _Stop, go_on: str) -> None:
    """The banner of a notebook that stopped; its HTML; and last the mark of one that is whole."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    _hide_setup(content["cells"])
    if stop.headline:
        content["cells"].insert(0, _banner(stop.headline, go_on))
    _save(notebook, content)
    write_html(notebook)
    if not stop.error:
        content["metadata"][COMPLETE_MARK] = {"complete": True}
        _save(notebook, content)


def _hide_setup(cells: list[dict[str, Any]]) -> None:
    """Hide the code above the first section, so that a report begins with its summary.

    JupyterLab collapses what is marked so and opens it on a click; nothing is taken out.
    """
    for cell in takewhile(lambda cell: not "".join(cell["source"]).startswith(SECTION), cells):
        if cell["cell_type"] == "code":
            cell["metadata"].setdefault("jupyter", {})["source_hidden"] = True


def _banner(headline: str, go_on: str) -> dict[str, Any]:
    command = f" To go on: <code>{html.escape(visible(go_on))}</code>." if go_on else ""
    kept = "Finished rows and checkpoints are kept; the cells below stand as far as they came."
    style = "border-left:5px solid #D55E00;background:#FFF3E8;color:#222222;padding:.6em 1em"
    text = f'<div role="alert" style="{style}"><b>{html.escape(headline)}</b> {kept}{command}</div>'
    return {"cell_type": "markdown", "id": BANNER_TAG, "metadata": {"tags": [BANNER_TAG]}, "source": text}


def is_whole(notebook: Path) -> bool:
    """Whether a filled notebook and its HTML are there and every cell of it ran."""
    if not (notebook.is_file() and notebook.with_suffix(".html").is_file()):
        return False
    try:
        content = json.loads(notebook.read_text(encoding="utf-8"))
        return bool(content["metadata"][COMPLETE_MARK]["complete"])
    except (ValueError, LookupError, TypeError):
        return False


def _with_free_space(error: str, output: Path) -> str:
    # Libraries say it in their own words; which file system it is, and how to go on, they do not.
    plain = "No space left on device" in error or "Disk quota exceeded" in error
    return f"{error}\n  {full_disk_text(output)}" if plain else error
