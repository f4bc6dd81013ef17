"""Tables of 02_train: the settings as they are passed, and nothing where nothing was trained."""

from pathlib import Path

import torch
import yaml

from lib.engine.load import Runtime
from lib.engine.sources import ModelSource
from lib.params import PARAMS_DIR
from lib.reports import training_tables
from lib.train.checkpoint_selection import NOT_SELECTED, Choice
from lib.train.settings import TrainSettings

SANDBOX = yaml.safe_load((PARAMS_DIR / "sandbox_one.yaml").read_text(encoding="utf-8")) | {"checkpoint": ""}
BASE = ModelSource("owner/base", Path("base"), "owner/base@1", "hub")
RUNTIME = Runtime("cpu", torch.float32, "test")


def test_settings_come_from_the_parameters_of_a_run():
    settings = TrainSettings.from_params(SANDBOX, "owner/base@1 nf4")
    assert (settings.base_identity, settings.lora_r, settings.rows_per_step) == ("owner/base@1 nf4", 8, 2)
    assert settings.micro_batch_tokens == 0 and settings.gradient_checkpointing is None


def test_settings_are_shown_as_they_are_passed(tmp_path):
    shown = training_tables.settings_table(SANDBOX, BASE, RUNTIME, 11, tmp_path).text
    assert "2 rows per step, 6 steps" in shown
    for words in ("bnb_4bit_quant_type nf4", "lora_alpha 16", "learning_rate 0.0001", "lr_scheduler_type cosine"):
        assert words in " ".join(shown.split())
    assert not list(tmp_path.iterdir()), "a table makes no folder"
    plain = training_tables.settings_table(SANDBOX | {"quantization": "none"}, BASE, RUNTIME, 11, tmp_path)
    assert "BitsAndBytesConfig" not in plain.text


def test_where_nothing_was_trained_nothing_is_shown(tmp_path):
    mine = SANDBOX | {"checkpoint": "mine"}
    assert training_tables.settings_table(mine, BASE, RUNTIME, 11, tmp_path) is None
    assert training_tables.cost_table(None, "cpu") is training_tables.curves(None, 0, None) is None
    choice = Choice("the adapter mine", None, NOT_SELECTED, "Kept is mine.")
    assert training_tables.choice_table(choice) is training_tables.choice_plot(choice, None) is None
    trained = training_tables.trained_text(None, "mine")
    assert training_tables.summary(trained, choice, None, 0) == [trained, "Kept is mine."]


def test_the_question_is_not_trained_on_where_there_is_another():
    row = {"question": "?", "answer": "#### 1"}
    assert training_tables.probe([row], [row], [row])["kind"] == "a development row"
    assert training_tables.probe([], [row], [row])["kind"] == "a row of the few-shot pool"
    assert training_tables.probe([], [], [row])["kind"] == "a training row"
