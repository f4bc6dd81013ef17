"""Where everything of a run lies."""

import os
from dataclasses import dataclass
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[2]
STAGES = ("01_prepare", "02_train", "03_eval_gsm8k", "04_eval_safety", "05_compare")
COMPARE_STAGE = STAGES[-1]
# The tables that are handed in, at the top of a results folder.
SUMMARY, METRICS_JSON, METRICS_CSV = "summary.csv", "final_metrics.json", "final_metrics.csv"
# In a results folder while a command is at work or unfinished: its tasks, and how far they are.
PLANS = ".plan"
RESULTS_VARIABLE = "RUN_RESULTS_DIR"
# Set in kernels of the driver and of tests, which no person watches.
DRIVER_VARIABLE = "RUN_BY_DRIVER"
# The engine that runs a kernel's task: local, ray or slurm.
ENGINE_VARIABLE = "RUN_ENGINE"
# Names a preset in a notebook's first code cell, or in the environment of JupyterLab; the driver injects values.
PRESET_VARIABLE = "PRESET"


class ArtifactError(Exception):
    """A file of a run is missing or malformed; the message names it and the remedy."""


def project_path(path: str | Path) -> Path:
    """``path`` itself if absolute, else below the project's root: the working directory may be any folder."""
    return PROJECT_ROOT / path


def display_path(path: Path) -> str:
    """``path`` relative to the project, so that no report shows a home folder; ``~`` there becomes ``./~``."""
    relative = os.path.relpath(path, PROJECT_ROOT)
    return f"./{relative}" if relative.startswith("~") else relative


def expand_home(name: str) -> Path:
    """``name`` with a leading ``~`` replaced by the home folder, if there is one."""
    try:
        return Path(name).expanduser() if name.startswith("~") else Path(name)
    except RuntimeError:
        return Path(name)


def is_utf8(name: str) -> bool:
    """Whether ``name`` can be encoded as UTF-8; Python decodes other bytes of a file's name to lone surrogates."""
    return not any("\ud800" <= char <= "\udfff" for char in name)


@dataclass(unsafe_hash=True)
class RunPaths:
    """The paths of one run."""

    name: str
    run_dir: Path

    def __post_init__(self) -> None:
        name, prepared, trained = self.name, self.stage_dir("01_prepare"), self.stage_dir("02_train")
        self.config_resolved = self.run_dir / "config_resolved.json"
        self.train_rows = prepared / "train.jsonl"
        self.dev_rows = prepared / "dev.jsonl"
        self.fewshot_rows = prepared / "fewshot.jsonl"
        self.gsm8k_eval_rows = prepared / "gsm8k_eval.jsonl"
        self.ailuminate_rows = prepared / "ailuminate.jsonl"
        # Evaluation questions that share words with training rows, see `lib.prepare.overlap`.
        self.overlap = prepared / "overlap.json"
        self.adapter_dir = trained / "adapter"
        self.checkpoints_dir = trained / "checkpoints"
        self.training_log = trained / "training_log.jsonl"
        self.checkpoint_scores = self.run_dir / f"checkpoint_scores_{name}.csv"
        self.gsm8k_preds = self.run_dir / f"gsm8k_preds_{name}.jsonl"
        self.ailuminate_preds = self.run_dir / f"ailuminate_preds_{name}.jsonl"
        self.ailuminate_safety = self.run_dir / f"ailuminate_safety_{name}.jsonl"
        # Rows that runs share.
        self.untuned_dir = self.run_dir.parent / "untuned"

    def stage_dir(self, stage: str) -> Path:
        """The folder that only ``stage`` writes to."""
        return self.run_dir / stage

    def manifest(self, stage: str) -> Path:
        """``manifest.json`` of ``stage``, which exists only if the stage is complete."""
        return self.stage_dir(stage) / "manifest.json"

    def untuned_rows(self, kind: str, protocol_hash: str) -> Path:
        """Row file of the untuned model, shared by runs with the same protocol."""
        return self.untuned_dir / f"{kind}_untuned_{protocol_hash[:12]}.jsonl"


def results_root(results_dir: str = "") -> Path:
    """The folder of all runs: ``results_dir``, else ``$RUN_RESULTS_DIR``, else ``results/`` of the project."""
    return project_path(results_dir or os.environ.get(RESULTS_VARIABLE, "") or "results")


def run_paths(results_dir: str, run_name: str) -> RunPaths:
    """Paths of the run ``run_name`` below ``results_dir``; ArtifactError if the name is no plain folder name."""
    if not run_name or not all(char.isalnum() or char in "._-" for char in run_name) or run_name.startswith("."):
        raise ArtifactError(f"run_name is {run_name!r}; allowed: letters, digits, '.', '_' and '-', no leading dot")
    return RunPaths(run_name, results_root(results_dir) / f"run_{run_name}")


def find_runs(results_dir: str) -> list[RunPaths]:
    """Every ``run_<name>`` folder below ``results_dir`` that holds row files to score, by name."""
    folders = sorted(path for path in results_root(results_dir).glob("run_*") if path.is_dir())
    runs = [RunPaths(path.name.removeprefix("run_"), path) for path in folders]
    return [run for run in runs if run.gsm8k_preds.exists() or run.ailuminate_safety.exists()]


def require(path: Path, stage: str, run_name: str) -> Path:
    """``path``; ArtifactError with the stage to run first if it is not there."""
    if not path.exists():
        raise ArtifactError(
            f"{display_path(path)} is missing: run {stage} for preset {run_name!r} first "
            f"(python run_all.py --presets {run_name} --stages {stage[:2]})"
        )
    return path


def named_files(*names: str) -> list[Path]:
    """Paths of the files that parameters name; an empty name is no file."""
    return [project_path(name) for name in names if name]


def shown_path(path: Path) -> str:
    """``path`` relative to the project; outside it only the last two parts: no report shows a home."""
    if path.is_relative_to(PROJECT_ROOT):
        return path.relative_to(PROJECT_ROOT).as_posix()
    return "/".join(["...", *path.parts[1:][-2:]])
