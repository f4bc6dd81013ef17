"""The evaluated model of a run as a plain transformers folder, which any loader opens without this project.

    python -m lib.reports.to_transformers --results-dir results simple strong

The base as evaluated (4-bit weights dequantised, adapter merged: ``model.load_dense``), its tokenizer, greedy decoding
as generation settings, and a model card. A base or an adapter that changed since the evaluation is refused. The driver,
which never imports torch, runs this in a child process.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lib import gsm8k
from lib.compare import runs, tables
from lib.engine import load, sources
from lib.record import lookup, manifest
from lib.record.files import folder_in_making, free_bytes, read_json, sha256_file, sha256_json, share
from lib.record.paths import ArtifactError, RunPaths, display_path, expand_home, require, results_root, run_paths
from lib.record.terminal import fail, tell
from lib.train import checkpoint_selection, model_card

FOLDER = "models"
# Free space, relative to the weights.
ROOM = 1.2


@dataclass(frozen=True)
class Evaluated:
    """The model that a run evaluated, according to its files.

    Attributes:
        parameters: of ``config_resolved.json``, as ``settings``.
        dtype: of the weights, as ``torch`` names it; of a run without evaluation the one in its parameters.
        protocols: stage -> protocol of its rows; only stages that ran.
    """

    paths: RunPaths
    parameters: Mapping[str, Any]
    settings: Mapping[str, Any]
    dtype: str
    protocols: Mapping[str, Mapping[str, Any]]


def export_model(paths: RunPaths, assets_dir: str = "", offline: bool = False) -> Path:
    """Write the evaluated model of one run; returns its folder, which replaces an older one once complete.

    Args:
        assets_dir: folder with the base model; empty for that of the run.
        offline: never use the network.

    Raises:
        ArtifactError: the run has no adapter, base or adapter differ from those evaluated, or the disk is full.
        AssetError: the base model is not available.
        ModelError: it does not load here.
    """
    run = read_evaluated(paths)
    name, assets_dir = run.parameters["base_model"], assets_dir or run.settings.get("assets_dir", "")
    # Redaction writes a home folder as ~.
    name = str(expand_home(name)) if name.startswith("~") else name
    base = sources.resolve_model(name, run.parameters["base_model_revision"], assets_dir, offline)
    check_unchanged(run, base.identity)
    device = load.resolve_runtime(run.parameters["device"], "auto").device
    # The run's dtype, float16 on a CPU too: only the merge is computed here.
    runtime = load.Runtime(device, load.DTYPES[run.dtype], "as evaluated")
    dense = load.load_dense(base.folder, runtime, run.parameters["quantization"], paths.adapter_dir)
    tokenizer = load.load_tokenizer(base.folder)
    folder = paths.run_dir.parent / FOLDER / paths.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    _check_room(folder.parent, dense)
    with folder_in_making(folder, is_complete=lambda _: False) as made:
        save_plain(dense, tokenizer, made)
        model_card.write_model_card(made, _facts(run, base))
    return folder


def read_evaluated(paths: RunPaths) -> Evaluated:
    """Read a run's files.

    Raises:
        ArtifactError: there is no such run, its 02 is not complete, or its parameters are missing.
    """
    if not paths.run_dir.is_dir():
        there = ", ".join(sorted(path.name.removeprefix("run_") for path in paths.run_dir.parent.glob("run_*")))
        raise ArtifactError(f"{display_path(paths.run_dir.parent)}/ holds no such run; there are: {there or 'none'}")
    require(paths.manifest("02_train"), "02_train", paths.name)
    config = read_json(require(paths.config_resolved, "02_train", paths.name))
    parameters = config["parameters"]
    found = {stage: manifest.facts_of(paths, stage).get("protocol") for stage in runs.AXIS_STAGES.values()}
    protocols = {stage: protocol for stage, protocol in found.items() if protocol}
    dtypes = [protocol["dtype"] for protocol in protocols.values()]
    dtypes = dtypes or [load.resolve_runtime(parameters["device"], parameters["compute_dtype"]).dtype]
    names = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes})
    if len(names) > 1:
        words = ", ".join(names)
        raise ArtifactError(f"run {paths.name!r} was evaluated in {words}: there is no one model; run 03 and 04 again")
    return Evaluated(paths, parameters, config["settings"], names[0], protocols)


def check_unchanged(run: Evaluated, base_identity: str) -> None:
    """Check that base and adapter are those that made the rows.

    Raises:
        ArtifactError: one differs.
    """
    hashes = [sha256_file(path) for path in sorted(run.paths.adapter_dir.glob("adapter_*"))]
    again = f"run it again (python run_all.py --presets {run.paths.name})"
    for stage, protocol in run.protocols.items():
        known = protocol["base model"]
        if known != base_identity:
            raise ArtifactError(f"{stage} was evaluated with the base model {known}, here is {base_identity}; {again}")
        # 03 records one hash of all files, 04 one per file.
        if protocol["adapter"] not in (hashes, sha256_json(hashes)):
            adapter = display_path(run.paths.adapter_dir)
            raise ArtifactError(f"{adapter} is not the adapter that {stage} evaluated; {again}")


def save_plain(dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save weights, config, tokenizer with chat template, and greedy decoding with every stop token, as evaluated."""
    # Not the base model's settings: they may hold sampling and a repetition penalty.
    dense.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=load.stop_token_ids(dense, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=dense.generation_config.bos_token_id,
    )
    with load.quiet_loading():
        dense.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        share(path)


def _check_room(folder: Path, dense: PreTrainedModel) -> None:
    need = ROOM * sum(weights.nbytes for weights in dense.parameters())
    free = free_bytes(folder)
    if free < need:
        raise ArtifactError(f"{display_path(folder)}: {need / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")


def _facts(run: Evaluated, base: sources.ModelSource) -> model_card.CardFacts:
    paths = run.paths
    prepared, trained = (manifest.manifest_of(paths, stage) for stage in ("01_prepare", "02_train"))
    train, made_elsewhere = trained["facts"], bool(trained["parameters"].get("checkpoint"))
    scores = runs.score_run(paths)
    return model_card.CardFacts(
        run_name=paths.name,
        base=base,
        revision=run.parameters["base_model_revision"],
        trained=train.get("trained", ""),
        selection=checkpoint_selection.selection_text(
            train["adapter"],
            train["selected_on"],
            train.get("sweep_metric") or "",
            len(train.get("checkpoints", [])),
            trained["parameters"].get("max_sweep_checkpoints", 0),
        ),
        dtype=run.dtype,
        training={} if made_elsewhere else model_card.training_data(prepared, paths.train_rows),
        evaluation=model_card.evaluation_data(prepared, paths.dev_rows),
        parameters=run.parameters,
        metrics={
            "GSM8K, strict": tables.rate_words(scores.accuracy, scores.gsm8k_status),
            "AILuminate, called safe by the judge": tables.rate_words(scores.safe, scores.safety_status),
        },
        prompt=gsm8k.SYSTEM_PROMPT,
        benchmark=bool(run.parameters["benchmark"]),
        adapter_sha256=sha256_file(paths.adapter_dir / "adapter_model.safetensors"),
    )


# --- command line -------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Write the models of the named runs; returns 1 if any failed, the others are still written."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.reports.to_transformers", description="Evaluated models as plain folders."
    )
    parser.add_argument("--results-dir", default="", help="folder of the runs")
    parser.add_argument("--assets", default="", help="folder with models already fetched")
    parser.add_argument("--offline", action="store_true", help="never use the network")
    parser.add_argument("runs", nargs="*", help="names of runs")
    args = parser.parse_args(argv)
    if not args.runs:
        root = display_path(results_root(args.results_dir))
        fail(f"--export model: {root}/ holds no run: run a preset first (python run_all.py --presets NAME)")
        return 1
    status = 0
    for name in args.runs:
        try:
            folder = export_model(run_paths(args.results_dir, name), args.assets, args.offline)
            tell(f"written: {display_path(folder)}/")
        except (ArtifactError, lookup.AssetError, load.ModelError, OSError) as error:
            fail(f"--export model, run {name!r}: {error}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
