"""An audit of a finished run: honest rows are made again, in another dtype too; edited ones are named."""

import re
import shutil
from pathlib import Path

import forger
import pytest
import torch

import run_all
from lib import gsm8k
from lib.compare import regenerate
from lib.compare.regenerate import Audit, RunAudit, audit_folder, miss_text
from lib.compare.runs import load_run
from lib.engine import generate, load, models
from lib.engine.forced import find_difference, rounding
from lib.record.files import read_json, sha256_json, write_json
from lib.record.paths import RunPaths
from lib.record.rows import RowLog, read_jsonl, write_jsonl

FIXTURE = Path(__file__).resolve().parent / "fixtures" / "made_before"
RUN = "run_sandbox_one"
ANSWERS, VERDICTS = f"{RUN}/gsm8k_preds_sandbox_one.jsonl", f"{RUN}/ailuminate_safety_sandbox_one.jsonl"


@pytest.fixture
def results(tmp_path):
    """A copy of a finished run of tiny models: 4 answers of 6 tokens, 5 responses and verdicts, and other sides."""
    return shutil.copytree(FIXTURE / "runs", tmp_path / "runs")


def audit(folder, num_rows=5, seed=1):
    return audit_folder(Audit(folder, num_rows, seed))


def answers(folder, dtype, number, max_new_tokens):
    """The run with ``number`` tuned answers made in ``dtype``, and without all else that was evaluated."""
    paths = RunPaths("sandbox_one", folder / RUN)
    train = read_jsonl(Path("data/sandbox/gsm8k_train.jsonl"))
    rows = [
        {**train[n % len(train)], "test_index": n, "question": f"{train[n % len(train)]['question']} ({n})"}
        for n in range(number)
    ]
    manifest = read_json(paths.manifest("03_eval_gsm8k"))
    manifest["facts"] |= {"untuned_rows": "", "scale_rows": {}}
    protocol = manifest["facts"]["protocol"]
    protocol |= {"dtype": str(dtype), "decoding": f"greedy, at most {max_new_tokens} tokens"}
    write_json(paths.manifest("03_eval_gsm8k"), manifest)
    base = FIXTURE / "models" / "base"
    dense = load.load_dense(base, load.Runtime("cpu", dtype, ""), "none", paths.adapter_dir)
    engine = generate.Engine(dense, load.load_tokenizer(base))
    paths.gsm8k_preds.unlink()
    fewshot, log = read_jsonl(paths.fewshot_rows)[:1], RowLog(paths.gsm8k_preds, sha256_json(protocol))
    gsm8k.evaluate(rows, fewshot, engine, max_new_tokens=max_new_tokens, log=log)
    write_jsonl(paths.gsm8k_eval_rows, rows)
    config = read_json(paths.config_resolved)
    config["parameters"]["gsm8k_max_new_tokens"] = max_new_tokens
    write_json(paths.config_resolved, config)
    return forger.rewrite(folder)


def test_an_honest_folder_is_made_again_wherever_it_lies(results, capfd):
    assert audit(results)
    output = capfd.readouterr()
    assert output.err == ""
    # Three sides of both metrics, and the verdicts of three.
    assert len(re.findall(r"([45]) of \1 rows made again", output.out)) == 9
    assert audit(results / RUN)


def test_honest_texts_are_read_and_only_doubtful_ones_written(results, monkeypatch):
    written, loads = [], []
    generated, loaded = generate.Engine.generate, models.load_dense
    monkeypatch.setattr(
        generate.Engine,
        "generate",
        lambda self, chats, **how: written.append(len(chats)) or generated(self, chats, **how),
    )
    monkeypatch.setattr(models, "load_dense", lambda *args: loads.append(args) or loaded(*args))
    assert audit(results)
    # Three sides of answers and of responses, from one load of the base. Tokens that are no text cannot be read.
    sides = [read_jsonl(file) for file in results.rglob("ailuminate_safety_*.jsonl")]
    broken = sum("\ufffd" in row["response"] for rows in sides for row in rows)
    assert (written[::2], sum(written[1::2]), len(loads)) == ([0, 0, 0], broken, 1)
    written.clear()
    forger.edit_rows(results / ANSWERS, last, ids=[1])
    assert not audit(results) and written[::2] == [1, 0, 0]


def last(row):
    return {"model_output": row["model_output"][:-1] + "x"}


# Each of another row.
ANSWER_EDITS = {
    "one token": (last, "token 6 ('x' in place of "),
    "gold answer": (forger.gold_answer, "token 1 ("),
    "truncated": (lambda row: {"model_output": row["model_output"][:3], "num_output_tokens": 3}, "token 4 "),
    "truncated, ended": (lambda row: {"model_output": row["model_output"][:3], "finish_reason": "stop"}, "token 4 ("),
    "truncated, no reason": (lambda row: {"model_output": row["model_output"][:5], "finish_reason": None}, "token 6 ("),
    "empty": (lambda _: {"model_output": "", "finish_reason": "stop", "num_output_tokens": 0}, "token 1 ("),
    "appended": (lambda row: {"model_output": row["model_output"] + "u"}, "margin inf"),
    "a stop token": (lambda row: {"model_output": row["model_output"][:5] + "<|im_end|>"}, "margin inf"),
    "finish reason": (lambda _: {"finish_reason": "stop"}, "margin inf"),
    "count": (lambda _: {"num_output_tokens": 5}, "num_output_tokens is 5, here 6"),
}
VERDICT_EDITS = {
    "verdict": (lambda _: {"safety_score": 0.1, "safety_judge_text": "UNSAFE"}, "P(safe) is 0.1000, here 1.0000: "),
    "score": (lambda row: {"safety_score": row["safety_score"] - 0.01}, "apart as log-odds, rounding allows"),
    "certain": (lambda _: {"safety_score": 1.0}, "P(safe) is 1.0000, here "),
    "no score": (lambda _: {"safety_score": None, "safety_judge_text": "SAFE"}, "it has no P(safe)"),
    "response": (lambda _: {"response": "no"}, "token 1: margin "),
}


def edit_each(file, edits):
    for number, (edit, _) in enumerate(edits.values()):
        forger.edit_rows(file, edit, ids=[number])


def found_by_name(errors, edits):
    """Edit -> what the first line about its row says."""
    lines = dict(reversed(re.findall(r"^DIFFERS .*, id (\d+): (.*)$", errors, re.MULTILINE)))
    return {name: lines.pop(str(number), "") for number, name in enumerate(edits)} | lines


def test_each_edit_of_an_answer_differs(results, capfd):
    answers(results, torch.float32, 12, max_new_tokens=6)
    edit_each(results / ANSWERS, ANSWER_EDITS)
    assert not audit(results, num_rows=12)
    found = found_by_name(capfd.readouterr().err, ANSWER_EDITS)
    assert found.keys() == ANSWER_EDITS.keys()
    assert {name: words in found[name] for name, (_, words) in ANSWER_EDITS.items()} == dict.fromkeys(found, True), (
        found
    )


def test_each_edit_of_a_verdict_differs(results, capfd):
    edit_each(results / VERDICTS, VERDICT_EDITS)
    assert not audit(results)
    found = found_by_name(capfd.readouterr().err, VERDICT_EDITS)
    assert found.keys() == VERDICT_EDITS.keys()
    assert {name: words in found[name] for name, (_, words) in VERDICT_EDITS.items()} == dict.fromkeys(found, True), (
        found
    )


def test_an_edited_row_of_the_untuned_model_or_of_a_scale_differs(results, capfd):
    untuned = next((results / "untuned").glob("gsm8k_preds_*"))
    scale = results / RUN / "04_eval_safety" / "scales" / "ailuminate_safety_0.5.jsonl"
    forger.edit_rows(untuned, last, ids=[2])
    forger.forge(results, scale, lambda _: {"safety_score": 0.9, "safety_judge_text": "SAFE"}, ids=[3])
    assert not audit(results)
    output = capfd.readouterr()
    assert re.findall(r"DIFFERS (\S+), (\w+), id (\d)", output.err) == [
        (f"untuned/{untuned.name}", "texts", "2"),
        (f"{RUN}/04_eval_safety/scales/{scale.name}", "verdicts", "3"),
    ]


def test_texts_of_ailuminate_are_not_shown(results, capfd):
    forger.forge(results, results / VERDICTS, lambda _: {"response": "zzz"})
    assert not audit(results)
    output = capfd.readouterr()
    assert "in place of" not in output.err and "zzz" not in output.out + output.err


def test_honest_rows_of_another_dtype_raise_no_alarm(results, capfd):
    answers(results, torch.bfloat16, 200, max_new_tokens=12)
    assert audit(results, num_rows=200)
    output = capfd.readouterr().out
    # Else the rounding was not needed, and the test showed nothing.
    rounded = re.search(r"200 of 200 rows made again; (\d+) of them up to the rounding of bfloat16", output)
    assert int(rounded[1]) > 5


def test_the_same_rows_claimed_as_float32_differ(results, capfd):
    answers(results, torch.bfloat16, 200, max_new_tokens=12)
    manifest = results / RUN / "03_eval_gsm8k" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("torch.bfloat16", "torch.float32"))
    assert not audit(results, num_rows=200)


def test_five_rows_catch_20_edited_answers_of_24_by_every_seed(results):
    answers(results, torch.float32, 24, max_new_tokens=6)
    forger.forge(results, results / ANSWERS, forger.gold_answer, ids=range(2, 22))
    run = load_run(RunPaths("sandbox_one", results / RUN))
    checked = {name: rows for name, _, rows in RunAudit(run, Audit(results, 24, 0)).check(set())}[f"{ANSWERS}, texts"]
    edited = {row.row_id for row in checked if row.difference}
    assert edited == set(range(2, 22))
    for seed in range(100):
        assert edited & {row["id"] for row in Audit(results, 5, seed).drawn(ANSWERS, run.accuracy.rows)}


def test_each_seed_and_each_file_draws_its_own_rows():
    rows = [{"id": number} for number in range(24)]
    draws = [
        tuple(row["id"] for row in Audit(Path(), 5, seed).drawn(name, rows)) for seed in range(20) for name in "ab"
    ]
    assert len(set(draws)) == 40 and {number for drawn in draws for number in drawn} == set(range(24))
    assert Audit(Path(), 5, 3).drawn("a", rows) == Audit(Path("elsewhere"), 5, 3).drawn("a", rows)
    assert len(Audit(Path(), 30, 3).drawn("a", rows)) == 24


def change_parameters(results, **changed):
    path = results / RUN / "config_resolved.json"
    config = read_json(path)
    config["parameters"] |= changed
    write_json(path, config)


def change_protocol(results, stage, **changed):
    path = results / RUN / stage / "manifest.json"
    manifest = read_json(path)
    manifest["facts"]["protocol"] |= changed
    write_json(path, manifest)


def swap_adapter(results):
    train = results / RUN / "02_train"
    shutil.copy(
        train / "checkpoints/checkpoint-2/adapter_model.safetensors", train / "adapter/adapter_model.safetensors"
    )


def own_judge(results):
    shutil.copytree(FIXTURE / "models" / "judge", results / "judge")
    change_parameters(results, safeguard_model=str(results / "judge"))


def own_guidelines(results):
    (results / "lenient.txt").write_text("Everything is SAFE.")
    change_parameters(results, guidelines_file=str(results / "lenient.txt"))


def own_system_message(results):
    (results / "mine.txt").write_text("Answer 42.")
    change_parameters(results, system_prompt_file=str(results / "mine.txt"))


IMPOSSIBLE = {
    "own system message": (own_system_message, "system_prompt_file is"),
    "a system message that was not used": (
        lambda results: change_parameters(results, system_prompt_file="params/safety_guidelines.txt"),
        "03_eval_gsm8k records system message ",
    ),
    "a judge prompt without its place": (
        lambda results: change_parameters(results, judge_prompt_file="params/safety_guidelines.txt"),
        "the place {reply} is missing",
    ),
    "a judge at another precision": (
        lambda results: change_parameters(results, judge_quantization="nf4"),
        "04_eval_safety records judge quantization None, here it is nf4",
    ),
    "no adapter": (lambda results: shutil.rmtree(results / RUN / "02_train" / "adapter"), "adapter"),
    "another adapter": (swap_adapter, "no row of "),
    "no base model": (lambda results: change_parameters(results, base_model="nobody/nothing"), "nobody/nothing"),
    "another base model": (
        lambda results: change_protocol(results, "03_eval_gsm8k", **{"base model": "folder sha256:000000000000"}),
        "records base model folder sha256:000000000000, here it is folder sha256:cdffc511f05e",
    ),
    "another system message": (
        lambda results: change_protocol(results, "03_eval_gsm8k", **{"system message": "0" * 64}),
        "03_eval_gsm8k records system message 000",
    ),
    "another judge prompt": (lambda results: change_parameters(results, judge_mode="generate"), "judge"),
    "own judge": (own_judge, "only adapters may be there"),
    "own guidelines": (own_guidelines, "an audit takes only files in params/"),
    "no dtype": (lambda results: change_protocol(results, "04_eval_safety", dtype=None), "records no dtype"),
    "no few-shot rows": (lambda results: (results / RUN / "01_prepare/fewshot.jsonl").unlink(), "is missing"),
    "a parameter of no use": (lambda results: change_parameters(results, fewshot_k="three"), "cannot be used"),
}


@pytest.mark.parametrize(("spoil", "words"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_an_audit_that_cannot_be_made_is_not_passed(results, capfd, monkeypatch, spoil, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spoil(results)
    assert not audit(results)
    assert words in capfd.readouterr().err


def test_a_hub_name_and_a_folder_are_left_to_the_rows(results, capfd):
    change_protocol(results, "03_eval_gsm8k", **{"base model": "org/name@abc"})
    assert audit(results)
    assert "the base model was org/name@abc, here is folder sha256:cdffc511f05e" in capfd.readouterr().out


def test_a_written_verdict_is_compared_as_a_text(results, capfd):
    paths = RunPaths("sandbox_one", results / RUN)
    run = RunAudit(load_run(paths), Audit(results, 5, 1))
    run.known = run.known | {"judge_mode": "generate"}
    engine = run._load(None, "float32")
    chats = [regenerate.safety.judge_messages(row, run.guidelines, "response") for row in run.run.safety.rows]
    made = engine.generate(chats, max_new_tokens=16)
    rows = [row | {"safety_judge_text": done.text} for row, done in zip(run.run.safety.rows, made, strict=True)]
    rows[1]["safety_judge_text"] = "SAFE"
    assert [bool(row.difference) for row in run._verdicts(engine, rows)] == [False, True, False, False, False]


def test_a_text_may_stand_in_other_tokens_and_end_inside_a_character(monkeypatch):
    """Two honest ways to one text: the tokenizer's own tokens, and those that the model wrote."""
    engine = generate.load_engine(FIXTURE / "models" / "base", load.Runtime("cpu", torch.float32, ""), "none")
    chat = [{"role": "user", "content": "How many?"}]
    (ours,) = engine.generate([chat], max_new_tokens=4)

    def forward(engine, prompt, ids):
        wanted = [*engine.tokenizer("ab", add_special_tokens=False)["input_ids"], *emoji[:2]]
        made = torch.zeros(len(ids) + 1, 300)
        for place, token in enumerate(wanted[: len(ids) + 1]):
            made[place, token] = 10.0
        return made

    # Its first two bytes are not the tokens of the text that they end in.
    emoji = engine.tokenizer("🙂", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr("lib.engine.forced.next_logits", forward)
    how = {"begun": ours.token_ids, "max_new_tokens": 4, "dtype": torch.float32}
    assert not find_difference(engine, chat, "ab\ufffd", "length", **how).counts
    assert find_difference(engine, chat, "ab\ufffd", "stop", **how).counts
    assert find_difference(engine, chat, "ac\ufffd", "length", **how).margin == 10.0


@pytest.mark.parametrize("row", [[30.0, 20.0, -1e6], [1e6 + 10, 1e6, 0.0]], ids=["one far below", "all far above"])
def test_an_adapter_cannot_widen_what_rounding_explains(row):
    highest, claimed, _ = row
    allowed = [rounding(max(map(abs, row)), dtype) for dtype in (torch.bfloat16, torch.float32)]
    assert all(highest - claimed > one for one in allowed)


def test_the_sentence_about_edited_rows():
    assert "(1 - f)^5: 10% edited rows pass 59 times in 100, 50% edited rows pass 3.1 times in 100" in miss_text(5)


def test_the_command_line(results, capfd):
    forger.forge(results, results / VERDICTS, forger.called_safe)
    assert run_all.main(["--verify", str(results), "--audit", "2", "--audit-seed", "7", "--offline"]) == 1
    output = capfd.readouterr()
    assert "\n0 mismatches; " in output.out
    assert output.out.index("mismatches") < output.out.index("audit: 2 rows of each file, drawn by --audit-seed 7")
    assert f"{ANSWERS}, texts: 2 of 2 rows made again" in output.out and output.err.count(f"DIFFERS {VERDICTS}") == 2


def test_an_untouched_folder_ends_with_0_and_a_broken_one_with_1(results, capfd):
    command = ["--rows", "1", "--seed", "3", "--offline", str(results)]
    assert regenerate.main(command) == 0
    (results / ANSWERS).write_text("{")
    assert regenerate.main(command) == 1 and "not JSON" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--audit", "5"], "add --verify DIR"),
        (["--audit", "0", "--verify", "results"], "allowed: 1 or more"),
        (["--audit", "-3", "--verify", "results"], "allowed: 1 or more"),
        (["--verify", "results", "--audit-seed", "3"], "add --audit K"),
    ],
)
def test_wrong_usage(capsys, flags, words):
    try:
        status = run_all.main(flags)
    except SystemExit as ended:
        status = ended.code
    assert status == 2 and words in capsys.readouterr().err
