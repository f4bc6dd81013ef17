"""A kernel that dies with the driver, inherits its lock, and is stopped by Ctrl-C."""

import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

from lib.driver import kernel_server
from lib.driver.kernel_server import die_with
from lib.record.locks import held_descriptors
from lib.record.manifest import REQUESTED_VARIABLE
from lib.record.paths import is_utf8

# What an idle kernel writes about a signal that it ignores, and about the driver's frozen modules.
IDLE_WORDS = ("[IPKernelApp] KeyboardInterrupt", "0.00s - ")
MAX_LAST_WORDS = 400
# Bytes of a Unix socket's path: sun_path holds 108 with the NUL at its end.
MAX_SOCKET_PATH = 107
# The longest path below a temporary folder: jupyter_client numbers a kernel's five sockets.
LONGEST_NAME = "/kernel-12345678/kernel-ipc-5"
# Where sockets go when $TMPDIR is too long for them; the second one has room also where a container's disk is full.
SHORT_FOLDERS = ("/tmp", "/dev/shm")


class StopAsked(Exception):
    """An interrupt came while no cell was running."""


class ForkedKernel:
    """A kernel that is not a child of this process, with the interface of a Popen; it is watched through a pidfd."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None
        self._handle = os.pidfd_open(pid)

    def poll(self, wait_s: float | None = 0) -> int | None:
        """0 if it ends within ``wait_s`` (None: for ever); its exit status is known only to its parent."""
        if self.returncode is None:
            watch = select.poll()
            watch.register(self._handle, select.POLLIN)
            if watch.poll(None if wait_s is None else wait_s * 1000):
                os.close(self._handle)
                self.returncode = 0
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; raises ``subprocess.TimeoutExpired`` after ``timeout`` seconds."""
        if self.poll(timeout) is None:
            raise subprocess.TimeoutExpired("kernel", timeout)
        return 0

    def send_signal(self, number: int) -> None:
        """Send a signal if it is still running."""
        if self.poll() is None:
            signal.pidfd_send_signal(self._handle, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkingProvisioner(LocalProvisioner):
    """Forks the kernel from the server of this process; starts it plainly without a server, or if it refuses."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """As ``LocalProvisioner``'s; ``stdout`` in ``kwargs`` is the log's open file."""
        environment = {**(kwargs.get("env") or os.environ), "JPY_PARENT_PID": str(os.getpid())}
        environment[REQUESTED_VARIABLE] = str(time.time())
        folder = str(kwargs.get("cwd") or Path.cwd())
        arguments = cmd[cmd.index("ipykernel_launcher") + 1 :]
        pid = kernel_server.fork_kernel(arguments, kwargs["stdout"].name, environment, folder)
        if not pid:
            return await super().launch_kernel(cmd, **{**kwargs, "env": environment})
        # It leads a session: its number is that of its group, too.
        self.process, self.pid, self.pgid, self.cwd = ForkedKernel(pid), pid, pid, folder
        return self.connection_info


class OwnKernelManager(AsyncKernelManager):
    """Starts the kernel so that it cannot outlive the driver, whatever ends the driver."""

    notebook: ClassVar["Session"]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Sockets in a new folder: TCP ports can be listened to by anyone and raced for, and jupyter_client's default is
        # the working directory, which two drivers may share.
        self._folder = _socket_folder()
        self.transport = "ipc"
        self.connection_file = str(Path(self._folder.name) / "kernel.json")

    @property
    def kernel_spec(self) -> KernelSpec:
        """Never looked up: a ``python3`` of a cluster's module, a hub or a home folder is another interpreter."""
        return KernelSpec(display_name="Python 3", language="python")

    def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
        """The interpreter of this process; paths are taken as they are, where jupyter_client fills in ``{prefix}``."""
        # As ipykernel's own kernelspec: the debugger cannot see into frozen modules.
        command = [sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", self.connection_file]
        return [*command, *(extra_arguments or [])]

    async def _async_pre_start_kernel(self, **kw: Any) -> tuple[list[str], dict[str, Any]]:
        if self.provisioner is None:
            spec = self.kernel_spec
            self.provisioner = ForkingProvisioner(kernel_id=self.kernel_id, kernel_spec=spec, parent=self)
        return await super()._async_pre_start_kernel(**kw)

    async def _async_cleanup_resources(self, restart: bool = False) -> None:
        await super()._async_cleanup_resources(restart=restart)
        if not restart:
            self._folder.cleanup()

    async def _async_launch_kernel(self, kernel_cmd: list[str], **kw: Any) -> None:
        # A log file: on the terminal its words would break the line of progress. The kernel inherits the lock on the
        # output folder: another driver must not start while it still writes.
        self.notebook.log_file = Path(self._folder.name) / "kernel.log"
        kw |= {"env": {**(kw.get("env") or os.environ), **self.notebook.environment}}
        with self.notebook.log_file.open("ab") as log:
            await super()._async_launch_kernel(
                kernel_cmd, stdout=log, stderr=log, pass_fds=held_descriptors(), preexec_fn=die_with(os.getpid()), **kw
            )
        self.notebook.begin(self.provisioner.pid)


def _socket_folder() -> tempfile.TemporaryDirectory[str]:
    """A new folder whose path leaves room for sockets and is UTF-8, as an address is; OSError if there is none."""
    for place in (tempfile.gettempdir(), *SHORT_FOLDERS):
        is_short = len(os.fsencode(place + LONGEST_NAME)) <= MAX_SOCKET_PATH
        if is_short and is_utf8(place) and os.access(place, os.W_OK | os.X_OK):
            return tempfile.TemporaryDirectory(prefix="kernel-", dir=place, ignore_cleanup_errors=True)
    raise OSError(
        f"there is no folder for a kernel's sockets: {tempfile.gettempdir()} is longer than "
        f"{MAX_SOCKET_PATH - len(LONGEST_NAME)} bytes or not UTF-8, and {' and '.join(SHORT_FOLDERS)} "
        "cannot be written; set TMPDIR to a short folder"
    )


class Interrupts:
    """Ctrl-C, and a cluster's SIGTERM: the first lets every kernel finish its row, the second ends them now."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell, self.count = tell, 0
        self.kernels: set[int] = set()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        # Python delivers signals only to the main thread.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def refuse_cell(self, **_: Any) -> None:
        """Raise ``StopAsked`` before a cell after an interrupt: an idle kernel ignores the signal."""
        if self.count:
            raise StopAsked

    def stop(self, *_: object) -> None:
        """Pass on one interrupt, by a signal or by a file that asks for it."""
        self.count += 1
        if self.count == 1:
            self.tell("stopping after the current row; Ctrl-C again stops now")
        for pid in list(self.kernels):
            # It may have ended already; whoever waits for it notices.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT if self.count == 1 else signal.SIGKILL)


@dataclass
class Session:
    """The kernels of one notebook, of which one runs at a time; ``environment``: variables beside the driver's own."""

    interrupts: Interrupts
    environment: Mapping[str, str] = field(default_factory=dict)
    # What the latest kernel writes outside its notebook.
    log_file: Path | None = None
    pid: int = 0

    def manager(self) -> type[OwnKernelManager]:
        """The class that papermill makes its kernel manager from."""
        return type("NotebookKernelManager", (OwnKernelManager,), {"notebook": self})

    def begin(self, pid: int) -> None:
        """Pass interrupts on to the kernel ``pid``."""
        self.end()
        self.pid = pid
        self.interrupts.kernels.add(pid)
        if self.interrupts.count > 1:
            os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        """Pass no more on: a process number that is free again may soon be another program's."""
        self.interrupts.kernels.discard(self.pid)

    def last_words(self) -> str:
        """The last lines that the kernel wrote outside its notebook, as a crash in C leaves them; "" without any."""
        log = self.log_file
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log and log.exists() else []
        return "\n".join(line for line in lines if line.strip() and not line.startswith(IDLE_WORDS))[-MAX_LAST_WORDS:]
