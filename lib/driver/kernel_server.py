"""A process that has imported what the notebooks import, and forks kernels.

Importing torch, transformers and peft takes a kernel 6 to 15 seconds on two cores; the server does it once per run. It
refuses where a fork would not be sound: threads run, or torch sees a GPU, whose driver does not survive a fork.
Requests and answers are lines of JSON on a socket. It imports nothing of ``lib``: a kernel reads the code on disk.
"""

import atexit
import ctypes
import gc
import importlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
# "0": every kernel is started plainly.
SERVER_VARIABLE = "FORK_KERNELS"
# Read when a library is loaded: pictures in the notebook, as in ipykernel; no threads of OpenBLAS or Arrow's allocator.
SERVER_ENVIRONMENT = {
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
# What the notebooks' modules import; transformers loads its slow submodules lazily, so they are named.
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
    """What a new process calls first, so that Linux kills it with its parent; ipykernel looks only once per second."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)

    def before_start() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            # The parent ended before the call.
            os._exit(1)

    return before_start


def preload() -> str:
    """Import everything; returns why no kernel may be forked from here, "" if one may."""
    import torch

    if torch.cuda.is_available():
        return "torch sees a GPU"
    for name in PRELOADED:
        # A machine may do without bitsandbytes.
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    # The collector would write to every page that kernels share with their server.
    gc.collect()
    gc.freeze()
    num_threads = len(list(Path("/proc/self/task").iterdir()))
    return f"{num_threads} threads run" if num_threads > 1 else ""


def become_kernel(request: Mapping[str, Any], server: int) -> None:
    """Run the kernel that ``request`` describes in this forked process, then end it."""
    die_with(server)()
    # For top; the command line stays the server's.
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

    # Or every kernel would draw the same numbers; the fork seeds Python's own generator again.
    np.random.seed()
    sys.argv = [ipykernel_launcher.__file__, *request["arguments"]]
    # ipykernel read its variable when the server imported it; without a parent it prints how to end it by hand.
    launch_new_instance(parent_handle=server)
    # Run the exit handlers; unloading every module would take seconds.
    atexit._run_exitfuncs()
    os._exit(0)


def _redirect(descriptor: int, path: str, flags: int) -> None:
    opened = os.open(path, flags)
    os.dup2(opened, descriptor)
    os.close(opened)


def fork_on_request(stream: IO[str]) -> dict[str, Any] | None:
    """Fork a process per request; returns the request in the new process, ``None`` here after the last one."""
    for line in stream:
        pid = os.fork()
        if not pid:
            return json.loads(line)
        print(json.dumps({"pid": pid}), file=stream, flush=True)
    return None


def main(descriptor: int) -> None:
    """Serve until the other side closes."""
    # The system reaps ended kernels: the driver watches them through handles.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    server, refusal = os.getpid(), preload()
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rw", encoding="utf-8") as stream:
        print(json.dumps({"refusal": refusal}), file=stream, flush=True)
        request = None if refusal else fork_on_request(stream)
    if request is not None:
        become_kernel(request, server)


class KernelServer:
    """A server as a child of this process, started early so that it imports meanwhile; kernels get ``inherited``."""

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
                # The driver passes Ctrl-C on.
                start_new_session=True,
            )
        self._stream = ours.makefile("rw", encoding="utf-8")
        ours.close()
        self._refusal: str | None = None

    def fork(self, arguments: Sequence[str], log: str, environment: Mapping[str, str], folder: str) -> int:
        """Process number of a new kernel that writes to ``log``; 0 if the caller must start one plainly."""
        if self._refusal is None:
            self._refusal = self._answer().get("refusal", "it died")
        if self._refusal:
            return 0
        request = {"arguments": list(arguments), "log": log, "environment": dict(environment), "folder": folder}
        try:
            print(json.dumps(request), file=self._stream, flush=True)
        except BrokenPipeError:
            return 0
        return self._answer().get("pid", 0)

    def _answer(self) -> dict[str, Any]:
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
# Notebooks run in threads, and an answer belongs to the request before it.
_one_request = threading.Lock()


def start(inherited: Sequence[int] = ()) -> None:
    """Start the server of this process, if kernels can be forked and none was started; see ``KernelServer``."""
    global _server
    # Without a pidfd, which is Linux's, a kernel that is not a child could not be watched.
    if _server is None and hasattr(os, "pidfd_open") and os.environ.get(SERVER_VARIABLE) != "0":
        _server = KernelServer(inherited)


def fork_kernel(arguments: Sequence[str], log: str, environment: Mapping[str, str], folder: str) -> int:
    """As ``KernelServer.fork``; also 0 without a server."""
    with _one_request:
        return _server.fork(arguments, log, environment, folder) if _server else 0


def stop() -> None:
    """End the server of this process, if there is one."""
    global _server
    if _server is not None:
        _server.stop()
        _server = None


if __name__ == "__main__":
    main(int(sys.argv[1]))
