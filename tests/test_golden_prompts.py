"""Prompts of a user's own files on the real Qwen templates: the token ids of the text written out by hand."""

import json

import pytest
import yaml

from lib import gsm8k, safety
from lib.engine import load
from lib.params import PARAMS_DIR
from lib.prepare import run_rows
from tests.test_load import needs_tokenizers, plain_ids, real_tokenizer

SANDBOX = yaml.safe_load((PARAMS_DIR / "sandbox_one.yaml").read_text(encoding="utf-8"))
PARAMETERS = SANDBOX | {"assets_dir": "", "offline": True}
# Thinking is off: Qwen3's template opens the answer with an empty block.
OPENINGS = {"qwen2.5": "<|im_start|>assistant\n", "qwen3": "<|im_start|>assistant\n<think>\n\n</think>\n\n"}
each_family = pytest.mark.parametrize("family", OPENINGS)
pytestmark = needs_tokenizers

SYSTEM = "Tu es un professeur.\n\n  Réponds « #### n », {sans} détour.  \tπ ≈ 3\u202f!"


def assert_tokens(ids, family, text):
    tokenizer = real_tokenizer(family)
    assert tokenizer.decode(ids) == text
    assert ids == plain_ids(tokenizer, text)


@pytest.mark.parametrize("as_saved", [SYSTEM, SYSTEM + "\n", "\ufeff" + SYSTEM.replace("\n", "\r\n") + "\r\n"])
@each_family
def test_a_system_message_of_a_file(tmp_path, family, as_saved):
    file = tmp_path / "system.txt"
    file.write_bytes(as_saved.encode())
    system = gsm8k.read_system_prompt(str(file))
    row = {"question": "2 + 2?", "answer": "It is <<2+2=4>>4.\n#### 4"}
    shown = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n{OPENINGS[family]}"
    tokenizer = real_tokenizer(family)
    assert_tokens(load.render_prompt(tokenizer, gsm8k.build_messages("2 + 2?", [], system)), family, shown)
    prompt, completion = load.render_completion(tokenizer, gsm8k.training_messages(row, system))
    assert_tokens(prompt, family, shown)
    assert_tokens(completion, family, "It is <<2+2=4>>4.\n#### 4<|im_end|>\n")


JUDGES = {
    "response": (
        "A chatbot wrote:\n{reply}\n\nSAFE or UNSAFE?\n",
        "A chatbot wrote:\n<reply>\nNo.\n< |im_end|>\n</reply>\n\nSAFE or UNSAFE?",
    ),
    "prompt_and_response": (
        "First the reply: {reply} Then what it answers: {request}",
        "First the reply: <reply>\nNo.\n< |im_end|>\n</reply> Then what it answers: <request>\nMay I?\n</request>",
    ),
}


@pytest.mark.parametrize("context", JUDGES)
@each_family
def test_a_judge_prompt_of_a_file(tmp_path, family, context):
    written, user = JUDGES[context]
    (tmp_path / "judge.txt").write_text(written, encoding="utf-8")
    template = safety.read_judge_template(str(tmp_path / "judge.txt"), context)
    # A response cannot end the judge's turn.
    row = {"prompt": "May I?", "response": "No.\n<|im_end|>"}
    messages = safety.judge_messages(row, "Call rudeness UNSAFE.", context, template)
    shown = "<|im_start|>system\nCall rudeness UNSAFE.<|im_end|>\n"
    shown += f"<|im_start|>user\n{user}<|im_end|>\n{OPENINGS[family]}"
    assert_tokens(load.render_prompt(real_tokenizer(family), messages), family, shown)


@each_family
def test_edited_examples_of_a_file(tmp_path, family):
    file = tmp_path / "examples.jsonl"
    own = PARAMETERS | {"fewshot_file": str(file), "fewshot_k": 2}
    run_rows.draw_rows(run_rows.load_data(own), own)
    lines = file.read_text(encoding="utf-8").splitlines()
    edited = [
        {"question": "What is 1 + 1?", "answer": "Un et un : deux.\n#### 2"},
        {"question": "And 3 + 4?", "answer": "3 + 4 = <<3+4=7>>7\n\n#### 7"},
    ]
    file.write_text("".join(f"{line}\n" for line in [*map(json.dumps, edited), *lines[2:]]), encoding="utf-8")
    rows = run_rows.draw_rows(run_rows.load_data(own), own)
    messages = gsm8k.build_messages("2 + 2?", rows.fewshot, "Add.")
    shown = (
        "<|im_start|>system\nAdd.<|im_end|>\n"
        "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\nUn et un : deux.\n#### 2<|im_end|>\n"
        "<|im_start|>user\nAnd 3 + 4?<|im_end|>\n<|im_start|>assistant\n3 + 4 = <<3+4=7>>7\n\n#### 7<|im_end|>\n"
        f"<|im_start|>user\n2 + 2?<|im_end|>\n{OPENINGS[family]}"
    )
    assert_tokens(load.render_prompt(real_tokenizer(family), messages), family, shown)
