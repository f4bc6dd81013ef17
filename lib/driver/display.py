"""How far runs are, on the terminal: rows, rate, time left, the score so far, tokens, memory.

Follows the small file of each task (``lib.driver.tasks``): only counts are shown, no model's text.
"""

import math
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lib import wording
from lib.record import progress
from lib.record.gpus import nvidia_smi
from lib.record.locks import is_alive
from lib.record.progress import Counts
from lib.record.redaction import visible
from lib.record.terminal import fail, lose_reader

SECONDS_ON_TERMINAL, SECONDS_IN_LOG, SECONDS_BETWEEN_MEMORY = 1.0, 15.0, 5.0
# Rows finish in bursts: a rate over less time jumps, one over more lags behind.
RATE_WINDOW_S = 60.0
BAR_WIDTH = 20
GIB = 2**30


def score_words(counts: Counts) -> str:
    """The loss, or the rate so far with its 95 % interval; "" where rows are not scored."""
    if counts.loss is not None:
        return f"loss {counts.loss:.4f}" + ("" if counts.dev_loss is None else f", dev {counts.dev_loss:.4f}")
    if not counts.num_scored:
        return ""
    rate = f"{wording.percent(counts.num_good / counts.num_scored)} {counts.good}"
    # Equal prompts count together in the interval of a safe rate, and only the rows know which are equal.
    if counts.good == "safe":
        return rate
    from lib.stats import wilson_interval  # scipy: most of a second, only where there is a rate

    low, high = wilson_interval(counts.num_good, counts.num_scored)
    return f"{rate} ({wording.interval(low, high)})"


def final_lines(work: Iterable[Counts]) -> list[str]:
    """One line per kind of rows: "24 answers, 4.2 % right (0.7 to 20.2)"."""
    return [", ".join(filter(None, [f"{counts.done} {counts.kind}", score_words(counts)])) for counts in work]


def duration(seconds: float) -> str:
    """Seconds in words: ``42 s``, ``85 min``, ``2 h 07 min``."""
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def memory_words(driver: int) -> str:
    """Memory of the processes that the process ``driver`` started, and of all GPUs where there are any."""
    taken = 0
    with suppress(psutil.Error):
        for process in psutil.Process(driver).children(recursive=True):
            with suppress(psutil.Error):  # it has just ended
                taken += process.memory_info().rss
    output = nvidia_smi("--query-gpu=memory.used", "--format=csv,noheader,nounits", timeout_s=5)
    gpu = sum(int(line) for line in output.split() if line.isdigit()) * 2**20
    words = [f"{taken / GIB:.1f} GiB"] if taken else []
    return " + ".join([*words, *([f"GPU {gpu / GIB:.1f} GiB"] if gpu else [])])


def fit(begin: str, details: Iterable[str], width: int) -> str:
    """``begin`` and the ``details`` that ``width`` has room for; speed goes before time left and score, none is cut."""
    speed, left, score, tokens, memory = details
    for dropped in ((), (memory,), (memory, tokens), (memory, tokens, speed), (memory, tokens, speed, score)):
        line = "  ".join(part for part in (begin, speed, left, score, tokens, memory) if part and part not in dropped)
        if len(line) <= width:
            return line
    return begin if len(begin) <= width else begin[: max(0, width - 1)] + "…"


class Follower:
    """The task ``name``, whose file is ``path``."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self._memory_at = -math.inf
        self._memory = ""
        self._seen: deque[tuple[float, int, int]] = deque()
        self._of: tuple[int, str] | None = None

    def look(self, now: float) -> tuple[str, list[str], Counts] | None:
        """Begin and details of a line (see ``fit``), and its counts, at ``now`` (s); None if it does not run."""
        content = progress.read_file(self.path)
        if content.get("state") != "running":
            return None
        is_here = content["where"] == socket.gethostname()
        if is_here and not is_alive(content["driver"]):
            return None  # a killed driver left its file
        # A look at the GPUs starts a program: not every time.
        if is_here and now - self._memory_at >= SECONDS_BETWEEN_MEMORY:
            self._memory_at, self._memory = now, memory_words(content["driver"])
        label, work = self.name, content["work"]
        if not work:
            left = f"{duration(time.time() - content['started'])} in"
            return f"{label}  working", ["", left, "", "", self._memory], Counts("")
        counts = work[-1]
        speed, tokens = self._rates(now, (len(work), counts.kind), counts)
        unit = "rows" if counts.loss is None else "steps"
        count = f"{counts.done}/{counts.total}" if counts.total else str(counts.done)
        details = [
            f"{speed:.2f} {unit}/s" if speed else "",
            f"{duration((counts.total - counts.done) / speed)} left" if speed and counts.total else "",
            score_words(counts),
            f"{tokens:.0f} tokens/s" if tokens else "",
            self._memory,
        ]
        return f"{label}  {count} {counts.kind}", details, counts

    def _rates(self, now: float, of: tuple[int, str], counts: Counts) -> tuple[float, float]:
        """Rows and tokens per second over the last minute; 0.0 where not known."""
        if of != self._of:
            self._of = of
            self._seen.clear()
        self._seen.append((now, counts.done, counts.num_tokens))
        while len(self._seen) > 2 and now - self._seen[1][0] >= RATE_WINDOW_S:
            self._seen.popleft()
        before, done, tokens = self._seen[0]
        # At the end the next model is being loaded: a rate that sinks meanwhile would mean nothing.
        if now <= before or (counts.total and counts.done >= counts.total):
            return 0.0, 0.0
        return (counts.done - done) / (now - before), (counts.num_tokens - tokens) / (now - before)


class Display:
    """Live lines of ``tasks`` (name -> file), or plain ones; without ``background`` only when ``update`` is called."""

    def __init__(
        self,
        tasks: Mapping[str, Path],
        *,
        quiet: bool = False,
        console: Console | None = None,
        every_s: float | None = None,
        background: bool = True,
    ) -> None:
        self.console = console or LastingConsole(highlight=False)
        # A line can be rewritten on most terminals, but not in CI.
        can_rewrite = self.console.is_terminal and not self.console.is_dumb_terminal and not os.environ.get("CI")
        self.quiet, self.live, self.background = quiet, can_rewrite and not quiet, background
        self.every_s = every_s or (SECONDS_ON_TERMINAL if self.live else SECONDS_IN_LOG)
        self._followers = [Follower(*task) for task in tasks.items()]
        self._lines = Live(console=self.console, auto_refresh=False, transient=True)
        self._looked_at = time.monotonic()
        self._shown: dict[str, tuple[str, int]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_updating, daemon=True)

    def __enter__(self) -> "Display":
        if self.live:
            self._lines.start()
        if self.background and not self.quiet:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._lines.stop()

    def _keep_updating(self) -> None:
        while not self._ended.wait(self.every_s):
            self.update()

    def update(self) -> None:
        """Show how far the runs are, if it is time to look again."""
        now = time.monotonic()
        if self.quiet or now - self._looked_at < self.every_s:
            return
        self._looked_at = now
        looks = {follower.name: found for follower in self._followers if (found := follower.look(now))}
        if self.live:
            lines = [_live_line(*look, self.console.width) for look in looks.values()]
            self._lines.update(Group(*lines), refresh=True)
            return
        for name, (begin, details, counts) in looks.items():
            # In a log only what is new.
            if counts.kind and self._shown.get(name) != (counts.kind, counts.done):
                self._shown[name] = counts.kind, counts.done
                self.tell(f"  {fit(begin, details, 10_000)}")

    def tell(self, line: str, *, error: bool = False) -> None:
        """Print a line above the live ones; without any, an error goes to the standard error."""
        if error and not self.live:
            fail(line)
        else:
            self.console.print(visible(line), markup=False, soft_wrap=True)


class LastingConsole(Console):
    """The standard output; a run goes on when its reader has gone."""

    def on_broken_pipe(self) -> None:
        lose_reader(sys.stdout)


def _live_line(begin: str, details: list[str], counts: Counts, width: int) -> Any:
    # One column is left free: some terminals wrap a full line. The bar comes last, where there is room, so that nothing
    # moves when it goes.
    with_bar = bool(counts.total) and len(fit(begin, details, 10_000)) + BAR_WIDTH + 1 < width
    room = width - 1 - ((BAR_WIDTH + 1) if with_bar else 0)
    line = Table.grid(padding=(0, 1, 0, 0))
    cells: list[Any] = [Text(fit(begin, details, room), no_wrap=True, overflow="ellipsis")]
    line.add_row(*cells, *([ProgressBar(counts.total, counts.done, BAR_WIDTH)] if with_bar else []))
    return line
