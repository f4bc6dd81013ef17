"""Kernels that are forked: the same as one that is started plainly, and gone with whoever holds their server.

Ctrl-C, kills and last words are tested in ``test_execution``, which runs its drivers with both kinds.
"""

import json
import os
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
from nbclient import NotebookClient
from small_notebooks import is_gone, wait_for

from lib.driver import kernel_server
from lib.driver.kernel import ForkedKernel, Interrupts, Session
from lib.record.paths import PROJECT_ROOT

# What a notebook may depend on: printed by the kernel itself.
FACTS = """
import json, os, pathlib, sys, threading
before = sorted(name for name in sys.modules if name == "lib" or name.startswith("lib."))
import random
import matplotlib, numpy, torch
json.dumps({
    "argv": sys.argv[:2] + sys.argv[3:], "folder": os.getcwd(), "lib": before, "backend": matplotlib.get_backend(),
    "variable": os.environ.get("ONLY_HERE"), "group": os.getpgid(0) == os.getpid(), "main": __name__,
    "path": [part for part in sys.path if "kernel_server" in part or part.endswith("/lib")],
    "threads": torch.get_num_threads(), "ignored_children": str(__import__("signal").getsignal(17)),
    "shown": pathlib.Path("/proc/self/fd/1").resolve().read_text(),
    "uncommon": [random.random(), numpy.random.random()],
})
"""


def run_cells(*codes):
    """The result of each cell, in one kernel."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in codes])
    folder = {"metadata": {"path": str(PROJECT_ROOT)}}
    NotebookClient(
        notebook, kernel_manager_class=Session(Interrupts(print)).manager(), kernel_name="python3", resources=folder
    ).execute()
    return [cell.outputs[-1]["data"]["text/plain"] if cell.outputs else "" for cell in notebook.cells]


def facts():
    return json.loads(run_cells(FACTS)[0].strip("'"))


@pytest.fixture
def server(forked_kernels):
    """The process that kernels are forked from."""
    return psutil.Process(kernel_server._server._process.pid)


def test_a_forked_kernel_is_like_one_that_was_started(server, monkeypatch):
    monkeypatch.setenv("ONLY_HERE", "since the server was started")
    forked, again = facts(), facts()
    monkeypatch.setattr(kernel_server, "_server", None)
    plain = facts()
    assert forked.pop("uncommon") != again.pop("uncommon") and plain.pop("uncommon")
    assert forked == again == plain
    assert forked["lib"] == [], "the project's code must be read as it is on disk when the stage begins"


def test_a_forked_kernel_has_imported_what_takes_long(server):
    code = "import os, sys; {'torch', 'peft', 'transformers'} <= set(sys.modules)"
    loaded, parent = run_cells(code, "os.getppid()")
    assert (loaded, int(parent)) == ("True", server.pid)


def test_a_server_runs_no_thread_and_no_kernel_stays(server):
    run_cells("1")
    assert server.num_threads() == 1
    wait_for(lambda: not server.children())


def test_a_server_that_ends_takes_its_kernels_with_it(server, tmp_path):
    # The last of the tests with this server. A kernel that finds no connection file writes one.
    connection = tmp_path / "kernel.json"
    kernel = ForkedKernel(kernel_server.fork_kernel(["-f", str(connection)], os.devnull, os.environ, str(tmp_path)))
    wait_for(connection.exists)
    assert kernel.poll() is None
    kernel_server.stop()
    assert kernel.wait(timeout=60) == 0


def test_a_server_that_died_is_no_reason_not_to_start(monkeypatch):
    monkeypatch.setenv(kernel_server.SERVER_VARIABLE, "1")
    kernel_server.start()
    kernel_server._server._process.kill()
    try:
        assert run_cells("1 + 1") == ["2"]
    finally:
        kernel_server.stop()


def test_none_is_started_where_it_is_not_wanted_or_a_kernel_could_not_be_watched(monkeypatch):
    monkeypatch.setattr(kernel_server, "_server", None)
    monkeypatch.setenv(kernel_server.SERVER_VARIABLE, "0")
    kernel_server.start()
    assert kernel_server._server is None
    monkeypatch.setenv(kernel_server.SERVER_VARIABLE, "1")
    monkeypatch.delattr(os, "pidfd_open")
    kernel_server.start()
    assert kernel_server._server is None


@pytest.mark.parametrize(
    ("prelude", "reason"),
    [
        pytest.param("torch.cuda.is_available = lambda: True", "torch sees a GPU", marks=pytest.mark.slow),
        (
            "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
            "2 threads run",
        ),
        pytest.param("", "", marks=pytest.mark.slow),
    ],
)
def test_it_refuses_where_a_fork_is_not_sound(prelude, reason):
    code = f"import torch\n{prelude}\nfrom lib.driver import kernel_server as k\nk.PRELOADED = ()\nprint(k.preload())"
    environment = os.environ | kernel_server.SERVER_ENVIRONMENT
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == reason, done.stderr


def test_a_driver_that_is_killed_takes_its_server_with_it():
    code = "import time\nfrom lib.driver import kernel_server as k\nk.start()\n"
    code += "print(k._server._process.pid, flush=True)\ntime.sleep(600)"
    environment = os.environ | {kernel_server.SERVER_VARIABLE: "1"}
    driver = subprocess.Popen(
        [sys.executable, "-c", code], cwd=PROJECT_ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    server = psutil.Process(int(driver.stdout.readline()))
    time.sleep(0.5)
    driver.kill()
    driver.communicate()
    wait_for(lambda: is_gone(server), seconds=10)
