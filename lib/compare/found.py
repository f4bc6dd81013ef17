"""What a verification has found so far, and what the grader's machine has to compare with."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from lib.params import PARAMS_DIR


@dataclass(frozen=True)
class Grader:
    """Data sets and presets of whoever verifies; they decide, not those that a results folder names."""

    assets_dir: str = ""
    params_dir: Path = PARAMS_DIR


@dataclass
class Found:
    """Sentences; ``checked`` counts what was compared, ``files`` are those whose content was."""

    runs: list[str] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    checked: Counter[str] = field(default_factory=Counter)
    absent: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    commitments: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    files: set[Path] = field(default_factory=set)
