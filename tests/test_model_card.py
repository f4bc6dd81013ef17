"""The adapter's card: the same for the same training, safe to publish, and its script loads what was trained."""

import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import mistune
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_sft import conversation
from tiny import save_tiny_model, tiny_tokenizer

from lib import gsm8k
from lib.engine import load
from lib.engine.sources import ModelSource
from lib.train import model_card, sft
from lib.train.rows import encode_rows
from lib.train.settings import TrainSettings

FLOAT32 = load.Runtime("cpu", torch.float32, "test")
HUB = ModelSource("owner/base", Path("/somewhere/snapshots/0123abcd"), "owner/base@0123abcd", "hub")
FACTS = model_card.CardFacts(
    run_name="simple",
    base=HUB,
    revision="main",
    trained="2 steps on 8 rows.",
    selection="Kept is checkpoint-2, selected on development rows by accuracy.",
    dtype="float32",
    training={"training rows": "sha256 00ff"},
    evaluation={"GSM8K test": "GSM8K (MIT), 1,319 rows"},
    parameters={"quantization": "nf4", "lora_r": 4, "seed": 1, "results_dir": "/home/someone/results"},
    metrics={"loss": "1.0 | 0.5"},
    prompt=gsm8k.SYSTEM_PROMPT,
    benchmark=True,
)


def adapter_card(facts):
    return model_card.card_text(facts, "peft", {"adapter_model.safetensors": "abc123"})


def script(text):
    (found,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return found


def test_the_card_names_base_data_parameters_metrics_and_choice():
    text = adapter_card(FACTS)
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "owner/base" and front["library_name"] == "peft"
    for shown in ("owner/base@0123abcd", "sha256 00ff", "| lora_r | 4 |", "sha256 abc123", "selected on development"):
        assert shown in text
    assert "| loss | 1.0 \\| 0.5 |" in text, "a bar in a cell would end it"
    assert gsm8k.SYSTEM_PROMPT.splitlines()[0] in text
    assert "/home/someone" not in text and "/somewhere" not in text and "benchmark" not in text.casefold()
    assert "Not a benchmark" in adapter_card(replace(FACTS, benchmark=False))


def test_the_script_names_the_very_base():
    assert '"owner/base", revision="0123abcd"' in script(adapter_card(FACTS))
    kept = replace(FACTS, base=replace(HUB, origin="assets folder", identity="folder sha256:00"), revision="v2")
    assert '"owner/base", revision="v2"' in script(adapter_card(kept))
    local = replace(FACTS, base=ModelSource("/home/someone/mine", Path("/home/someone/mine"), "folder", "local folder"))
    text = script(adapter_card(local))
    assert '"path/to/mine"' in text and "someone" not in text
    assert "base_model" not in adapter_card(local).split("---")[1]


def test_a_plain_base_is_loaded_without_quantisation():
    text = adapter_card(replace(FACTS, parameters={"quantization": "none"}))
    assert "BitsAndBytes" not in text and "dequantize" not in text
    compile(script(text), "card", "exec")


def test_values_are_texts_and_never_templates():
    facts = replace(FACTS, trained="{{ 7 * 7 }} {% if %}", metrics={"a <b>": "{{ facts }} & 'more'"})
    text = adapter_card(facts)
    assert "{{ 7 * 7 }} {% if %}" in text and "| a &lt;b> | {{ facts }} & 'more' |" in text


NASTY = (
    "<script>alert(1)</script>",
    "x\n\n# Forged",
    "# Forged",
    "\u2028## Forged",
    "[click](javascript:alert(1))",
    "\\[click](javascript:alert(1))",
    "![x](https://example.org/pixel.png)",
    "[x]: https://example.org",
    "a | b\n| --- |\n| Forged |",
    "\\| b",
    "<https://example.org>",
    "```\n# Forged",
    "~~~",
    "--- \nbase_model: forged",
    "<!--",
)


@pytest.mark.parametrize("text", NASTY)
def test_no_text_of_a_results_folder_is_markup_in_a_card(text):
    tables = {name: {text: text} for name in ("training", "evaluation", "metrics")}
    given = {name: text for name in ("run_name", "trained", "selection", "adapter_sha256")}
    parameters = {"quantization": text, "lora_r": text, "fewshot_k": text}
    base = replace(HUB, name=text, identity=text)
    plain = replace(FACTS, parameters={"quantization": "none", "lora_r": 4, "fewshot_k": 3}, adapter_sha256="00")
    for library in ("peft", "transformers"):
        card = model_card.card_text(replace(plain, **given, **tables, parameters=parameters, base=base), library, {})
        forged, honest = (tags_of(one) for one in (card, model_card.card_text(plain, library, {})))
        assert forged == honest
        assert yaml.safe_load(card.split("---")[1]).keys() <= {"library_name", "pipeline_tag", "tags"}


def tags_of(card):
    """The tags of a card as a browser gets them, how often each; all rows of a table count once."""
    rendered = mistune.html(card.partition("\n---\n")[2])
    tags = Counter(re.findall(r"<!?[a-z][^>]*>|<!--", rendered))
    return {tag: number for tag, number in tags.items() if tag not in ("<tr>", "<td>", "<tbody>")}


def test_data_and_metrics_come_from_files_and_log(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    table = model_card.training_data(prepared("gsm8k"), rows)
    sha256 = "sha256 ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356"
    assert table["GSM8K train"] == "GSM8K train (MIT), 7,473 rows, sha256 77" and table["training rows"] == sha256
    assert "training rows" not in model_card.training_data(prepared("gsm8k"), tmp_path / "none")
    assert model_card.evaluation_data({}, rows) == {"development rows, of GSM8K train": sha256}
    assert model_card.evaluation_data({}, tmp_path / "none") == {}
    log = [
        {"step": 1, "loss": 2.0, "dev_loss": 1.5},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 0.5, "dev_loss": None},
    ]
    metrics = model_card.metrics_table(log, [("right", 3, 8)])
    assert metrics["training loss, first and last step"] == "2.0000, 0.5000"
    assert metrics["loss on development rows"] == "1.5000 (step 1), 1.5000 (step 1)" and metrics["right"] == "3 of 8"
    assert model_card.metrics_table([]) == {}


def prepared(train_source, **distil):
    """01's manifest, as far as the card reads it."""
    source = {"licence": "MIT", "num_rows": 7473, "sha256": "77"}
    names = ("GSM8K train", "GSM8K test", "AILuminate") + ("training file",) * (train_source == "file")
    return {
        "parameters": {"train_source": train_source, "distil_keep": 2, "distil_choice": "shortest"},
        "facts": {
            "data": {name: {"name": name, **source} for name in names},
            "rows": {"train": 6000, "dev": 2, "gsm8k_eval": 263, "ailuminate": 240},
            "num_too_long": 7,
            "distil": distil,
        },
    }


OWN = {
    "protocol": {"answers": "4 a question", "decoding": "temperature 0.7, seed 42, at most 512 tokens"},
    **{"num_own": 5500, "num_gold": 500, "num_questions": 7000, "num_covered": 6300, "num_dropped": 200},
}


def section(text, title):
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_the_card_says_whose_answers_were_learnt_and_keeps_evaluation_data_apart(tmp_path):
    train, dev = tmp_path / "train.jsonl", tmp_path / "dev.jsonl"
    train.write_text("{}\n")
    dev.write_text("{}\n{}\n")
    manifest = prepared("self_distilled", **OWN)
    data = {
        "training": model_card.training_data(manifest, train),
        "evaluation": model_card.evaluation_data(manifest, dev),
    }
    facts = replace(FACTS, **data)
    for text in (adapter_card(facts), model_card.card_text(replace(facts, adapter_sha256="ad4"), "transformers", {})):
        learnt, evaluated = section(text, "Trained on"), section(text, "Chosen and evaluated on")
        for shown in (
            "| train_source | self_distilled |",
            "| answers | 5,500 rows by the untuned base model, 500 by GSM8K |",
            "4 a question, temperature 0.7, seed 42, at most 512 tokens; kept: at most 2 of the correct ones per",
            "6,300 of 7,000 questions had a correct answer of the base model; 200 have no row",
            "| rows | 5,993; 7 more are over max_seq_length and were left out |",
            "| training rows | sha256 ca3d163bab",
            "| questions of GSM8K train | GSM8K train (MIT), 7,473 rows",
        ):
            assert shown in learnt
        assert "GSM8K test" not in learnt and "AILuminate" not in learnt and "development" not in learnt
        assert "GSM8K test (MIT), 7,473 rows, sha256 77; 263 of them evaluated" in evaluated
        assert (
            "AILuminate" in evaluated
            and "development rows, of GSM8K train" in evaluated
            and "base model" not in evaluated
        )
    assert "| adapter | sha256 ad4 |" in text


@pytest.mark.parametrize(("train_source", "name"), [("gsm8k", "GSM8K train"), ("file", "training file")])
def test_only_the_source_of_the_training_rows_is_listed_as_trained_on(tmp_path, train_source, name):
    shown = model_card.training_data(prepared(train_source), tmp_path / "none")
    assert list(shown) == ["train_source", name, "rows"] and shown["train_source"] == train_source
    (tmp_path / "dev.jsonl").touch()
    shown = model_card.evaluation_data(prepared(train_source), tmp_path / "dev.jsonl")
    assert list(shown) == ["GSM8K test", "AILuminate"], "no development rows were drawn"


def test_of_an_adapter_made_elsewhere_it_is_not_known_what_it_learnt():
    text = adapter_card(replace(FACTS, training={}))
    assert section(text, "Trained on").strip() == "Not known here: the adapter was made elsewhere."
    assert model_card.training_data({}, Path("none")) == {} == model_card.evaluation_data({}, Path("none"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny base, and an adapter that changes what it says, trained on its 4-bit weights."""
    folder = save_tiny_model(tmp_path_factory.mktemp("base") / "tiny", "llama")
    examples = encode_rows(tiny_tokenizer(), [conversation(number) for number in range(20)], 100).examples
    settings = TrainSettings(
        base_model="owner/base",
        base_identity="random",
        num_epochs=3,
        learning_rate=5e-3,
        lora_r=4,
        lora_alpha=8,
        lora_dropout=0.0,
        train_batch_size=4,
        gradient_accumulation_steps=1,
        save_steps=50,
        seed=1,
    )
    output = tmp_path_factory.mktemp("run")
    model = load.load_dense(folder, FLOAT32, "nf4").train()
    sft.train(model, examples, settings, output, say=lambda line: None)
    return folder, output / "adapter", torch.tensor([examples[0]["input_ids"]])


def test_the_card_is_the_same_for_the_same_training(trained):
    folder, adapter, _ = trained
    facts = replace(FACTS, base=ModelSource("tiny", folder, "folder sha256:00", "local folder"))
    first = model_card.write_card(adapter, facts).read_bytes()
    assert model_card.write_card(adapter, facts).read_bytes() == first
    assert b"/tmp" not in first and str(folder.parent).encode() not in first


@pytest.mark.parametrize("user", ["auto", "python", "lora", "peft", "this"])
def test_the_cards_own_words_stay_whatever_the_user_is_called(tmp_path, monkeypatch, user):
    (tmp_path / "adapter_model.safetensors").touch()
    before = (
        model_card.write_card(tmp_path, FACTS).read_text(),
        model_card.write_card(tmp_path, FACTS, "transformers").read_text(),
    )
    secrets = {"A_KEY": "library_name", "B_KEY": "text-generation", "C_KEY": "from_pretrained"}
    for name, value in {"USER": user, "LOGNAME": user, "HOME": f"/{user}", **secrets}.items():
        monkeypatch.setenv(name, value)
    assert before == (
        model_card.write_card(tmp_path, FACTS).read_text(),
        model_card.write_card(tmp_path, FACTS, "transformers").read_text(),
    )


def test_a_home_folder_stays_out_of_the_card(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/planted")
    (tmp_path / "adapter_model.safetensors").touch()
    facts = replace(FACTS, trained="Trained on /home/planted/rows.jsonl.", training={"file": "/home/planted/x"})
    text = model_card.write_card(tmp_path, facts).read_text()
    assert "planted" not in text and "~/rows.jsonl" in text


OUTSIDE = """
import sys
from safetensors.torch import load_file, save_file
ids = load_file(sys.argv[1])["ids"]
with torch.no_grad():
    logits = model(ids).logits
    merged = model.merge_and_unload()(ids).logits
assert not [name for name in sys.modules if name.partition(".")[0] in ("lib", "run_all")], "something of ours"
save_file({"logits": logits, "merged": merged}, sys.argv[2])
"""


@pytest.mark.slow
def test_the_cards_script_computes_what_is_evaluated_and_imports_nothing_of_ours(trained, tmp_path):
    folder, adapter, ids = trained
    facts = replace(FACTS, base=ModelSource("tiny", folder, "folder sha256:00", "local folder"))
    code = script(adapter_card(facts))
    code = re.sub(r'from_pretrained\("[^"]*tiny"', f'from_pretrained("{folder}"', code)
    code = code.replace("path/to/this/folder", str(adapter))
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    arguments = [str(tmp_path / "ids.safetensors"), str(tmp_path / "logits.safetensors")]
    # -I: neither this folder nor the environment's variables are on the path of the script.
    command = [sys.executable, "-I", "-c", code + OUTSIDE, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "logits.safetensors")
    with torch.no_grad():
        ours = load.load_dense(folder, FLOAT32, "nf4", adapter)(ids).logits
        untuned = load.load_dense(folder, FLOAT32, "nf4")(ids).logits
    assert (ours - untuned).abs().max() > 1, "the adapter of this test does something"
    assert torch.equal(theirs["merged"], ours), "the same weights, merged by the same rule"
    # W x + s B (A x) against (W + s B A) x: float32 rounds them apart, by some parts in a million of the largest logit.
    torch.testing.assert_close(theirs["logits"], ours, rtol=0, atol=2e-5 * ours.abs().max().item())
