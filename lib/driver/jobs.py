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
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any, Literal

from lib.driver.display import Display
from lib.driver.kernel_server import die_with

LOOK_AGAIN_S = 0.5
STOPS = (signal.SIGINT, signal.SIGTERM)


def _send(connection: Connection, kind: Literal["out", "err", "end", "stopped"], value: Any) -> None:
    """Send one message, as JSON: nothing that comes from a job is ever executed."""
    connection.send_bytes(json.dumps([kind, value]).encode())


class _Lines:
    """A text stream that sends its complete lines in one message when flushed, so that jobs do not mix theirs."""

    encoding, errors = "utf-8", "strict"

    def __init__(self, connection: Connection, kind: Literal["out", "err"]) -> None:
        self._connection, self._kind, self._part = connection, kind, ""

    def write(self, text: str) -> int:
        self._part += text
        return len(text)

    def flush(self) -> None:
        """Send the complete lines written since the last flush."""
        lines, newline, self._part = self._part.rpartition("\n")
        if newline:
            _send(self._connection, self._kind, lines)

    def isatty(self) -> bool:
        return False


@dataclass
class _Running:
    name: str
    process: Any
    connection: Connection
    environment: Mapping[str, str]
    result: Any = None
    was_stopped: bool = False


def run_jobs(
    jobs: Mapping[str, Callable[[], Any]], environments: Sequence[Mapping[str, str]], display: Display
) -> dict[str, Any]:
    """Run ``jobs`` in order, as many at once as there are ``environments``: variables for a job, such as its device.

    After Ctrl-C or SIGTERM no further job is started; both signals are passed to all running jobs, each time.

    Returns:
        name -> JSON result; ``None`` for a job whose process died; no entry for one that was stopped or not started.
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
                    running.append(_start(*left.popleft(), free.popleft(), others))
            for connection in wait([one.connection for one in running], LOOK_AGAIN_S):
                job = next(one for one in running if one.connection is connection)
                if not _receive(job, display):
                    running.remove(job)
                    free.append(job.environment)
                    if not job.was_stopped:
                        results[job.name] = job.result
            display.update()
    return results


@contextmanager
def _stops_blocked() -> Iterator[None]:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def _start(
    name: str, work: Callable[[], Any], environment: Mapping[str, str], others: Sequence[Connection]
) -> _Running:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    # Forked: the job inherits the driver's locks and its imports.
    process = multiprocessing.get_context("fork").Process(
        target=_work,
        args=(work, environment, theirs, os.getpid(), [ours, *others]),
        name=name,
        # Where the system cannot end it with the driver, Python does so when the driver exits normally.
        daemon=True,
    )
    process.start()
    # The pipe ends only when no other process holds its sending side.
    theirs.close()
    return _Running(name, process, ours, environment)


def _work(
    work: Callable[[], Any],
    environment: Mapping[str, str],
    driver: Connection,
    parent: int,
    not_ours: Sequence[Connection],
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
    sys.stdout, sys.stderr = _Lines(driver, "out"), _Lines(driver, "err")
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        kind, value = "end", work()
    except KeyboardInterrupt:
        kind, value = "stopped", None
    # A further signal must not cut the message.
    with _stops_blocked():
        _send(driver, kind, value)


def _receive(job: _Running, display: Display) -> bool:
    """Handle one message; False when the job has ended."""
    try:
        kind, value = json.loads(job.connection.recv_bytes())
    except EOFError:
        job.connection.close()
        job.process.join()
        return False
    if kind == "end":
        job.result = value
    elif kind == "stopped":
        job.was_stopped = True
    else:
        display.tell(value, error=kind == "err")
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
