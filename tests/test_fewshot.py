"""Worked examples that a person fixes: the file that is made once, rows named by position, and what is refused."""

import json
import os
import random
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import pytest
import yaml

import run_all
from lib import gsm8k
from lib.driver.cli import build_parser
from lib.driver.plan import SUBMISSION_FEWSHOT_ROWS, make_plans
from lib.params import PARAMS_DIR, ParamsError, load_params, preset_path
from lib.prepare import fewshot, run_rows
from lib.prepare.audit import File
from lib.record.lookup import AssetError
from lib.record.protocol import answer_protocol
from lib.reports import prepare_tables

SANDBOX = yaml.safe_load((PARAMS_DIR / "sandbox_one.yaml").read_text(encoding="utf-8"))
ASSETS = os.environ.get("ASSETS_DIR", "")
PARAMETERS = SANDBOX | {"assets_dir": "", "offline": True}


def prepared(**changes):
    data = run_rows.load_data(PARAMETERS | changes)
    return data, run_rows.draw_rows(data, PARAMETERS | changes)


def questions(rows):
    return {gsm8k.normalise_question(row["question"]) for row in rows}


def numbered(count, first=0):
    return [{"question": f"What is {n} and {n}?", "answer": f"#### {2 * n}"} for n in range(first, first + count)]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def nothing_starts(monkeypatch):
    monkeypatch.setattr("lib.driver.commands.run_all", lambda *_: pytest.fail("something was started"))


# --- the file -------------------------------------------------------------------------------------------------------


def test_the_first_run_makes_the_file_of_its_pool_and_changes_nothing_else(tmp_path):
    _, drawn = prepared()
    file = tmp_path / "new" / "examples.jsonl"
    for _ in range(2):
        data, rows = prepared(fewshot_file=str(file))
        assert (rows.pool, rows.fewshot, rows.dev, rows.train) == (drawn.pool, drawn.fewshot, drawn.dev, drawn.train)
    kept = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert kept == drawn.pool and len(kept) == 8 and list(kept[0]) == ["question", "answer"]
    # An input of 01, so that an edit of the file runs it again; and a line of the provenance.
    assert data.sources["few-shot examples"].file == file
    protocols = [answer_protocol({}, [], [], rows.fewshot, "", "") for rows in (rows, drawn)]
    assert protocols[0] == protocols[1]


def test_an_edited_file_is_used_as_it_is_and_never_written(tmp_path):
    _, drawn = prepared()
    # A development and a training question in other spelling, and one that GSM8K does not have.
    dev, train = drawn.dev[0], drawn.train[0]
    edited = [{**dev, "question": f"Question 3: {dev['question'].upper()} "}, train, *numbered(2)]
    file = tmp_path / "examples.jsonl"
    text = "\ufeff\r\n" + "\r\n".join(json.dumps({**row, "note": "mine"}) for row in edited)
    file.write_bytes(text.encode())
    data, rows = prepared(fewshot_file=str(file), max_train_rows=0)
    assert file.read_bytes() == text.encode()
    assert rows.pool == [{name: row[name] for name in ("question", "answer")} for row in edited]
    assert rows.fewshot == rows.pool[:3] and len(rows.dev) == 4
    assert not questions(rows.pool) & questions([*rows.dev, *rows.train])
    # What is not in the file does not move: development rows stay, the rows of the pool are trained on again.
    assert questions(drawn.dev[1:]) < questions(rows.dev) and questions(drawn.pool) & questions(rows.train)
    shown = prepare_tables.run_rows(rows, rows.train, data, PARAMETERS).text
    assert "examples.jsonl; 3 are shown" in shown
    changed = answer_protocol({}, [], [], rows.fewshot, "", "") != answer_protocol({}, [], [], drawn.fewshot, "", "")
    assert changed


def slow_run(file, first):
    """A run that draws other examples, slowly."""

    def draw():
        time.sleep(0.5)
        return numbered(8, first)

    return fewshot.load_file(str(file), 3, [], draw)[0]


def test_two_runs_at_once_make_one_file(tmp_path):
    file = tmp_path / "examples.jsonl"
    # Processes, as --jobs starts them: a file's lock is held by a process.
    with ProcessPoolExecutor(2, get_context("fork")) as runs:
        first, second = runs.map(slow_run, (file, file), (0, 100))
    assert first == second and first.rows in (numbered(8), numbered(8, 100))
    assert [path.name for path in tmp_path.iterdir()] == ["examples.jsonl"]


BAD_LINES = [
    ('{"question": "Two?", "answer": ', "line 2: not JSON"),
    ('["Two?", "#### 2"]', "line 2: a list"),
    ('{"question": "Two?"}', "line 2: column 'answer' is missing"),
    ('{"question": "  ", "answer": "#### 2"}', "line 2: column 'question' must be text that is not empty"),
    ('{"question": "Two?", "answer": 2}', "line 2: column 'answer' must be text"),
    ('{"question": "Two?", "answer": "It is 2."}', "line 2: its answer has no number after ####"),
    ('{"question": "Two?", "answer": "#### two"}', "line 2: its answer has no number after ####"),
    ('{"question": "what is  0 and 0", "answer": "#### 0"}', "line 2: asks what line 1 asks"),
]


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(("line", "words"), BAD_LINES)
def test_a_line_that_is_no_example_is_refused_before_anything_runs(tmp_path, capsys, line, words):
    file = write(tmp_path / "mine.jsonl", numbered(4))
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], line, *lines[1:]]))
    command = ["--presets", "sandbox_one", "--output-dir", str(tmp_path / "out"), "--set", f"fewshot_file={file}"]
    assert run_all.main(command) == 2
    printed = capsys.readouterr().err
    assert f"mine.jsonl, {words}" in printed and not (tmp_path / "out").exists()
    with pytest.raises(AssetError, match=r"mine\.jsonl, line 2"):
        prepared(fewshot_file=str(file))


def test_every_faulty_example_is_listed(tmp_path):
    rows = [*numbered(2), {"question": "Three?", "answer": "three"}, numbered(1)[0]]
    with pytest.raises(AssetError) as caught:
        fewshot.check_file(str(write(tmp_path / "mine.jsonl", rows)), 5, 8, [])
    message = str(caught.value).splitlines()
    assert len(message) == 3 and "line 3: its answer" in message[0] and "line 4: asks what line 1" in message[1]
    assert message[2].endswith("mine.jsonl has 4 examples but fewshot_k is 5: add some, or lower it")


@pytest.mark.usefixtures("nothing_starts")
def test_a_test_question_among_the_examples_is_contamination(tmp_path, capsys):
    test_row = run_rows.load_data(PARAMETERS).gsm8k_test[5]
    reworded = {**test_row, "question": f"**Q1.** {test_row['question'].upper()}"}
    file = write(tmp_path / "mine.jsonl", [*numbered(3), reworded])
    command = ["--presets", "sandbox_one", "--output-dir", str(tmp_path / "out"), "--set", f"fewshot_file={file}"]
    assert run_all.main(command) == 2
    words = "mine.jsonl, line 4: asks what GSM8K's test split asks (contamination)"
    assert words in capsys.readouterr().err
    # What the driver cannot see, because the test split is not there yet, 01 does.
    fewshot.check_file(str(file), 3, 8, [])
    with pytest.raises(AssetError, match="line 4: asks what GSM8K's test split asks"):
        prepared(fewshot_file=str(file), train_file_faults="keep")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "mine.jsonl is empty"),
        ('[{"question": "One?", "answer": "#### 1"}]', "is a JSON array; JSON lines were expected"),
        ("question,answer\nOne?,#### 1\n", "line 1: not JSON"),
        (b"\xff\xfe{", "not UTF-8"),
    ],
)
def test_a_file_that_holds_no_json_lines_is_refused(tmp_path, text, words):
    file = tmp_path / "mine.jsonl"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(AssetError, match=words):
        fewshot.check_file(str(file), 1, 8, [])


def test_places_where_no_file_can_be_made_are_refused(tmp_path):
    with pytest.raises(AssetError, match="is a folder: name a JSON lines file"):
        fewshot.check_file(str(tmp_path), 1, 8, [])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(AssetError, match="cannot be made"):
        fewshot.load_file(str(tmp_path / "file" / "mine.jsonl"), 1, [], lambda: numbered(2))


@pytest.mark.parametrize(("shown", "pool_size"), [(3, 2), (0, 0)])
def test_a_pool_too_small_for_the_file_is_refused_and_nothing_is_made(tmp_path, shown, pool_size):
    file = tmp_path / "mine.jsonl"
    with pytest.raises(AssetError, match=r"fewshot_pool_size \(\d\) examples, but fewshot_k is \d: raise"):
        fewshot.check_file(str(file), shown, pool_size, [])
    with pytest.raises(AssetError, match="fewshot_pool_size"):
        prepared(fewshot_file=str(file), fewshot_k=shown, fewshot_pool_size=pool_size)
    assert not file.exists()


def test_a_file_of_more_examples_than_the_pool_can_be_shown(tmp_path):
    file = write(tmp_path / "mine.jsonl", numbered(12))
    plans = build_parser().parse_args(["--presets", "simple", "--set", f"fewshot_file={file}", "fewshot_k=12"])
    (plan,) = make_plans(plans)
    assert (plan.params.fewshot_k, plan.params.fewshot_pool_size) == (12, 8)


# --- rows of GSM8K train --------------------------------------------------------------------------------------------


def test_named_rows_take_the_place_of_the_pool():
    _, drawn = prepared()
    data, rows = prepared(fewshot_rows=[20, 3, 11], max_train_rows=0)
    assert rows.pool == rows.fewshot == [data.gsm8k_train.rows[position] for position in (20, 3, 11)]
    assert not questions(rows.pool) & questions([*rows.dev, *rows.train]) and len(rows.dev) == 4
    assert questions(drawn.dev) - questions(rows.pool) <= questions(rows.dev)
    shown = prepare_tables.run_rows(rows, rows.train, data, PARAMETERS).text
    assert "rows 20, 3, 11 of GSM8K train; 3 are shown" in shown and "few-shot examples" not in data.sources


@pytest.mark.skipif(not ASSETS, reason="ASSETS_DIR names no folder with GSM8K")
def test_named_rows_of_the_real_data_are_the_pool_and_nothing_else_is_asked_there():
    real = {"assets_dir": ASSETS, "gsm8k_source": "openai/gsm8k", "fewshot_rows": SUBMISSION_FEWSHOT_ROWS}
    data, rows = prepared(**real, fewshot_k=8, max_train_rows=0, dev_rows=300)
    text = (Path(ASSETS) / "gsm8k_train.jsonl").read_text(encoding="utf-8")
    train = [json.loads(line) for line in text.split("\n") if line]
    positions = [5238, 912, 204, 6074, 2253, 2006, 1828, 1143]
    assert len(train) == 7473 and rows.pool == rows.fewshot == [train[position] for position in positions]
    assert len(rows.dev) == 300 and len(rows.train) > 7000
    assert not questions(rows.pool) & questions([*rows.dev, *rows.train])
    # Everything else is there to be drawn.
    assert questions([*rows.pool, *rows.dev, *rows.train]) >= questions(train) - questions(data.gsm8k_test)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fewshot_rows": [1, 2, 1]}, "fewshot_rows is [1, 2, 1]: a row is named twice"),
        ({"fewshot_rows": [1, 2]}, "fewshot_rows is [1, 2] but fewshot_k is 3: name as many rows"),
        ({"fewshot_rows": [0, 1, 7473]}, "allowed are the rows 0 to 7472 of GSM8K train"),
        ({"fewshot_rows": [1, 2, 3], "fewshot_file": "mine.jsonl"}, "keep one of them"),
        ({"fewshot_rows": [1, 2, -3]}, "fewshot_rows"),
        ({"fewshot_rows": [1, 2, "3"]}, "fewshot_rows"),
        ({"fewshot_rows": [1, 2, 3.0]}, "fewshot_rows"),
        ({"fewshot_rows": "1, 2, 3"}, "fewshot_rows"),
        ({"fewshot_file": None}, 'write ""'),
        ({"fewshot_k": 9}, "fewshot_k is 9 but the pool holds 8"),
    ],
)
def test_contradictions_are_listed_with_the_preset(changes, words):
    with pytest.raises(ParamsError) as caught:
        load_params(preset_path("simple"), changes)
    assert words in str(caught.value)


def test_a_row_that_the_folder_does_not_have_is_refused():
    with pytest.raises(AssetError, match=r"fewshot_rows names row 64; .*gsm8k_train.jsonl has the rows 0 to 63"):
        prepared(fewshot_rows=[1, 2, 64])


def test_a_named_row_that_cannot_be_shown_is_refused_by_its_number():
    rows = [*numbered(2), numbered(1)[0], {"question": "Three?", "answer": "three"}]
    with pytest.raises(AssetError, match=r"mine, row 0: asks what GSM8K's test split asks") as caught:
        fewshot.named_rows([2, 0, 3], 3, File(rows, "mine"), numbered(1))
    assert "row 0: asks what row 2 asks" in str(caught.value) and "row 3: its answer has no number" in str(caught.value)


def test_presets_written_before_these_keys_still_load(tmp_path):
    values = {key: value for key, value in SANDBOX.items() if key not in ("fewshot_file", "fewshot_rows")}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    loaded = load_params(tmp_path / "mine.yaml")
    assert (loaded.fewshot_file, loaded.fewshot_rows) == ("", [])
    with pytest.raises(ParamsError, match="fewshot_k is 9 but the pool holds 8"):
        load_params(tmp_path / "mine.yaml", {"fewshot_k": 9})


# --- the hand-in ----------------------------------------------------------------------------------------------------


def test_a_hand_in_shows_the_rows_that_the_published_adapters_were_trained_without():
    assert random.Random(42).sample(range(7473), 8) == SUBMISSION_FEWSHOT_ROWS
    plans = make_plans(build_parser().parse_args(["--submission"]))
    assert [plan.params.fewshot_rows for plan in plans] == list(repeat(SUBMISSION_FEWSHOT_ROWS, 3))
    assert plans[0].params.origin["fewshot_rows"] == "--submission"
    (other,) = make_plans(build_parser().parse_args(["--presets", "simple"]))
    assert other.params.fewshot_rows == []


@pytest.mark.parametrize("name", [".bash_profile", "fewshot.json", "examples", "x.jsonl.sh"])
def test_a_preset_makes_no_file_that_something_else_would_run(tmp_path, name):
    for use in (
        lambda: fewshot.check_file(str(tmp_path / name), 1, 8, []),
        lambda: fewshot.load_file(str(tmp_path / name), 1, [], lambda: [{"question": "q", "answer": "#### 1"}]),
    ):
        with pytest.raises(AssetError, match=r"it is made only under a name ending in \.jsonl"):
            use()
    assert not (tmp_path / name).exists()
