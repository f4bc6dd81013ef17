"""What manifests and the configuration of a run state, against each other, its files and the grader's own preset."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lib import gsm8k, safety
from lib.compare.folder_schema import named_path
from lib.compare.found import Found, Grader
from lib.compare.parsed import read_once
from lib.compare.runs import METRIC_STAGES, RUN_STAGES, Run, judgement_files, row_file
from lib.evaluate.other_judgements import changes_by_way
from lib.params import Params, find_presets, load_params, preset_path
from lib.record.files import sha256_file, sha256_json
from lib.record.manifest import LOCATION_PARAMETERS
from lib.record.paths import PROJECT_ROOT, display_path, project_path
from lib.record.protocol import adapter_hashes, judge_quantization, with_precision
from lib.record.rows import read_jsonl

Row = Mapping[str, Any]
# Baselines and margin are the course's, not the run's: another value than the grader's preset has is never its choice.
THRESHOLDS = ("baseline_accuracy", "baseline_safety", "submission_gsm8k_rows", "submission_ailuminate_rows")
THRESHOLDS += ("safety_margin", "benchmark")

# A stage that is run again later may have these otherwise: no number follows from them.
MAY_CHANGE = frozenset({"description", "eval_batch_size"})


def check_claims(run: Run, grader: Grader, found: Found) -> None:
    """Manifests, configuration, protocol and preset of one run."""
    found.absent += [f"run_{run.name}: manifest of {stage}" for stage in RUN_STAGES if stage not in run.manifests]
    found.absent += [] if run.config else [f"run_{run.name}: config_resolved.json"]
    found.files |= {run.paths.manifest(stage) for stage in run.manifests} | {run.paths.config_resolved}
    for stage, manifest in run.manifests.items():
        found.checked["manifests"] += 1
        found.mismatches += [f"run_{run.name}, {stage}: {fault}" for fault in _manifest_faults(run, stage, manifest)]
    found.mismatches += [f"run_{run.name}, {fault}" for fault in _protocol_faults(run, found)]
    _check_preset(run, grader, found)


def _manifest_faults(run: Run, stage: str, manifest: Row) -> Iterator[str]:
    if manifest["stage"] != stage or manifest.get("run_name", run.name) != run.name:
        yield f"its manifest is that of {manifest['stage']} of run {manifest.get('run_name')!r}"
    settled = {**run.config.get("parameters", {}), **run.config.get("settings", {})}
    skip = MAY_CHANGE | LOCATION_PARAMETERS | {*manifest["facts"].get("unused_parameters", [])}
    for name, value in manifest["parameters"].items():
        if settled and name not in skip and settled.get(name, value) != value:
            yield f"it ran with {name} {value!r}, config_resolved.json has {settled[name]!r}"
    metric = next((name for name, of_stage in METRIC_STAGES.items() if of_stage == stage), "")
    if not metric or manifest["skipped_because"]:
        return
    file = row_file(run.paths, metric)
    if f"../{file.name}" not in manifest["outputs"]:
        yield f"its manifest does not name {file.name} among its outputs"
    for name, value in (run.metrics[metric].summary or {}).items():
        if manifest["metrics"].get(name) != value:
            yield f"{name} is {manifest['metrics'].get(name)}, recomputed {value}"


def check_hashes(manifests: Mapping[Path, Row], found: Found) -> None:
    """Files that are not those a stage wrote, by size and SHA-256."""
    stamps = {
        Path(named_path(path, name)): (stamp, manifest["stage"])
        for path, manifest in manifests.items()
        for name, stamp in manifest["outputs"].items()
    }
    missing = [file for file in stamps if not file.is_file()]
    if missing:
        found.absent.append(f"{len(missing)} files that manifests name, the first {display_path(missing[0])}")
    for file, (stamp, stage) in stamps.items():
        if not file.is_file():
            continue
        if file.stat().st_size == stamp["size"] and read_once(file, sha256_file) == stamp["sha256"]:
            found.checked["files by their hash"] += 1
            found.files.add(file)
        else:
            found.mismatches.append(f"{display_path(file)} is not the file that {stage} wrote (its SHA-256 differs)")


def _protocol_faults(run: Run, found: Found) -> Iterator[str]:
    """Parts of a recorded protocol that the files of the run do not give."""
    for metric, score in run.metrics.items():
        if score.rows and not score.row_protocol:
            found.absent.append(f"run_{run.name}: the protocol of its {metric} rows")
        for name, value in _protocol_parts(run, metric, found).items() if score.row_protocol else ():
            if with_precision(score.row_protocol).get(name) != value:
                yield f"{metric}: the recorded protocol has another {name} than the files here"


def _protocol_parts(run: Run, metric: str, found: Found) -> dict[str, Any]:
    paths, known = run.paths, run.parameters
    parts: dict[str, Any] = {"quantization": known["quantization"]} if "quantization" in known else {}
    hashes = adapter_hashes(paths.adapter_dir)
    if hashes:
        parts["adapter"] = sha256_json(hashes) if metric == "accuracy" else hashes
        found.checked["adapters of the rows"] += 1
        found.files |= {*paths.adapter_dir.glob("adapter_*")}
    else:
        found.absent.append(f"run_{run.name}: the adapter")
    if metric == "safety":
        parts |= {"prompts": sha256_json(read_rows(paths.ailuminate_rows))} if paths.ailuminate_rows.exists() else {}
        if parts.get("quantization") and "judge" in run.safety.row_protocol:
            chosen = known.get("judge_quantization", "same")
            parts["judge quantization"] = judge_quantization(known["quantization"], chosen)
        return parts | _judge_prompt(run, found)
    named = _own_prompt(run, "system_prompt_file", "the system message", found)
    if named is not None and "system message" in run.accuracy.row_protocol:
        parts["system message"] = sha256_json(gsm8k.read_system_prompt(named))
    if paths.gsm8k_eval_rows.exists():
        parts["questions"] = sha256_json(read_rows(paths.gsm8k_eval_rows))
    if paths.fewshot_rows.exists() and "fewshot_k" in known:
        found.files.add(paths.fewshot_rows)
        parts["few-shot examples"] = sha256_json(
            gsm8k.fewshot_examples(read_rows(paths.fewshot_rows), known["fewshot_k"])
        )
    return parts


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file that may be empty."""
    return read_once(path, read_jsonl) if path.stat().st_size else []


def _own_prompt(run: Run, key: str, what: str, found: Found) -> str | None:
    """The prompt file that the run names, "" for the built-in text; None, and noted, where it is not the grader's."""
    name = str(run.parameters.get(key) or "")
    file, why = own_file(name, run.paths.run_dir.parent)
    if name and not file:
        found.absent.append(f"run_{run.name}: {what}{why}")
        return None
    return name


def _judge_prompt(run: Run, found: Found) -> dict[str, str]:
    """The hash of the judge's prompt from the guidelines on this disk, and whether the rows have it."""
    known = run.parameters
    own, why = own_file(str(known.get("guidelines_file", "")), run.paths.run_dir.parent)
    if not own or not {"judge_context", "judge_mode"} <= known.keys():
        found.absent.append(f"run_{run.name}: the judge's guidelines{why}")
        return {}
    named = _own_prompt(run, "judge_prompt_file", "the judge's prompt", found)
    if named is None:
        return {}
    read = {"guidelines": safety.read_guidelines(own), "context": known["judge_context"], "mode": known["judge_mode"]}
    read["template"] = safety.read_judge_template(named, known["judge_context"])
    _check_other_ways(run, read, own, found)
    expected = safety.judge_prompt_hash(**read)
    found.checked["guidelines of a judge"] += 1
    others = [row["id"] for row in run.safety.rows if row.get("judge_prompt_hash") != expected]
    if others:
        files = f"{known['guidelines_file']}{' and ' * bool(named)}{named}"
        found.mismatches.append(
            f"run_{run.name}: {len(others)} verdicts were not made under {files} as it is here, "
            f"the first id {others[0]}"
        )
    return {"judge prompt": expected}


def _check_other_ways(run: Run, read: Row, guidelines: Path, found: Found) -> None:
    """Other judgements (``judgement_files``) against the prompt of their way, made from the grader's files."""
    changes = changes_by_way(read, guidelines)
    for way, sides in judgement_files(run).items():
        if way not in changes and not way.startswith("other_precision_"):
            found.absent.append(f"run_{run.name}: the guidelines that {way} was judged under")
            continue
        expected = safety.judge_prompt_hash(**{**read, **changes.get(way, {})})
        rows = [row for file in sides.values() for row in file.rows]
        others = [row["id"] for row in rows if row.get("judge_prompt_hash") != expected]
        if others:
            fault = f"{len(others)} verdicts were not made in this way by the guidelines here, the first id {others[0]}"
            found.mismatches.append(f"run_{run.name}, {way}: {fault}")


def own_file(name: str, results: Path, *folders: Path) -> tuple[Path | None, str]:
    """The file or folder in the grader's project that ``results`` names; None, and why, for any other or its own."""
    path = project_path(name).resolve()
    if not name or not any(path.is_relative_to(folder.resolve()) for folder in (PROJECT_ROOT, *folders)):
        return None, f" ({name!r} is not in this project)"
    if path.is_relative_to(results.resolve()):
        return None, f" ({name!r} is in the results folder itself)"
    return (path, "") if path.is_file() or path.is_dir() else (None, f" ({name!r} is not here)")


def grader_preset(run: Run, grader: Grader) -> tuple[str, Params | None]:
    """Name and parameters of the grader's preset that the run's name stands for, else the one it names."""
    known = find_presets(grader.params_dir)
    names = [run.name, re.sub(r"_seed\d+$", "", run.name), str(run.config.get("preset"))]
    name = next((name for name in names if name in known), "")
    return (name, load_params(preset_path(name, grader.params_dir))) if name else (names[-1], None)


def _check_preset(run: Run, grader: Grader, found: Found) -> None:
    name, preset = grader_preset(run, grader)
    if preset is None:
        found.absent.append(f"run_{run.name}: a preset {name!r} here to compare its baselines and settings with")
        return
    found.checked["presets"] += 1
    values = preset.model_dump()
    different = {key: value for key, value in run.parameters.items() if key in values and values[key] != value}
    for key in THRESHOLDS:
        if run.parameters and key not in run.parameters:
            found.absent.append(f"run_{run.name}: {key} in its configuration")
        if key in different:
            fault = f"{key} is {different.pop(key)!r}, in the preset {name!r} of this checkout {values[key]!r}"
            found.mismatches.append(f"run_{run.name}: {fault}")
    different.pop("description", None)
    if different:
        changes = ", ".join(f"{key} {value!r} (there {values[key]!r})" for key, value in different.items())
        found.differences.append(f"run_{run.name} is not as the preset {name!r} of this checkout: {changes}")
