"""The evaluated model of a run as a plain transformers folder, which any loader opens without this project.

    python -m lib.reports.to_transformers --results-dir results simple strong

The base as evaluated (4-bit weights dequantised, adapter merged: ``model.load_dense``), its tokenizer, greedy decoding
as generation settings, and a model card. A base or an adapter that changed since the evaluation is refused. The driver,
which never imports torch, runs this in a child process.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lib import gsm8k
from lib.compare.runs import METRIC_STAGES, Run, load_run
from lib.compare.tables import score_text
from lib.engine import load, quiet, sources
from lib.record import lookup
from lib.record.files import folder_in_making, free_bytes, sha256_file, sha256_json, share
from lib.record.paths import ArtifactError, RunPaths, display_path, expand_home, require, results_root, run_paths
from lib.record.plain_files import list_files
from lib.record.protocol import adapter_hashes
from lib.record.terminal import fail, tell
from lib.train import model_card, selection_rows

FOLDER = "models"
# Free space, relative to the weights.
ROOM = 1.2


def export_model(paths: RunPaths, assets_dir: str = "", offline: bool = False) -> Path:
    """Write the evaluated model of one run; returns its folder, which replaces an older one once complete."""
    list_files(paths.run_dir.parent / FOLDER)  # refuses links
    run = evaluated_run(paths)
    dtype = evaluated_dtype(run)
    name, assets_dir = run.parameters["base_model"], assets_dir or run.parameters.get("assets_dir", "")
    # Redaction writes a home folder as ~.
    name = str(expand_home(name)) if name.startswith("~") else name
    base = sources.resolve_model(name, run.parameters["base_model_revision"], assets_dir, offline)
    check_unchanged(run, base.identity)
    device = load.resolve_runtime(run.parameters["device"], "auto").device
    # The run's dtype, float16 on a CPU too: only the merge is computed here.
    runtime = load.Runtime(device, load.DTYPES[dtype], "as evaluated")
    dense = load.load_dense(base.folder, runtime, run.parameters["quantization"], paths.adapter_dir)
    tokenizer = load.load_tokenizer(base.folder)
    folder = paths.run_dir.parent / FOLDER / paths.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    need, free = ROOM * sum(weights.nbytes for weights in dense.parameters()), free_bytes(folder.parent)
    if free < need:
        where = display_path(folder.parent)
        raise ArtifactError(f"{where}: {need / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
    with folder_in_making(folder, is_complete=lambda _: False) as made:
        save_plain(dense, tokenizer, made)
        model_card.write_card(made, _facts(run, base, dtype), "transformers")
    return folder


def evaluated_run(paths: RunPaths) -> Run:
    """A run that has an adapter and its parameters; else ArtifactError."""
    if not paths.run_dir.is_dir():
        there = ", ".join(sorted(path.name.removeprefix("run_") for path in paths.run_dir.parent.glob("run_*")))
        raise ArtifactError(f"{display_path(paths.run_dir.parent)}/ holds no such run; there are: {there or 'none'}")
    require(paths.manifest("02_train"), "02_train", paths.name)
    require(paths.config_resolved, "02_train", paths.name)
    return load_run(paths)


def evaluated_dtype(run: Run) -> str:
    """Dtype of the weights, as ``torch`` names it; of a run without evaluation the one in its parameters."""
    dtypes = [score.protocol["dtype"] for score in run.metrics.values() if score.protocol]
    dtypes = dtypes or [load.resolve_runtime(run.parameters["device"], run.parameters["compute_dtype"]).dtype]
    names = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes})
    if len(names) > 1:
        words = ", ".join(names)
        raise ArtifactError(f"run {run.name!r} was evaluated in {words}: there is no one model; run 03 and 04 again")
    return names[0]


def check_unchanged(run: Run, base_identity: str) -> None:
    """Raise ArtifactError unless base and adapter are those that made the rows."""
    hashes = adapter_hashes(run.paths.adapter_dir)
    again = f"run it again (python run_all.py --presets {run.name})"
    for stage, protocol in ((METRIC_STAGES[name], score.protocol) for name, score in run.metrics.items()):
        if not protocol:
            continue
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
    with quiet.quiet_loading():
        dense.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        share(path)


def _facts(run: Run, base: sources.ModelSource, dtype: str) -> model_card.CardFacts:
    paths, prepared, trained = run.paths, run.manifests.get("01_prepare", {}), run.manifests["02_train"]
    train, made_elsewhere = trained["facts"], bool(trained["parameters"].get("checkpoint"))
    most, compared = trained["parameters"].get("max_sweep_checkpoints", 0), len(train.get("checkpoints", []))
    selected = train["adapter"], train["selected_on"], train.get("sweep_metric") or ""
    return model_card.CardFacts(
        run_name=run.name,
        base=base,
        revision=run.parameters["base_model_revision"],
        trained=train.get("trained", ""),
        selection=selection_rows.selection_text(*selected, compared, most),
        dtype=dtype,
        training={} if made_elsewhere else model_card.training_data(prepared, paths.train_rows),
        evaluation=model_card.evaluation_data(prepared, paths.dev_rows),
        parameters=run.config["parameters"],
        metrics={
            "GSM8K, strict": score_text(run.accuracy),
            "AILuminate, called safe by the judge": score_text(run.safety),
        },
        prompt=train.get("system_prompt", gsm8k.SYSTEM_PROMPT),
        benchmark=bool(run.parameters["benchmark"]),
        adapter_sha256=sha256_file(paths.adapter_dir / "adapter_model.safetensors"),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Write the models of the named runs; returns 1 if any failed, the others are still written."""
    prog, description = "python -m lib.reports.to_transformers", "Evaluated models as plain folders."
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--results-dir", default="", help="folder of the runs")
    parser.add_argument("--assets", default="", help="folder with models already fetched")
    parser.add_argument("--offline", action="store_true", help="never use the network")
    parser.add_argument("runs", nargs="*", help="names of runs")
    args = parser.parse_args(argv)
    status = 0 if args.runs else 1
    root = display_path(results_root(args.results_dir))
    if not args.runs:
        fail(f"--export model: {root}/ holds no run: run a preset first (python run_all.py --presets NAME)")
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
