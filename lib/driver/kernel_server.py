"""A process that has imported what the notebooks import, and forks a kernel from it in the time of a system call.

    python -P lib/kernel_server.py FD

Importing torch, transformers and peft takes a kernel 6 to 15 seconds on two cores. The server does it once for all
stages of a run. It refuses to serve where a fork would not be sound: threads were started, or torch sees a GPU, whose
driver does not survive a fork. Requests and answers are lines of JSON on the socket ``FD``; only the standard library
is imported above `main`, and nothing of ``lib`` at all: a kernel reads the project's code as it is on disk.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
# "0" in the environment: every kernel is started plainly.
SERVER_VARIABLE = "FORK_KERNELS"
# Read when a library is loaded: pictures in the notebook, as ipykernel asks for them; and no thread of OpenBLAS or of
# Arrow's allocator, which nothing here needs.
SERVER_ENVIRONMENT = {
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
# What the notebooks' modules import from outside the project, the slow submodules of transformers named one by one:
# it loads them lazily.
PRELOADED = (
    "torch",
    "bitsandbytes",
    "peft",
    "transformers.integrations.sdpa_attention",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.trainer",
    "huggingface_hub",
    "matplotlib.pyplot",
    "matplotlib_inline.backend_inline",
    "pandas",
    "pydantic",
    "scipy.stats",
    "statsmodels.stats.contingency_tables",
    "statsmodels.stats.power",
    "statsmodels.stats.proportion",
    "ipykernel.kernelapp",
)


def die_with(parent: int) -> Callable[[], None] | None:
    """What a new process does first: ask Linux for its own end when its parent ends.

    Elsewhere ipykernel looks for its parent once a second, which a long call into C can hold up.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)

    def before_start() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            # The parent was gone before the wish was heard.
            os._exit(1)

    return before_start


def preload() -> str:
    """Import everything; returns why no kernel may be forked from here, "" where one may."""
    import torch

    if torch.cuda.is_available():
        return "torch sees a GPU"
    for name in PRELOADED:
        importlib.import_module(name)
    # The collector would write to every page that kernels share with their server.
    gc.collect()
    gc.freeze()
    num_threads = len(list(Path("/proc/self/task").iterdir()))
    return f"{num_threads} threads run" if num_threads > 1 else ""


def become_kernel(request: Mapping[str, Any], server: int) -> None:
    """Turn this forked process into the kernel that ``request`` describes, and end it with that."""
    die_with(server)()
    # As what it is shown by top; its command line stays the server's.
    ctypes.CDLL(None).prctl(PR_SET_NAME, b"ipykernel")
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _redirect(0, os.devnull, os.O_RDONLY)
    for stream in (1, 2):
        _redirect(stream, request["log"], os.O_WRONLY | os.O_APPEND)
    os.environ.clear()
    os.environ |= request["environment"]
    os.chdir(request["folder"])
    import ipykernel_launcher
    import numpy as np
    from ipykernel.kernelapp import launch_new_instance

    # Else every kernel would draw the same numbers; Python's own generator is seeded again by the fork.
    np.random.seed()
    sys.argv = [ipykernel_launcher.__file__, *request["arguments"]]
    # ipykernel read the variable for it when the server imported it; without one it writes how to end it by hand.
    launch_new_instance(parent_handle=server)
    # What is registered for the end is done; taking every loaded module apart would take seconds.
    atexit._run_exitfuncs()
    os._exit(0)


def _redirect(descriptor: int, path: str, flags: int) -> None:
    opened = os.open(path, flags)
    os.dup2(opened, descriptor)
    os.close(opened)


def fork_on_request(stream: IO[str]) -> dict[str, Any] | None:
    """Fork a process for each request: returns the request in that process, ``None`` here when nobody asks any more."""
    for line in stream:
        pid = os.fork()
        if not pid:
            return json.loads(line)
        print(json.dumps({"pid": pid}), file=stream, flush=True)
    return None


def main(descriptor: int) -> None:
    """Serve until the other side closes."""
    # The system forgets ended kernels by itself: who asked for one watches it through a handle.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    server, refusal = os.getpid(), preload()
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rw", encoding="utf-8") as stream:
        print(json.dumps({"refusal": refusal}), file=stream, flush=True)
        request = None if refusal else fork_on_request(stream)
    if request is not None:
        become_kernel(request, server)


# --- the driver's side ----------------------------------------------------------------------------------------------


class KernelServer:
    """A server as a child of this process; it is started ahead, so that it imports while other things are done.

    Args:
        inherited: descriptors that every kernel inherits, as those of locks.
    """

    def __init__(self, inherited: Sequence[int] = ()) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-Xfrozen_modules=off", __file__, str(theirs.fileno())],
                env=os.environ | SERVER_ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), *inherited],
                preexec_fn=die_with(os.getpid()),
                # Ctrl-C at the terminal is the driver's to pass on.
                start_new_session=True,
            )
        self._stream = ours.makefile("rw", encoding="utf-8")
        ours.close()
        self._refusal: str | None = None

    def fork(self, arguments: Sequence[str], log: str, environment: Mapping[str, str], folder: str) -> int:
        """Process number of a new kernel; 0 where the server died or refuses: then it is to be started plainly.

        Args:
            arguments: of ``ipykernel_launcher``.
            log: file that it writes to what stands in no notebook.
            folder: its working directory.
        """
        if self._refusal is None:
            self._refusal = self._hear().get("refusal", "it died")
        if self._refusal:
            return 0
        request = {"arguments": list(arguments), "log": log, "environment": dict(environment), "folder": folder}
        try:
            print(json.dumps(request), file=self._stream, flush=True)
        except BrokenPipeError:
            return 0
        return self._hear().get("pid", 0)

    def _hear(self) -> dict[str, Any]:
        try:
            return json.loads(self._stream.readline() or "{}")
        except ConnectionResetError:
            return {}

    def stop(self) -> None:
        """End the server, and with it every kernel that still runs."""
        self._process.kill()
        self._process.wait()
        self._stream.close()


_server: KernelServer | None = None


def start(inherited: Sequence[int] = ()) -> None:
    """Start the server of this process, where kernels can be forked and none was started.

    Args:
        inherited: as ``KernelServer``.
    """
    global _server
    # A pidfd is Linux's; without one, a kernel that is no child could not be watched.
    if _server is None and hasattr(os, "pidfd_open") and os.environ.get(SERVER_VARIABLE) != "0":
        _server = KernelServer(inherited)


def fork_kernel(arguments: Sequence[str], log: str, environment: Mapping[str, str], folder: str) -> int:
    """As ``KernelServer.fork``; 0 too where there is no server."""
    return _server.fork(arguments, log, environment, folder) if _server else 0


def stop() -> None:
    """End the server of this process, if there is one."""
    global _server
    if _server is not None:
        _server.stop()
        _server = None


if __name__ == "__main__":
    main(int(sys.argv[1]))
