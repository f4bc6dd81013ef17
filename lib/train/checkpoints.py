"""Checkpoints of a training: complete, other, unsound."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel

from lib.record.files import read_json, sha256_file
from lib.record.rows import read_jsonl
from lib.train.settings import TrainResult, checkpoint_step

COMPLETE = "complete.json"
# What the mark above is renamed to in a checkpoint whose weights were found unsound: nothing goes on from it.
UNSOUND = "unsound.json"


def checkpoint_steps(num_steps: int, save_steps: int) -> list[int]:
    """The steps at which a checkpoint is saved: every ``save_steps``-th, and the last."""
    return sorted({*range(save_steps, num_steps + 1, save_steps), num_steps})


def list_checkpoints(checkpoints_dir: Path) -> list[Path]:
    """Complete, sound checkpoints by step (checkpoint-500 before checkpoint-1000)."""
    found = [path for path in checkpoints_dir.glob("checkpoint-*") if (path / COMPLETE).is_file()]
    return sorted(found, key=checkpoint_step)


def save_adapter(wrapped: PeftModel, folder: Path) -> None:
    """Saves the adapter alone, as safetensors; peft's template README, which says nothing, is left out."""
    # "auto" would ask the hub whether the base model's vocabulary was changed.
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def finished_training(output_dir: Path, fingerprint: str) -> TrainResult | None:
    if not (output_dir / "training.json").is_file():
        return None
    facts = read_json(output_dir / "training.json")
    if facts["fingerprint"] != fingerprint or not _has_adapter(output_dir, facts["adapter_sha256"]):
        return None
    return training_result(facts, output_dir, reused=True)


def _has_adapter(output_dir: Path, sha256: str) -> bool:
    """Whether the final adapter is there; where another was put in its place, it comes back from the checkpoint."""
    adapter_dir = output_dir / "adapter"
    if adapter_sha256(adapter_dir) == sha256:
        return True
    latest = list_checkpoints(output_dir / "checkpoints")[-1:]
    if not latest or adapter_sha256(latest[0]) != sha256:
        return False
    adapter_dir.mkdir(exist_ok=True)
    for file in latest[0].glob("adapter_*"):
        # The bytes alone: not every file system takes the times and rights that copy2 sets.
        shutil.copyfile(file, adapter_dir / file.name)
    return True


def adapter_sha256(folder: Path) -> str:
    path = folder / "adapter_model.safetensors"
    return sha256_file(path) if path.is_file() else ""


def training_result(facts: Mapping[str, Any], output_dir: Path, *, reused: bool) -> TrainResult:
    return TrainResult(
        **facts,
        adapter_dir=output_dir / "adapter",
        checkpoints=list_checkpoints(output_dir / "checkpoints"),
        log=read_jsonl(output_dir / "training_log.jsonl"),
        reused=reused,
    )


def delete_other_trainings(output_dir: Path, fingerprint: str, say: Callable[[str], None]) -> None:
    (output_dir / "training.json").unlink(missing_ok=True)
    for path in sorted((output_dir / "checkpoints").glob("checkpoint-*"), key=checkpoint_step):
        if why := _why_not_taken(path, fingerprint):
            say(f"deleting {path.name}: {why}")
            shutil.rmtree(path)


def _why_not_taken(checkpoint: Path, fingerprint: str) -> str:
    if (checkpoint / UNSOUND).is_file():
        return "its weights were found unsound"
    if not (checkpoint / COMPLETE).is_file():
        return "cut short while it was saved"
    return "" if read_json(checkpoint / COMPLETE)["fingerprint"] == fingerprint else "made by another training"


def lost_checkpoints(checkpoints_dir: Path, needed: Sequence[int]) -> list[int]:
    """Those of the needed steps whose checkpoint is not there, or not yet."""
    there = set(map(checkpoint_step, list_checkpoints(checkpoints_dir)))
    return [step for step in needed if step not in there]


def delete_after_gap(checkpoints_dir: Path, needed: Sequence[int], say: Callable[[str], None]) -> None:
    """Deletes what comes after a needed checkpoint that is gone: going on from there would never make it again."""
    lost = lost_checkpoints(checkpoints_dir, needed)
    for path in list_checkpoints(checkpoints_dir):
        if lost and checkpoint_step(path) > lost[0]:
            say(f"deleting {path.name}: it is made again after checkpoint-{lost[0]}, which is needed and gone")
            shutil.rmtree(path)
