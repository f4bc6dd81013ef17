"""A notebook's stage from its first cell to its last: parameters, header, summary, an early end, the manifest."""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lib import params
from lib.record.manifest import start_stage
from lib.record.paths import COMPARE_STAGE, STAGES, require, results_root, run_paths
from lib.record.rows import RowLog, read_jsonl
from lib.record.shards import close_share
from lib.reports import html, plots, tables

NO_DEVICE = "none is used: no model is loaded"


class Stage:
    """What every cell of a notebook may need; ``paths`` is None in 05, which is about all runs."""

    def __init__(self, name: str, parameters: dict[str, Any]) -> None:
        self.name, self.parameters = name, parameters
        comparing = name == COMPARE_STAGE
        self.paths = None if comparing else run_paths(parameters["results_dir"], parameters["run_name"])
        self.root = self.paths.run_dir if self.paths else results_root(parameters["results_dir"])
        self.folder = self.root / name
        run_name = "all runs" if comparing else parameters["run_name"]
        self._record = start_stage(self.folder / "manifest.json", name, run_name, parameters)
        self._slot: html.SummarySlot | None = None

    def header(self, device: str = NO_DEVICE) -> html.Html:
        """What this run is, its parameters and versions, folded; ``device``: where a model runs and why."""
        known = self.parameters
        parts = tables.setup_tables(self.name, known, device)
        if self.paths:
            parts.insert(0, html.purpose_note(known["run_name"], known["description"], known["benchmark"]))
        return html.stack(parts)

    def summary(self) -> None:
        """Show the place of the summary, which ``finish`` and ``skip`` fill."""
        self._slot = html.SummarySlot()

    def plot(self, figure: Figure, name: str, alt: str) -> html.Html:
        """Save a plot in the stage's folder and show it; ``alt`` says in words what it shows."""
        return plots.show_plot(figure, self.folder / "plots" / name, alt)

    def require(self, path: Path) -> Path:
        """A file that an earlier stage of the run left; ArtifactError names the stage to run where it is missing."""
        # Named after its folder; an adapter lies one deeper.
        earlier = next(part for part in path.parts[::-1] if part in STAGES)
        return require(path, earlier, self.parameters["run_name"])

    def adapter(self, part: str) -> Path | None:
        """The adapter's folder, None for a part of the untuned rows; ArtifactError where 02 has to run first."""
        if part.startswith("untuned"):
            return None
        return self.require(self.paths.manifest("02_train")).parent / "adapter"

    def read_rows(self, path: Path) -> list[dict[str, Any]]:
        """Rows of a file that an earlier stage left; none where it left none."""
        return read_jsonl(path) if self.require(path).stat().st_size else []

    def existing(self, *names: str) -> list[Path]:
        """Those of the stage's own files and folders that it made."""
        return [self.folder / name for name in names if (self.folder / name).exists()]

    def skip(self, why: str, *, inputs: Iterable[Path] = (), facts: Mapping[str, Any] | None = None) -> None:
        """End the stage where it cannot be measured: the manifest says why, and the cells that follow do nothing."""
        self._record.finish(inputs=inputs, outputs=[], facts=dict(facts or {}), skipped=why)
        self._leave(f"NOT MEASURED. {why}")

    def end_part(self, part: str, log: RowLog) -> None:
        """End a notebook that made one part of the stage's rows; the stage itself joins them."""
        close_share(log.path)
        self._leave(f"Part of a stage: {part}, {len(log.rows)} rows. The stage itself joins them and reports.")

    def _leave(self, why: str) -> None:
        if self._slot:
            self._slot.fill(html.note(why, strong=True))
        _ignore_later_cells(True)

    def finish(
        self,
        *,
        inputs: Iterable[Path],
        outputs: Sequence[Path],
        facts: Mapping[str, Any],
        metrics: Mapping[str, Any],
        summary: Sequence[str],
        notes: Sequence[html.Html] = (),
        skipped: str = "",
    ) -> html.Html:
        """Write the manifest, after which nothing else of the stage may be written, and fill the summary.

        A folder stands for every file in it; ``notes`` precede the summary. Returns a table of the files
        written.
        """
        shown = tables.files_table([path for path in outputs if path.is_relative_to(self.root)], self.root)
        self._record.finish(inputs=inputs, outputs=outputs, facts=facts, metrics=metrics, skipped=skipped)
        if self._slot:
            self._slot.fill(html.stack([*notes, html.sentences(summary)]))
        return shown


def open_stage(name: str, namespace: MutableMapping[str, Any]) -> Stage:
    """Check the parameters in ``namespace`` (``globals()``) and begin: the old manifest goes until ``finish``.

    PRESET changes them here. ArtifactError if a driver is at work on the same folder.
    """
    _ignore_later_cells(False)
    return Stage(name, params.from_notebook(namespace))


def _ignored(lines: list[str]) -> list[str]:
    return lines if any("open_stage(" in line for line in lines) else []


def _ignore_later_cells(ignore: bool) -> None:
    """Whether later cells of this kernel are read as empty, but for one that opens the stage again."""
    import IPython

    if shell := IPython.get_ipython():
        others = [one for one in shell.input_transformers_cleanup if one is not _ignored]
        shell.input_transformers_cleanup[:] = [*others, *([_ignored] if ignore else [])]
