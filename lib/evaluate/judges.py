"""The judge at the run's precision, and at the other one where both fit."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.engine.generate import judge_generator
from lib.engine.generator import LazyGenerator
from lib.engine.load import ModelError, Runtime, plan_judge
from lib.record.protocol import judge_quantization


@dataclass(frozen=True)
class Judges:
    """``other`` is the same judge by its other precision; where it was due and is not there, ``notes`` say why."""

    quantization: str
    own: LazyGenerator
    plan: str
    other: Mapping[str, LazyGenerator] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def wall_s(self) -> float:
        """Seconds that they worked."""
        return sum(one.wall_s for one in (self.own, *self.other.values()))

    @property
    def load_s(self) -> float:
        """Seconds that loading them took."""
        return sum(one.load_s for one in (self.own, *self.other.values()))


def open_judges(parameters: Mapping[str, Any], folder: Path, runtime: Runtime, verdicts: Path) -> Judges:
    """The judge in ``folder``, not yet loaded; call it while no model is in memory.

    ModelError where it does not fit, unless there are ``verdicts`` already: then it may not be needed.
    Under ``same`` there is no other judge: such a run costs what it did before the judge had a precision of its own.
    """
    own = judge_quantization(parameters["quantization"], parameters["judge_quantization"])
    generators = {how: judge_generator(folder, runtime, how, parameters["eval_batch_size"]) for how in ("none", "nf4")}
    fits, plan = _fits(folder, runtime, own)
    if not fits and not verdicts.exists():
        raise ModelError(plan)
    if parameters["judge_quantization"] == "same":
        return Judges(own, generators[own], plan)
    other = "nf4" if own == "none" else "none"
    fits, why = _fits(folder, runtime, other)
    if not fits:
        return Judges(own, generators[own], plan, notes=(f"The judge was not compared with itself at {other}: {why}.",))
    return Judges(own, generators[own], plan, {other: generators[other]})


def _fits(folder: Path, runtime: Runtime, quantization: str) -> tuple[bool, str]:
    """Whether memory holds the judge, and what it takes, in words."""
    try:
        return True, plan_judge(folder, runtime, quantization)[1]
    except ModelError as error:
        return False, str(error)
