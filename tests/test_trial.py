"""Templates and patterns that come with a model or adapter: what does not end is refused, usual ones cost little."""

import json
import os
import re
import time
from functools import partial

import pytest

from lib.engine import load, trial
from tests.test_load import (
    FLOAT32,
    NO_SYSTEM_ROLE,
    TURNS,
    needs_tokenizers,
    real_tokenizer,
    save_adapter,
    saved_tokenizer,
)
from tests.tiny import CHATML, save_tiny_model

ENDLESS = "(([a-z0-9_.])+)+!"
LOOPS = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    return save_adapter(folder, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def short_limit(monkeypatch):
    monkeypatch.setattr(trial, "LIMIT_S", 1)


@pytest.mark.parametrize(
    "function",
    [
        lambda: time.sleep(60),
        lambda: re.fullmatch(ENDLESS, "a" * 60),
        lambda: [0] * 10**9,
        lambda: os.kill(os.getpid(), 9),
        lambda: os._exit(3),
    ],
)
def test_what_does_not_end_or_takes_all_memory_is_stopped(function):
    started = time.monotonic()
    with pytest.raises(trial.TrialError, match="takes over 1 s or 500 MB"):
        trial.within(1, function)
    assert time.monotonic() - started < 10


def test_what_ends_or_raises_is_left_to_the_real_call():
    trial.within(5, lambda: 1 / 0)
    trial.within(5, lambda: 1)


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (LOOPS, "takes over 1 s or 500 MB"),
        ("{% if messages[1:] %}" + LOOPS + "{% endif %}", "takes over 1 s"),
        ("{% if add_generation_prompt %}" + LOOPS + "{% endif %}", "takes over 1 s"),
        ("{{ 'x' * 20000000000 }}", "takes over 1 s or 500 MB"),
        ("{{ 9**(9**9) }}", r"holds a power \(\*\*\)"),
        ("{% if messages[0]['content'] == 'never tried' %}{{ 2 ** 99 }}{% endif %}", r"holds a power \(\*\*\)"),
        ("{{ (2)**x }}", r"holds a power \(\*\*\)"),
        ("x" * 200_000, "is over 100000 characters long"),
    ],
)
def test_a_template_that_does_not_end_is_refused_with_its_folder(template, fault, tmp_path, short_limit):
    with pytest.raises(load.ModelError, match=rf"chat template in .*model {fault}.*base_model or safeguard_model"):
        saved_tokenizer(tmp_path / "model", CHATML + template)


@pytest.mark.parametrize("template", [CHATML + "**bold** {{ dict(**{'a': 1}) }}", NO_SYSTEM_ROLE["gemma"] + TURNS])
def test_usual_templates_are_taken(template, tmp_path):
    saved_tokenizer(tmp_path / "model", template)


@needs_tokenizers
@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_trying_a_real_template_costs_less_than_a_tenth_of_a_second(name):
    tokenizer = real_tokenizer(name)
    costs, forks = [], []
    for number in range(5):
        # Another text each time: a template that was compiled before is cached.
        template = f"{tokenizer.chat_template}{{# {number} #}}"
        render = partial(tokenizer.apply_chat_template, chat_template=template, tokenize=False)
        costs.append(processor_seconds(lambda: trial.try_template(render, template)))  # noqa: B023 - called here
        forks.append(processor_seconds(lambda: trial.within(1, int)))
    # A process of many tests is larger than any that loads a tokenizer, and so is its fork.
    assert min(costs) - min(forks) < 0.1


def processor_seconds(function):
    """Of this process and its children: the machine has other work."""
    started = sum(os.times()[:4])
    function()
    return sum(os.times()[:4]) - started


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"target_modules": ENDLESS}, "takes over 1 s"),
        ({"exclude_modules": ENDLESS}, "takes over 1 s"),
        ({"rank_pattern": {ENDLESS: 4}}, "takes over 1 s"),
        ({"alpha_pattern": {"q_proj": 8, ENDLESS: 4}}, "takes over 1 s"),
        ({"layers_pattern": [ENDLESS], "layers_to_transform": [0]}, "takes over 1 s"),
        ({"modules_to_save": [ENDLESS]}, "takes over 1 s"),
        ({"rank_pattern": {f"m{number}": 4 for number in range(30_000)}}, "holds over 100000 characters"),
        ({"target_modules": "(open"}, "does not fit the base model"),
        ({"modules_to_save": ["lm_head"]}, "does not fit the base model|differ in"),
        ({"modules_to_save": ["model.norm"]}, "does not fit the base model|differ in"),
    ],
)
def test_an_adapter_whose_patterns_do_not_end_or_fit_is_refused(changes, fault, folder, adapter, tmp_path, short_limit):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    (tmp_path / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    with pytest.raises(load.ModelError, match=fault):
        load.load_dense(folder, FLOAT32, "none", tmp_path)


def test_an_adapter_with_usual_patterns_is_taken(folder, adapter, tmp_path):
    config = json.loads((adapter / "adapter_config.json").read_text())
    pattern = r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)).*?"
    changes = {"target_modules": pattern, "rank_pattern": {"layers.0.self_attn.q_proj": 4}}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    (tmp_path / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    load.load_dense(folder, FLOAT32, "none", tmp_path)
