"""One base a stage: loaded once, merged, put back bit by bit, trained, and loaded again where it cannot be put back."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from test_load import save_adapter
from test_sft import SETTINGS, conversation
from tiny import save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from lib.engine import load, models
from lib.engine.models import Models, copy_weights, put_back
from lib.record.paths import PROJECT_ROOT
from lib.train import sft
from lib.train.rows import encode_rows

FLOAT32, BFLOAT16 = (load.Runtime("cpu", dtype, "test") for dtype in (torch.float32, torch.bfloat16))
FIXTURE = PROJECT_ROOT / "tests" / "fixtures" / "made_before"
CHAT = [[{"role": "user", "content": f"What is {number} and one?"}] for number in range(3)]


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama"])
def folder(request, tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp(request.param), request.param, tied=request.param != "llama")


@pytest.fixture
def loads(monkeypatch):
    """How often each folder's weights were loaded."""
    counted, real = Counter(), AutoModelForCausalLM.from_pretrained

    def counting(name, *args, **kwargs):
        counted[Path(name).name] += 1
        return real(name, *args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counting)
    return counted


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == weight.dtype and torch.equal(ours[name], weight) for name, weight in theirs.items()
    )


KINDS = [{}, {"use_dora": True}, {"use_rslora": True}]


@pytest.mark.parametrize("kind", KINDS, ids=["lora", "dora", "rslora"])
@pytest.mark.parametrize(("runtime", "quantization"), [(FLOAT32, "nf4"), (BFLOAT16, "nf4"), (BFLOAT16, "none")])
def test_every_side_has_the_weights_of_a_fresh_load_from_one_load(folder, runtime, quantization, kind, loads, tmp_path):
    adapters = [save_adapter(folder, tmp_path / f"{scale}", scale, **kind) for scale in (0.1, 0.3)]
    sides = [(adapters[0], 1.0), (None, 1.0), (adapters[1], 1.0), (adapters[0], 1.0), (None, 1.0)]
    if "use_dora" not in kind:
        sides.insert(2, (adapters[1], 0.5))
    own = Models(folder, runtime, quantization)
    loads.clear()
    made = [weights(own.engine(*side).model) for side in sides]
    assert loads == {folder.name: 1}
    for side, ours in zip(sides, made, strict=True):
        assert same(ours, weights(load.load_dense(folder, runtime, quantization, *side))), side


def test_texts_are_those_of_fresh_loads(folder, tmp_path):
    adapter = save_adapter(folder, tmp_path, 0.3)
    own = Models(folder, FLOAT32, "none")
    tuned, untuned = own.tuned(adapter), own.untuned()
    texts = [one.generate(CHAT, max_new_tokens=8) for one in (untuned, tuned, untuned, tuned)]
    fresh = [Models(folder, FLOAT32, "none").tuned(path).generate(CHAT, max_new_tokens=8) for path in (None, adapter)]
    assert texts == fresh * 2 and fresh[0] != fresh[1]
    assert own.load_s > 0 and tuned.load_s > 0 and own.work_s > 0


def test_training_takes_the_base_in_memory_and_leaves_it_as_it_was(folder, loads, tmp_path):
    own = Models(folder, FLOAT32, "nf4")
    before = own.untuned().generate(CHAT, max_new_tokens=8)
    as_loaded = weights(own.engine(None).model)
    trainee = own.for_training()
    assert trainee.training and not any(weight.requires_grad for weight in trainee.parameters())
    wrapped = get_peft_model(trainee, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    wrapped(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    wrapped.unload()
    engine = own.engine(None)
    assert not engine.model.training and same(weights(engine.model), as_loaded)
    assert engine.generate(CHAT, max_new_tokens=8) == before
    assert loads == {folder.name: 1}


def test_an_adapter_trained_on_a_base_that_answered_before_is_that_of_a_fresh_base(folder, tmp_path):
    examples = encode_rows(tiny_tokenizer(), [conversation(number) for number in range(6)], 100).examples
    made = []
    for name in ("used", "fresh"):
        own = Models(folder, FLOAT32, "nf4")
        if name == "used":
            own.tuned(save_adapter(folder, tmp_path / "before", 0.3)).generate(CHAT, max_new_tokens=4)
        made.append(sft.train(own.for_training(), examples, SETTINGS, tmp_path / name, say=lambda line: None))
    assert made[0].adapter_sha256 == made[1].adapter_sha256
    assert [row["loss"] for row in made[0].log] == [row["loss"] for row in made[1].log]


def test_packed_training_frees_the_dense_base_first(folder, loads, monkeypatch, capsys):
    own, found = Models(folder, FLOAT32, "nf4"), []
    own.engine(None)

    def choose(*args, held_bytes):
        found.append(held_bytes)
        return "packed", "NF4, packed (no room)"

    monkeypatch.setattr(models, "choose_weights", choose)
    trainee = own.for_training()
    assert trainee.is_loaded_in_4bit and trainee.training and own._model is None
    assert found[0] >= sum(weight.nbytes for weight in load.load_base(folder, FLOAT32, "none").parameters())
    assert "weights: NF4, packed (no room)" in capsys.readouterr().out


def test_where_memory_is_short_the_base_is_loaded_again(folder, loads, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "free_memory_bytes", lambda device: 1000)
    adapter, own = save_adapter(folder, tmp_path, 0.1), Models(folder, FLOAT32, "none")
    loads.clear()
    made = [weights(own.engine(path).model) for path in (adapter, None, adapter)]
    # The first side, and the base in place of what the adapter was merged into.
    assert loads == {folder.name: 2}
    for path, ours in zip((adapter, None, adapter), made, strict=True):
        assert same(ours, weights(load.load_dense(folder, FLOAT32, "none", path)))


def test_weights_computed_with_in_another_dtype_are_put_back_in_their_own(folder, loads, tmp_path):
    adapter, own = save_adapter(folder, tmp_path, 0.1), Models(folder, BFLOAT16, "none")
    for path in (adapter, None, adapter):
        model = own.engine(path).model
        assert same(weights(model), weights(load.load_dense(folder, BFLOAT16, "none", path)))
        model.float()


def test_a_model_with_other_layers_is_not_put_back(folder):
    model = load.load_dense(folder, FLOAT32, "none")
    kept = copy_weights(model)
    assert put_back(kept, model) and not put_back({}, model)
    name = next(iter(kept))
    assert not put_back({**kept, "more": kept[name]}, model)
    assert not put_back({**kept, name: kept[name][:1]}, model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert put_back(kept, model) == ("lm_head.weight" in kept), "an output layer that is not tied any more"


# --- stages -----------------------------------------------------------------------------------------------------------


def run_stage(stage, results, **changes):
    """The code cells of a notebook in this process, with the fixture's settings; its namespace."""
    lines = (FIXTURE / "settings.txt").read_text(encoding="utf-8").split()
    settings = {key: yaml.safe_load(value) for key, _, value in (line.partition("=") for line in lines)}
    settings |= {"results_dir": str(results), "offline": True, "save_steps": 1, "max_gsm8k_rows": 2, **changes}
    namespace = {"display": print}
    for cell in json.loads((PROJECT_ROOT / "notebooks" / f"{stage}.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)
        if "parameters" in cell["metadata"].get("tags", []):
            namespace |= {name: value for name, value in settings.items() if name in namespace}
    return namespace["stage"]


def manifest(stage):
    return json.loads((stage.folder / "manifest.json").read_text(encoding="utf-8"))


def test_a_stage_loads_each_model_once(loads, tmp_path, monkeypatch):
    """The answer before training, training, two checkpoints, the answer after; three sides; two sides and the judge."""
    monkeypatch.chdir(PROJECT_ROOT)
    run_stage("01_prepare", tmp_path)
    counts = {}
    for stage in ("02_train", "03_eval_gsm8k", "04_eval_safety"):
        loads.clear()
        facts = manifest(run_stage(stage, tmp_path, adapter_scales=[0.5], max_ailuminate_rows=2))["facts"]
        counts[stage] = dict(loads)
        assert facts["model_load_s"] > 0 and facts["model_work_s"] > 0
    once = {"base": 1}
    assert counts == {"02_train": once, "03_eval_gsm8k": once, "04_eval_safety": {"base": 1, "judge": 1}}


def test_a_judge_in_the_selection_is_loaded_once_and_the_base_again_after_it(loads, tmp_path, monkeypatch):
    """Base and judge are never in memory together; the base answers after the judge has chosen."""
    monkeypatch.chdir(PROJECT_ROOT)
    for stage in ("01_prepare", "02_train"):
        loads.clear()
        run_stage(stage, tmp_path, dev_safety_rows=1, sweep_metric="sum", max_ailuminate_rows=2)
    assert loads == {"base": 2, "judge": 1}
