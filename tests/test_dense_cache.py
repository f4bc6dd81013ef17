"""Dequantised weights kept on disk: the same weights, made once, made again when what they depend on changes."""

import pytest
import torch
from tiny import save_tiny_model

from lib.engine import dense_cache, load
from lib.engine.load import Runtime
from lib.engine.models import Models

FLOAT32 = Runtime("cpu", torch.float32, "test")
BFLOAT16 = Runtime("cpu", torch.bfloat16, "test")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(dense_cache, "CACHE_DIR", tmp_path / "dense")
    monkeypatch.setattr(dense_cache, "MIN_BYTES", 0)
    return save_tiny_model(tmp_path / "model")


@pytest.fixture
def packings(monkeypatch):
    """Names of the quantisations that were loaded again."""
    seen, real = [], load.load_base

    def load_base(path, runtime, quantization):
        seen.append(quantization)
        return real(path, runtime, quantization)

    monkeypatch.setattr(load, "load_base", load_base)
    return seen


def weights(loaded):
    return {name: tensor.clone() for name, tensor in loaded.state_dict().items()}


@pytest.mark.parametrize("runtime", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def test_kept_weights_are_those_that_were_made(folder, packings, runtime):
    made, kept = (weights(load.load_dense(folder, runtime, "nf4")) for _ in range(2))
    assert packings == ["nf4", "none"]
    assert made.keys() == kept.keys()
    assert all(torch.equal(made[name], kept[name]) and made[name].dtype == kept[name].dtype for name in made)
    assert not getattr(load.load_dense(folder, runtime, "nf4"), "is_quantized", False)


def test_training_starts_from_the_kept_weights(folder, packings):
    load.load_dense(folder, FLOAT32, "nf4")
    trainee = Models(folder, FLOAT32, "nf4").for_training()
    assert packings == ["nf4", "none"] and trainee.training


def test_other_weights_or_another_dtype_are_made_anew(folder, packings):
    load.load_dense(folder, FLOAT32, "nf4")
    load.load_dense(folder, BFLOAT16, "nf4")
    save_tiny_model(folder, seed=1)
    load.load_dense(folder, FLOAT32, "nf4")
    assert packings == ["nf4"] * 3 and len(list(dense_cache.CACHE_DIR.iterdir())) == 3


def test_a_folder_that_a_kill_left_without_its_note_is_not_read(folder, packings):
    load.load_dense(folder, FLOAT32, "nf4")
    (kept,) = dense_cache.CACHE_DIR.iterdir()
    (kept / dense_cache.NOTE).unlink()
    load.load_dense(folder, FLOAT32, "nf4")
    assert packings == ["nf4", "nf4"]


def test_where_nothing_can_be_kept_it_is_made_and_said(folder, packings, capsys):
    dense_cache.CACHE_DIR.write_text("in the way")
    load.load_dense(folder, FLOAT32, "nf4")
    assert packings == ["nf4"] and "not kept for the next load" in capsys.readouterr().out


def test_small_models_leave_nothing(folder, packings, monkeypatch):
    monkeypatch.setattr(dense_cache, "MIN_BYTES", 2**26)
    load.load_dense(folder, FLOAT32, "nf4")
    assert not dense_cache.CACHE_DIR.exists()
