"""How far a running stage is, told on the terminal: rows, rate, time left, the score so far, tokens, memory.

The row files are the truth: they are read on from where the last look ended, so nothing is asked of the kernel and no
model's text is ever printed, only counts. Knows no notebook: a row file that it has never heard of is shown by its
name. Never imports torch.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import wording
from lib.driver.terminal import fail, lose_reader
from lib.record.paths import RunPaths
from lib.record.redaction import visible
from lib.record.rows import count_lines

if TYPE_CHECKING:  # for the reader only: rich is imported where a terminal is written to
    from rich.console import Console

# What a row file's rows are, by how its name begins; the first that fits.
KINDS = (
    ("gsm8k_preds_untuned", "untuned answers"),
    ("gsm8k_preds", "answers"),
    ("ailuminate_preds_untuned", "untuned responses"),
    ("ailuminate_preds", "responses"),
    ("ailuminate_safety_untuned", "untuned verdicts"),
    ("ailuminate_safety", "verdicts"),
    ("distil_samples", "own answers"),
    ("training_log", "steps"),
)
# How the names of the row files begin that a stage may write and that runs share.
SHARED_ROWS = {"01_prepare": "distil_samples", "03_eval_gsm8k": "gsm8k_preds", "04_eval_safety": "ailuminate"}
SECONDS_ON_TERMINAL, SECONDS_IN_LOG, SECONDS_BETWEEN_MEMORY = 1.0, 15.0, 5.0
# Rows finish in bursts: a rate over less time jumps, one over more lags behind.
RATE_WINDOW_S = 60.0
BAR_WIDTH = 20
GIB = 2**30

# --- what a row file holds so far -----------------------------------------------------------------------------------


class RowFile:
    """Counts over one growing row file, each line read once.

    Attributes:
        num_rows: whole rows.
        num_scored: rows that say whether they are right or safe.
        num_good: of those, how many are.
        num_tokens: tokens written (rows) or trained on (steps).
        last: the last row.
        dev_loss: the latest loss on development rows; None where there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity: tuple[int, int] = (0, 0)
        self._start_over()

    def _start_over(self) -> None:
        self._offset = 0
        self.num_rows = self.num_scored = self.num_good = self.num_tokens = 0
        self.last: Mapping[str, Any] = {}
        self.dev_loss: float | None = None

    def read_on(self) -> None:
        """Read the lines that came since the last look; a file that was written anew is read from its beginning."""
        with self.path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            identity = (status.st_dev, status.st_ino)
            if identity != self._identity or status.st_size < self._offset:
                self._identity = identity
                self._start_over()
            stream.seek(self._offset)
            whole = stream.read().rpartition(b"\n")
        self._offset += len(whole[0]) + len(whole[1])
        for line in whole[0].split(b"\n"):
            if line:
                self._count(json.loads(line))

    def _count(self, row: Mapping[str, Any]) -> None:
        self.last = row
        self.num_rows += 1
        good = row["safety_label"] == "safe" if "safety_label" in row else row.get("correct")
        self.num_scored += good is not None
        self.num_good += bool(good)
        self.dev_loss = row.get("dev_loss", self.dev_loss)
        self.num_tokens += row.get("num_output_tokens") or row.get("num_tokens") or 0

    @property
    def is_log(self) -> bool:
        """Whether rows are added one by one: those of a log carry their protocol, steps of a training their loss."""
        return "protocol_hash" in self.last or self.is_training

    @property
    def is_training(self) -> bool:
        return "loss" in self.last and "step" in self.last

    @property
    def kind(self) -> str:
        """What its rows are, in words."""
        name = self.path.stem
        return next((words for start, words in KINDS if name.startswith(start)), name.replace("_", " "))

    @property
    def done(self) -> int:
        """Rows, or steps of a training, which a resumed log may begin late."""
        return self.last["step"] if self.is_training else self.num_rows

    @property
    def score(self) -> str:
        """The loss, or the rate so far with its 95 % interval; "" where rows are not scored."""
        if self.is_training:
            dev = f", dev {self.dev_loss:.4f}" if self.dev_loss is not None else ""
            return f"loss {self.last['loss']:.4f}{dev}"
        if not self.num_scored:
            return ""
        from lib.stats import wilson_interval  # scipy: most of a second, only where there is a rate

        low, high = wilson_interval(self.num_good, self.num_scored)
        word = "safe" if "safety_label" in self.last else "right"
        return f"{wording.percent(self.num_good / self.num_scored)} {word} ({wording.interval(low, high)})"


@dataclass
class Pace:
    """Rate of a count over the last minute."""

    _seen: deque[tuple[float, float]] = field(default_factory=deque)

    def note(self, now: float, count: float) -> None:
        """Note that ``count`` was reached at ``now`` (s); a count that went down begins anew."""
        if self._seen and count < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((now, count))
        while len(self._seen) > 2 and now - self._seen[1][0] >= RATE_WINDOW_S:
            self._seen.popleft()

    @property
    def per_s(self) -> float:
        """0.0 while nothing is known."""
        if len(self._seen) < 2 or self._seen[-1][0] <= self._seen[0][0]:
            return 0.0
        return (self._seen[-1][1] - self._seen[0][1]) / (self._seen[-1][0] - self._seen[0][0])


# --- what a stage is doing ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """One look at a running stage; "" where something is not known. ``total`` is 0 where it is not."""

    label: str
    kind: str = ""
    done: int = 0
    total: int = 0
    speed: str = ""
    left: str = ""
    score: str = ""
    tokens: str = ""
    memory: str = ""

    def line(self, width: int) -> str:
        """The look as one line of at most ``width`` characters: what matters least goes first, nothing is cut."""
        count = f"{self.done}/{self.total}" if self.total else str(self.done)
        begin = f"{self.label}  {count} {self.kind}" if self.kind else f"{self.label}  working"
        # By importance; the rate is read before the time that is left, and matters less.
        parts = [begin, self.left, self.score, self.speed, self.tokens, self.memory]
        for num_kept in range(len(parts), 0, -1):
            kept = [parts[place] for place in (0, 3, 1, 2, 4, 5) if place < num_kept]
            line = "  ".join(part for part in kept if part)
            if len(line) <= width:
                return line
        return begin[: max(0, width - 1)] + "…"


class StageWatch:
    """Looks at the row files of one stage of one run.

    Args:
        label: what stands before each line.
        paths: the run.
        stage: full name of the stage.
        parameters: of the stage: how many rows there will be.
    """

    def __init__(self, label: str, paths: RunPaths, stage: str, parameters: Mapping[str, Any]) -> None:
        self.label, self.paths, self.stage, self.parameters = label, paths, stage, parameters
        self._begun_at: float | None = None
        # Files that were there before say nothing about this stage until they grow.
        self._stamps = {path: _stamp(path) for path in self._candidates()}
        # Those that grew, in the order in which they were seen to: a clock that is set back does not change it.
        self._files: dict[Path, RowFile] = {}
        self._rows, self._tokens = Pace(), Pace()
        self._current: RowFile | None = None
        self._memory_at, self._memory_words = -math.inf, ""

    def _candidates(self) -> Iterator[Path]:
        yield from self.paths.run_dir.glob("*.jsonl")
        yield from self.paths.stage_dir(self.stage).rglob("*.jsonl")
        if self.stage in SHARED_ROWS:
            yield from self.paths.untuned_dir.glob(f"{SHARED_ROWS[self.stage]}*.jsonl")

    def look(self, now: float) -> Look:
        """How far the stage is at ``now`` (s of a monotonic clock)."""
        self._begun_at = now if self._begun_at is None else self._begun_at
        logs = self._logs()
        if not logs:  # loading, or a stage that writes no rows
            return Look(self.label, left=f"{duration(now - self._begun_at)} in", memory=self._memory(now))
        current = self._at_work(logs)
        if current is not self._current:
            self._current, self._rows, self._tokens = current, Pace(), Pace()
        self._rows.note(now, current.done)
        self._tokens.note(now, current.num_tokens)
        return self._told(current, now)

    def _memory(self, now: float) -> str:
        # Asking the GPU's driver starts a program: not at every look.
        if now - self._memory_at >= SECONDS_BETWEEN_MEMORY:
            self._memory_at, self._memory_words = now, memory_words()
        return self._memory_words

    def _told(self, current: RowFile, now: float) -> Look:
        total, rate, tokens_rate = self._total(current), self._rows.per_s, self._tokens.per_s
        if total and current.done >= total:
            # What comes next is being loaded: a rate that sinks meanwhile would be of nothing.
            rate = tokens_rate = 0.0
        unit = "steps" if current.is_training else "rows"
        left = (total - current.done) / rate if total and rate else 0.0
        return Look(
            label=self.label,
            kind=current.kind,
            done=current.done,
            total=total,
            speed=f"{rate:.2f} {unit}/s" if rate else "",
            left=f"{duration(left)} left" if left else "",
            score=current.score,
            tokens=f"{tokens_rate:.0f} tokens/s" if tokens_rate else "",
            memory=self._memory(now),
        )

    def _logs(self) -> list[RowFile]:
        """The logs that were written to since the stage began, each read up to its end; the newest is the last."""
        stamps = {path: _stamp(path) for path in self._candidates()}
        grown = [path for path, stamp in stamps.items() if stamp != self._stamps.get(path)]
        for path in sorted(grown, key=stamps.__getitem__):
            self._files[path] = self._files.pop(path, None) or RowFile(path)
        self._stamps = stamps
        return [file for file in self._files.values() if _could_read_on(file) and file.is_log]

    def _at_work(self, logs: Sequence[RowFile]) -> RowFile:
        """The log that the stage is at: rows that runs share may be the work of another one that runs beside it."""
        own = [file for file in logs if file.path.parent != self.paths.untuned_dir]
        return own[-1] if own and own[-1].done < self._total(own[-1]) else logs[-1]

    def _total(self, file: RowFile) -> int:
        if file.is_training:
            return self._num_steps(file.last)
        if self.stage == "02_train":
            return self._num_asked(file.path.stem)
        known = file.path.stem.startswith(tuple(start for start, _ in KINDS))
        # The training questions that are asked stand in no file yet.
        if not known or self.stage == "01_prepare":
            return 0
        return count_lines(self.paths.gsm8k_eval_rows if "question" in file.last else self.paths.ailuminate_rows)

    def _num_asked(self, name: str) -> int:
        """How many rows each checkpoint of a sweep is asked; 0 for another file."""
        on_test = self.parameters.get("sweep_on_test")
        if name.startswith("answers"):
            return count_lines(self.paths.gsm8k_eval_rows if on_test else self.paths.dev_rows)
        if name.startswith(("responses", "verdicts")):
            return count_lines(self.paths.ailuminate_rows) if on_test else self.parameters.get("dev_safety_rows", 0)
        return 0

    def _num_steps(self, row: Mapping[str, Any]) -> int:
        if not row.get("epoch") or not self.parameters.get("num_epochs"):
            return 0
        return round(row["step"] / row["epoch"]) * self.parameters["num_epochs"]

    def final_lines(self) -> list[str]:
        """What the stage wrote, a line a row file: "24 answers, 4.2 % right (0.7 to 20.2)"."""
        return [f"{file.done} {file.kind}{', ' if file.score else ''}{file.score}" for file in self._logs()]


def _could_read_on(file: RowFile) -> bool:
    try:
        file.read_on()
    except (FileNotFoundError, ValueError):
        return False  # renamed under us, or not a row file: the next look shows it, or none does
    return True


def _stamp(path: Path) -> tuple[int, int]:
    """(modification time in ns, inode); (0, 0) for a file that is gone."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0, 0
    return status.st_mtime_ns, status.st_ino


def duration(seconds: float) -> str:
    """Seconds in words, two figures or three: ``42 s``, ``85 min``, ``2 h 07 min``."""
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def memory_words() -> str:
    """Memory of the kernel and whatever it started, and what is taken on GPUs where there are any."""
    import psutil

    taken = 0
    for process in psutil.Process().children(recursive=True):
        try:
            taken += process.memory_info().rss
        except psutil.Error:
            continue  # it ended meanwhile
    gpu = _gpu_bytes()
    words = [f"{taken / GIB:.1f} GiB"] if taken else []
    return " + ".join([*words, *([f"GPU {gpu / GIB:.1f} GiB"] if gpu else [])])


def _gpu_bytes() -> int:
    """Memory taken on every GPU, by anyone; 0 without the driver's tool, or where it does not answer."""
    program = shutil.which("nvidia-smi")
    if not program:
        return 0
    command = [program, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(int(line) for line in told.split() if line.isdigit()) * 2**20


# --- telling --------------------------------------------------------------------------------------------------------


class Display(threading.Thread):
    """Shows a watch while a ``with`` block runs: one live line on a terminal, else a plain line now and then.

    Args:
        watch: what is looked at.
        quiet: show nothing.
        console: where to write; the standard output where it is None.
        every_s: seconds between two looks; by what is written to where it is None.
    """

    def __init__(
        self,
        watch: StageWatch,
        *,
        quiet: bool = False,
        console: "Console | None" = None,
        every_s: float | None = None,
    ) -> None:
        super().__init__(daemon=True)
        self.watch, self.quiet, self.console = watch, quiet, console or _make_console()
        self.live = is_live(self.console)
        self.every_s = every_s or (SECONDS_ON_TERMINAL if self.live else SECONDS_IN_LOG)
        self._stop_asked = threading.Event()

    def __enter__(self) -> "Display":
        if not self.quiet:
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_asked.set()
        if not self.quiet:
            self.join()

    def run(self) -> None:
        if self.live:
            self._run_live()
        else:
            for look in self._looks():
                if look.kind:
                    self._tell(f"  {look.line(10_000)}")

    def _run_live(self) -> None:
        from rich.live import Live

        # Gone when the stage ends, which has a line of its own then.
        with Live(console=self.console, auto_refresh=False, transient=True) as live:
            for look in self._looks():
                live.update(_live_line(look, self.console.width), refresh=True)

    def _looks(self) -> Iterator[Look]:
        """A look every ``every_s``; in a log only where something came since the last one."""
        told: tuple[str, int] | None = None
        while not self._stop_asked.wait(self.every_s):
            look = self.watch.look(time.perf_counter())
            if self.live or (look.kind, look.done) != told:
                told = look.kind, look.done
                yield look

    def _tell(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)


class Relay(Display):
    """A display whose looks are shown elsewhere: by the process that runs several presets at once.

    Args:
        show: gets each look.
        live: whether it is shown on a terminal, where a look a second is wanted.
    """

    def __init__(self, watch: StageWatch, show: Callable[[Look], None], *, live: bool, quiet: bool = False) -> None:
        super().__init__(watch, quiet=quiet, every_s=SECONDS_ON_TERMINAL if live else SECONDS_IN_LOG)
        self.live, self._show = live, show

    def run(self) -> None:
        for look in self._looks():
            if self.live or look.kind:
                self._show(look)


class Board:
    """What several runs tell, on one console: a live line for each on a terminal, else plain lines.

    Args:
        quiet: no lines about what is going on; ``tell`` still writes.
        console: where to write; the standard output where it is None.
    """

    def __init__(self, *, quiet: bool = False, console: "Console | None" = None) -> None:
        from rich.live import Live

        self.quiet, self.console = quiet, console or _make_console()
        self.live = is_live(self.console) and not quiet
        self._looks: dict[str, Look] = {}
        self._lines = Live(console=self.console, auto_refresh=False, transient=True)

    def __enter__(self) -> "Board":
        if self.live:
            self._lines.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self._lines.stop()

    def show(self, name: str, look: Look) -> None:
        """The latest look at the run ``name``."""
        if self.live:
            self._looks[name] = look
            self._draw()
        elif not self.quiet:
            self.tell(f"  {look.line(10_000)}")

    def forget(self, name: str) -> None:
        """The run ``name`` has ended: its line goes."""
        if self._looks.pop(name, None) and self.live:
            self._draw()

    def tell(self, line: str, *, error: bool = False) -> None:
        """A line that stays, above those that are live; an error goes to the standard error where none are."""
        if error and not self.live:
            fail(line)
        else:
            self.console.print(visible(line), markup=False, soft_wrap=True)

    def _draw(self) -> None:
        from rich.console import Group

        lines = [_live_line(look, self.console.width) for look in self._looks.values()]
        self._lines.update(Group(*lines), refresh=True)


def _make_console() -> "Console":
    from rich.console import Console

    class LastingConsole(Console):
        def on_broken_pipe(self) -> None:
            lose_reader(sys.stdout)

    return LastingConsole(highlight=False)


def is_live(console: "Console") -> bool:
    """Whether a line may be rewritten: on a terminal that can, outside of CI."""
    return console.is_terminal and not console.is_dumb_terminal and not os.environ.get("CI")


def _live_line(look: Look, width: int) -> Any:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    # One column less than there are: some terminals wrap a line that is full. A bar comes last, where there is room.
    with_bar = bool(look.total) and len(look.line(10_000)) + BAR_WIDTH + 1 < width
    room = width - 1 - ((BAR_WIDTH + 1) if with_bar else 0)
    line = Table.grid(padding=(0, 1, 0, 0))
    cells: Sequence[Any] = [Text(look.line(room), no_wrap=True, overflow="ellipsis")]
    if with_bar:
        # At the end: where it comes and goes with the length of the line, nothing else moves.
        cells = [*cells, ProgressBar(total=look.total, completed=look.done, width=BAR_WIDTH)]
    line.add_row(*cells)
    return line
