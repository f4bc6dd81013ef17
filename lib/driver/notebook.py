"""One notebook, executed and kept: the parameters it declares, papermill, HTML."""

import ast
import html
import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
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
    from lib.driver.kernel import Interrupts, Session

NOTEBOOKS_DIR = PROJECT_ROOT / "notebooks"
# A loaded machine can be slow to answer: a kernel that does not start is tried once more.
KERNEL_START_TRIES = 2
KERNEL_START_TIMEOUT_S = 120
# A cell's outputs come on another channel, on a starved machine long after its end; nbclient waits 4 s for them.
OUTPUT_TIMEOUT_S = 120
# How nbclient and jupyter_client report a kernel that did not come up, and outputs that did not come.
NO_START = ("Kernel didn't respond", "Kernel died before replying")
NO_OUTPUT = "Timeout waiting for IOPub output"
BANNER_TAG = "run-stopped"
# Key of a notebook's metadata; it is set last, so that a notebook whose driver was killed never looks complete.
COMPLETE_MARK = "run_all"


@dataclass(frozen=True)
class Outcome:
    """How one notebook ended, ``error`` empty if every cell ran; ``headline`` is for the top of the notebook."""

    error: str = ""
    cell: int = 0
    interrupted: bool = False
    headline: str = ""
    notebook: Path = Path()
    wall_s: float = 0.0
    died: bool = False  # the kernel itself, which may run elsewhere or later


STOPPED_BY_HAND = Outcome("interrupted", interrupted=True, headline="Stopped by hand (Ctrl-C or a signal to end).")


def source_notebook(stage: str) -> Path:
    """The notebook that a person opens, without outputs."""
    return NOTEBOOKS_DIR / f"{stage}.ipynb"


def declared_parameters(stage: str) -> dict[str, Any]:
    """Names and defaults of the ``parameters`` cell but PRESET; ValueError if not ``name: type = literal``."""
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
    stage: str,
    output: Path,
    parameters: Mapping[str, Any],
    interrupts: "Interrupts | None" = None,
    *,
    cell_timeout_s: int = 0,
    go_on: str = "",
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Run the stage's notebook with ``parameters`` and keep it, filled, at ``output``; DiskFull if it cannot be saved.

    The outcome reports a cell that raises, a kernel that dies, hangs or never starts, and an interrupt (the first one
    lets the current row finish); the partly filled notebook is kept and names ``go_on``, the command that resumes.
    ``interrupts`` are those of a caller that runs several notebooks; the kernel gets ``environment`` too.
    """
    # With papermill's half a second; --list and --help need neither.
    from lib.driver.kernel import Interrupts, Session

    started = time.perf_counter()
    output.parent.mkdir(parents=True, exist_ok=True)
    with nullcontext(interrupts) if interrupts else Interrupts(tell) as heard:
        session = Session(heard, environment or {})
        try:
            outcome = _run_papermill(stage, output, dict(parameters), cell_timeout_s, session)
        finally:
            session.end()
        interrupted = outcome.interrupted or heard.count > 0
        if output.exists():
            _keep(output, outcome, go_on)
    error = outcome.error
    if "No space left on device" in error or "Disk quota exceeded" in error:
        error += f"\n  {full_disk_text(output)}"
    wall_s = time.perf_counter() - started
    return replace(outcome, error=error, interrupted=interrupted, notebook=output, wall_s=wall_s)


def _run_papermill(
    stage: str, output: Path, parameters: dict[str, Any], cell_timeout_s: int, session: "Session"
) -> Outcome:
    for attempt in range(1, KERNEL_START_TRIES + 1):
        try:
            return _run_once(stage, output, parameters, cell_timeout_s, session)
        except RuntimeError as failure:
            if not str(failure).startswith(NO_START):
                raise
            if session.interrupts.count:
                return STOPPED_BY_HAND
            error = f"the kernel did not start in {KERNEL_START_TRIES} tries: {failure}"
            if attempt < KERNEL_START_TRIES:
                tell(f"  the kernel did not start (try {attempt} of {KERNEL_START_TRIES}), trying again")
    return Outcome(error, headline="The kernel did not start: no cell was run.", died=True)


def _run_once(stage: str, output: Path, parameters: dict[str, Any], cell_timeout_s: int, session: "Session") -> Outcome:
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    from lib.driver.kernel import StopAsked

    _use_record_files()
    # Relative, because papermill writes them into the notebook; it fills parameters into `{name}`.
    places = [display_path(path).replace("{", "{{").replace("}", "}}") for path in (source_notebook(stage), output)]
    try:
        papermill.execute_notebook(
            *places,
            parameters=parameters,
            # Words of the protocol, whatever the notebook was last saved with; no kernelspec is looked up.
            kernel_name="python3",
            language="python",
            cwd=str(PROJECT_ROOT),
            progress_bar=False,
            start_timeout=KERNEL_START_TIMEOUT_S,
            execution_timeout=cell_timeout_s or None,
            iopub_timeout=OUTPUT_TIMEOUT_S,
            kernel_manager_class=session.manager(),
            on_cell_start=session.interrupts.refuse_cell,
        )
    except papermill.PapermillExecutionError as failure:
        # Without the traceback, which the notebook holds.
        by_hand = failure.ename == "KeyboardInterrupt"
        error = ": ".join(part for part in (failure.ename, failure.evalue) if part)[:MAX_ERROR_LENGTH]
        return Outcome(error, failure.cell_index, by_hand, STOPPED_BY_HAND.headline if by_hand else "")
    except (KeyboardInterrupt, StopAsked):
        return STOPPED_BY_HAND
    except DeadKernelError:
        if session.interrupts.count:
            return STOPPED_BY_HAND
        words = clean(session.last_words())
        last = f"; its last words: {words}" if words else ""
        headline = (
            "The kernel died while a cell was running. The operating system often ends it when memory runs out: "
            "a smaller eval_batch_size, train_batch_size or model needs less."
        )
        return Outcome(f"the kernel died: often there was too little memory{last}", headline=headline, died=True)
    except CellTimeoutError as failure:
        if NO_OUTPUT in str(failure):
            late = f"the outputs of a cell did not come within {OUTPUT_TIMEOUT_S} s of its end: is the machine starved?"
            return Outcome(late, headline="The outputs of a cell that had ended did not come.")
        error = f"a cell took over {cell_timeout_s} s (--cell-timeout), its kernel was ended"
        return Outcome(error, headline=f"{error.capitalize()}.")
    return Outcome()


@cache
def _use_record_files() -> None:
    """Let papermill write atomically, so that a kill leaves no half notebook, and without the names of homes."""
    from papermill.iorw import LocalHandler, papermill_io

    class RecordFiles(LocalHandler):
        # Paths start at the project, whatever the working directory is.
        def read(self, path: str) -> str:
            return (PROJECT_ROOT / path).read_text(encoding="utf-8")

        def write(self, content: str, path: str) -> None:
            _save(PROJECT_ROOT / path, json.loads(content))

    papermill_io.register("", RecordFiles())


def _save(path: Path, notebook: dict[str, Any]) -> None:
    write_text(path, json_text(clean_notebook(notebook), indent=1))


def _keep(notebook: Path, outcome: Outcome, go_on: str) -> None:
    """Add the banner of a notebook that stopped, write its HTML, and last the mark of one that is complete."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    # A report begins with its summary: JupyterLab collapses the code above the first section, and opens it on a click.
    for cell in takewhile(lambda cell: not "".join(cell["source"]).startswith("## "), content["cells"]):
        if cell["cell_type"] == "code":
            cell["metadata"].setdefault("jupyter", {})["source_hidden"] = True
    if outcome.headline:
        content["cells"].insert(0, _banner(outcome.headline, go_on))
    _save(notebook, content)
    write_html(notebook)
    if not outcome.error:
        content["metadata"][COMPLETE_MARK] = {"complete": True}
        _save(notebook, content)


def _banner(headline: str, go_on: str) -> dict[str, Any]:
    command = f" To go on: <code>{html.escape(visible(go_on))}</code>." if go_on else ""
    kept = "Finished rows and checkpoints are kept; the cells below ran as far as their outputs show."
    style = "border-left:5px solid #D55E00;background:#FFF3E8;color:#222222;padding:.6em 1em"
    text = f'<div role="alert" style="{style}"><b>{html.escape(headline)}</b> {kept}{command}</div>'
    return {"cell_type": "markdown", "id": BANNER_TAG, "metadata": {"tags": [BANNER_TAG]}, "source": text}


def is_complete(notebook: Path) -> bool:
    """Whether a filled notebook and its HTML are there and every cell of it ran."""
    if not (notebook.is_file() and notebook.with_suffix(".html").is_file()):
        return False
    try:
        content = json.loads(notebook.read_text(encoding="utf-8"))
        return bool(content["metadata"][COMPLETE_MARK]["complete"])
    except (ValueError, LookupError, TypeError):
        return False
