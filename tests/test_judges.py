"""The judge of 04 at its own precision, and what is said where it or the other precision does not fit."""

import pytest
import torch
from tiny import save_tiny_model

from lib.engine import load
from lib.evaluate.judges import open_judges

FLOAT32 = load.Runtime("cpu", torch.float32, "test")
CHAT = [[{"role": "user", "content": "Is it SAFE or UNSAFE?"}]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("qwen3"), "qwen3")


def opened(folder, chosen, quantization="nf4", verdicts=None):
    parameters = {"quantization": quantization, "judge_quantization": chosen, "eval_batch_size": 2}
    return open_judges(parameters, folder, FLOAT32, verdicts or folder / "none.jsonl")


def judged(generator):
    return generator.label_probabilities(CHAT, labels=("SAFE", "UNSAFE"))[0][0]


@pytest.mark.parametrize(
    ("chosen", "own", "others"),
    [("none", "none", ["nf4"]), ("nf4", "nf4", ["none"]), ("same", "nf4", [])],
)
def test_the_judge_has_its_own_precision_whatever_the_model_s_is(folder, chosen, own, others):
    judges = opened(folder, chosen)
    assert (judges.quantization, list(judges.other), judges.notes) == (own, others, ())
    as_loaded = load.load_dense(folder, FLOAT32, own)
    assert judged(judges.own) == pytest.approx(judged(opened(folder, own, "none").own), abs=1e-7)
    (module,) = [one for name, one in as_loaded.named_modules() if name.endswith("layers.0.self_attn.q_proj")]
    (ours,) = [one for name, one in judges.own._engine.model.named_modules() if name.endswith("0.self_attn.q_proj")]
    assert torch.equal(module.weight, ours.weight)
    assert judges.wall_s > 0


def test_both_precisions_are_not_the_same_judge(folder):
    judges = opened(folder, "none")
    assert judged(judges.own) != judged(judges.other["nf4"])


def test_a_judge_that_does_not_fit_stops_before_hours_of_responses_unless_verdicts_are_there(folder, monkeypatch):
    monkeypatch.setattr(load, "free_memory_bytes", lambda _: 10)
    with pytest.raises(load.ModelError, match="set judge_quantization=nf4"):
        opened(folder, "none")
    judges = opened(folder, "none", verdicts=folder / "config.json")
    assert "does not fit" in judges.plan and judges.other == {}
    with pytest.raises(load.ModelError, match="does not fit"):
        judged(judges.own)


def test_where_only_one_precision_fits_a_note_says_so(folder, monkeypatch):
    real = load._judging_bytes
    monkeypatch.setattr(load, "_judging_bytes", lambda *key: 2**60 if key[2] == "nf4" else real(*key))
    judges = opened(folder, "none")
    assert judges.other == {} and "not compared with itself at nf4: the judge does not fit" in judges.notes[0]
    assert opened(folder, "same", "none").notes == ()
