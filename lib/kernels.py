"""A notebook's kernel as the driver's own: it dies with the driver, holds its lock, and is stopped by Ctrl-C.

Knows nothing about notebooks. Imports jupyter_client, so it is imported only where a notebook is run.
"""

import ctypes
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, ClassVar

from jupyter_client.manager import AsyncKernelManager

from lib.locks import held_descriptors

PR_SET_PDEATHSIG = 1
# What an idle kernel says to a signal that it ignores, and to the driver's frozen modules.
IDLE_WORDS = ("[IPKernelApp] KeyboardInterrupt", "0.00s - ")
MAX_LAST_WORDS = 400


class StopAsked(Exception):
    """A stop was asked for while no cell was at work."""


class OwnKernelManager(AsyncKernelManager):
    """Starts the kernel so that it cannot outlive the driver, whatever ends the driver."""

    # The process of the kernel that runs now; a driver runs one at a time.
    running_pid: ClassVar[int] = 0
    # What the latest kernel writes past its notebook.
    log_file: ClassVar[Path | None] = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Sockets in a folder of this kernel alone: TCP ports can be listened to by anyone and raced for, and where no
        # folder is named jupyter_client puts them into the working directory, which two drivers may share.
        self._folder = tempfile.TemporaryDirectory(prefix="kernel-", ignore_cleanup_errors=True)
        self.transport = "ipc"
        self.connection_file = str(Path(self._folder.name) / "kernel.json")

    async def _async_cleanup_resources(self, restart: bool = False) -> None:
        await super()._async_cleanup_resources(restart=restart)
        if not restart:
            self._folder.cleanup()

    async def _async_launch_kernel(self, kernel_cmd: list[str], **kw: Any) -> None:
        # A file of its own: on the terminal its words would fall into the line of progress. The kernel inherits the
        # lock on the output folder: another driver must not start while it still writes.
        OwnKernelManager.log_file = Path(self._folder.name) / "kernel.log"
        with OwnKernelManager.log_file.open("ab") as log:
            await super()._async_launch_kernel(
                kernel_cmd,
                stdout=log,
                stderr=log,
                pass_fds=held_descriptors(),
                preexec_fn=die_with(os.getpid()),
                **kw,
            )
        OwnKernelManager.running_pid = self.provisioner.pid


def last_words() -> str:
    """The last lines that the kernel wrote past its notebook, as a crash in C leaves them; "" for none."""
    log = OwnKernelManager.log_file
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log and log.exists() else []
    return "\n".join(line for line in lines if line.strip() and not line.startswith(IDLE_WORDS))[-MAX_LAST_WORDS:]


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


class Interrupts:
    """Ctrl-C, and a cluster's SIGTERM: once lets the kernel finish its row, twice ends it now.

    Args:
        tell: gets a sentence for the person at the keyboard.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell, self.count = tell, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        # Python hands signals to the main thread alone.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        # A number that is free again may soon be another program's.
        OwnKernelManager.running_pid = 0
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def refuse_cell(self, **_: Any) -> None:
        """Called before each cell: an idle kernel ignores the signal, so the next cell must not start.

        Raises:
            StopAsked: a stop was asked for.
        """
        if self.count:
            raise StopAsked

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
        if self.count == 1:
            self.tell("stopping after the row in work; Ctrl-C again stops now")
            _send(signal.SIGINT)
        else:
            _send(signal.SIGKILL)
            raise KeyboardInterrupt


def _send(number: signal.Signals) -> None:
    if OwnKernelManager.running_pid:
        try:
            os.kill(OwnKernelManager.running_pid, number)
        except ProcessLookupError:
            # It ended on its own; whoever waits for it notices.
            OwnKernelManager.running_pid = 0
