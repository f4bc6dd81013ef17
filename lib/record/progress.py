"""How far a stage is: a bar where a person looks at the notebook, else a small file that the driver follows.

The driver makes the file of a task (``lib.driver.tasks``); a kernel only updates the counts in one that is there.
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lib.record.paths import DRIVER_VARIABLE

# Where the kernels of a driver find the file of their task.
FILE_VARIABLE = "RUN_PROGRESS_FILE"
SECONDS_BETWEEN_WRITES = 1.0


@dataclass
class Counts:
    """Rows or training steps done, ``total`` 0 if unknown; ``good``, right or safe, is what ``num_good`` rows are."""

    kind: str
    total: int = 0
    done: int = 0
    num_scored: int = 0
    num_good: int = 0
    good: str = "right"
    num_tokens: int = 0
    loss: float | None = None
    dev_loss: float | None = None

    def add(self, row: Mapping[str, Any]) -> None:
        self.done += 1
        self.num_tokens += row.get("num_output_tokens") or 0
        if "safety_label" in row:
            self.good = "safe"
        is_good = row["safety_label"] == "safe" if "safety_label" in row else row.get("correct")
        self.num_scored += is_good is not None
        self.num_good += bool(is_good)


class Tracker:
    """Shows counts while they grow; ``kept`` are rows of an earlier run."""

    def __init__(self, kind: str, total: int, kept: Iterable[Mapping[str, Any]] = ()) -> None:
        self.counts, self._started = Counts(kind, total), time.monotonic()
        for row in kept:
            self.counts.add(row)
        _work.append(self.counts)
        self._bar: Any = None
        if someone_looks():
            from tqdm import tqdm

            # On the standard output: JupyterLab shows the other one as an error.
            shown = {"desc": kind, "total": total or None, "initial": self.counts.done, "file": sys.stdout}
            self._bar = tqdm(**shown, leave=False, mininterval=0.5)

    def advance(self, row: Mapping[str, Any]) -> None:
        """Count one more row."""
        self.counts.add(row)
        self.show()

    def show(self) -> None:
        """Update the bar, or the driver's file at most once per second."""
        if self._bar is None:
            _write_counts(at_once=False)
        elif self._bar.update(self.counts.done - self._bar.n):
            self._bar.set_postfix_str(_score(self.counts))

    def close(self) -> None:
        """Replace the bar by a line that stays; bring the driver's file up to date."""
        if self._bar is None:
            _write_counts(at_once=True)
            return
        self._bar.close()
        parts = [f"{self.counts.done} {self.counts.kind}", _score(self.counts)]
        print(", ".join(filter(None, parts)), f"({time.monotonic() - self._started:.0f} s)")


def _score(counts: Counts) -> str:
    if counts.loss is not None:
        return f"loss {counts.loss:.4f}"
    return f"{counts.num_good} of {counts.num_scored} {counts.good}" if counts.num_scored else ""


def track(kind: str, total: int = 0, kept: Iterable[Mapping[str, Any]] = ()) -> closing[Tracker]:
    """Show how many rows of ``kind`` are done inside the block; see ``Tracker``."""
    return closing(Tracker(kind, total, kept))


def report(kind: str, done: int, total: int, **numbers: float | None) -> None:
    """Show that ``done`` of ``total`` steps are made, and other fields of ``Counts``; None leaves the last value."""
    global _reported
    if _reported is None or (_reported.counts.kind, _reported.counts.total) != (kind, total):
        _reported = Tracker(kind, total)
    _reported.counts.done = done
    for name, value in numbers.items():
        if value is not None:
            setattr(_reported.counts, name, value)
    _reported.show()
    if done >= total:
        _reported.close()
        _reported = None


def someone_looks() -> bool:
    """Whether a person may be looking: in a kernel that neither the driver nor a test has started."""
    if "IPython" not in sys.modules or os.environ.get(DRIVER_VARIABLE):
        return False
    from IPython import get_ipython

    return hasattr(get_ipython(), "kernel")


# Of this process: one stage runs in a kernel.
_work: list[Counts] = []
_reported: Tracker | None = None
_written_at = 0.0


def read_file(path: Path) -> dict[str, Any]:
    """The content of a task's file, its ``work`` as ``Counts``, the current one last; {} without a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {**content, "work": [Counts(**counts) for counts in content["work"]]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write_counts(at_once: bool) -> None:
    global _written_at
    path, now = os.environ.get(FILE_VARIABLE, ""), time.monotonic()
    if not path or not (at_once or now - _written_at >= SECONDS_BETWEEN_WRITES):
        return
    content = read_file(Path(path))
    if content:
        write_file(Path(path), {**content, "work": _work})
        _written_at = now


def write_file(path: Path, content: Mapping[str, Any]) -> None:
    """Write what ``read_file`` reads, as far as it can be written: no stage fails because nobody can see its counts."""
    # Not `files.write_json`, which waits for the disk: after a power cut nobody needs this file.
    temporary = path.with_name(f".{path.name}.tmp")
    with suppress(OSError):
        work = [asdict(counts) for counts in content["work"]]
        temporary.write_text(json.dumps({**content, "work": work}), encoding="utf-8")
        temporary.replace(path)
