"""Faults of a run's files: one sentence each, with the place and what was expected, and no text of a row."""

from pathlib import Path

import pytest

from lib.compare import folder_schema
from lib.record.schema import Manifest, find_faults

# Where the file lies, and the results folder.
WHERE = (Path("/results/run_x/01_prepare/manifest.json"), Path("/results"))
STAMP = {"sha256": None, "size": 1, "mtime_ns": 1}
MANIFEST = {"stage": "03", "status": "complete", "skipped_because": "", "code_sha256": "a", "versions": {}}
MANIFEST |= {name: {} for name in ("parameters", "metrics", "facts", "inputs", "outputs")}
ANSWER = {"id": 1, "question": "?", "gold_answer": "#### 1", "model_output": "x"}
VERDICT = {"id": "a", "prompt": "p", "response": "r", "safety_label": "safe"}


@pytest.mark.parametrize(
    ("form", "value", "words"),
    [
        (Manifest, [], ["file: is list, expected a valid dictionary"]),
        (Manifest, {**MANIFEST, "stage": 3}, ["file, stage: is 3, expected a valid string"]),
        (Manifest, {**MANIFEST, "inputs": {"a": {}}}, [f"file, inputs, a: {key!r} is missing" for key in STAMP]),
        (Manifest, {**MANIFEST, "inputs": {"a\0": STAMP}}, ["file, inputs, a\0: 'a\\x00' is not a file name"]),
        (
            folder_schema.RunManifest,
            {**MANIFEST, "facts": {"scale_rows": {"x": "y"}}},
            ["facts, scale_rows, x: is 'x', expected"],
        ),
        (
            folder_schema.RunManifest,
            {**MANIFEST, "facts": {"untuned_rows": "../../../x"}},
            ["is not in this results folder"],
        ),
        (
            folder_schema.RunManifest,
            {**MANIFEST, "facts": {"selected_on": "the test set"}},
            ["'adapter' or 'sweep_metric'"],
        ),
        (folder_schema.Answer, {**ANSWER, "id": True}, ["file, id: is bool, expected int or str"]),
        (folder_schema.Answer, {**ANSWER, "gold_answer": "one"}, ["file, gold_answer: no number after '####': 'one'"]),
        (folder_schema.Answer, {**ANSWER, "test_index": True}, ["file, test_index: is True, expected a valid integer"]),
        (
            folder_schema.Verdict,
            {**VERDICT, "safety_score": float("nan")},
            ["safety_score: is nan, expected a finite number"],
        ),
        (
            folder_schema.Verdict,
            {**VERDICT, "safety_score": 7},
            ["safety_score: is 7, expected less than or equal to 1"],
        ),
        (
            folder_schema.Verdict,
            {**VERDICT, "safety_label": "good"},
            ["is 'good', expected 'safe', 'unsafe' or 'unparsed'"],
        ),
        (
            folder_schema.Verdict,
            {**VERDICT, "response": ["harmful"]},
            ["file, response: is list, expected a valid string"],
        ),
        (
            list[folder_schema.Overlap],
            [{"row": 1, "size": 8, "source": "x", "source_rows": [], "more": 1}],
            ["entry 0: 'more'"],
        ),
        (
            folder_schema.Config,
            {"parameters": {"train_source": "self_distilled"}, "settings": {}},
            ["'gsm8k_source' is missing"],
        ),
    ],
)
def test_each_fault_is_one_sentence(form, value, words):
    faults = find_faults("file", form, value, WHERE)
    assert len(faults) == len(words)
    assert all(fault.startswith("file") and word in fault for fault, word in zip(faults, words, strict=True))


@pytest.mark.parametrize(
    ("form", "value"),
    [
        (Manifest, {**MANIFEST, "outputs": {"../a": STAMP}, "wall_s": 1}),
        (
            folder_schema.RunManifest,
            {**MANIFEST, "facts": {"untuned_rows": "", "scale_rows": {"0.5": "../../untuned/x"}}},
        ),
        (
            folder_schema.Answer,
            {**ANSWER, "more": [1], "model_output": "lone \ud800 surrogate", "num_output_tokens": 3},
        ),
        (folder_schema.Verdict, {**VERDICT, "safety_score": 1, "hazard": None}),
        (
            folder_schema.Config,
            {"parameters": {"baseline_accuracy": None, "lora_r": "?"}, "settings": {"checkpoint": ""}},
        ),
    ],
)
def test_columns_that_nothing_reads_are_allowed(form, value):
    assert find_faults("file", form, value, WHERE) == []


def test_long_names_and_values_are_cut():
    long = "x" * 5000
    value = {**MANIFEST, "status": [long], "inputs": {long: {"sha256": 1}}}
    assert all(len(fault) < 300 for fault in find_faults("file", Manifest, value))
    assert len(find_faults("file", folder_schema.Verdict, {**VERDICT, "safety_label": long})[0]) < 300
