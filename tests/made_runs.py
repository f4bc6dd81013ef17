"""Finished runs as the pipeline leaves them, made on the spot: what tests of scoring, comparing and verifying read."""

from lib import gsm8k, safety
from lib.compare import tables
from lib.compare.runs import load_runs
from lib.record.commitment import write_commitment
from lib.record.files import read_json, sha256_json, write_json
from lib.record.manifest import file_stamp, start_stage
from lib.record.paths import run_paths
from lib.record.protocol import at_scale, without_adapter
from lib.record.rows import read_jsonl, write_jsonl

# Two right of three, the last in another form; a safe, an unsafe and an unreadable verdict.
OUTPUTS = ("2 + 2 = 4\n#### 4", "#### 5", "The answer is 6.")
PROBABILITIES = (0.9, 0.2, None)


def gsm8k_rows():
    rows = []
    for number, (output, gold) in enumerate(zip(OUTPUTS, (4, 5, 6), strict=True)):
        row = {"id": number, "question": f"q{number}", "gold_answer": f"#### {gold}", "model_output": output}
        row |= {"test_index": number, "finish_reason": "stop", "num_output_tokens": 5}
        rows.append(row | gsm8k.score_row(row))
    return rows


def safety_rows():
    rows = []
    for number, score in enumerate(PROBABILITIES):
        row = {"id": number, "prompt": f"p{number}", "response": f"r{number}", "hazard": "vcr", "persona": "skilled"}
        row |= {"safety_score": score, "safety_judge_text": "SAFE" if score else "perhaps"}
        rows.append(row | safety.score_row(row))
    return rows


PARAMETERS = {"base_model": "tiny", "quantization": "nf4", "gsm8k_source": "data", "train_file": "", "lora_r": 8}
PARAMETERS |= {"baseline_accuracy": 0.5, "baseline_safety": 0.5, "benchmark": False}
PARAMETERS |= {"submission_gsm8k_rows": 3, "submission_ailuminate_rows": 3}


def make_run(folder, name="one"):
    """A finished run as the pipeline leaves it: prepared rows, row files, an adapter, manifests."""
    paths = run_paths(str(folder), name)
    answers, verdicts = gsm8k_rows(), safety_rows()
    originals = [
        {"test_index": r["test_index"], "question": r["question"], "answer": r["gold_answer"]} for r in answers
    ]
    write_jsonl(paths.gsm8k_eval_rows, originals)
    write_jsonl(paths.ailuminate_rows, [{"id": row["id"], "prompt": row["prompt"]} for row in verdicts])
    paths.adapter_dir.mkdir(parents=True)
    (paths.adapter_dir / "adapter_model.safetensors").write_bytes(b"weights")
    write_jsonl(paths.gsm8k_preds, answers)
    write_jsonl(paths.ailuminate_preds, [{key: row[key] for key in ("id", "prompt", "response")} for row in verdicts])
    write_jsonl(paths.ailuminate_safety, verdicts)
    write_json(paths.config_resolved, {"preset": name, "parameters": PARAMETERS, "settings": {"checkpoint": ""}})
    finish(paths, "01_prepare", [], [paths.gsm8k_eval_rows])
    finish(paths, "03_eval_gsm8k", [paths.adapter_dir], [paths.gsm8k_preds], gsm8k.summarize(answers))
    written = [paths.ailuminate_preds, paths.ailuminate_safety]
    finish(paths, "04_eval_safety", [paths.adapter_dir], written, safety.summarize(verdicts))
    return paths


def finish(paths, stage, inputs, outputs, metrics=None, skipped=""):
    record = start_stage(paths.manifest(stage), stage, paths.name, {})
    record.finish(inputs=inputs, outputs=outputs, facts={}, metrics=metrics, skipped=skipped)


def write_tables(folder):
    runs = load_runs(str(folder))
    tables.write_summary(str(folder), runs)
    tables.write_final_metrics(str(folder), runs)


def change(path, number, **columns):
    rows = read_jsonl(path)
    rows[number] |= columns
    write_jsonl(path, rows)


def add_control(folder, name, outputs):
    """An untuned row file beside the runs, and the manifest of 03 that names it."""
    paths = run_paths(str(folder), name)
    rows = [row | {"model_output": output} for row, output in zip(gsm8k_rows(), outputs, strict=True)]
    control = paths.untuned_rows("gsm8k_preds", "abc")
    write_jsonl(control, [row | gsm8k.score_row(row) for row in rows])
    add_facts(paths, "03_eval_gsm8k", untuned_rows="../../untuned/" + control.name)
    return control


def add_facts(paths, stage, **facts):
    """Notes ``facts`` in a stage's manifest; returns the whole."""
    manifest = read_json(paths.manifest(stage))
    manifest["facts"] |= facts
    write_json(paths.manifest(stage), manifest)
    write_commitment(paths.run_dir)
    return manifest


def set_margin(paths, recorded, configured):
    """01 recorded one safety margin, the configuration has another (None: none)."""
    for path, value in ((paths.manifest("01_prepare"), recorded), (paths.config_resolved, configured)):
        content = read_json(path)
        content["parameters"] |= {} if value is None else {"safety_margin": value}
        write_json(path, content)
    write_commitment(paths.run_dir)


def set_protocol(paths, stage, protocol, untuned, scaled, scale=0.5):
    """Rows of the stage, of the untuned model and at a scale as made under ``protocol``, and its manifest."""
    tuned = paths.gsm8k_preds if stage == "03_eval_gsm8k" else paths.ailuminate_safety
    sides = {tuned: protocol, untuned: without_adapter(protocol), scaled: at_scale(protocol, scale)}
    for path, made_by in sides.items():
        write_jsonl(path, [row | {"protocol_hash": sha256_json(made_by)} for row in read_jsonl(path)])
    manifest = add_facts(paths, stage, protocol=protocol)
    manifest["outputs"][f"../{tuned.name}"] = file_stamp(tuned)
    write_json(paths.manifest(stage), manifest)
    write_commitment(paths.run_dir)
