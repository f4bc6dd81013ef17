"""The rows of a run from the bundled data: what is drawn, checked and left out."""

import json

import pytest
import yaml
from tiny import tiny_tokenizer

from lib.params import PARAMS_DIR
from lib.prepare import datasets, run_rows
from lib.prepare.self_distillation import OWN_ANSWERS, Distillation, Distilled, Sampled
from lib.record.lookup import AssetError
from lib.reports import prepare_tables
from lib.train.learnable import find_learnable

SANDBOX = yaml.safe_load((PARAMS_DIR / "sandbox_one.yaml").read_text(encoding="utf-8"))
PARAMETERS = SANDBOX | {"assets_dir": "", "offline": True}


def questions(rows):
    return {row["question"] for row in rows}


def test_training_pool_and_development_rows_share_no_question():
    data = run_rows.load_data(PARAMETERS)
    rows = run_rows.draw_rows(data, PARAMETERS)
    assert (len(rows.train), len(rows.dev), len(rows.pool), len(rows.fewshot)) == (12, 4, 8, 3)
    assert not questions(rows.train) & questions([*rows.dev, *rows.pool]) and rows.fewshot == rows.pool[:3]
    assert rows.num_removed == 12 and rows.decided == [] and data.no_prompts == ""
    assert [row["test_index"] for row in rows.gsm8k_eval] == list(range(24)) and len(rows.prompts) == 24
    shown = (
        prepare_tables.hazards(rows.prompts, data).text + prepare_tables.run_rows(rows, rows.train, data, SANDBOX).text
    )
    assert "24 prompts, language: English" in shown and "set all, language: English" in shown


@pytest.mark.parametrize("source", ["mlcommons", "class"])
def test_prompts_that_cannot_be_had_are_a_reason_and_no_error(tmp_path, monkeypatch, source):
    monkeypatch.setattr(datasets, "RAW_DIR", tmp_path)
    data = run_rows.load_data(PARAMETERS | {"ailuminate_source": source, "assets_dir": str(tmp_path)})
    assert "switched off (offline)" in data.no_prompts and data.prompts == [] and "AILuminate" not in data.sources
    shown = prepare_tables.hazards([], data).text
    assert "safety will be not measured" in shown and data.language == ""


def test_a_source_that_there_is_not_is_an_error(tmp_path):
    with pytest.raises(AssetError, match=r"nowhere\.csv is not there"):
        run_rows.load_data(PARAMETERS | {"ailuminate_source": str(tmp_path / "nowhere.csv")})


def test_a_training_file_is_checked_with_the_lines_of_its_rows(tmp_path):
    test_row = run_rows.load_data(PARAMETERS).gsm8k_test[0]
    file = tmp_path / "mine.jsonl"
    file.write_text('\n{"question": "2 + 2?", "answer": "#### 4"}\n\n')
    with file.open("a") as stream:
        stream.write(json.dumps(test_row) + "\n")
    parameters = PARAMETERS | {"train_source": "file", "train_file": str(file), "train_file_url": ""}
    data = run_rows.load_data(parameters | {"train_file_faults": "drop"})
    rows = run_rows.draw_rows(data, parameters | {"train_file_faults": "drop"})
    assert [row["question"] for row in rows.train] == ["2 + 2?"] and rows.num_unknown == 1
    assert [(fault.kind, fault.row) for fault in rows.decided] == [("test question", 4)]


def test_own_answers_take_the_place_of_the_training_rows():
    data = run_rows.load_data(PARAMETERS)
    rows = run_rows.draw_rows(data, PARAMETERS)
    assert run_rows.training_rows(rows, None, data, PARAMETERS) == (rows.train, data.train, "refuse")
    mine = [
        {"question": rows.train[0]["question"], "answer": rows.train[0]["answer"]},
        {"question": "?", "answer": " "},
    ]
    own = Distillation({}, Sampled([], 1, 0, 0, 0.0), Distilled(mine, [], 0, 0), data.sources["GSM8K train"].file)
    trained, file, action = run_rows.training_rows(rows, own, data, PARAMETERS)
    assert (file.name, action) == (OWN_ANSWERS, "drop")
    learnable = find_learnable(trained, tiny_tokenizer(), action, file)
    assert learnable.rows == mine[:1] and [fault.row for fault in learnable.faults] == [2]
    # Rows that are too long are counted where 01 writes them.
    assert [(fault.row, fault.file) for fault in learnable.too_long(3, file)] == [(1, "01_prepare/train.jsonl")]


def test_no_rows_are_learnable_rows():
    assert find_learnable([], tiny_tokenizer(), "refuse", run_rows.File([], "none")).rows == []
