"""Small notebooks in the place of the real ones, run by drivers of their own: what tests of the driver use."""

import shutil
import time
from pathlib import Path

import nbformat
import psutil

PROJECT_ROOT = Path(__file__).resolve().parent.parent
# How long what must be stopped would go on: longer than any test waits, however busy the machine is.
LONG_S = 600
PARAMETERS_CELL = 'run_name: str = "sandbox_one"  # name\nresults_dir: str = ""  # folder'
# A driver in another process: arguments are the folder of the notebooks, then its command line.
DRIVER = (
    "import pathlib, sys, run_all; from lib.driver import notebook as execution\n"
    "execution.NOTEBOOKS_DIR = pathlib.Path(sys.argv[1])\n"
    "sys.exit(run_all.main(sys.argv[2:]))\n"
)


def copy_project(folder: Path) -> Path:
    """A copy of the project in ``folder`` without any model, which edits and other runs cannot disturb."""
    project = folder / "project"
    for name in ("lib", "notebooks", "params", "data/sandbox"):
        shutil.copytree(PROJECT_ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(PROJECT_ROOT / "run_all.py", project)
    return project


def write_notebook(path, *codes, parameters=PARAMETERS_CELL):
    """A notebook of these cells after one with its parameters; returns its folder."""
    content = nbformat.v4.new_notebook()
    content.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    content.cells = [nbformat.v4.new_code_cell(code) for code in (parameters, *codes)]
    content.cells[0].metadata["tags"] = ["parameters"]
    Path(path).parent.mkdir(exist_ok=True)
    nbformat.write(content, path)
    return Path(path).parent


def hanging_cell(folder, marker):
    """A cell that is in the middle of a row for as long as it is let.

    ``marker``, an expression, names a file in ``folder`` that is there when the row has begun.
    """
    return (
        "import pathlib, time\nfrom lib.record.rows import RowLog\n"
        f"with RowLog(pathlib.Path({str(folder)!r}, {marker} + '.jsonl'), 'p').complete_rows():\n"
        f"    pathlib.Path({str(folder)!r}, {marker}).touch()\n"
        f"    time.sleep({LONG_S})"
    )


def rows_cell(path, pause_s, num_rows=None):
    """A cell that adds rows to the file ``path``, an expression: so many, or without end until it is stopped."""
    return (
        "import itertools, pathlib, time\nfrom lib.record.rows import RowLog\n"
        f"log = RowLog(pathlib.Path({path}), 'p')\n"
        "with log.complete_rows():\n"
        f"    for number in itertools.islice(itertools.count(len(log.rows)), {num_rows}):\n"
        f"        time.sleep({pause_s})\n"
        "        log.append({'id': number})"
    )


def is_gone(process):
    """Whether a process has ended, also if nobody has waited for it yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(condition, seconds=120.0):
    """What ``condition()`` gives as soon as it is true; fails after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found
