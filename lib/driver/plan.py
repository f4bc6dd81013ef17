"""What a command line asks for, resolved before anything starts: a plan a run, or every fault of every preset."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.driver.cli import STAGE_NUMBERS, UsageError
from lib.record.paths import (
    PROJECT_ROOT,
    RESULTS_VARIABLE,
    STAGES,
    ArtifactError,
    RunPaths,
    display_path,
    project_path,
    results_root,
    run_paths,
)

if TYPE_CHECKING:
    from lib.params import Params

COMPARE = "05_compare"
SUBMISSION_PRESETS = ("simple", "medium", "strong")


@dataclass
class Plan:
    """One run, resolved: its parameters, its settings, the stages asked for, and what became of them.

    ``preset`` is the run's name: its preset's, with ``_seed<N>`` after it under ``--seeds``.
    """

    preset: str
    params: "Params"
    settings: dict[str, Any]
    paths: RunPaths
    reports_dir: Path
    stages: list[str]
    cell_timeout_s: int = 0
    go_on: str = ""
    quiet: bool = False
    wall_s: float = 0.0
    failure: str = ""
    interrupted: bool = False
    of_preset: str = ""


def make_plans(args: argparse.Namespace) -> list[Plan]:
    """Check the whole command line and every preset; nothing is written.

    Raises:
        UsageError: anything is wrong; every faulty preset is named.
    """
    from lib.params import ParamsError

    presets = list(args.presets or (SUBMISSION_PRESETS if args.submission else ()))
    _check_usage(args, presets)
    checkpoints = _parse_checkpoints(args.checkpoint, presets)
    plans, faults = [], []
    for preset, seed in ((preset, seed) for preset in presets for seed in args.seeds or [None]):
        try:
            plans.append(_make_plan(args, preset, checkpoints, seed))
        except ParamsError as error:
            faults.append(str(error))
    if faults:
        # A fault of the preset itself is found once a seed.
        raise UsageError("\n".join(dict.fromkeys(faults)))
    return plans


def _check_usage(args: argparse.Namespace, presets: Sequence[str]) -> None:
    if not presets:
        raise UsageError("name at least one preset: python run_all.py --presets sandbox_one (see --list)")
    if len(set(presets)) < len(presets):
        raise UsageError(f"--presets {' '.join(presets)}: a preset is named twice")
    _check_seeds(args)
    if args.resume and args.rerun_all:
        raise UsageError("--resume and --rerun-all contradict each other: keep one")
    if args.submission and (args.checkpoint or args.smoke_test):
        raise UsageError("--submission evaluates the published adapters whole: leave out --checkpoint and --smoke-test")
    if args.eval_batch_size is not None and args.eval_batch_size < 0:
        raise UsageError(f"--eval-batch-size {args.eval_batch_size}: allowed is 0 (derived) or more")
    if args.jobs < 1:
        raise UsageError(f"--jobs {args.jobs}: allowed is 1 (one preset after the other) or more")
    if args.cell_timeout < 0:
        raise UsageError(f"--cell-timeout {args.cell_timeout}: allowed is 0 (no limit) or more seconds")
    if args.assets and not args.assets.is_dir():
        raise UsageError(f"--assets {args.assets}: there is no such folder")


def _check_seeds(args: argparse.Namespace) -> None:
    seeds = args.seeds or []
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {' '.join(map(str, seeds))}: a seed is named twice")
    if seeds and args.submission:
        raise UsageError("--submission evaluates the published adapters, trained with seeds of their own: no --seeds")
    if seeds and any(text.startswith("seed=") for group in args.set for text in group):
        raise UsageError("--seeds and --set seed=... contradict each other: keep one")


def _parse_checkpoints(texts: Sequence[str], presets: Sequence[str]) -> dict[str, str]:
    """Preset -> adapter. A local folder is checked at once; a hub name only when its stage asks for it."""
    checkpoints: dict[str, str] = {}
    for text in texts:
        preset, equals, place = text.partition("=")
        if equals and preset not in presets:
            raise UsageError(f"--checkpoint {text}: preset {preset!r} is not among --presets {' '.join(presets)}")
        if not (place if equals else text):
            raise UsageError(f"--checkpoint {text!r}: a folder or a hub name was expected")
        for name in [preset] if equals else presets:
            checkpoints[name] = _local_or_hub(place if equals else text)
    return checkpoints


def _local_or_hub(place: str) -> str:
    from lib.engine.sources import HUB_ID

    path = Path(place)
    if _is_there(path):
        return display_path(path.resolve())
    # `results/adapter` could be a name of the hub; where there is a folder `results`, it is a slip.
    if not HUB_ID.fullmatch(place) or (len(path.parts) > 1 and path.parent.is_dir()):
        raise UsageError(f"--checkpoint {place}: there is no such folder")
    return place


def _make_plan(args: argparse.Namespace, preset: str, checkpoints: dict[str, str], seed: int | None) -> Plan:
    from lib.params import load_params, preset_path

    path = preset_path(preset, args.params_dir)
    overrides = _overrides(args, load_params(path)) | ({} if seed is None else {"seed": (seed, "--seeds")})
    name = preset if seed is None else f"{preset}_seed{seed}"
    values = {key: value for key, (value, _) in overrides.items()}
    params = load_params(path, values, {key: origin for key, (_, origin) in overrides.items()})
    results, reports = output_folders(args)
    settings = {
        "run_name": name,
        "results_dir": display_path(results),
        "assets_dir": display_path(args.assets.resolve()) if args.assets else "",
        "offline": args.offline,
        "checkpoint": params.published_adapter if args.submission else checkpoints.get(preset, ""),
        "require_rows": args.submission,
        "redact": args.redact,
        "allow_unlike": args.allow_unlike,
    }
    _check_checkpoint(preset, params, settings)
    stages = chosen_stages(args)
    if "01_prepare" in stages:
        _check_train_file(preset, params, settings)
    if "04_eval_safety" in stages:
        _check_texts(preset, params)
    try:
        run = run_paths(str(results), name)
    except ArtifactError as error:
        raise UsageError(f"preset {preset!r}: {error}") from None
    folder = reports / f"run_{name}"
    plan = Plan(name, params, settings, run, folder, stages, args.cell_timeout, args.typed, args.quiet)
    return replace(plan, of_preset=preset)


def _check_checkpoint(preset: str, params: "Params", settings: dict[str, Any]) -> None:
    from lib.engine.sources import resolve_adapter
    from lib.record.lookup import AssetError

    if settings["checkpoint"] and _is_there(PROJECT_ROOT / settings["checkpoint"]):
        try:
            resolve_adapter(settings["checkpoint"], params.base_model, settings["assets_dir"], settings["offline"])
        except AssetError as error:
            raise UsageError(f"--checkpoint for preset {preset!r}: {error}") from None


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise UsageError(f"--checkpoint {path.name[:80]!r}: {error.strerror}") from None


def _check_train_file(preset: str, params: "Params", settings: dict[str, Any]) -> None:
    from lib.prepare.datasets import check_train_file
    from lib.record.lookup import AssetError

    if params.train_source == "file":
        try:
            check_train_file(params.train_file, params.train_file_url, settings["assets_dir"], settings["offline"])
        except AssetError as error:
            raise UsageError(f"preset {preset!r}: {error}") from None


def _check_texts(preset: str, params: "Params") -> None:
    """Read the guidelines and a person's labels as 04 will: it comes last, hours after the command was typed."""
    from lib.record.text_files import TextFileError, read_text
    from lib.safety import other_wordings, read_guidelines

    guidelines, labels = project_path(params.guidelines_file), project_path(params.judge_labels_file)
    try:
        read_guidelines(guidelines)
        other_wordings(guidelines)
        if labels.is_file():
            read_text(labels)
    except TextFileError as error:
        raise UsageError(f"preset {preset!r}: {error}") from None


def _overrides(args: argparse.Namespace, params: "Params") -> dict[str, tuple[Any, str]]:
    """Key -> (value, the flag it came from); a key that is ``--set`` wins over every other flag."""
    from lib.params import parse_assignment

    found: dict[str, tuple[Any, str]] = {}
    if args.smoke_test:
        sizes = {"train": params.smoke_train_rows, "gsm8k": params.smoke_gsm8k_rows}
        sizes["ailuminate"] = params.smoke_ailuminate_rows
        found |= {f"max_{name}_rows": (rows, "--smoke-test") for name, rows in sizes.items()}
    if args.submission:
        whole = params.submission_gsm8k_rows == 1319
        found["gsm8k_eval_fraction"] = (1.0 if whole else params.gsm8k_eval_fraction, "--submission")
    if args.full_gsm8k_test:
        found["gsm8k_eval_fraction"] = (1.0, "--full-gsm8k-test")
    if args.eval_batch_size is not None:
        found["eval_batch_size"] = (args.eval_batch_size, "--eval-batch-size")
    assignments = [parse_assignment(text) for group in args.set for text in group]
    return found | {key: (value, "--set") for key, value in assignments}


def output_folders(args: argparse.Namespace) -> tuple[Path, Path]:
    """(artefacts, filled notebooks). A smoke test has folders of its own: it must never replace a real run."""
    if args.output_dir or args.submission:
        folder = (args.output_dir or PROJECT_ROOT / "submission_results").resolve()
        return folder, folder / "reports"
    part = "smoke" if args.smoke_test else "."
    results = (results_root() / part).resolve()
    # Beside each other in the project; a folder that was moved has its own, which no driver of another one writes to.
    moved = os.environ.get(RESULTS_VARIABLE)
    return results, results / "reports" if moved else (PROJECT_ROOT / "reports" / part).resolve()


def chosen_stages(args: argparse.Namespace) -> list[str]:
    """The stages to run, by their full names, in order."""
    numbers = set(args.stages or STAGE_NUMBERS)
    numbers -= {"03"} if args.skip_gsm8k else set()
    numbers -= {"04"} if args.skip_ailuminate else set()
    return [stage for stage in STAGES if stage[:2] in numbers]
