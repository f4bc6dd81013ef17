"""The untuned control: the base model asked exactly what the tuned one is asked, its rows kept once for all presets.

Without it nobody can tell what tuning bought. Knows nothing about models: the generator is loaded by a function that is
called only when rows are missing, so a second preset that asks the same loads nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.artifacts import RowLog, RunPaths, sha256_json
from lib.locks import hold_file, release_file

if TYPE_CHECKING:  # for the reader only: generate imports torch
    from lib.generate import Engine

UNTUNED = "none (untuned)"


class LazyGenerator:
    """A generator that ``load(*arguments)`` gives when it is first asked something; ``loaded`` tells whether it was."""

    def __init__(self, load: Callable[..., "Engine"], *arguments: Any) -> None:
        self._load, self._arguments = load, arguments
        self._generator: Engine | None = None

    @property
    def loaded(self) -> bool:
        return self._generator is not None

    @property
    def source(self) -> str:
        """Where its answers come from, in words."""
        return "answered here" if self.loaded else "already answered for another preset or an earlier run"

    @property
    def wall_s(self) -> float:
        """Seconds that the generator worked, all calls together; 0 where every row was there."""
        return self._generator.work_s if self._generator else 0.0

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As ``lib.generate.Engine.generate``."""
        return self._asked().generate(*args, **kwargs)

    def label_probabilities(self, *args: Any, **kwargs: Any) -> Any:
        """As ``lib.generate.Engine.label_probabilities``."""
        return self._asked().label_probabilities(*args, **kwargs)

    def _asked(self) -> "Engine":
        if self._generator is None:
            self._generator = self._load(*self._arguments)
        return self._generator


def untuned_protocol(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The same protocol without the adapter.

    Raises:
        KeyError: the protocol does not say which adapter it is of.
    """
    if "adapter" not in protocol:
        raise KeyError("the protocol has no key 'adapter'")
    return {**protocol, "adapter": UNTUNED}


class SharedRowLog(RowLog):
    """A row file that several runs may want at once: one of them fills it, the others wait and find its rows.

    It is held from here to ``finish``, or to the end of the process.
    """

    def __init__(self, path: Path, protocol_hash: str) -> None:
        hold_file(path)
        super().__init__(path, protocol_hash)

    def finish(self, keys: Sequence[Any]) -> list[dict[str, Any]]:
        """As ``RowLog.finish``; other runs may have the file then."""
        rows = super().finish(keys)
        release_file(self.path)
        return rows


def untuned_log(paths: RunPaths, kind: str, protocol: Mapping[str, Any]) -> SharedRowLog:
    """The row file of the untuned model under ``protocol``; ``kind`` begins its name, as ``gsm8k_preds``."""
    protocol_hash = sha256_json(protocol)
    return SharedRowLog(paths.untuned_rows(kind, protocol_hash), protocol_hash)
