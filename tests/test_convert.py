"""--convert-preset: a preset from the nested YAML of another pipeline."""

import pytest

import run_all
from lib.params import LORA_TARGETS, load_params, preset_path
from lib.record.preset_yaml import read_mapping

SIMPLE = read_mapping(preset_path("simple"))
SECTIONS = """
name: mine
seed: 7
model: {name: me/base, revision: v1, max_length: 1024, torch_dtype: torch.bfloat16}
train_hparams: {lr: 2e-5, epochs: 2, batch-size: 4, optimizer: adamw_torch}
lora: {r: 64, alpha: 128, dropout: 0.05, target_modules: [q_proj, v_proj]}
judge: {model: me/judge, revision: v2, load_in_4bit: true, max_new_tokens: 8}
"""
SECTIONS_VALUES = {
    **{"seed": 7, "base_model": "me/base", "base_model_revision": "v1", "max_seq_length": 1024},
    **{"compute_dtype": "bfloat16", "learning_rate": 2e-5, "num_epochs": 2, "train_batch_size": 4},
    **{"optimizer": "adamw", "lora_r": 64, "lora_alpha": 128, "lora_dropout": 0.05},
    **{"lora_target_modules": ["q_proj", "v_proj"], "judge_max_new_tokens": 8},
    **{"safeguard_model": "me/judge", "safeguard_revision": "v2"},
}
DEEP = """
experiment:
  data: {train_path: data/raw/own.jsonl, seed: 1}
  training:
    args: {learning_rate: 0.0001, num_train_epochs: 3, per_device_train_batch_size: 8, warmup_ratio: 0.03}
  peft: {lora: {rank: 16, lora_alpha: 32}}
  quantization: {load_in_4bit: false}
  guard: {model: {name: me/guard}}
"""
DEEP_VALUES = {
    **{"train_source": "file", "train_file": "data/raw/own.jsonl", "data_seed": 1, "learning_rate": 1e-4},
    **{"num_epochs": 3, "train_batch_size": 8, "warmup_share": 0.03, "lora_r": 16, "lora_alpha": 32},
    **{"quantization": "none", "safeguard_model": "me/guard"},
}
ONE_SECTION = """
description: "ours: # 1"
base_model: me/base
lora_r: 4
eval: {batch_size: 2, max_new_tokens: 99}
few: {shots: 1}
system_prompt: |
  Think.
  Answer.
train_data: openai/gsm8k
"""
ONE_SECTION_VALUES = {
    **{"description": "ours: # 1", "base_model": "me/base", "lora_r": 4, "eval_batch_size": 2},
    **{"gsm8k_max_new_tokens": 99, "fewshot_k": 1},
}


@pytest.fixture
def convert(tmp_path, capsys):
    """Converts a text; returns the exit status, what was printed, and the path of the preset."""

    def run(text, *flags, name="mine.yaml"):
        source = tmp_path / "theirs" / name
        source.parent.mkdir(exist_ok=True)
        source.write_text(text)
        folder = tmp_path / "presets"
        status = run_all.main(["--convert-preset", str(source), "--params-dir", str(folder), *flags])
        printed = capsys.readouterr()
        return status, printed.out + printed.err, folder / f"{source.stem}.yaml"

    return run


@pytest.mark.parametrize(
    ("text", "expected", "left"),
    [
        (SECTIONS, SECTIONS_VALUES, "name, judge.load_in_4bit"),
        (DEEP, DEEP_VALUES, "none"),
        (ONE_SECTION, ONE_SECTION_VALUES, "system_prompt (write the text to a file"),
    ],
    ids=["sections", "deep", "one section"],
)
def test_a_nested_preset_becomes_one_of_ours(convert, text, expected, left):
    status, printed, path = convert(text)
    assert status == 0, printed
    values = load_params(path).model_dump()
    assert {key: values[key] for key in expected} == expected
    others = SIMPLE.keys() - expected.keys() - {"description"}
    assert {key: values[key] for key in others} == {key: SIMPLE[key] for key in others}
    assert f"no counterpart here: {left}" in printed and "written: " in printed
    taken = printed.partition("taken: ")[2].splitlines()[0]
    assert [key for key in expected if f" as {key}" not in taken and key != "train_source"] == []


def test_the_comments_stay_and_the_first_line_and_description_say_where_it_came_from(convert):
    text = convert(SECTIONS)[2].read_text()
    comments = [line.partition("#")[2] for line in preset_path("simple").read_text().splitlines()[1:]]
    assert [line.partition("#")[2] for line in text.splitlines()[1:]] == comments
    assert text.startswith("# mine: converted from mine.yaml") and "learning_rate: 2.0e-05" in text
    assert "description: converted from mine.yaml; the rest as in simple\n" in text
    # A comment keeps its column.
    old = next(line for line in preset_path("simple").read_text().splitlines() if line.startswith("lora_r:"))
    assert old.replace("8  ", "64 ", 1) in text


def test_the_rest_may_come_from_another_preset(convert):
    status, printed, path = convert("lora: {r: 64}\nnote: null\n", "--presets", "medium")
    medium = load_params(preset_path("medium")).model_dump()
    assert status == 0 and load_params(path).model_dump() | {"description": ""} == medium | {
        "lora_r": 64,
        "description": "",
    }
    assert "as in medium.yaml" in printed


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("model: {load_in_4bit: yes}", "quantization", "nf4"),
        ("quant: {bits: 16}", "quantization", "none"),
        ("lora: {target_modules: all-linear}", "lora_target_modules", list(LORA_TARGETS)),
        ("train: {optim: paged_adamw_32bit}", "optimizer", "paged_adamw"),
        ("train: {lr: 1E-05}", "learning_rate", 1e-5),
        ("model: {dtype: BF16}", "compute_dtype", "bfloat16"),
        ('model: {description: "größer\\n🙂 it\'s # no: 1"}', "description", "größer\n🙂 it's # no: 1"),
        ("a: {seed: 3}\nb: {seed: 3}", "seed", 3),
    ],
)
def test_values_are_written_as_they_are_meant_here(convert, text, key, value):
    status, printed, path = convert(text)
    assert status == 0 and load_params(path).model_dump()[key] == value, printed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1\n- 2\n", "lines were expected, got list"),
        ("", "got NoneType"),
        ("a: [1\n", "not YAML"),
        ("model: &m {name: x}\njudge: *m\n", "no alias *m"),
        ("model: !!python/object:os.system {name: x}\n", "no tag"),
        ("lora: {r: eight}\ntrain: {lr: true}\n", "lora.r as lora_r: 'eight' (str) is refused"),
        ("lora: {r: 8.5}\n", "lora.r as lora_r: 8.5 (float) is refused"),
        ("train: {warmup: 100}\n", "train.warmup as warmup_share: 100"),
        ("a: {lr: 0.1}\nb: {lr: 0.2}\n", "a.lr and b.lr are both learning_rate here, and differ"),
        ("ppo: {clip: 0.2}\nname: x\n", "no key has a counterpart here: ppo.clip, name"),
        ("{}\n", "no key has a counterpart here"),
        ("train: {lr: null}\n", "train.lr (null)"),
        ("eval: {shots: 99}\n", "fewshot_k is 99"),
    ],
)
def test_what_cannot_be_converted_is_named_and_nothing_is_written(convert, text, words):
    status, printed, path = convert(text)
    assert (status, path.parent.exists()) == (2, False)
    assert words in printed and "Traceback" not in printed


def test_an_existing_preset_is_kept(convert):
    path = convert(SECTIONS)[2]
    before = path.read_text()
    status, printed, _ = convert(DEEP)
    assert status == 2 and f"{path} exists" in printed and path.read_text() == before


def test_names_flags_and_files_that_cannot_be_are_refused(convert, tmp_path, capsys):
    assert "run_name is 'my preset'" in convert(SECTIONS, name="my preset.yaml")[1]
    assert "--presets names 2" in convert(SECTIONS, "--presets", "simple", "medium")[1]
    assert "'nosuch' is unknown" in convert(SECTIONS, "--presets", "nosuch")[1]
    assert not (tmp_path / "presets").exists()
    assert run_all.main(["--convert-preset", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: there is no such file" in capsys.readouterr().err


def test_a_base_preset_may_lack_a_key_and_hold_a_list_of_several_lines(convert, tmp_path):
    folder = tmp_path / "presets"
    folder.mkdir()
    lines = [line for line in preset_path("simple").read_text().splitlines() if not line.startswith("optimizer:")]
    place = next(number for number, line in enumerate(lines) if line.startswith("lora_target_modules:"))
    lines[place] = "lora_target_modules:\n  - q_proj\n  - k_proj\n\n# --- batches"
    (folder / "simple.yaml").write_text("\n".join(lines))
    status, printed, path = convert(SECTIONS)
    assert status == 0 and load_params(path).lora_target_modules == ["q_proj", "v_proj"], printed
    text = path.read_text()
    assert "\n\n# --- batches\n" in text and text.endswith("\noptimizer: adamw\n")


def test_the_fault_of_a_nested_preset_names_the_flag(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(SECTIONS)
    assert run_all.main(["--presets", "mine", "--params-dir", str(tmp_path)]) == 2
    assert "--convert-preset FILE writes it so" in capsys.readouterr().err
