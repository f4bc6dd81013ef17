"""Several runs at once, each in a process of its own: what they tell on one console, one Ctrl-C for all of them.

Knows nothing about presets: a job is a name and a function, and what it returns is JSON. Processes are forked, so that
the driver's locks are theirs too; they end with the driver, whatever ends it.
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
    """A job's way to the console of its driver.

    Attributes:
        live: whether that is a terminal whose lines can be rewritten.
    """

    def __init__(self, connection: Connection, live: bool) -> None:
        self._connection, self.live = connection, live

    def show(self, look: Look) -> None:
        """How far the job is."""
        self.send("look", asdict(look))

    def send(self, kind: Literal["look", "out", "err", "end", "stopped"], value: Any) -> None:
        """One message, as JSON: nothing that comes from a job is ever run."""
        self._connection.send_bytes(json.dumps([kind, value]).encode())


class _Lines:
    """A text stream whose whole lines go through a channel when it is flushed, with no other job's between them."""

    encoding, errors = "utf-8", "strict"

    def __init__(self, channel: Channel, kind: Literal["out", "err"]) -> None:
        self._channel, self._kind, self._part = channel, kind, ""

    def write(self, text: str) -> int:
        self._part += text
        return len(text)

    def flush(self) -> None:
        """Send what was written since the last time; nothing is kept back but a line that has not ended."""
        lines, newline, self._part = self._part.rpartition("\n")
        if newline:
            self._channel.send(self._kind, lines)

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
    jobs: Mapping[str, Callable[[Channel], Any]], environments: Sequence[Mapping[str, str]], board: Board
) -> dict[str, Any]:
    """Run ``jobs``, as many at once as there are ``environments``, in their order.

    A first Ctrl-C or SIGTERM starts no further job and is passed to all that run, so is a second.

    Args:
        jobs: name -> what is run in a process of its own; its result must be JSON.
        environments: what each job's environment has in addition, as the device that it holds; a job has one of them.
        board: shows what the jobs tell.

    Returns:
        name -> result; ``None`` for a job whose process died. A job that was never started, or was stopped before it
        could say anything, is not in it.
    """
    left, free = deque(jobs.items()), deque(environments)
    running: list[_Running] = []
    results: dict[str, Any] = {}
    with _Stop(running) as stop:
        while running or (left and not stop.count):
            while left and free and not stop.count:
                # A stop that comes in between waits until it can be passed to the new job too.
                with _stops_wait():
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
def _stops_wait() -> Iterator[None]:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def _start(
    name: str,
    work: Callable[[Channel], Any],
    environment: Mapping[str, str],
    live: bool,
    others: Sequence[Connection],
) -> _Running:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    # Forked: the job holds the driver's locks, and nothing has to be imported again.
    process = multiprocessing.get_context("fork").Process(
        target=_work,
        args=(work, environment, Channel(theirs, live), os.getpid(), [ours, *others]),
        name=name,
        # Where the system cannot end it with the driver, Python does when the driver ends by itself.
        daemon=True,
    )
    process.start()
    # The end of the pipe is heard only where nobody else holds its other side.
    theirs.close()
    return _Running(name, process, ours, environment)


def _work(
    work: Callable[[Channel], Any],
    environment: Mapping[str, str],
    channel: Channel,
    parent: int,
    not_ours: Sequence[Connection],
) -> None:
    """What a job's process does; it begins with signals that wait, as its driver was when it forked."""
    # The terminal's Ctrl-C goes to the driver, which passes it on: each job hears it once.
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
    # What became of it is told whole.
    with _stops_wait():
        channel.send(kind, value)


def _hear(job: _Running, board: Board) -> bool:
    """Take one message; False when the job has ended."""
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


class _Stop:
    """Ctrl-C, and a cluster's SIGTERM, for all jobs that run."""

    def __init__(self, running: list[_Running]) -> None:
        self.count, self._running = 0, running
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Stop":
        self._before = {number: signal.signal(number, self._pass_on) for number in STOPS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
        for job in list(self._running):
            if job.process.is_alive():
                os.kill(job.process.pid, signal.SIGINT)
