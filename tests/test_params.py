"""Presets: what they hold, and that every fault is reported at once, with key, value and what is allowed."""

import os
import re
import subprocess
import sys

import pytest
import yaml

from lib import params
from lib.driver import environment
from lib.params import Params, ParamsError, find_presets, load_params, parse_assignment, preset_path
from lib.record.paths import PROJECT_ROOT
from lib.train.checkpoints import checkpoint_steps

SIMPLE = yaml.safe_load(preset_path("simple").read_text())

# The presets' table: setting -> (simple, medium, strong).
TABLE = {
    "base_model": ("Qwen/Qwen2.5-1.5B-Instruct",) * 3,
    "safeguard_model": ("Qwen/Qwen3-4B-SafeRL",) * 3,
    "train_source": ("gsm8k", "gsm8k", "file"),
    "train_file": ("", "", "data/gsm8k_train_self-instruct.jsonl"),
    "num_epochs": (1, 1, 2),
    "learning_rate": (1e-4, 5e-5, 2e-5),
    "lora_r": (8, 16, 32),
    "lora_alpha": (16, 32, 64),
    "lora_dropout": (0.0, 0.05, 0.1),
    "train_batch_size": (2, 2, 4),
    "gradient_accumulation_steps": (8, 8, 4),
    "weight_decay": (0.0, 0.0, 0.01),
    "warmup_share": (0.0, 0.03, 0.05),
    "fewshot_k": (3, 5, 8),
    "gsm8k_max_new_tokens": (512, 768, 1024),
    "ailuminate_max_new_tokens": (512, 512, 512),
    "max_seq_length": (2048,) * 3,
    "data_seed": (42,) * 3,
    "seed": (42,) * 3,
    "quantization": ("nf4",) * 3,
    "checkpoint_sweep": (False, True, False),
    # 500 were published for medium, whose 459 steps would leave its sweep one checkpoint.
    "save_steps": (500, 156, 400),
    "baseline_accuracy": (0.26, 0.31, 0.37),
    "baseline_safety": (0.26, 0.34, 0.42),
    "published_adapter": tuple(
        f"{owner}/{name}_pilot_project_model"
        for owner, name in [("nbso", "simple"), ("haohxin", "medium"), ("haohxin", "strong")]
    ),
    "submission_gsm8k_rows": (1319, 263, 263),
    "submission_ailuminate_rows": (240, 240, 240),
    "judge_context": ("response",) * 3,
}


def write_preset(folder, **changes):
    """simple.yaml with some keys changed; a value of ``...`` removes its key."""
    values = {key: value for key, value in {**SIMPLE, **changes}.items() if value is not ...}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("key", TABLE)
def test_presets_hold_the_published_settings(key):
    loaded = [getattr(load_params(preset_path(name)), key) for name in ("simple", "medium", "strong")]
    assert tuple(loaded) == TABLE[key]


def test_every_preset_loads_and_has_the_same_keys():
    assert find_presets() == ["sandbox_one", "simple", "medium", "strong", "distilled"]
    for name in find_presets():
        assert list(yaml.safe_load(preset_path(name).read_text())) == list(Params.model_fields)
        assert load_params(preset_path(name)).origin["seed"] == f"{name}.yaml"


def test_the_margin_of_safety_is_5_points_and_older_presets_load(tmp_path):
    assert {load_params(preset_path(name)).safety_margin for name in find_presets()} == {5.0}
    assert load_params(write_preset(tmp_path, safety_margin=...)).safety_margin == 5.0
    assert load_params(write_preset(tmp_path, safety_margin=3)).safety_margin == 3.0
    assert load_params(write_preset(tmp_path), {"safety_margin": 50}).safety_margin == 50.0


def test_distilled_differs_from_strong_in_its_training_data_alone():
    strong, distilled = (load_params(preset_path(name)).model_dump() for name in ("strong", "distilled"))
    differing = {key for key in strong if strong[key] != distilled[key]}
    data = {"train_source", "train_file", "train_file_url", "train_file_faults"}
    assert differing == {"description", "published_adapter", *data}
    assert (distilled["train_source"], distilled["published_adapter"]) == ("self_distilled", "")


def test_strong_can_be_reported_to_train_on_its_own_answers():
    chosen = dict(map(parse_assignment, ["train_source=self_distilled", "train_file=", "train_file_url="]))
    assert load_params(preset_path("strong"), chosen).train_source == "self_distilled"


def test_every_line_of_a_preset_carries_a_comment():
    for name in find_presets():
        lines = preset_path(name).read_text().splitlines()
        settings = [line for line in lines if ": " in line and not line.startswith("#")]
        bare = [line for line in settings if " # " not in line and not line.startswith(("description", "smoke_"))]
        assert bare == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": "1e-4"}, ["learning_rate", "'1e-4'", "str", "1.0e-4"]),
        ({"learning_rate": -1.0}, ["learning_rate", "-1.0", "more than 0"]),
        ({"learning_rate": float("nan")}, ["learning_rate", "nan"]),
        ({"max_grad_norm": float("inf")}, ["max_grad_norm", "inf"]),
        ({"lora_r": 0}, ["lora_r", "0", "at least 1"]),
        ({"lora_r": True}, ["lora_r", "True", "integer"]),
        ({"lora_r": 8.0}, ["lora_r", "8.0", "integer"]),
        ({"seed": -1}, ["seed", "-1", "at least 0"]),
        ({"data_seed": 2**32}, ["data_seed", "4294967296", "less than 4294967296"]),
        ({"quantization": "int4"}, ["quantization", "'int4'", "allowed: nf4, none"]),
        ({"checkpoint_sweep": "yes please"}, ["checkpoint_sweep", "'yes please'", "boolean"]),
        ({"base_model": ""}, ["base_model", "at least 1 character"]),
        ({"seed": None}, ["seed", "None"]),
        ({"seed": [1, 2]}, ["seed", "[1, 2]", "list"]),
        ({"seed": ...}, ["seed", "missing", "integer"]),
        ({"learning_rat": 1.0}, ["learning_rat", "unknown key", "did you mean 'learning_rate'?"]),
        ({"fewshot_k": 9}, ["fewshot_k is 9", "pool holds 8"]),
        ({"train_source": "file"}, ["train_source is 'file'", "train_file is empty"]),
        ({"train_file": "mine.jsonl"}, ["train_source is 'gsm8k'", "mine.jsonl"]),
        ({"train_source": "self_distilled", "train_file": "mine.jsonl"}, ["'self_distilled'", "mine.jsonl"]),
        ({"train_source": "own"}, ["train_source", "'own'", "allowed: gsm8k, file, self_distilled"]),
        ({"distil_keep": 5}, ["distil_keep is 5", "distil_num_samples is 4"]),
        ({"distil_temperature": 0.0}, ["distil_temperature", "more than 0"]),
        ({"train_file_faults": "ignore"}, ["train_file_faults", "allowed: refuse, drop, keep"]),
        ({"checkpoint_sweep": True}, ["checkpoint_sweep is true", "dev_rows is 0"]),
        ({"dev_safety_rows": 9}, ["dev_safety_rows is 9", "checkpoint_sweep is false"]),
        ({"sweep_on_test": True}, ["sweep_on_test is true", "checkpoint_sweep is false"]),
        ({"sweep_metric": "sum"}, ["sweep_metric is 'sum'", "checkpoint_sweep is false"]),
        ({"sweep_metric": "loss"}, ["sweep_metric", "'loss'", "allowed: accuracy, safety, sum"]),
        (
            {"checkpoint_sweep": True, "dev_rows": 9, "sweep_metric": "safety"},
            ["sweep_metric is 'safety'", "dev_safety_rows is 0"],
        ),
        (
            {"checkpoint_sweep": True, "sweep_on_test": True, "dev_safety_rows": 9},
            ["sweep_on_test is true", "dev_safety_rows is 9"],
        ),
        (
            {
                "checkpoint_sweep": True,
                "dev_rows": 9,
                "dev_safety_rows": 9,
                "ailuminate_prompt_set": "demo1200_fr",
                "max_ailuminate_rows": 9,
            },
            ["dev_safety_rows is 9", "the prompts to choose on are English"],
        ),
        (
            {"checkpoint_sweep": True, "dev_rows": 9, "dev_safety_rows": 9, "ailuminate_prompt_set": "demo1200"},
            ["dev_safety_rows is 9", "'demo1200' evaluates every prompt"],
        ),
        ({"device": "cpu", "compute_dtype": "float16"}, ["float16", "bfloat16 and float32"]),
        ({"ailuminate_source": "class", "ailuminate_prompt_set": "demo1200"}, ["'class'", "demo1200"]),
        (
            {"ailuminate_source": "class", "ailuminate_prompt_set": "demo1200_fr"},
            ["'class'", "MLCommons'", "mlcommons"],
        ),
        ({"ailuminate_source": "mine.csv", "ailuminate_prompt_set": "demo1200_fr"}, ["'mine.csv'", "set: all"]),
        ({"safety_margin": 0.0}, ["safety_margin", "0.0", "more than 0"]),
        ({"safety_margin": -5.0}, ["safety_margin", "-5.0", "more than 0"]),
        ({"safety_margin": 50.5}, ["safety_margin", "50.5", "at most 50"]),
        ({"safety_margin": "5 points"}, ["safety_margin", "'5 points'", "number"]),
        ({"safety_margin": None}, ["safety_margin", "None"]),
        ({"ailuminate_prompt_set": "demo_1200"}, ["'demo_1200'", "did you mean 'demo1200'?"]),
        (
            {"train_source": "self_distilled", "train_file_url": "https://x"},
            ["train_file_url is set", "train_file is empty"],
        ),
        (
            {"adapter_scales": [0.5], "evaluate_untuned": False},
            ["adapter_scales is [0.5]", "evaluate_untuned is false"],
        ),
        ({"aa_control": True, "evaluate_untuned": False}, ["aa_control is true", "set evaluate_untuned: true"]),
        ({"aa_control": 1}, ["aa_control", "boolean"]),
        ({"adapter_scales": [float("nan"), 9.0]}, ["adapter_scales", "[nan, 9.0]", "finite"]),
        ({"gsm8k_eval_fraction": 0.0}, ["gsm8k_eval_fraction", "more than 0"]),
    ],
)
def test_a_fault_names_key_value_and_what_is_allowed(tmp_path, changes, words):
    with pytest.raises(ParamsError) as caught:
        load_params(write_preset(tmp_path, **changes))
    assert "1 fault(s)" in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


def test_three_faults_in_one_file_are_all_listed(tmp_path):
    path = write_preset(tmp_path, learning_rate="1e-4", lora_r=0, colour="blue")
    with pytest.raises(ParamsError, match="3 fault") as caught:
        load_params(path)
    assert all(key in str(caught.value) for key in ("learning_rate", "lora_r", "colour"))


def test_contradictions_of_sound_keys_are_listed_beside_faulty_keys(tmp_path):
    # fewshot_k is faulty itself, so its rule is skipped.
    path = write_preset(
        tmp_path, max_train_rows=-1, fewshot_k="9", device="cpu", compute_dtype="float16", train_file="x"
    )
    with pytest.raises(ParamsError, match="4 fault") as caught:
        load_params(path)
    assert "device is 'cpu'" in str(caught.value) and "train_file is 'x'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "`key: value` lines"),
        ("- a\n- b\n", "list"),
        ("seed: [1\n", "not YAML"),
        ("seed: 1\nseed: 2\n", "'seed' is given 2 times"),
        ("seed: !!python/object/apply:os.getcwd []\n", "not YAML"),
        ("seed: 1\n'seed': 2\n", "'seed' is given 2 times"),
        ("\x00", "not YAML"),
    ],
)
def test_a_file_that_is_no_preset_is_refused(tmp_path, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ParamsError, match=r"mine\.yaml") as caught:
        load_params(path)
    assert words in str(caught.value)


# What was typed, the key, and the remedy; YAML 1.1 reads each as another value than it looks like, or as text.
MISREAD = [
    ("seed", "010", "write 10 or 8 (YAML 1.1 reads 010 as 8)"),
    ("max_train_rows", "1:30", "write 90 (YAML 1.1 reads 1:30 as 90)"),
    ("max_train_rows", "1:00:00", "write 3600 ("),
    ("max_train_rows", "1_000", "write 1000 ("),
    ("seed", "0x10", "write 16 ("),
    ("seed", "0b1", "write 1 ("),
    ("seed", "0o10", "write 8 ("),
    ("seed", "08", "write 8 (YAML 1.1 reads 08 as text)"),
    ("seed", "007", "write 7 ("),
    ("max_train_rows", "1e3", "write 1000 ("),
    ("seed", "'42'", "write 42 without quotes"),
    ("seed", "2026-01-01", "'2026-01-01' (str) is refused"),
    ("seed", "yes", "'yes' (str) is refused"),
    ("learning_rate", "2e-5", "write 2.0e-5 (YAML 1.1 reads 2e-5 as text)"),
    ("learning_rate", "5E-5", "write 5.0e-5 ("),
    ("learning_rate", "0:30.5", "write 30.5 ("),
    ("learning_rate", "0_0.5", "write 0.5 ("),
    ("learning_rate", "00", "write 0 ("),
    ("adapter_scales", "[0.5, 01]", "write 1 ("),
    ("adapter_scales", "[1e-1]", "write 1.0e-1 ("),
    ("benchmark", "yes", "write true"),
    ("benchmark", "off", "write false"),
    ("benchmark", "'true'", "write true"),
    ("quantization", "no", "'no' (str) is refused"),
]


@pytest.mark.parametrize(("key", "typed", "words"), MISREAD)
def test_a_value_that_yaml_reads_otherwise_is_refused_in_files_and_assignments(tmp_path, key, typed, words):
    text = re.sub(rf"(?m)^{key}: .*$", f"{key}: {typed}", preset_path("simple").read_text())
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ParamsError, match="1 fault") as in_a_file:
        load_params(tmp_path / "mine.yaml")
    with pytest.raises(ParamsError, match="1 fault") as assigned:
        load_params(preset_path("simple"), dict([parse_assignment(f"{key}={typed}")]))
    assert words in str(in_a_file.value) and words in str(assigned.value)


@pytest.mark.parametrize(
    ("key", "typed", "value"),
    [
        ("seed", "+5", 5),
        ("seed", "0", 0),
        ("learning_rate", ".5", 0.5),
        ("learning_rate", "1.", 1.0),
        ("learning_rate", "1.5e-05", 1.5e-5),
        ("learning_rate", "1", 1),
        ("benchmark", "FALSE", False),
        # Texts, though they look like numbers, dates and truths: a commit, a branch, a folder.
        ("base_model_revision", "0123456", "0123456"),
        ("base_model_revision", "1e5", "1e5"),
        ("base_model_revision", "2026-01-01", "2026-01-01"),
        ("base_model", "no", "no"),
        ("base_model", "1:30", "1:30"),
    ],
)
def test_a_value_is_what_it_looks_like(tmp_path, key, typed, value):
    text = re.sub(rf"(?m)^{key}: .*$", f"{key}: {typed}", preset_path("simple").read_text())
    (tmp_path / "mine.yaml").write_text(text)
    assert getattr(load_params(tmp_path / "mine.yaml"), key) == value
    assert parse_assignment(f"{key}={typed}") == (key, value)


@pytest.mark.parametrize(("key", "typed"), [("base_model_revision", "1234567"), ("base_model", "true")])
def test_a_text_that_looks_like_a_number_belongs_in_quotes(tmp_path, key, typed):
    text = re.sub(rf"(?m)^{key}: .*$", f"{key}: {typed}", preset_path("simple").read_text())
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ParamsError, match=r"1 fault.*\n.*: put it in quotes"):
        load_params(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    "text", ["9" * 5000, "0x" + "f" * 5000, "1e" + "9" * 5000, "1:" * 3000 + "1", "1" + "_" * 5000]
)
def test_a_long_text_is_no_number(text):
    fault = params.find_faults({**SIMPLE, "seed": text, "learning_rate": text})[0]
    assert "write" not in fault and len(fault) < 500


NESTED = """
name: mine
seed: 42
model:
  name: Qwen/Qwen2.5-1.5B-Instruct
  max_length: 2048
train_hparams: {lr: 1e-4, epochs: 1, batch-size: 4, weight_decay: 0.0, optimizer: {name: adamw}}
lora: {r: 8, alpha: 16, dropout: 0.05}
judge: {model: Qwen/Qwen3-4B-SafeRL}
"""


def test_a_nested_preset_is_named_in_a_sentence_with_our_keys(tmp_path):
    (tmp_path / "mine.yaml").write_text(NESTED)
    with pytest.raises(ParamsError, match="1 fault") as caught:
        load_params(tmp_path / "mine.yaml")
    (fault,) = str(caught.value).splitlines()[1:]
    assert "nested sections (model, train_hparams, lora, judge): a preset here is flat" in fault
    known = {"model.name": "base_model", "model.max_length": "max_seq_length", "train_hparams.lr": "learning_rate"}
    known |= {"train_hparams.epochs": "num_epochs", "train_hparams.batch-size": "train_batch_size"}
    known |= {"train_hparams.weight_decay": "weight_decay", "judge.model": "safeguard_model"}
    known |= {"lora.r": "lora_r", "lora.alpha": "lora_alpha", "lora.dropout": "lora_dropout"}
    assert [name for name, ours in known.items() if f"{name} as {ours}" not in fault] == []
    assert "no such key here for name, train_hparams.optimizer.name" in fault


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"base_model": {"name": "x", "revision": "main"}},
            ["(base_model)", "base_model.revision as base_model_revision"],
        ),
        ({"lora_r": ..., "lora": {"r": 8}}, ["(lora)", "lora.r as lora_r"]),
        ({"lr": 1e-4, "data": {}}, ["(data)", "lr as learning_rate"]),
        ({"much": {str(n): n for n in range(1000)}}, ["(much)", "much.0, much.1,", "and 970 more"]),
    ],
)
def test_a_single_section_is_named_too(tmp_path, changes, words):
    with pytest.raises(ParamsError, match="1 fault") as caught:
        load_params(write_preset(tmp_path, **changes))
    assert [word for word in words if word not in str(caught.value)] == []


def test_every_other_name_leads_to_a_key():
    assert set(params.OTHER_NAMES.values()) <= set(Params.model_fields)
    assert not params.OTHER_NAMES.keys() & Params.model_fields.keys()


def test_overrides_are_checked_like_the_file_and_remembered():
    loaded = load_params(preset_path("simple"), {"seed": 7}, {"seed": "--set"})
    assert (loaded.seed, loaded.origin["seed"], loaded.origin["lora_r"]) == (7, "--set", "simple.yaml")
    with pytest.raises(ParamsError, match="seed"):
        load_params(preset_path("simple"), {"seed": "7"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora_r=16", ("lora_r", 16)),
        ("checkpoint_sweep=true", ("checkpoint_sweep", True)),
        ("learning_rate=2.0e-5", ("learning_rate", 2e-5)),
        ("base_model=123", ("base_model", "123")),
        ("train_file=a=b.jsonl", ("train_file", "a=b.jsonl")),
        ("train_file=", ("train_file", "")),
    ],
)
def test_assignments_are_typed_as_in_the_yaml(text, expected):
    assert parse_assignment(text) == expected


@pytest.mark.parametrize("text", ["lora_r", "=3", "lora_rr=3"])
def test_an_assignment_that_names_no_key_is_refused(text):
    with pytest.raises(ParamsError, match="--set"):
        parse_assignment(text)


def test_a_misspelt_preset_is_reported_with_a_suggestion():
    with pytest.raises(ParamsError, match=r"did you mean 'medium'.*sandbox_one, simple"):
        preset_path("meduim")


def test_a_notebooks_parameters_cell_is_checked_by_the_same_schema():
    namespace = {"seed": 1, "run_name": "mine", "unrelated": object(), "offline": False}
    assert params.from_notebook(namespace) == {"run_name": "mine", "offline": False, "seed": 1}
    with pytest.raises(ParamsError, match="2 fault") as caught:
        params.from_notebook({"seed": "1", "offline": "no"})
    assert "seed" in str(caught.value) and "offline" in str(caught.value)


def cell(**changes):
    """Names as a parameters cell leaves them."""
    return {"PRESET": "", "run_name": "sandbox_one", "offline": True, "lora_r": 8, "unrelated": 1, **changes}


def test_a_preset_replaces_what_the_cell_declares_and_nothing_else(monkeypatch):
    monkeypatch.delenv(params.DRIVER_VARIABLE, raising=False)
    monkeypatch.setenv("PRESET", "medium")
    namespace = cell(PRESET="strong")
    assert params.from_notebook(namespace) == {"run_name": "strong", "offline": True, "lora_r": 32}
    assert namespace == cell(PRESET="strong", run_name="strong", lora_r=32)
    assert params.from_notebook(cell())["run_name"] == "medium"
    # 05 compares every run: it declares no PRESET, and none is looked for.
    assert params.from_notebook({"offline": True}) == {"offline": True}


def test_what_the_driver_injected_is_never_replaced(monkeypatch):
    # A copy: what the driver sets for its kernels is not for the tests that follow.
    monkeypatch.setattr(os, "environ", {**os.environ, "PRESET": "medium"})
    environment.set_kernel_environment(offline=False)
    for name in ("", "strong", "no such preset"):
        assert params.from_notebook(cell(PRESET=name)) == {"run_name": "sandbox_one", "offline": True, "lora_r": 8}


@pytest.mark.parametrize("wrong", ["stronk", 3, True, ["strong"]])
def test_a_preset_that_is_none_names_those_there_are(monkeypatch, wrong):
    monkeypatch.delenv(params.DRIVER_VARIABLE, raising=False)
    with pytest.raises(ParamsError, match=r"PRESET \(parameters cell\): .*sandbox_one, simple, medium, strong"):
        params.from_notebook(cell(PRESET=wrong))
    monkeypatch.setenv("PRESET", "stronk")
    with pytest.raises(ParamsError, match=r"PRESET \(environment variable\): .*'stronk'.*sandbox_one, simple"):
        params.from_notebook(cell())


TORCH_FREE = (
    "gsm8k",
    "safety",
    "stats",
    "record.manifest",
    "record.rows",
    "compare.verify",
    "driver.commands",
    "driver.reporting",
)


@pytest.mark.parametrize("module", TORCH_FREE)
def test_scoring_and_driver_modules_never_import_torch(module):
    code = f"import sys, lib.{module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT).returncode == 0


PEFT_KEYS = [
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'; allowed are default (peft's true) and gaussian"),
    ({"init_lora_weights": "olora"}, "leave an adapter that is wrong on the unchanged base"),
    ({"init_lora_weights": "guassian"}, "allowed are default"),
    ({"init_lora_weights": False}, "init_lora_weights: False (bool) is refused"),
    ({"use_dora": True, "adapter_scales": [0.5]}, "leaves its magnitudes"),
    ({"lora_target_modules": []}, "lora_target_modules: [] (list) is refused: List should have at least 1 item"),
    ({"lora_target_modules": "all-linear"}, "lora_target_modules: 'all-linear' (str) is refused"),
    ({"lr_scheduler": "cosin"}, "did you mean 'cosine'?"),
    ({"lr_scheduler": "constant", "warmup_share": 0.1}, "use constant_with_warmup"),
    ({"optimizer": "paged_adamw", "device": "cpu"}, "optimizer is 'paged_adamw' but device is 'cpu'"),
    ({"optimizer": "sgd"}, "allowed: adamw, adamw_8bit, paged_adamw, paged_adamw_8bit"),
    ({"neftune_noise_alpha": -1.0}, "at least 0"),
    ({"judge_quantization": "int8"}, "allowed: none, nf4, same"),
]


@pytest.mark.parametrize(("changed", "words"), PEFT_KEYS)
def test_what_these_keys_cannot_be_is_refused_with_the_reason(changed, words):
    with pytest.raises(ParamsError) as caught:
        load_params(preset_path("simple"), changed)
    assert words in str(caught.value)


def test_the_course_s_judge_has_16_bits_and_a_preset_from_before_keeps_what_it_meant(tmp_path):
    judged_at = {name: load_params(preset_path(name)).judge_quantization for name in find_presets()}
    assert judged_at == {"sandbox_one": "same"} | dict.fromkeys(("simple", "medium", "strong", "distilled"), "none")
    later = [key for key, field in Params.model_fields.items() if not field.is_required()]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({k: v for k, v in SIMPLE.items() if k not in later}))
    loaded = load_params(tmp_path / "mine.yaml")
    assert loaded.judge_quantization == "same" and loaded.system_prompt_file == loaded.judge_prompt_file == ""
    same = set(later) - {"judge_quantization"}
    assert {key: getattr(loaded, key) for key in same} == {key: SIMPLE[key] for key in same}


@pytest.mark.parametrize("as_in_peft", [True, "true", "default"])
def test_the_usual_initialisation_may_be_written_as_in_peft(as_in_peft):
    assert load_params(preset_path("simple"), {"init_lora_weights": as_in_peft}).init_lora_weights == "default"


def test_medium_saves_as_many_checkpoints_as_it_compares():
    medium = load_params(preset_path("medium"))
    # GSM8K train without pool and development rows.
    rows = 7473 - medium.fewshot_pool_size - medium.dev_rows
    steps = -(-rows // (medium.train_batch_size * medium.gradient_accumulation_steps))
    assert len(checkpoint_steps(steps, medium.save_steps)) == medium.max_sweep_checkpoints
    assert f"and {steps}, the last of {rows:,} rows" in preset_path("medium").read_text()
