"""The same rows put to the tuned model, to the untuned one and to the adapter at other scales: a row file per side."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.record import shards
from lib.record.files import sha256_json
from lib.record.paths import RunPaths
from lib.record.protocol import at_scale, in_half_batches, without_adapter
from lib.record.rows import RowLog, open_shared_log

Row = dict[str, Any]
# The control is the untuned model in other batches.
TUNED, UNTUNED, CONTROL = "tuned", "untuned", "control"
LABELS = {TUNED: "", UNTUNED: "untuned", CONTROL: "untuned again"}


def scales_between(scales: list[float]) -> list[float]:
    """Scales that need rows: 0 is the untuned model, 1 the tuned one."""
    return [scale for scale in scales if scale not in (0, 1)]


class Sides:
    """The row files of one stage; ``kind`` begins their names (``gsm8k_preds``), ``protocol`` makes the tuned rows.

    ``part``, as in ``lib.driver.tasks``: one side and share alone, ``untuned 1-of-1`` or ``tuned 2-of-5``.
    """

    def __init__(self, paths: RunPaths, stage: str, kind: str, protocol: Mapping[str, Any], part: str = "") -> None:
        self._paths, self._stage, self._kind, self._protocol, self._part = paths, stage, kind, protocol, part
        self.logs: dict[str | float, RowLog] = {}

    def log(self, side: str | float = TUNED) -> RowLog:
        """The row file of a side or a scale. Those of the untuned model are shared, and locked until finished."""
        if side not in self.logs:
            opened = open_shared_log if side in (UNTUNED, CONTROL) else RowLog
            self.logs[side] = opened(*self._file(side), label=self._label(side))
        return self.logs[side]

    def share(self, rows: Sequence[Row]) -> tuple[str, Sequence[Row], RowLog]:
        """Side, rows and row file of the part."""
        side, name = self._part.split()
        index, num_shares = map(int, name.split("-of-"))
        if num_shares == 1:
            return side, rows, self.log(side)
        path, made_by = self._file(side)
        share = shards.share_path(path, index, num_shares)
        log = RowLog(share.with_name(share.name + shards.PART_ENDING), made_by, label=self._label(side))
        numbered = [{"id": position, **row} for position, row in enumerate(rows)]
        return side, numbered[index - 1 :: num_shares], log.with_rows_of(path)

    def _file(self, side: str | float) -> tuple[Path, str]:
        """The row file of a side, and the hash of what makes its rows."""
        if side in (UNTUNED, CONTROL):
            of_base = without_adapter(self._protocol) if side == UNTUNED else in_half_batches(self._protocol)
            made_by = sha256_json(of_base)
            return self._paths.untuned_rows(self._kind + "_control" * (side == CONTROL), made_by), made_by
        if side == TUNED:
            return self._paths.run_dir / f"{self._kind}_{self._paths.name}.jsonl", sha256_json(self._protocol)
        path = self._paths.stage_dir(self._stage) / "scales" / f"{self._kind}_{side:g}.jsonl"
        return path, sha256_json(at_scale(self._protocol, float(side)))

    def _label(self, side: str | float) -> str:
        return LABELS.get(side, f"scale {side}")

    def kept_text(self, side: str | float = TUNED) -> str:
        if self._part:
            return f"only {self._part}"  # its protocol is not that of the tuned rows where the adapter is still made
        log = self.log(side)
        return f"{len(log.rows)} rows are reused, {log.num_dropped} rows of another protocol were dropped"

    @property
    def files(self) -> list[Path]:
        return [log.path for log in self.logs.values()]

    def facts(self) -> dict[str, Any]:
        """For the manifest: what made the rows, and where those of other sides lie."""
        scales = {f"{side:g}": self._relative(log) for side, log in self.logs.items() if not isinstance(side, str)}
        untuned = self._relative(self.logs[UNTUNED]) if UNTUNED in self.logs else ""
        control = {"control_rows": self._relative(self.logs[CONTROL])} if CONTROL in self.logs else {}
        return {"protocol": dict(self._protocol), "untuned_rows": untuned, "scale_rows": scales, **control}

    def _relative(self, log: RowLog) -> str:
        return Path(os.path.relpath(log.path, self._paths.stage_dir(self._stage))).as_posix()
