"""What a command line means: one plan per run, or every fault of every preset, before anything starts."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lib.driver.cli import STAGE_NUMBERS, UsageError
from lib.engine.sources import HUB_ID, resolve_adapter
from lib.params import Params, ParamsError, load_params, parse_assignment, preset_path
from lib.prepare.datasets import check_ailuminate, check_train_file, load_gsm8k
from lib.record.lookup import AssetError, load_or_reason
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
from lib.record.text_files import TextFileError, read_prompt, read_text
from lib.safety import other_wordings, read_guidelines, read_judge_template

SUBMISSION_PRESETS = ("simple", "medium", "strong")
# Rows of GSM8K train, from 0, that the published adapters were trained without: they are
# random.Random(42).sample(range(7473), 8).
SUBMISSION_FEWSHOT_ROWS = [5238, 912, 204, 6074, 2253, 2006, 1828, 1143]


@dataclass
class Plan:
    """One run, named ``preset``: its parameters, settings and stages, and the seconds that they took."""

    preset: str
    of_preset: str
    params: Params
    settings: dict[str, Any]
    paths: RunPaths
    reports_dir: Path
    stages: list[str]
    cell_timeout_s: int
    go_on: str
    quiet: bool
    wall_s: float = 0.0


def make_plans(args: argparse.Namespace) -> list[Plan]:
    """Check the command line and every preset, writing nothing; UsageError with every faulty preset."""
    presets = list(args.presets or (SUBMISSION_PRESETS if args.submission else ()))
    _check_usage(args, presets)
    checkpoints = _parse_checkpoints(args.checkpoint, presets)
    plans, faults = [], []
    for preset, seed in ((preset, seed) for preset in presets for seed in args.seeds or [None]):
        try:
            plans.append(_make_plan(args, preset, checkpoints.get(preset, ""), seed))
        except ParamsError as error:
            faults.append(str(error))
    if faults:
        # A fault of the preset itself is found once per seed.
        raise UsageError("\n".join(dict.fromkeys(faults)))
    return plans


def _check_usage(args: argparse.Namespace, presets: Sequence[str]) -> None:
    seeds = args.seeds or []
    sets_seed = any(text.startswith("seed=") for group in args.set for text in group)
    faults = {
        "name at least one preset: python run_all.py --presets sandbox_one (see --list)": not presets,
        f"--presets {' '.join(presets)}: a preset is named twice": len(set(presets)) < len(presets),
        f"--seeds {' '.join(map(str, seeds))}: a seed is named twice": len(set(seeds)) < len(seeds),
        "--submission evaluates the published adapters, trained with other seeds: leave out --seeds": (
            seeds and args.submission
        ),
        "--seeds and --set seed=... contradict each other: keep one": seeds and sets_seed,
        "--resume and --rerun-all contradict each other: keep one": args.resume and args.rerun_all,
        "--submission evaluates the published adapters on all agreed rows: leave out --checkpoint and --smoke-test": (
            args.submission and (args.checkpoint or args.smoke_test)
        ),
        f"--eval-batch-size {args.eval_batch_size}: allowed is 0 (derived) or more": (args.eval_batch_size or 0) < 0,
        f"--jobs {args.jobs}: allowed is 1 (one notebook after the other) or more": args.jobs < 1,
        f"--cell-timeout {args.cell_timeout}: allowed is 0 (no limit) or more seconds": args.cell_timeout < 0,
        f"--assets {args.assets}: there is no such folder": args.assets and not args.assets.is_dir(),
    }
    for message, is_wrong in faults.items():
        if is_wrong:
            raise UsageError(message)


def _parse_checkpoints(texts: Sequence[str], presets: Sequence[str]) -> dict[str, str]:
    """Preset -> adapter. A local folder is checked at once; a hub name only when its stage needs it."""
    checkpoints: dict[str, str] = {}
    for text in texts:
        preset, equals, place = text.partition("=")
        if equals and preset not in presets:
            raise UsageError(f"--checkpoint {text}: preset {preset!r} is not among --presets {' '.join(presets)}")
        if not (place if equals else text):
            raise UsageError(f"--checkpoint {text!r}: a folder or a hub name was expected")
        checkpoints |= dict.fromkeys([preset] if equals else presets, _local_or_hub(place if equals else text))
    return checkpoints


def _local_or_hub(place: str) -> str:
    path = Path(place)
    if _exists(path):
        return display_path(path.resolve())
    # `results/adapter` could be a name of the hub; where there is a folder `results`, it is a slip.
    if not HUB_ID.fullmatch(place) or (len(path.parts) > 1 and path.parent.is_dir()):
        raise UsageError(f"--checkpoint {place}: there is no such folder")
    return place


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise UsageError(f"--checkpoint {path.name[:80]!r}: {error.strerror}") from None


def _make_plan(args: argparse.Namespace, preset: str, checkpoint: str, seed: int | None) -> Plan:
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
        "checkpoint": params.published_adapter if args.submission else checkpoint,
        "require_rows": args.submission,
        "redact": args.redact,
        "allow_unlike": args.allow_unlike,
    }
    stages = chosen_stages(args)
    _check_packages(preset, params, stages)
    try:
        _check_files(params, settings, stages)
        run = run_paths(str(results), name)
    except (AssetError, TextFileError, ArtifactError) as error:
        raise UsageError(f"preset {preset!r}: {error}") from None
    folder = reports / f"run_{name}"
    return Plan(name, preset, params, settings, run, folder, stages, args.cell_timeout, args.typed, args.quiet)


def _check_packages(preset: str, params: Params, stages: list[str]) -> None:
    if {"02_train", "03_eval_gsm8k", "04_eval_safety"}.isdisjoint(stages) or find_spec("bitsandbytes"):
        return
    needed = {"quantization": "none", "judge_quantization": "none", "optimizer": "adamw"}
    four_bit = [key for key in needed if getattr(params, key) not in (needed[key], "same")]
    if four_bit:
        keys = ", ".join(f"{key} is {getattr(params, key)!r}" for key in four_bit)
        remedy = " ".join(f"{key}={needed[key]}" for key in four_bit)
        raise UsageError(f"preset {preset!r}: {keys}, but bitsandbytes is not installed; --set {remedy}")


def _check_files(params: Params, settings: dict[str, Any], stages: list[str]) -> None:
    """Read the files that a person named, as the stages will hours after the command was typed."""
    place, sources = settings["checkpoint"], (settings["assets_dir"], settings["offline"])
    if place and _exists(PROJECT_ROOT / place):
        resolve_adapter(place, params.base_model, *sources)
    if "01_prepare" in stages:
        check_ailuminate(params.ailuminate_source, params.ailuminate_prompt_set, settings["assets_dir"])
        if params.train_source == "file":
            check_train_file(params.train_file, params.train_file_url, *sources)
        if params.fewshot_file:
            _check_examples(params, settings["assets_dir"])
    # Not by way of lib.gsm8k, which imports numpy.
    if params.system_prompt_file and {"01_prepare", "02_train", "03_eval_gsm8k"} & {*stages}:
        read_prompt(project_path(params.system_prompt_file))
    if "04_eval_safety" in stages or ("02_train" in stages and sweeps_safety(params)):
        read_judge_template(params.judge_prompt_file, params.judge_context)
    if "04_eval_safety" in stages:
        guidelines, labels = project_path(params.guidelines_file), project_path(params.judge_labels_file)
        read_guidelines(guidelines)
        other_wordings(guidelines)
        if labels.is_file():
            read_text(labels)


def sweeps_safety(params: Params) -> bool:
    """Whether 02 needs the judge to choose a checkpoint."""
    return params.dev_safety_rows > 0 or params.sweep_metric != "accuracy"


def _check_examples(params: Params, assets_dir: str) -> None:
    # Imports numpy, which a run without such a file does not wait for here.
    from lib.prepare import fewshot

    # Where the test split is still to be downloaded, 01 looks for its questions.
    test, _ = load_or_reason(load_gsm8k, "test", params.gsm8k_source, assets_dir, True)
    fewshot.check_file(params.fewshot_file, params.fewshot_k, params.fewshot_pool_size, test[0] if test else [])


def _overrides(args: argparse.Namespace, params: Params) -> dict[str, tuple[Any, str]]:
    """Key -> (value, the flag it came from); ``--set`` wins over every other flag."""
    found: dict[str, tuple[Any, str]] = {}
    if args.smoke_test:
        for name in ("train", "gsm8k", "ailuminate"):
            found[f"max_{name}_rows"] = (getattr(params, f"smoke_{name}_rows"), "--smoke-test")
    if args.submission:
        has_all = params.submission_gsm8k_rows == 1319
        found["gsm8k_eval_fraction"] = (1.0 if has_all else params.gsm8k_eval_fraction, "--submission")
        found["fewshot_rows"] = (SUBMISSION_FEWSHOT_ROWS, "--submission")
    if args.full_gsm8k_test:
        found["gsm8k_eval_fraction"] = (1.0, "--full-gsm8k-test")
    if args.eval_batch_size is not None:
        found["eval_batch_size"] = (args.eval_batch_size, "--eval-batch-size")
    assignments = [parse_assignment(text) for group in args.set for text in group]
    return found | {key: (value, "--set") for key, value in assignments}


def output_folders(args: argparse.Namespace) -> tuple[Path, Path]:
    """(artefacts, filled notebooks). A smoke test has other folders: it must never replace a real run."""
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
    skipped = {"03"} if args.skip_gsm8k else set()
    skipped |= {"04"} if args.skip_ailuminate else set()
    return [stage for stage in STAGES if stage[:2] in set(args.stages or STAGE_NUMBERS) - skipped]
