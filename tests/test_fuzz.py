"""Malformed files by the hundred, and properties that hold for any text: scoring, verdicts, presets, rows, --verify.

The malformed files are seeded, so a failure comes again. Every one must be refused in words that name the place, never
with a traceback, and leave nothing behind.
"""

import json
import os
import random
import string

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_runs import add_control, add_facts, make_run, set_protocol, write_tables

import run_all
from lib import gsm8k, safety
from lib.compare import comparison, folder_schema
from lib.compare.runs import add_hazards, load_runs
from lib.compare.verify import verify_folder
from lib.params import Params, ParamsError, find_faults, load_params, parse_assignment, preset_path
from lib.prepare import datasets
from lib.record import lookup
from lib.record.files import sha256_json, write_json
from lib.record.paths import ArtifactError, run_paths
from lib.record.protocol import adapter_hashes, in_half_batches
from lib.record.rows import RowLog, read_jsonl, write_jsonl

NUM_FILES = 200
# Few examples by default, so that the file takes seconds; each is as nasty as hypothesis can make it.
QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
QUICK = settings(max_examples=60, suppress_health_check=QUIET)
# One of five in the tests that are run all the time, all of them in the slow ones.
EVERY = pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
PRESET = preset_path("simple").read_text(encoding="utf-8")
VALUES = yaml.safe_load(PRESET)
TEXTS = st.text(st.characters(codec=None), max_size=80)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(TEXTS, inside, max_size=3),
    max_leaves=5,
)


# --- parameter files ------------------------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, after in zip(string.ascii_lowercase[:12], string.ascii_lowercase[1:13], strict=True)
)
HAND_MADE_PRESETS = [
    b"",
    b"\x00",
    b"\xff\xfe\x00",
    b"\xef\xbb\xbf",
    b"just text",
    b"- a list\n",
    b"42\n",
    b"seed: [1, 2\n",
    b"seed: {a: 1\n",
    b"seed: 'open\n",
    b"\tseed: 1\n",
    b"seed: 1\nseed: 2\n",
    b"? [a, b]\n: 1\n",
    b"? {a: b}\n: 1\n",
    b"1: 2\nnull: 3\ntrue: 4\n1.5: 6\n",
    b"seed: !!python/object/apply:os.system ['true']\n",
    b"!!python/object:lib.params.Params {}\n",
    b"seed: !!binary |\n  AAAA\n",
    b"seed: 2020-13-45\n",
    b"seed: 0x\nlora_r: 0b2\n",
    b"seed: !!int abc\n",
    b"seed: !!timestamp abc\n",
    b"seed: !!float abc\n",
    b"seed: !!bool abc\n",
    b"seed: *nowhere\n",
    b"a: &a [*a]\n",
    BOMB.encode() + b"seed: *m\n",
    b"a: &a {b: *a}\n",
    b"<<: 1\n",
    b"<<: [1, 2]\n",
    b"<<: {seed: 1}\nseed: 2\n",
    BOMB.encode(),
    b"[" * 3000,
    b"{a: " * 3000,
    b"a:\n" + b"".join(b" " * depth + b"- a:\n" for depth in range(1, 400, 2)),
    b"description: " + b"x" * 1_000_000,
    b"seed: " + b"9" * 5000 + b"\n",
    b"seed: 1e999999\n",
    b"--- \nseed: 1\n--- \nseed: 2\n",
    b"%YAML 9.9\n---\nseed: 1\n",
    "\u2028seed: 1\n".encode(),
    b"\x1b]0;title\x07: 1\n",
]


def broken_preset(draw: random.Random) -> bytes:
    """simple.yaml with one thing wrong, of the kinds that editors, merges and hands make."""
    lines = PRESET.splitlines(keepends=True)
    keyed = [place for place, line in enumerate(lines) if ": " in line and not line.startswith("#")]
    place = draw.choice(keyed)
    key = lines[place].split(":")[0]
    kinds = {
        "missing": "",
        "twice": lines[place] * 2,
        "misspelt": lines[place].replace(key, key[:-1] + draw.choice("xyz_"), 1),
        "wrong value": f"{key}: {draw.choice(['[]', '{}', '~', '!!set {a}', '.nan', '-.inf', '-1', '0o9', '[[1]]'])}\n",
        "conflict": f"<<<<<<< ours\n{lines[place]}=======\n",
        "unclosed": f"{key}: {draw.choice(['[', '{', chr(34), chr(39), '&', '*', '!', '%', '@', '`'])}\n",
        "tab": f"\t{lines[place]}",
        "control": lines[place].replace(": ", f": {chr(draw.choice([0, 1, 7, 8, 27, 127]))}", 1),
        "indent": "   " + lines[place],
    }
    lines[place] = kinds[draw.choice(sorted(kinds))]
    content = "".join(lines).encode("utf-8")
    if draw.random() < 0.1:
        content = content[: draw.randrange(len(content) // 2)]
    if draw.random() < 0.1:
        at = draw.randrange(len(content) + 1)
        content = content[:at] + bytes([draw.choice([0xFF, 0xFE, 0xC0, 0x80])]) + content[at:]
    return content


def malformed_presets() -> list[bytes]:
    draw = random.Random(6)
    made = (broken_preset(draw) for _ in range(10 * NUM_FILES))
    return [*HAND_MADE_PRESETS, *(content for content in made if not _loads(content))][:NUM_FILES]


def _loads(content: bytes) -> bool:
    # Some of what is done to a file leaves it complete: a value that is allowed, an indented comment.
    try:
        values = yaml.load(content, yaml.CSafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and not find_faults(values)


@EVERY
def test_two_hundred_malformed_presets_are_reported_without_a_traceback_and_leave_nothing(tmp_path, capsys, every):
    contents = malformed_presets()
    assert len(contents) == NUM_FILES
    for number, content in list(enumerate(contents))[::every]:
        (tmp_path / "mine.yaml").write_bytes(content)
        status = run_all.main(
            ["--presets", "mine", "--params-dir", str(tmp_path), "--output-dir", str(tmp_path / "out")]
        )
        printed = capsys.readouterr().err
        assert (status, "mine.yaml" in printed, "Traceback" in printed) == (2, True, False), (
            number,
            content[:200],
            printed,
        )
        assert len(printed) < 20_000 and "\x1b" not in printed
        assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml"]


@QUICK
@given(st.dictionaries(st.sampled_from(sorted(Params.model_fields)) | TEXTS, JSON_VALUES, max_size=4))
def test_any_values_are_loaded_or_reported_with_their_keys(tmp_path, changes):
    faults = find_faults({**VALUES, **changes})
    for key in changes.keys() - Params.model_fields.keys():
        assert any(key in fault for fault in faults)
    if not faults:
        assert Params(**{**VALUES, **changes}).seed >= 0


@QUICK
@given(TEXTS)
def test_any_assignment_is_read_or_refused(text):
    for assignment in (text, f"seed={text}", f"base_model={text}"):
        try:
            key, _ = parse_assignment(assignment)
        except ParamsError as error:
            assert "--set" in str(error)
        else:
            assert key in Params.model_fields


@QUICK
@given(st.fixed_dictionaries({"seed": st.integers(0, 2**32 - 1), "description": st.text("ab é:#'\"", min_size=1)}))
def test_a_preset_comes_back_as_it_was_written(tmp_path, changes):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**VALUES, **changes}, allow_unicode=True), encoding="utf-8")
    assert load_params(path).model_dump() == {**VALUES, **changes}


# --- data files -----------------------------------------------------------------------------------------------------

HAND_MADE_ROWS = [
    b"",
    b"\n\n",
    b"\x00",
    b"null\n",
    b"[]\n",
    b'"text"\n',
    b"{}\n",
    b'{"question": 1, "answer": "a"}\n',
    b'{"question": "q", "answer": null}\n',
    b'{"question": "q", "answer": "  "}\n',
    b'{"question": ["q"], "answer": {"a": 1}}\n',
    b'{"question": "q"}\n',
    b'{"Question": "q", "Answer": "a"}\n',
    b"<!doctype html><html><script>alert(1)</script></html>",
    b"  <html>\n",
    b"<?xml version='1.0'?><Error>AccessDenied</Error>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    b"PK\x03\x04\x14\x00",
    b"\x1f\x8b\x08\x00",
    b"[" * 100_000 + b"\n",
    b'{"question": ' * 50_000 + b"\n",
    b'{"question": "' + b"x" * 1_000_000 + b"\n",
    b'{"question": "q", "answer": "a"}{"question": "q", "answer": "a"}\n',
    b'{"question": "q", "answer": "a",}\n',
    b"{'question': 'q', 'answer': 'a'}\n",
    '{"question": "q", "answer": "a"}\n'.encode("utf-16"),
    b'{"question": "q", "answer": NaN}\n',
    b'{"question": "\\ud800", "answer": "#### 1"}\n',
    b'{"question": "\x1b]0;title\x07", "answer": 5}\n',
]
HAND_MADE_PROMPTS = [
    b"",
    b"\n",
    b"prompt\n",
    b"id,question\n1,x\n",
    b"\x00,prompt\n",
    b"prompt,hazard\n,prv\n",
    b"prompt,prompt\nx,y\n",
    b'prompt\n"open\n',
    b'prompt\n"' + b"x" * 200_000 + b'"\n',
    b"prompt\nx,y,z\n",
    b"<html><body>log in</body></html>",
    b"prompt\n\xff\xfe\n",
    "prompt\nx\n".encode("utf-16"),
]
GOOD_ROW = {"question": "How many?", "answer": "All.\n#### 7"}


def broken_rows(draw: random.Random) -> bytes:
    """Three rows, one of them damaged."""
    lines = [json.dumps(GOOD_ROW) for _ in range(3)]
    place, line = draw.randrange(3), lines[0]
    kinds = {
        "cut": line[: draw.randrange(1, len(line))],
        "no column": json.dumps({draw.choice(["q", "input", "Question"]): "x", "answer": "#### 1"}),
        "wrong type": json.dumps({**GOOD_ROW, draw.choice(list(GOOD_ROW)): draw.choice([1, None, [], {}, True, 1.5])}),
        "empty": json.dumps({**GOOD_ROW, draw.choice(list(GOOD_ROW)): draw.choice(["", " ", "\n\t"])}),
        "no object": json.dumps(draw.choice([[], 1, None, "x", [GOOD_ROW]])),
        "doubled": line + line,
        "raw": line.replace("?", chr(draw.choice([0, 1, 8, 11, 31]))),
        "quote": line.replace('"', draw.choice(["'", "“", ""]), 1),
    }
    lines[place] = kinds[draw.choice(sorted(kinds))]
    return ("\n".join(lines) + "\n").encode()


def malformed_data() -> list[tuple[str, bytes]]:
    """(kind of file, content)."""
    draw = random.Random(6)
    files = [("rows", content) for content in HAND_MADE_ROWS] + [("prompts", content) for content in HAND_MADE_PROMPTS]
    return files + [("rows", broken_rows(draw)) for _ in range(NUM_FILES - len(files))]


def test_two_hundred_malformed_data_files_are_refused_with_their_place(tmp_path):
    files = malformed_data()
    assert len(files) == NUM_FILES
    for number, (kind, content) in enumerate(files):
        name = "gsm8k_train.jsonl" if kind == "rows" else "ailuminate.csv"
        (tmp_path / name).write_bytes(content)
        with pytest.raises(lookup.AssetError) as caught:
            if kind == "rows":
                datasets.load_gsm8k("train", str(tmp_path))
            else:
                datasets.load_ailuminate(str(tmp_path), "all")
        printed = str(caught.value)
        assert name in printed and len(printed) < 2000, (number, content[:100], printed[:500])
        (tmp_path / name).unlink()
        assert list(tmp_path.iterdir()) == []


@QUICK
@given(st.binary(max_size=200))
def test_any_bytes_are_rows_or_refused_with_the_file_named(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    try:
        rows = read_jsonl(path)
    except ArtifactError as error:
        assert "rows.jsonl" in str(error)
    else:
        assert rows and all(isinstance(row, dict) for row in rows)


# --- rows -----------------------------------------------------------------------------------------------------------


@QUICK
@given(st.lists(st.dictionaries(TEXTS, JSON_VALUES, max_size=3), min_size=1, max_size=5), st.integers(0, 400))
def test_rows_of_any_text_come_back_and_a_torn_end_costs_one_row_at_most(tmp_path, rows, cut):
    path = tmp_path / "rows.jsonl"
    path.unlink(missing_ok=True)
    log = RowLog(path, "p")
    for number, row in enumerate(rows):
        log.append({**row, "id": number})
    stamped = [{**row, "id": number, "protocol_hash": "p"} for number, row in enumerate(rows)]
    assert read_jsonl(path) == stamped
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - min(cut, len(content))])
    kept = list(RowLog(path, "p").rows.values())
    assert kept == stamped[: len(kept)]
    assert len(kept) == content[: len(content) - min(cut, len(content))].count(b"\n")


# --- scoring --------------------------------------------------------------------------------------------------------

NUMBERS = st.integers(-(10**9), 10**9) | st.decimals(-(10**6), 10**6, places=2, allow_nan=False)


@QUICK
@given(TEXTS)
def test_any_text_has_an_answer_or_none(text):
    for extract in (gsm8k.extract_answer, gsm8k.extract_answer_flexible):
        found = extract(text)
        assert found is None or (any(char.isdigit() for char in found) and gsm8k.is_correct(found, found))


@QUICK
@given(NUMBERS, TEXTS.filter(lambda text: "####" not in text))
def test_the_number_after_the_last_marks_is_read_whatever_stands_before(number, before):
    for shown in (f"{number}", f"{number:,}", f"${number}", f"{number}."):
        text = f"{before}\n#### 5\nno:\n#### {shown}"
        assert gsm8k.is_correct(gsm8k.extract_answer(text), str(number)), shown
        assert gsm8k.is_correct(gsm8k.extract_answer_flexible(text), str(number)), shown


@QUICK
@given(NUMBERS, NUMBERS)
def test_equal_numbers_and_no_others_are_correct(one, other):
    assert gsm8k.is_correct(str(one), str(other)) == gsm8k.is_correct(str(other), str(one)) == (one == other)
    assert not gsm8k.is_correct(None, str(one)) and not gsm8k.is_correct(str(one), None)


@QUICK
@given(TEXTS)
def test_any_verdict_is_one_of_three_and_a_thought_does_not_change_it(text):
    verdict = safety.parse_verdict(text)
    assert verdict in ("safe", "unsafe", "unparsed")
    thought = text.replace("<", "").replace(">", "")
    assert safety.parse_verdict(f"<think>{thought}</think>\n\nUNSAFE") == "unsafe"
    assert safety.parse_verdict(f"<think>{thought}</think>\n\nSAFE") == "safe"


@QUICK
@given(st.sampled_from(["safe", "unsafe"]), st.text(string.ascii_letters + " ,", max_size=30))
def test_a_label_inside_a_sentence_that_denies_it_is_no_verdict(label, more):
    assert safety.parse_verdict(f"this is not {label}") == "unparsed"
    assert safety.parse_verdict(f"{more} neither safe nor unsafe") in ("unparsed",)


# --- verify ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A results folder of one run with its manifest, and a function that replaces its rows."""
    from lib.record.manifest import start_stage

    root = tmp_path_factory.mktemp("results")
    paths = run_paths(str(root), "x")
    texts = ["#### 7", "I say 8", "#### 9, no: #### 7", "7"]
    answers = [
        {"id": place, "question": "?", "gold_answer": "#### 7", "model_output": text, "finish_reason": "stop"}
        for place, text in enumerate(texts)
    ]
    rows = [{**row, **gsm8k.score_row(row), "num_output_tokens": 3, "test_index": row["id"]} for row in answers]
    record = start_stage(paths.manifest("03_eval_gsm8k"), "03_eval_gsm8k", "x", {})
    write_jsonl(paths.gsm8k_preds, rows)
    record.finish(inputs=[], outputs=[paths.gsm8k_preds], facts={}, metrics=gsm8k.summarize(rows))
    assert verify_folder(root).mismatches == []
    return root, paths, rows


@QUICK
@given(st.data())
def test_any_change_of_a_rows_text_or_label_is_found(finished, data):
    root, paths, rows = finished
    place = data.draw(st.integers(0, len(rows) - 1))
    column = data.draw(st.sampled_from(sorted(rows[place])))
    value = data.draw(JSON_VALUES.filter(lambda value: json.dumps(value) != json.dumps(rows[place][column])))
    changed = [{**row, column: value} if number == place else row for number, row in enumerate(rows)]
    write_jsonl(paths.gsm8k_preds, changed)
    try:
        folder_schema.check_folder(root)
        assert verify_folder(root).mismatches, f"{column} = {value!r} was not noticed"
    except ArtifactError as error:
        assert "gsm8k_preds_x.jsonl" in str(error)
    finally:
        write_jsonl(paths.gsm8k_preds, rows)


@QUICK
@given(st.data())
def test_without_a_manifest_a_label_that_its_text_does_not_give_is_still_found(tmp_path, finished, data):
    rows = finished[2]
    (tmp_path / "run_x").mkdir(exist_ok=True)
    place = data.draw(st.integers(0, len(rows) - 1))
    text = data.draw(TEXTS)
    changed = {**rows[place], "model_output": text}
    write_jsonl(tmp_path / "run_x" / "gsm8k_preds_x.jsonl", [changed])
    truth = gsm8k.score_row(changed)
    same = all(changed[column] == value for column, value in truth.items())
    assert (verify_folder(tmp_path).mismatches == []) == same


HAND_MADE_RUNS = [
    {"gsm8k_preds_x.jsonl": '{"id": 0}\n'},
    {"gsm8k_preds_x.jsonl": '{"id": 0, "model_output": 5, "gold_answer": "#### 1", "finish_reason": "stop"}\n'},
    {"gsm8k_preds_x.jsonl": '{"id": 0, "model_output": "x", "gold_answer": null, "finish_reason": []}\n'},
    {"gsm8k_preds_x.jsonl": '{"id": [], "model_output": "x", "gold_answer": "#### 1", "finish_reason": "stop"}\n'},
    {"gsm8k_preds_x.jsonl": "[1]\n"},
    {"ailuminate_safety_x.jsonl": '{"id": 0, "safety_score": "high", "safety_judge_text": "SAFE"}\n'},
    {"ailuminate_safety_x.jsonl": '{"id": 0, "safety_score": null, "safety_judge_text": 7}\n'},
    {"gsm8k_preds_x.jsonl": "good", "03_eval_gsm8k/manifest.json": "[]"},
    {"gsm8k_preds_x.jsonl": "good", "03_eval_gsm8k/manifest.json": "{}"},
    {"gsm8k_preds_x.jsonl": "good", "03_eval_gsm8k/manifest.json": '{"outputs": 1, "metrics": []}'},
    {"gsm8k_preds_x.jsonl": "good", "config_resolved.json": "[]"},
    {"gsm8k_preds_x.jsonl": "good", "config_resolved.json": '{"parameters": 1, "settings": 2}'},
    {"gsm8k_preds_x.jsonl": "good", "../final_metrics.json": "[1]"},
    {"gsm8k_preds_x.jsonl": "good", "../final_metrics.json": '{"run_name": "x"}'},
    {"gsm8k_preds_x.jsonl": "good", "../summary.csv": "a,b\n1,2\n"},
    {"gsm8k_preds_x.jsonl": "good", "03_eval_gsm8k/manifest.json": '{"outputs": {"a": 1}}'},
    {"gsm8k_preds_x.jsonl": "good", "../05_compare/comparison.json": "[]"},
    {"gsm8k_preds_x.jsonl": "good", "../05_compare/comparison.json": '{"runs": [1], "hazards_added": 5}'},
]


@pytest.mark.parametrize("files", HAND_MADE_RUNS)
def test_a_tampered_results_folder_is_reported_without_a_traceback(tmp_path, finished, capsys, files):
    for name, content in files.items():
        path = tmp_path / "run_x" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in finished[2]) if content == "good" else content)
    assert run_all.main(["--verify", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert "_x.jsonl" in printed.err or ".json" in printed.err or "summary.csv" in printed.err


# --- every file of a results folder ---------------------------------------------------------------------------------

COMMANDS = {
    "verify": lambda folder: ["--verify", str(folder)],
    "report": lambda folder: ["--report-only", "--redact", "--output-dir", str(folder)],
    "export": lambda folder: ["--export", "lm-eval", "--output-dir", str(folder)],
}
# Of every command: a verification takes up to a second on a busy machine.
NUM_CHANGES = 20
NASTY_VALUES = [
    None,
    True,
    1,
    -1,
    2.5,
    1e308,
    float("nan"),
    float("inf"),
    10**400,
    "",
    "x",
    "\ud800",
    "\x00",
    "9" * 5000,
]
NASTY_VALUES += ["/dev/zero", "../" * 9 + "etc/hosts", [], {}, [1], {"a": 1}, [[]], ["x", "x"]]


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """Runs with everything that a score is made of: untuned rows, rows between, overlaps, tables, a comparison.

    The third is of an earlier pipeline: rows alone, which do not name their hazards.
    """
    folder = tmp_path_factory.mktemp("complete")
    for name in ("one", "two"):
        paths = make_run(folder, name)
        add_control(folder, name, ["#### 4", "#### 0", "#### 0"])
        untuned = paths.untuned_rows("ailuminate_safety", "abc")
        for stage, rows, control in (
            ("03_eval_gsm8k", paths.gsm8k_preds, paths.untuned_rows("gsm8k_preds", "abc")),
            ("04_eval_safety", paths.ailuminate_safety, untuned),
        ):
            if stage == "04_eval_safety":
                write_jsonl(untuned, read_jsonl(paths.ailuminate_safety))
            write_jsonl(paths.stage_dir(stage) / "scale_0.5.jsonl", read_jsonl(rows))
            facts = {"untuned_rows": f"../../untuned/{control.name}", "scale_rows": {"0.5": "scale_0.5.jsonl"}}
            add_facts(paths, stage, **facts, runtime="cpu")
            hashes = adapter_hashes(paths.adapter_dir)
            made_by = {"adapter": sha256_json(hashes) if "gsm8k" in stage else hashes, "quantization": "nf4"}
            made_by |= {"decoding": {"greedy": True}}
            made_by |= {"questions": sha256_json(read_jsonl(paths.gsm8k_eval_rows))} if "gsm8k" in stage else {}
            made_by |= {"prompts": sha256_json(read_jsonl(paths.ailuminate_rows))} if "safety" in stage else {}
            set_protocol(paths, stage, made_by, control, paths.stage_dir(stage) / "scale_0.5.jsonl")
            again = paths.untuned_rows(f"{control.name.partition('_untuned')[0]}_control", "abc")
            half = {"protocol_hash": sha256_json(in_half_batches(made_by))}
            write_jsonl(again, [row | half for row in read_jsonl(control)])
            add_facts(paths, stage, control_rows=f"../../untuned/{again.name}")
        ways = {"tuned": "judge_card/brief.jsonl", "untuned": "judge_card/untuned/brief.jsonl"}
        for side, rows in (("tuned", paths.ailuminate_safety), ("untuned", untuned)):
            write_jsonl(paths.stage_dir("04_eval_safety") / ways[side], read_jsonl(rows)[:2])
        add_facts(paths, "04_eval_safety", other_judgements={"brief": ways})
        overlaps = [{"row": 1, "size": 8, "source": "train", "source_rows": [0, 3]}]
        write_json(paths.overlap, overlaps)
    old = run_paths(str(folder), "old")
    rows = [{**row, "hazard": "", "persona": ""} for row in read_jsonl(paths.ailuminate_safety)]
    write_jsonl(old.ailuminate_safety, rows)
    write_tables(folder)
    prompts = [{"prompt": row["prompt"], "hazard": "hte", "persona": "normal"} for row in rows]
    runs = add_hazards(load_runs(str(folder)), prompts)
    comparison.write_comparison(str(folder), comparison.comparison(runs))
    assert [run_all.main(argv(folder)) for argv in COMMANDS.values()] == [0, 0, 0]
    return folder


def mutated(value, draw):
    """A JSON value with something in it lost or replaced."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(list(value))
        if draw.random() < 0.25:
            return {name: item for name, item in value.items() if name != key}
        return {**value, key: mutated(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        place = draw.randrange(len(value))
        return [*value[:place], mutated(value[place], draw), *value[place + 1 :]]
    return draw.choice(NASTY_VALUES)


def mutated_file(path, content, draw):
    if draw.random() < 0.1:
        return content[: draw.randrange(len(content))] + bytes([draw.choice([0, 0xFF, 0x22, 0x0A, 0x0D])])
    if path.suffix == ".json":
        return json.dumps(mutated(json.loads(content), draw)).encode()
    if path.suffix == ".jsonl":
        lines = content.decode().splitlines()
        place = draw.randrange(len(lines))
        lines[place] = json.dumps(mutated(json.loads(lines[place]), draw))
        return "\n".join([*lines, ""]).encode()
    places = {draw.randrange(len(content)) for _ in range(3)}
    return bytes(draw.choice(b'\x00",\n\r\xff9e-') if at in places else byte for at, byte in enumerate(content))


@EVERY
@pytest.mark.parametrize("command", COMMANDS)
def test_any_file_of_a_results_folder_changed_is_reported_or_harmless(complete, capsys, command, every):
    draw = random.Random(command)
    made = ("lm_eval", "reports")
    files = [path for path in sorted(complete.rglob("*.*")) if path.suffix in (".json", ".jsonl", ".csv")]
    files = [path for path in files if path.relative_to(complete).parts[0] not in made]
    assert len(files) == 2 * 14 + 1 + 4 + 4
    told_of = 0
    for _ in range(NUM_CHANGES // every):
        path = draw.choice(files)
        content = path.read_bytes()
        try:
            path.write_bytes(mutated_file(path, content, draw))
            # An exception that no message was made of would end the test here, as it would end the program.
            status = run_all.main(COMMANDS[command](complete))
            printed = capsys.readouterr().err
            named = any(word in printed for word in (*(file.name for file in files), "run_", "test_index"))
            assert status in (0, 1) and (status == 0 or named), (path.name, path.read_bytes()[:300], printed[:500])
            told_of += status
        finally:
            path.write_bytes(content)
    assert told_of > NUM_CHANGES // every // 10


PLACES = {
    "a table that is not UTF-8": ("final_metrics.csv", lambda content: content + b"\xff", ["verify"]),
    "no versions": ("run_one/03_eval_gsm8k/manifest.json", lambda content: without(content, "versions"), COMMANDS),
    "no reason": ("run_one/03_eval_gsm8k/manifest.json", lambda content: without(content, "skipped_because"), COMMANDS),
    "an overlap": ("run_one/01_prepare/overlap.json", lambda _: b"[1]", COMMANDS),
    "no settings": ("run_one/config_resolved.json", lambda content: without(content, "settings"), COMMANDS),
    "an untuned row": ("untuned/gsm8k_preds_untuned_abc.jsonl", lambda _: b'{"id": 0}\n', COMMANDS),
    "an untuned label": ("untuned/ailuminate_safety_untuned_abc.jsonl", lambda _: b'{"id": 0}\n', COMMANDS),
    "a row of the control": (
        "untuned/gsm8k_preds_control_untuned_abc.jsonl",
        lambda content: content.replace(b"#### 5", b"five"),
        COMMANDS,
    ),
    "another judgement": ("run_one/04_eval_safety/judge_card/untuned/brief.jsonl", lambda _: b'{"id": 0}\n', COMMANDS),
    "rows between": ("run_two/04_eval_safety/scale_0.5.jsonl", lambda _: b"[]\n", COMMANDS),
    "a question": ("run_one/gsm8k_preds_one.jsonl", lambda content: content.replace(b'"question"', b'"q"'), COMMANDS),
    "a probability": ("run_one/ailuminate_safety_one.jsonl", lambda content: content.replace(b"0.9", b"NaN"), COMMANDS),
    "a gold answer": ("untuned/gsm8k_preds_untuned_abc.jsonl", lambda c: c.replace(b"#### 5", b"five"), COMMANDS),
    "an id": ("run_one/gsm8k_preds_one.jsonl", lambda c: c.replace(b'"test_index": 1', b'"test_index": []'), COMMANDS),
    "a baseline": ("run_two/config_resolved.json", lambda content: content.replace(b"0.5", b"7.5"), COMMANDS),
    "rows elsewhere": (
        "run_one/03_eval_gsm8k/manifest.json",
        lambda content: content.replace(b"../../untuned/gsm8k_preds_untuned_abc.jsonl", b"../../../rows.jsonl"),
        COMMANDS,
    ),
}


def without(content, key):
    return json.dumps({name: value for name, value in json.loads(content).items() if name != key}).encode()


@pytest.mark.parametrize(("name", "change", "commands"), PLACES.values(), ids=PLACES)
def test_a_file_of_another_form_is_named_by_every_command_that_reads_it(complete, capsys, name, change, commands):
    path = complete / name
    content = path.read_bytes()
    try:
        path.write_bytes(change(content))
        assert path.read_bytes() != content
        for command in COMMANDS:
            status = run_all.main(COMMANDS[command](complete))
            printed = capsys.readouterr().err
            assert (status, path.name in printed) == ((1, True) if command in commands else (0, False)), (
                command,
                printed,
            )
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_is_none_is_named_and_not_read_for_ever(tmp_path, capsys, command):
    paths = make_run(tmp_path)
    paths.gsm8k_preds.unlink()
    os.mkfifo(paths.gsm8k_preds)
    assert run_all.main(COMMANDS[command](tmp_path)) == 1
    assert "gsm8k_preds_one.jsonl is not a plain file" in capsys.readouterr().err


def test_a_report_is_made_while_a_stage_is_at_work_and_when_a_table_was_spoiled(tmp_path):
    make_run(tmp_path, "done")
    paths = make_run(tmp_path, "working")
    paths.manifest("03_eval_gsm8k").unlink()
    paths.gsm8k_preds.write_bytes(paths.gsm8k_preds.read_bytes()[:-9])
    (tmp_path / "summary.csv").write_bytes(b"\xff")
    for command in ("report", "export"):
        assert run_all.main(COMMANDS[command](tmp_path)) == 0
    assert run_all.main(COMMANDS["verify"](tmp_path)) == 1


def test_a_foreign_manifest_makes_its_stage_run_again(tmp_path):
    from lib.record.manifest import stale_reason

    for content in ([], {}, {"status": "complete"}, {"status": "complete", "parameters": 1, "inputs": []}, "x", None):
        write_json(tmp_path / "manifest.json", content)
        assert stale_reason(tmp_path / "manifest.json", "01_prepare", {}) == "its manifest cannot be read"
