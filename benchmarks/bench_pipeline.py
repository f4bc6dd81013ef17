"""Wall time of a complete run by stage, and how much of it is not model work.

    python benchmarks/bench_pipeline.py
    python benchmarks/bench_pipeline.py --preset sandbox_one --json

Model work is what the stages themselves say they spent in training steps, generation and judging (`model_work_s` in
their manifests); all else is kernel starts and loading, which they say too, imports, conversion, tables, plots and
HTML. The run is fresh, in a temporary folder, and then repeated to time a run in which nothing changed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROJECT_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_ROOT))

from lib.record.files import read_json  # noqa: E402
from lib.record.paths import STAGES, run_paths  # noqa: E402


def timed_run(preset: str, output: Path, extra: list[str]) -> float:
    """Wall seconds of one ``run_all.py``; its failure ends the benchmark."""
    command = [sys.executable, "run_all.py", "--presets", preset, "--output-dir", str(output), *extra]
    started = time.perf_counter()
    subprocess.run(command, cwd=PROJECT_ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def stage_seconds(preset: str, output: Path) -> list[dict[str, Any]]:
    """A row a stage: seconds in the notebook from its first cell, of those in the model and loading, and before it."""
    rows = []
    for stage in STAGES:
        folder = run_paths(str(output), preset)
        manifest = read_json(output / stage / "manifest.json" if stage == "05_compare" else folder.manifest(stage))
        facts, row = manifest["facts"], {"stage": stage, "cells_s": manifest["wall_s"]}
        row |= {"model_s": facts.get("model_work_s", 0.0), "load_s": facts.get("model_load_s", 0.0)}
        rows.append({**row, "kernel_start_s": manifest["kernel_start_s"]})
    return rows


def measure(preset: str, extra: list[str]) -> dict[str, Any]:
    """The benchmark as one object."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        wall_s = timed_run(preset, output, extra)
        stages = stage_seconds(preset, output)
        again_s = timed_run(preset, output, extra)
    model_s, load_s, start_s = (sum(row[name] for row in stages) for name in ("model_s", "load_s", "kernel_start_s"))
    return {
        "preset": preset,
        "cores": os.cpu_count(),
        "wall_s": round(wall_s, 1),
        "model_s": round(model_s, 1),
        "load_s": round(load_s, 1),
        "kernel_start_s": round(start_s, 1),
        "not_model_share": round(1 - model_s / wall_s, 3),
        "unchanged_rerun_s": round(again_s, 1),
        "stages": stages,
    }


def main() -> None:
    """Print one table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="sandbox_one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args, extra = parser.parse_known_args()
    result = measure(args.preset, extra)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{'stage':<16}{'in its cells':>14}{'in the model':>14}{'loading':>14}{'kernel start':>14}")
    for row in result["stages"]:
        seconds = "".join(f"{row[name]:>12.1f} s" for name in ("cells_s", "model_s", "load_s", "kernel_start_s"))
        print(f"{row['stage']:<16}{seconds}")
    total = "".join(f"{result[name]:>12.1f} s" for name in ("wall_s", "model_s", "load_s", "kernel_start_s"))
    print(f"{'complete run':<16}{total}")
    print(f"not model work: {result['not_model_share']:.1%} of the wall time, on {result['cores']} cores")
    print(f"the same again, nothing changed: {result['unchanged_rerun_s']:.1f} s")


if __name__ == "__main__":
    main()
