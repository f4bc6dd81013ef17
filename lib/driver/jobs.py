"""Several runs at once, each in its own process, with one console and one Ctrl-C for all.

A job is a name and a function that returns JSON. Processes are forked, so that they inherit the driver's locks; they
end with the driver, whatever ends it.
"""

import json
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any, Literal

from lib.driver.display import Board, Look
from lib.driver.kernel_server import die_with

LOOK_AGAIN_S = 0.5
STOPS = (signal.SIGINT, signal.SIGTERM)


class Channel:
    """A job's connection to its driver's console; ``live`` if that is a terminal whose lines can be rewritten."""

    def __init__(self, connection: Connection, live: bool) -> None:
        self._connection, self.live = connection, live

    def show(self, look: Look) -> None:
        """Show the job's progress."""
        self.send("look", asdict(look))

    def send(self, kind: Literal["look", "out", "err", "end", "stopped"], value: Any) -> None:
        """Send one message, as JSON: nothing that comes from a job is ever executed."""
        self._connection.send_bytes(json.dumps([kind, value]).encode())


class _Lines:
    """A text stream that sends its complete lines in one message when flushed, so that jobs do not mix theirs."""

    encoding, errors = "utf-8", "strict"

    def __init__(self, channel: Channel, kind: Literal["out", "err"]) -> None:
        self._channel, self._kind, self._part = channel, kind, ""

    def write(self, text: str) -> int:
        self._part += text
        return len(text)

    def flush(self) -> None:
        """Send the complete lines written since the last flush."""
        lines, newline, self._part = self._part.rpartition("\n")
        if newline:
            self._channel.send(self._kind, lines)

    def isatty(self) -> bool:
        return False


Work = Callable[[Channel], Any]


@dataclass
class _Running:
    name: str
    process: Any
    connection: Connection
    environment: Mapping[str, str]
    result: Any = None
    was_stopped: bool = False


def run_jobs(jobs: Mapping[str, Work], environments: Sequence[Mapping[str, str]], board: Board) -> dict[str, Any]:
    """Run ``jobs`` in order, as many at once as there are ``environments``.

    After Ctrl-C or SIGTERM no further job is started; both signals are passed to all running jobs, each time.

    Args:
        jobs: name -> function for the job's process; its result must be JSON.
        environments: variables for a running job, such as its device; each is used by one job at a time.
        board: shows progress and messages.

    Returns:
        name -> result; ``None`` for a job whose process died. Jobs that never started, or were stopped before they
        returned, are left out.
    """
    left, free = deque(jobs.items()), deque(environments)
    running: list[_Running] = []
    results: dict[str, Any] = {}
    with _stops_passed_on(running) as stops:
        while running or (left and not stops):
            while left and free and not stops:
                # A signal that arrives here is held until it can be passed to the new job too.
                with _stops_blocked():
                    others = [one.connection for one in running]
                    running.append(_start(*left.popleft(), free.popleft(), board.live, others))
            for connection in wait([one.connection for one in running], LOOK_AGAIN_S):
                job = next(one for one in running if one.connection is connection)
                if not _hear(job, board):
                    running.remove(job)
                    free.append(job.environment)
                    if not job.was_stopped:
                        results[job.name] = job.result
    return results


@contextmanager
def _stops_blocked() -> Iterator[None]:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def _start(name: str, work: Work, environment: Mapping[str, str], live: bool, others: Sequence[Connection]) -> _Running:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    # Forked: the job inherits the driver's locks and its imports.
    process = multiprocessing.get_context("fork").Process(
        target=_work,
        args=(work, environment, Channel(theirs, live), os.getpid(), [ours, *others]),
        name=name,
        # Where the system cannot end it with the driver, Python does so when the driver exits normally.
        daemon=True,
    )
    process.start()
    # The pipe ends only when no other process holds its sending side.
    theirs.close()
    return _Running(name, process, ours, environment)


def _work(
    work: Work, environment: Mapping[str, str], channel: Channel, parent: int, not_ours: Sequence[Connection]
) -> None:
    """Main function of a job's process; signals are blocked at its start, as in the driver when it forked."""
    # Ctrl-C in the terminal reaches only the driver, which passes it on: each job gets it once.
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if (end_with_parent := die_with(parent)) is not None:
        end_with_parent()
    for connection in not_ours:
        connection.close()
    os.environ |= environment
    sys.stdout, sys.stderr = _Lines(channel, "out"), _Lines(channel, "err")
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        kind, value = "end", work(channel)
    except KeyboardInterrupt:
        kind, value = "stopped", None
    # A further signal must not cut the message.
    with _stops_blocked():
        channel.send(kind, value)


def _hear(job: _Running, board: Board) -> bool:
    """Handle one message; False when the job has ended."""
    try:
        kind, value = json.loads(job.connection.recv_bytes())
    except EOFError:
        job.connection.close()
        job.process.join()
        board.forget(job.name)
        return False
    if kind == "look":
        board.show(job.name, Look(**value))
    elif kind == "end":
        job.result = value
    elif kind == "stopped":
        job.was_stopped = True
    else:
        board.tell(value, error=kind == "err")
    return True


@contextmanager
def _stops_passed_on(running: list[_Running]) -> Iterator[list[int]]:
    """Pass Ctrl-C, and a cluster's SIGTERM, to all ``running`` jobs; yields the list of the signals received so far."""
    received: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for job in list(running):
            if job.process.is_alive():
                os.kill(job.process.pid, signal.SIGINT)

    before = {number: signal.signal(number, pass_on) for number in STOPS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
