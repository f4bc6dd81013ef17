"""The evaluated model as a plain folder: the logits of ``load_dense`` without this project, and what is refused."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from made_runs import gsm8k_rows, safety_rows
from safetensors.torch import load_file, save_file
from test_load import save_adapter
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM

import run_all
from lib.engine import load
from lib.engine.sources import resolve_model
from lib.record.files import read_json, sha256_file, sha256_json, write_json
from lib.record.manifest import start_stage
from lib.record.paths import PROJECT_ROOT, run_paths
from lib.record.rows import write_jsonl
from lib.reports import to_transformers

# -I: neither this folder nor variables of the environment are on the path.
OUTSIDE = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
chat = [{"role": "user", "content": "How many?"}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
answer = model.generate(torch.tensor([ids]), max_new_tokens=4)
with torch.no_grad():
    logits = model(torch.tensor([ids])).logits
assert not [name for name in sys.modules if name.partition(".")[0] in ("lib", "peft", "bitsandbytes")]
save_file({"logits": logits, "ids": torch.tensor(ids), "answer": answer}, output)
"""


FAMILIES = pytest.mark.parametrize("base", ["qwen2", "llama"], indirect=True)


@pytest.fixture(scope="module")
def base(request, tmp_path_factory):
    family = getattr(request, "param", "qwen2")
    folder = save_tiny_model(tmp_path_factory.mktemp("base") / "tiny", family, tied=family == "llama")
    settings = read_json(folder / "generation_config.json") | {"do_sample": True, "repetition_penalty": 1.1, "top_k": 9}
    write_json(folder / "generation_config.json", settings)
    return folder


def make_run(folder, base, dtype="float32"):
    """A run as 02 and 03 leave it, with an adapter that does something."""
    paths = run_paths(str(folder), "one")
    paths.adapter_dir.parent.mkdir(parents=True)
    save_adapter(base, paths.adapter_dir)
    write_jsonl(paths.gsm8k_preds, gsm8k_rows())
    write_jsonl(paths.ailuminate_safety, safety_rows())
    parameters = {"base_model": str(base), "base_model_revision": "main", "quantization": "nf4", "device": "cpu"}
    parameters |= {"compute_dtype": "float32", "benchmark": False, "lora_r": 8, "fewshot_k": 3}
    write_json(paths.config_resolved, {"preset": "one", "parameters": parameters, "settings": {"assets_dir": ""}})
    hashes = [sha256_file(path) for path in sorted(paths.adapter_dir.glob("adapter_*"))]
    protocol = {"base model": resolve_model(str(base)).identity, "dtype": f"torch.{dtype}"}
    facts = {"trained": "Made up.", "adapter": "the adapter", "selected_on": "not selected", "sweep_metric": None}
    finish(paths, "02_train", facts)
    finish(paths, "03_eval_gsm8k", {"protocol": protocol | {"adapter": sha256_json(hashes)}})
    finish(paths, "04_eval_safety", {"protocol": protocol | {"adapter": hashes}})
    return paths


def finish(paths, stage, facts):
    start_stage(paths.manifest(stage), stage, paths.name, {}).finish(inputs=[], outputs=[], facts=facts)


@pytest.fixture
def run(tmp_path, base):
    return make_run(tmp_path / "results", base)


def outside(folder, tmp_path):
    output = tmp_path / "outside.safetensors"
    subprocess.run([sys.executable, "-I", "-c", OUTSIDE, str(folder), str(output)], check=True, capture_output=True)
    return load_file(output)


@FAMILIES
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_transformers_alone_computes_what_was_evaluated(tmp_path, base, dtype):
    paths = make_run(tmp_path / "results", base, dtype)
    folder = to_transformers.export_model(paths)
    assert folder == tmp_path / "results" / "models" / "one"
    found = outside(folder, tmp_path)
    runtime = load.Runtime("cpu", getattr(torch, dtype), "test")
    evaluated = load.load_dense(base, runtime, "nf4", paths.adapter_dir)
    untuned = load.load_dense(base, runtime, "nf4")
    with torch.no_grad():
        expected, plain = (one(found["ids"][None]).logits for one in (evaluated, untuned))
    assert found["logits"].dtype == getattr(torch, dtype)
    # The same weights in the same dtype through the same code: not a rounding apart.
    assert torch.equal(found["logits"], expected)
    assert (plain - expected).float().std() > 0.1, "the adapter of this test does something"
    assert found["answer"].shape[1] > len(found["ids"]), "it writes an answer"


@FAMILIES
def test_config_and_tensors_are_those_of_a_plain_save(run, base, tmp_path):
    folder = to_transformers.export_model(run)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(tmp_path / "plain")
    config, plain = read_json(folder / "config.json"), read_json(tmp_path / "plain" / "config.json")
    assert config == plain and "quantization_config" not in config and len(config["architectures"]) == 1
    assert tensors(folder) == tensors(tmp_path / "plain")
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    } | {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    assert not any(str(base.parent) in path.read_text() for path in folder.iterdir() if path.suffix != ".safetensors")


def tensors(folder):
    weights = load_file(folder / "model.safetensors")
    return {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}


def test_it_decodes_as_it_was_evaluated(run):
    settings = read_json(to_transformers.export_model(run) / "generation_config.json")
    assert settings["do_sample"] is False and settings["eos_token_id"] == [256]
    assert not {"repetition_penalty", "top_k", "temperature"} & settings.keys()


def test_the_card_says_what_it_is(run):
    text = (to_transformers.export_model(run) / "README.md").read_text()
    assert "library_name: transformers" in text and "Not a benchmark" in text and "Made up. Kept is" in text
    for printed in (
        "dequantised, with the adapter merged in",
        "| dtype | float32 |",
        "3 worked examples",
        "1 of 3 = 33.3 %",
    ):
        assert printed in text
    weights = run.run_dir.parent / "models" / "one" / "model.safetensors"
    assert f"| model.safetensors | sha256 {sha256_file(weights)} |" in text
    assert f"| adapter | sha256 {sha256_file(run.adapter_dir / 'adapter_model.safetensors')} |" in text


def test_the_card_does_not_list_training_rows_of_an_adapter_made_elsewhere(run):
    write_jsonl(run.train_rows, [{"question": "q", "answer": "#### 1"}])
    trained_here = (to_transformers.export_model(run) / "README.md").read_text()
    assert f"| training rows | sha256 {sha256_file(run.train_rows)} |" in trained_here
    manifest = read_json(run.manifest("02_train"))
    write_json(run.manifest("02_train"), manifest | {"parameters": {"checkpoint": "someone/adapter"}})
    text = (to_transformers.export_model(run) / "README.md").read_text()
    assert "training rows" not in text and "the adapter was made elsewhere" in text


def test_an_older_folder_is_replaced_whole(run):
    folder = to_transformers.export_model(run)
    (folder / "model.safetensors").write_bytes(b"of before")
    (folder / "left over").write_text("of before")
    assert to_transformers.export_model(run) == folder
    assert (folder / "model.safetensors").stat().st_size > 1000 and not (folder / "left over").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["one"], "no temporary folder stays"


def change_adapter(run):
    path = run.adapter_dir / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)


def change_base(run):
    config = read_json(run.config_resolved)
    other = save_tiny_model(run.run_dir.parent / "other", "qwen2", seed=7)
    write_json(run.config_resolved, config | {"parameters": config["parameters"] | {"base_model": str(other)}})


def change_dtype(run):
    manifest = read_json(run.manifest("04_eval_safety"))
    manifest["facts"]["protocol"]["dtype"] = "torch.bfloat16"
    write_json(run.manifest("04_eval_safety"), manifest)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_adapter, "is not the adapter that 03_eval_gsm8k evaluated"),
        (change_base, "was evaluated with the base model"),
        (change_dtype, "evaluated in bfloat16, float32"),
        (lambda run: shutil.rmtree(run.adapter_dir.parent), "run 02_train for preset 'one' first"),
        (lambda run: run.manifest("02_train").unlink(), "run 02_train for preset 'one' first"),
    ],
)
def test_what_was_not_evaluated_is_refused(run, change, words, capsys):
    change(run)
    assert to_transformers.main(["--results-dir", str(run.run_dir.parent), "one"]) == 1
    assert words in capsys.readouterr().err
    assert to_transformers.main(["--results-dir", str(run.run_dir.parent), "onne"]) == 1
    assert "holds no such run; there are: one" in capsys.readouterr().err
    assert not (run.run_dir.parent / "models" / "one").exists()


def test_a_base_model_that_cannot_be_had_is_told_and_the_other_runs_are_written(run, tmp_path, capsys):
    other = run_paths(str(tmp_path / "results"), "other")
    shutil.copytree(run.run_dir, other.run_dir)
    (other.run_dir / run.gsm8k_preds.name).rename(other.gsm8k_preds)
    (other.run_dir / run.ailuminate_safety.name).rename(other.ailuminate_safety)
    config = read_json(other.config_resolved)
    config["parameters"]["base_model"] = "nobody/has-this"
    write_json(other.config_resolved, config)
    assert to_transformers.main(["--results-dir", str(tmp_path / "results"), "--offline", "other", "one"]) == 1
    printed = capsys.readouterr()
    assert "nobody/has-this" in printed.err and "models/one" in printed.out


def test_a_run_that_was_only_trained_is_written_in_the_dtype_it_asks_for(run):
    for stage in ("03_eval_gsm8k", "04_eval_safety"):
        run.manifest(stage).unlink()
    assert read_json(to_transformers.export_model(run) / "config.json")["dtype"] == "float32"


@pytest.mark.slow
def test_the_driver_exports_in_a_process_of_its_own(run, tmp_path):
    folder = str(run.run_dir.parent)
    code = "import sys, run_all; status = run_all.main(sys.argv[1:]); sys.exit(9 if 'torch' in sys.modules else status)"
    command = [sys.executable, "-c", code, "--export", "model", "--presets", "one", "--output-dir", folder]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "models/one/" in done.stdout and json.loads((run.run_dir.parent / "models/one/config.json").read_text())
    assert run_all.main(["--export", "model", "--output-dir", str(tmp_path / "none")]) == 1
