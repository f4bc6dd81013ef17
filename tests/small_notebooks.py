"""Small notebooks in the place of the real ones, run by drivers of their own: what tests of the driver use."""

import time
from pathlib import Path

import nbformat

PARAMETERS_CELL = 'run_name: str = "sandbox_one"  # name\nresults_dir: str = ""  # folder'
# A driver in a process of its own: arguments are the folder of the notebooks, then its command line.
DRIVER = (
    "import pathlib, sys, run_all; from lib import execution\n"
    "execution.NOTEBOOKS_DIR = pathlib.Path(sys.argv[1])\n"
    "sys.exit(run_all.main(sys.argv[2:]))\n"
)


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
    """A cell that is in the middle of a row for as long as it is let; ``marker``, an expression, names its file."""
    return (
        f"import pathlib, time\npathlib.Path({str(folder)!r}, {marker}).touch()\nfrom lib.artifacts import RowLog\n"
        f"with RowLog(pathlib.Path({str(folder)!r}, {marker} + '.jsonl'), 'p').whole_rows():\n    time.sleep(99)"
    )


def wait_for(condition, seconds=40.0):
    """What ``condition()`` gives as soon as it is true; fails after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found
