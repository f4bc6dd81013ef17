"""Choosing a checkpoint: on development rows alone, by number, by a stated rule, under one protocol."""

import csv
import json
import re
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from tiny import save_tiny_model

from lib.driver import notebook
from lib.engine.generator import Completion, LazyGenerator
from lib.record.files import read_json, write_csv
from lib.record.manifest import start_stage
from lib.record.paths import PROJECT_ROOT, ArtifactError, run_paths
from lib.record.rows import read_jsonl, write_jsonl
from lib.train import checkpoint_selection, selection_rows
from lib.train.settings import checkpoint_step

FEWSHOT = [{"question": "1 + 1?", "answer": "#### 2"}]
PROTOCOL = checkpoint_selection.Protocol(
    model={"base": "tiny", "dtype": "float32", "template": "t"},
    fewshot=FEWSHOT,
    max_answer_tokens=8,
    max_response_tokens=8,
    judge={"judge": "fake"},
    guidelines="Be strict.",
    judge_context="response",
    judge_mode="probabilities",
    max_verdict_tokens=4,
)
# Of PROTOCOL with its rows, then of the row files of a candidate.
PINNED = ["b7ca609239d4", "be127633c9de", "a0e0b045e922", "f336ba08aabc"]


def prompt(number, text="", release_id=None):
    ids = f"release-{number}" if release_id is None else release_id
    text = text or f"mild request {number}"
    return {"id": number, "prompt": text, "release_prompt_id": ids, "hazard": "prv", "persona": "normal"}


class Able:
    """A model that answers its first ``num_right`` questions right; its responses say which step it is of."""

    def __init__(self, num_right, step):
        self.num_right, self.step, self.calls, self.work_s = num_right, step, 0, 0.0

    def generate(self, conversations, *, max_new_tokens, on_completion):
        self.calls += 1
        self.work_s += 1.0
        for place, messages in enumerate(conversations):
            right = messages[-1]["content"].rpartition("answer is ")[2]
            text = f"#### {right if place < self.num_right else -1}" if right.isdigit() else f"step {self.step}"
            on_completion(place, Completion(text, "stop", 3, 9, (1, 2, 3)))


class Judge:
    """Finds as many responses of a step safe, from the first, as ``num_safe`` says."""

    def __init__(self, num_safe):
        self.num_safe = num_safe

    def label_probabilities(self, conversations, *, labels, on_result):
        for place, messages in enumerate(conversations):
            step = int(messages[-1]["content"].partition("step ")[2].split("\n")[0])
            safe = 0.9 if place < self.num_safe[step] else 0.1
            on_result(place, [safe, 1 - safe])


@pytest.fixture
def paths(tmp_path):
    """A run after 01_prepare and training, with checkpoints of 10, 100 and 1000 steps."""
    paths = run_paths(str(tmp_path / "results"), "mine")
    write_jsonl(paths.dev_rows, [{"question": f"{i}? The answer is {i}", "answer": f"#### {i}"} for i in range(4)])
    write_jsonl(paths.gsm8k_eval_rows, [{"test_index": 7, "question": "The answer is 7", "answer": "#### 7"}])
    write_jsonl(paths.ailuminate_rows, [prompt(0)])
    for step in (1000, 10, 100):
        folder = paths.checkpoints_dir / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_text(f"adapter of step {step}")
    return paths


def run_sweep(paths, rows, num_right, num_safe, metric, protocol=PROTOCOL):
    """As a run does it: every candidate answers, then all are judged; scores, the best, the generators."""
    generators, folder = [], paths.stage_dir("02_train") / "sweep"

    def tuned(candidate):
        step = checkpoint_step(candidate)
        generators.append(LazyGenerator(Able, num_right[step], step))
        return generators[-1]

    found = checkpoint_selection.candidates(list(paths.checkpoints_dir.iterdir()), 3)
    judge = LazyGenerator(Judge, num_safe)
    scores = checkpoint_selection.score_candidates(found, rows, protocol, folder, tuned, judge)
    return scores, checkpoint_selection.best(scores, metric), generators


# --- the choice -----------------------------------------------------------------------------------------------------


def test_checkpoints_are_taken_by_number_and_the_last_ones_kept(paths):
    found = sorted(paths.checkpoints_dir.iterdir())
    assert [path.name for path in checkpoint_selection.candidates(found, 3)] == [
        "checkpoint-10",
        "checkpoint-100",
        "checkpoint-1000",
    ]
    assert [path.name for path in checkpoint_selection.candidates(found, 2)] == ["checkpoint-100", "checkpoint-1000"]


@pytest.mark.parametrize(
    ("metric", "chosen"), [("accuracy", "checkpoint-100"), ("safety", "checkpoint-10"), ("sum", "checkpoint-1000")]
)
def test_the_metric_decides_on_development_rows(paths, metric, chosen):
    rows = selection_rows.development_rows(paths, [prompt(number) for number in range(10)])
    # Shares: 10 has 0/4 + 10/10, 100 has 4/4 + 0/10, 1000 has 3/4 + 9/10.
    scores, best, _ = run_sweep(paths, rows, {10: 0, 100: 4, 1000: 3}, {10: 10, 100: 0, 1000: 9}, metric)
    assert [(one.num_correct, one.num_safe) for one in scores] == [(0, 10), (4, 0), (3, 9)]
    assert best.checkpoint == chosen


def made(step, num_correct, num_safe=0, **more):
    return checkpoint_selection.Score(
        f"checkpoint-{step}", step, "", 8, num_correct, 10 if num_safe else 0, num_safe, **more
    )


def test_of_equal_scores_the_latest_wins_and_the_latest_is_found_by_number():
    assert checkpoint_selection.best([made(1000, 5), made(900, 5), made(10, 4)], "accuracy").step == 1000
    # 1/8 + 3/10 and 2/8 + ... in floating point would part what is equal.
    tied = [
        checkpoint_selection.Score("checkpoint-1", 1, "", 10, 1, 10, 2),
        checkpoint_selection.Score("checkpoint-2", 2, "", 10, 2, 10, 1),
    ]
    assert tied[0].value("sum") == tied[1].value("sum") == Fraction(3, 10) and 0.1 + 0.2 != 0.3
    assert checkpoint_selection.best(tied[::-1], "sum").step == 2


def test_a_verdict_that_cannot_be_read_is_not_safe():
    assert made(1, 0, 5, num_unparsed=5).value("safety") == Fraction(1, 2)


def test_scores_of_different_rows_are_not_compared():
    with pytest.raises(selection_rows.SweepError, match="not all with the same rows"):
        checkpoint_selection.best([made(1, 5), made(2, 5, 5)], "accuracy")
    with pytest.raises(selection_rows.SweepError, match="0 checkpoints"):
        checkpoint_selection.best([], "accuracy")
    with pytest.raises(selection_rows.SweepError, match="got no prompt: set dev_safety_rows"):
        checkpoint_selection.best([made(1, 5)], "sum")
    with pytest.raises(selection_rows.SweepError, match="allowed: accuracy, safety, sum"):
        made(1, 5).value("loss")


def test_the_table_holds_every_score_with_intervals_and_one_choice(paths):
    rows = selection_rows.development_rows(paths, [prompt(number) for number in range(10)])
    scores, _, _ = run_sweep(paths, rows, {10: 4, 100: 4, 1000: 0}, {10: 10, 100: 5, 1000: 0}, "accuracy")
    table = checkpoint_selection.table_rows(scores, "accuracy", rows.selected_on, PROTOCOL.sha256(rows))
    write_csv(paths.checkpoint_scores, table)
    with paths.checkpoint_scores.open(encoding="utf-8", newline="") as stream:
        read = list(csv.DictReader(stream))
    assert [row["checkpoint"] for row in read] == ["checkpoint-10", "checkpoint-100", "checkpoint-1000"]
    assert [row["chosen"] for row in read] == ["False", "True", "False"]
    assert {row["selected_on"] for row in read} == {"development rows"}
    assert len({row["protocol_sha256"] for row in read}) == 1 and len({row["adapter_sha256"] for row in read}) == 3
    # Wilson's interval of 5 of 10, from the tables: 23.7 to 76.3 %.
    assert (float(read[1]["safety_low"]), float(read[1]["safety_high"])) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert float(read[0]["low"]) > 0.5 and float(read[0]["high"]) == 1.0
    unmeasured = checkpoint_selection.table_rows([made(1, 5)], "accuracy", selection_rows.ON_DEV, "")[0]
    assert unmeasured["safety_rate"] is None and unmeasured["safety_low"] is None


# --- rows that are already there --------------------------------------------------------------------------------------


def test_a_second_sweep_generates_nothing_and_another_adapter_answers_again(paths):
    rows = selection_rows.development_rows(paths, [prompt(number) for number in range(3)])
    able, safe = {10: 1, 100: 2, 1000: 3}, {10: 1, 100: 1, 1000: 1}
    first, _, generators = run_sweep(paths, rows, able, safe, "accuracy")
    assert all(generator.loaded for generator in generators)
    second, _, generators = run_sweep(paths, rows, able, safe, "accuracy")
    assert second == first and not any(generator.loaded for generator in generators)
    (paths.checkpoints_dir / "checkpoint-100" / "adapter_model.safetensors").write_text("another")
    third, _, generators = run_sweep(paths, rows, {**able, 100: 4}, safe, "accuracy")
    assert [generator.loaded for generator in generators] == [False, True, False]
    assert [one.num_correct for one in third] == [1, 4, 3]


def test_another_judge_judges_again_without_new_answers(paths):
    rows = selection_rows.development_rows(paths, [prompt(number) for number in range(3)])
    able = {10: 1, 100: 1, 1000: 1}
    _, _, generators = run_sweep(paths, rows, able, {10: 1, 100: 1, 1000: 1}, "accuracy")
    assert [generator.wall_s for generator in generators] == [2.0] * 3, "two calls of a second each"
    for name, num_safe in (("one", 3), ("two", 0)):
        protocol = checkpoint_selection.Protocol(**{**PROTOCOL.__dict__, "judge": {"judge": name}})
        safe = dict.fromkeys((10, 100, 1000), num_safe)
        scores, _, generators = run_sweep(paths, rows, able, safe, "accuracy", protocol)
        assert [one.num_safe for one in scores] == [num_safe] * 3
        assert not any(generator.loaded for generator in generators)
        assert protocol.sha256(rows) != PROTOCOL.sha256(rows)


def test_rows_and_scores_keep_their_hashes(paths):
    """Rows are found by them: a hash that moves would answer every row of earlier runs again."""
    rows = selection_rows.development_rows(paths, [prompt(number) for number in range(3)])
    same = {10: 1, 100: 1, 1000: 1}
    run_sweep(paths, rows, same, same, "accuracy")
    folder = paths.stage_dir("02_train") / "sweep"
    kinds = ("answers", "responses", "verdicts")
    made_by = [read_jsonl(folder / f"{kind}_checkpoint-10.jsonl")[0]["protocol_hash"][:12] for kind in kinds]
    assert [PROTOCOL.sha256(rows)[:12], *made_by] == PINNED


# --- development prompts ----------------------------------------------------------------------------------------------


def test_prompts_of_the_class_set_and_of_the_evaluation_are_never_drawn():
    pool = [prompt(number) for number in range(40)]
    pool[5] = prompt(5, "Mild  request 30")  # its text, spelt a little otherwise, is evaluated under another id
    pool[6] = prompt(6, "mild request 0")  # its text is in the class set under another id
    pool[8] = prompt(8, "mild request 7")  # twice in the pool: drawn once at most
    evaluated, class_ids = [prompt(30), prompt(31)], ["release-0", "release-1"]
    allowed = set(range(40)) - {0, 1, 5, 6, 8, 30, 31}
    drawn = selection_rows.draw_prompts(pool, evaluated, len(allowed), seed=3, class_ids=class_ids)
    assert {int(row["release_prompt_id"].rpartition("-")[2]) for row in drawn} == allowed
    assert [row["id"] for row in drawn] == list(range(len(allowed)))
    with pytest.raises(selection_rows.SweepError, match=r"dev_safety_rows is 34 but 33 of 40 prompts"):
        selection_rows.draw_prompts(pool, evaluated, 34, seed=3, class_ids=class_ids)


def test_the_draw_is_seeded():
    pool = [prompt(number) for number in range(100)]
    drawn = [selection_rows.draw_prompts(pool, [], 10, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_prompts_without_ids_are_told_apart_by_their_texts():
    pool = [prompt(number, release_id="") for number in range(4)]
    drawn = selection_rows.draw_prompts(pool, [prompt(2, release_id="")], 3, seed=1)
    assert [row["prompt"] for row in drawn] == ["mild request 0", "mild request 1", "mild request 3"]


def test_the_240_of_the_class_are_left_out_by_default():
    ids = (PROJECT_ROOT / "params" / "ailuminate_class240_ids.txt").read_text().split()
    pool = [prompt(number, release_id=release_id) for number, release_id in enumerate(ids)] + [prompt(999)]
    assert [row["release_prompt_id"] for row in selection_rows.draw_prompts(pool, [], 1, seed=1)] == ["release-999"]


def test_a_choice_by_safety_without_a_judge_says_what_to_do():
    selection_rows.require_safety("accuracy", "judge: not here")
    selection_rows.require_safety("sum", "")
    with pytest.raises(
        selection_rows.SweepError, match=r"judge: not here.*--set sweep_metric=accuracy dev_safety_rows=0"
    ):
        selection_rows.require_safety("sum", "judge: not here")


# --- the test split ---------------------------------------------------------------------------------------------------

OPENED: list[str] = []
WATCHING: list[bool] = []
# An audit hook cannot be taken off again; it notes file names only while WATCHING holds something.
sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" and WATCHING else None)


def test_no_test_row_is_read_before_the_choice(paths):
    """Every file that is opened between the rows and the choice, as the interpreter itself tells it."""
    OPENED.clear()
    WATCHING.append(True)
    try:
        rows = selection_rows.development_rows(
            paths, selection_rows.draw_prompts([prompt(5)], selection_rows.evaluated_prompts(paths), 1, 1)
        )
        _, best, _ = run_sweep(paths, rows, {10: 4, 100: 2, 1000: 1}, {10: 1, 100: 1, 1000: 1}, "sum")
    finally:
        WATCHING.clear()
    assert best.checkpoint == "checkpoint-10"
    names = {name.rpartition("/")[2] for name in OPENED}
    assert {"dev.jsonl", "answers_checkpoint-1000.jsonl", "verdicts_checkpoint-10.jsonl"} <= names, "it does watch"
    assert not [name for name in OPENED if "gsm8k_eval" in name or "gsm8k_test" in name]


def test_the_choice_does_not_need_the_test_rows_and_the_old_way_does(paths):
    paths.gsm8k_eval_rows.unlink()
    able, safe = {10: 4, 100: 2, 1000: 1}, {10: 0, 100: 0, 1000: 0}
    assert run_sweep(paths, selection_rows.development_rows(paths), able, safe, "accuracy")[1].step == 10
    with pytest.raises(ArtifactError, match="run 01_prepare"):
        selection_rows.evaluation_rows(paths, "accuracy")


def test_the_old_way_by_safety_needs_prompts(paths):
    paths.ailuminate_rows.write_text("")
    assert selection_rows.evaluated_prompts(paths) == [] == selection_rows.evaluation_rows(paths, "accuracy").prompts
    with pytest.raises(selection_rows.SweepError, match="01_prepare found no AILuminate prompts"):
        selection_rows.evaluation_rows(paths, "safety")


def test_the_old_way_asks_the_evaluation_rows_and_says_so(paths):
    rows = selection_rows.evaluation_rows(paths, "sum")
    assert [row["test_index"] for row in rows.questions] == [7] and len(rows.prompts) == 1
    assert rows.selected_on == "the test set" and paths.gsm8k_eval_rows in rows.files
    _, best, _ = run_sweep(paths, rows, {10: 1, 100: 0, 1000: 0}, {10: 0, 100: 0, 1000: 0}, "sum")
    text = selection_rows.selection_text(best.checkpoint, rows.selected_on, "sum")
    assert text.startswith("Kept is checkpoint-10, selected on the test set by sum.") and "too high" in text
    assert "too high" not in selection_rows.selection_text("checkpoint-10", selection_rows.ON_DEV, "sum")
    assert "selected on" not in selection_rows.selection_text(
        "checkpoint-458", selection_rows.ON_DEV, "accuracy", num_candidates=1
    )
    assert "not selected" in selection_rows.selection_text("the adapter", selection_rows.NOT_SELECTED)


def test_one_checkpoint_compared_is_not_called_the_only_one_there_is():
    chosen = ("checkpoint-458", selection_rows.ON_DEV, "accuracy")
    text = selection_rows.selection_text(*chosen, num_candidates=1, most=1)
    assert text == "Kept is checkpoint-458, the only one compared (max_sweep_checkpoints: 1): nothing was selected."
    assert "the only checkpoint: a smaller save_steps" in selection_rows.selection_text(
        *chosen, num_candidates=1, most=3
    )
    assert "selected on development rows" in selection_rows.selection_text(*chosen, num_candidates=3, most=3)
    assert "fewer" not in selection_rows.selection_text(*chosen, num_candidates=3, most=3)
    assert "(max_sweep_checkpoints is 3)" in selection_rows.selection_text(*chosen, num_candidates=1, most=3)
    text = selection_rows.selection_text(*chosen, num_candidates=2, most=3)
    assert "Compared were 2 checkpoints" in text and "fewer than max_sweep_checkpoints (3)" in text


def test_the_test_rows_are_read_only_behind_sweep_on_test():
    cells = read_json(PROJECT_ROOT / "notebooks" / "02_train.ipynb")["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    names = ("gsm8k_eval", "gsm8k_test", "load_gsm8k", "gsm8k_preds", "evaluation_rows")
    assert not [name for name in names if name in code]
    # They are opened in one function alone, which is called in one place.
    source = Path(selection_rows.__file__).read_text(encoding="utf-8")
    places = [at for at in range(len(source)) if source.startswith("paths.gsm8k_eval_rows", at)]
    assert {source[:at].rpartition("\ndef ")[2].partition("(")[0] for at in places} == {"evaluation_rows"}
    lines = Path(checkpoint_selection.__file__).read_text(encoding="utf-8").splitlines()
    (call,) = [line for line in lines if "evaluation_rows(" in line]
    assert 'if parameters["sweep_on_test"] else development_rows(' in call


def test_parameters_of_the_judge_are_those_that_02_declares_for_it_alone():
    declared = notebook.declared_parameters("02_train").keys()
    assert set(checkpoint_selection.SAFETY_PARAMETERS) <= declared
    judged = {name for name in declared if name.startswith(("judge_", "safeguard_", "ailuminate_", "guidelines_"))}
    assert judged == set(checkpoint_selection.SAFETY_PARAMETERS)


def prepare_for_02(tmp_path, dev=None, pool=None):
    """What 01 leaves for notebook 02, without gsm8k_eval.jsonl, and parameters for a tiny random model."""
    model = save_tiny_model(tmp_path / "tiny", "llama")
    paths = run_paths(str(tmp_path / "results"), "sandbox_one")
    rows = [{"question": f"{i} + {i}?", "answer": f"Twice {i}.\n#### {2 * i}"} for i in range(12)]
    dev, pool = rows[8:10] if dev is None else dev, rows[10:] if pool is None else pool
    for path, part in ((paths.train_rows, rows[:8]), (paths.dev_rows, dev), (paths.fewshot_rows, pool)):
        write_jsonl(path, part)
    write_jsonl(paths.ailuminate_rows, [prompt(0)])
    start_stage(paths.manifest("01_prepare"), "01_prepare", "sandbox_one", {}).finish(inputs=[], outputs=[], facts={})
    return paths, {
        **{"results_dir": str(tmp_path / "results"), "base_model": str(model), "safeguard_model": str(model)},
        **{"compute_dtype": "float32", "quantization": "none", "save_steps": 1, "train_batch_size": 1},
        **{"gradient_accumulation_steps": 4},
        **{"gsm8k_max_new_tokens": 4, "ailuminate_max_new_tokens": 4, "fewshot_k": 1, "offline": True},
    }


@pytest.mark.slow
def test_notebook_02_trains_and_chooses_where_there_are_no_test_rows(tmp_path):
    """The complete notebook on a tiny random model, with a judge; results lack gsm8k_eval.jsonl."""
    paths, parameters = prepare_for_02(tmp_path)
    csv_file = tmp_path / "prompts.csv"
    lines = [f"release-{i},mild request {i},prv,normal" for i in range(5)]
    csv_file.write_text("\n".join(["release_prompt_id,prompt,hazard,persona", *lines]) + "\n")
    parameters |= {"ailuminate_source": str(csv_file), "dev_safety_rows": 3, "sweep_metric": "sum"}
    parameters |= {"max_sweep_checkpoints": 2, "guidelines_file": str(tmp_path / "guidelines.txt")}
    (tmp_path / "guidelines.txt").write_text("Be strict.")
    outcome = notebook.execute("02_train", tmp_path / "02_train.ipynb", parameters)
    assert not outcome.error, outcome.error
    manifest = read_json(paths.manifest("02_train"))
    assert manifest["facts"]["unused_parameters"] == [], "the judge was used"
    assert manifest["facts"]["selected_on"] == "development rows" and not paths.gsm8k_eval_rows.exists()
    with paths.checkpoint_scores.open(encoding="utf-8", newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [(row["checkpoint"], row["n"], row["num_prompts"]) for row in table] == [
        ("checkpoint-1", "2", "3"),
        ("checkpoint-2", "2", "3"),
    ]
    drawn = read_jsonl(paths.stage_dir("02_train") / "sweep" / "prompts.jsonl")
    assert len(drawn) == 3 and "release-0" not in {row["release_prompt_id"] for row in drawn}
    assert [row for row in read_jsonl(paths.training_log) if row.get("dev_loss")]
    card = (paths.adapter_dir / "README.md").read_text(encoding="utf-8")
    assert "selected on development rows" in card and str(tmp_path) not in card
    assert "mild request" not in (tmp_path / "02_train.ipynb").read_text(encoding="utf-8"), "no prompt is shown"
    assert json.loads((paths.adapter_dir / "adapter_config.json").read_text())["peft_type"] == "LORA"


def run_02(tmp_path, parameters):
    """Executes notebook 02; all that a reader of it sees, as text."""
    outcome = notebook.execute("02_train", tmp_path / "02_train.ipynb", parameters)
    assert not outcome.error, outcome.error
    cells = read_json(tmp_path / "02_train.ipynb")["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "\n".join("".join(one.get("data", {}).get("text/html", one.get("text", ""))) for one in outputs)


@pytest.mark.slow
def test_notebook_02_trains_again_where_the_checkpoints_to_choose_among_were_deleted(tmp_path):
    dev = [{"question": "8 + 8?" + "!" * size, "answer": "#### 16"} for size in (0, 600)]
    paths, parameters = prepare_for_02(tmp_path, dev=dev)
    first = run_02(tmp_path, parameters | {"max_sweep_checkpoints": 1})
    # One of two development rows is over 512 tokens: its loss is not measured, and the table says so.
    assert "of them left out</td><td>1</td>" in re.sub(r"\s*<t", "<t", re.sub(r"<td[^>]*>", "<td>", first))
    assert "Before training: a development row" in first
    assert (
        "checkpoint-2, the only one compared (max_sweep_checkpoints: 1)" in first and "smaller save_steps" not in first
    )
    trained = read_jsonl(paths.training_log)
    shutil.rmtree(paths.checkpoints_dir)
    again = run_02(tmp_path, parameters)
    assert "checkpoint-1, checkpoint-2 is needed to choose among checkpoints and gone: training again" in again
    assert [row["loss"] for row in read_jsonl(paths.training_log)] == [row["loss"] for row in trained]
    with paths.checkpoint_scores.open(encoding="utf-8", newline="") as stream:
        assert [row["checkpoint"] for row in csv.DictReader(stream)] == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pool", "kind"), [(None, "a row of the few-shot pool"), ([], "a training row")], ids=["pool", "nothing"]
)
def test_notebook_02_says_what_kind_of_row_its_example_question_is(tmp_path, pool, kind):
    """Without development rows and worked examples: the pool is still not trained on."""
    _, parameters = prepare_for_02(tmp_path, dev=[], pool=pool)
    seen = run_02(tmp_path, parameters | {"dev_rows": 0, "fewshot_k": 0, "checkpoint_sweep": False})
    assert f"Before training: {kind}" in seen
