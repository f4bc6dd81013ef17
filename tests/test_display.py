"""Progress on the terminal: what is counted from growing row files, and how it fits a line."""

import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console
from small_notebooks import wait_for

from lib.driver.display import Display, Look, Pace, RowFile, StageWatch, _live_line, duration, memory_words
from lib.record.paths import PROJECT_ROOT, run_paths
from lib.record.rows import RowLog, write_jsonl

FULL = Look(
    label="sandbox_one 03",
    kind="untuned answers",
    done=120,
    total=263,
    speed="1.92 rows/s",
    left="74 s left",
    score="52.3 % right (43.1 to 61.4)",
    tokens="850 tokens/s",
    memory="3.1 GiB",
)


def answer(number, correct=True):
    return {"id": number, "question": f"q{number}", "correct": correct, "num_output_tokens": 10}


@pytest.fixture
def paths(tmp_path):
    paths = run_paths(str(tmp_path), "one")
    write_jsonl(paths.gsm8k_eval_rows, [{"question": f"q{number}"} for number in range(8)])
    write_jsonl(paths.dev_rows, [{"question": f"d{number}"} for number in range(4)])
    return paths


def watch(paths, stage="03_eval_gsm8k", **parameters):
    return StageWatch("one 03", paths, stage, parameters)


# --- row files ----------------------------------------------------------------------------------------------------


def test_a_growing_file_is_read_on_and_a_torn_row_waits(tmp_path):
    path = tmp_path / "rows.jsonl"
    log = RowLog(path, "hash")
    log.append(answer(0))
    file = RowFile(path)
    file.read_on()
    assert (file.num_rows, file.num_good, file.num_tokens) == (1, 1, 10)
    whole = json.dumps(answer(1, correct=False)) + "\n"
    with path.open("a") as stream:
        stream.write(whole[:20])
    file.read_on()
    assert file.num_rows == 1
    with path.open("a") as stream:
        stream.write(whole[20:])
    file.read_on()
    assert (file.num_rows, file.num_scored, file.num_good, file.num_tokens) == (2, 2, 1, 20)


def test_a_file_that_is_written_anew_is_counted_anew(tmp_path):
    log = RowLog(tmp_path / "rows.jsonl", "hash")
    for number in range(3):
        log.append(answer(number))
    file = RowFile(log.path)
    file.read_on()
    log.finish([0, 1])
    file.read_on()
    assert file.num_rows == 2


def test_scores_are_shares_with_their_interval_and_unparsed_is_not_safe(tmp_path):
    path = tmp_path / "rows.jsonl"
    labels = ["safe", "unsafe", "unparsed", "safe"]
    write_jsonl(path, [{"id": number, "safety_label": label} for number, label in enumerate(labels)])
    file = RowFile(path)
    file.read_on()
    assert file.score == "50.0 % safe (15.0 to 85.0)"


def test_pace_is_of_the_last_minute_and_begins_anew_with_a_lower_count():
    pace = Pace()
    assert pace.per_s == 0.0
    for second in range(0, 200, 10):
        pace.note(second, 0.0 if second < 100 else (second - 100) * 2.0)
    assert pace.per_s == pytest.approx(2.0)
    pace.note(200, 1.0)
    assert pace.per_s == 0.0


# --- a stage ------------------------------------------------------------------------------------------------------


def test_a_stage_is_followed_from_tuned_to_untuned_answers(paths):
    looked = watch(paths)
    assert looked.look(-2.0).line(80).startswith("one 03  working  0 s in")
    log = RowLog(paths.gsm8k_preds, "hash")
    log.append(answer(0))
    assert looked.look(1.0).kind == "answers"
    for number in range(1, 5):
        log.append(answer(number, correct=number % 2 == 0))
    look = looked.look(3.0)
    assert (look.done, look.total, look.speed, look.left) == (5, 8, "2.00 rows/s", "2 s left")
    assert look.score.startswith("60.0 % right (") and look.tokens == "20 tokens/s"
    for number in range(5, 8):
        log.append(answer(number, correct=False))
    look = looked.look(3.5)
    assert (look.done, look.speed, look.left, look.tokens) == (8, "", "", "")
    untuned = RowLog(paths.untuned_rows("gsm8k_preds", "0123456789abcdef"), "hash")
    untuned.append(answer(0))
    look = looked.look(4.0)
    assert (look.kind, look.done, look.total, look.speed) == ("untuned answers", 1, 8, "")
    answers, untuned_answers = looked.final_lines()
    assert answers.startswith("8 answers, 37.5 % right (")
    assert untuned_answers.startswith("1 untuned answers, 100.0 % right (")


def test_rows_of_an_earlier_run_are_not_this_stages_until_it_adds_to_them(paths):
    log = RowLog(paths.gsm8k_preds, "hash")
    log.append(answer(0))
    looked = watch(paths)
    assert looked.look(0.0).kind == "" and looked.final_lines() == []
    RowLog(paths.gsm8k_preds, "hash").append(answer(1))
    assert looked.look(1.0).done == 2


def test_a_clock_that_jumps_does_not_change_what_is_followed(paths):
    looked = watch(paths)
    log = RowLog(paths.gsm8k_preds, "hash")
    for number in range(8):
        log.append(answer(number))
    os.utime(paths.gsm8k_preds, (4e9, 4e9))
    assert looked.look(0.0).kind == "answers"
    untuned = paths.untuned_rows("gsm8k_preds", "0123456789abcdef")
    for number, at in enumerate((1e9, 3e9, 2e9)):
        RowLog(untuned, "hash").append(answer(number))
        os.utime(untuned, (at, at))
        look = looked.look(float(number))
        assert (look.kind, look.done) == ("untuned answers", number + 1)


def test_rows_that_another_run_fills_are_not_taken_for_this_ones_work(paths):
    looked = watch(paths)
    untuned = RowLog(paths.untuned_rows("gsm8k_preds", "0123456789abcdef"), "hash")
    RowLog(paths.gsm8k_preds, "hash").append(answer(0))
    untuned.append(answer(0))
    assert looked.look(0.0).kind == "answers"
    training = watch(paths, "02_train")
    untuned.append(answer(1))
    assert training.look(1.0).kind == ""


def test_training_tells_steps_loss_and_time_left(paths):
    looked = watch(paths, "02_train", num_epochs=2)
    paths.training_log.parent.mkdir(parents=True)
    with paths.training_log.open("a") as stream:
        for step in range(1, 5):
            row = {"step": step, "epoch": step / 10, "loss": 1.5 / step, "num_tokens": 500}
            stream.write(json.dumps(row | ({"dev_loss": 0.9} if step == 1 else {})) + "\n")
            stream.flush()
            look = looked.look(float(step))
    assert (look.kind, look.done, look.total) == ("steps", 4, 20)
    assert (look.score, look.left, look.speed) == ("loss 0.3750, dev 0.9000", "16 s left", "1.00 steps/s")
    assert look.tokens == "500 tokens/s"


def test_development_answers_and_unknown_row_files_are_followed_too(paths):
    looked = watch(paths, "02_train")
    RowLog(paths.stage_dir("02_train") / "sweep" / "answers_checkpoint-4.jsonl", "hash").append(answer(0))
    look = looked.look(0.0)
    assert (look.kind, look.done, look.total) == ("answers checkpoint-4", 1, 4)
    RowLog(paths.stage_dir("02_train") / "new_kind.jsonl", "hash").append({"id": 0, "anything": 1})
    look = looked.look(1.0)
    assert (look.kind, look.total, look.score) == ("new kind", 0, "")


@pytest.mark.parametrize(
    ("name", "parameters", "total"),
    [
        ("answers", {"sweep_on_test": False, "dev_safety_rows": 3}, 4),
        ("verdicts", {"sweep_on_test": False, "dev_safety_rows": 3}, 3),
        ("answers", {"sweep_on_test": True, "dev_safety_rows": 3}, 8),
        ("responses", {"sweep_on_test": True, "dev_safety_rows": 3}, 5),
    ],
)
def test_a_sweep_counts_against_the_rows_that_it_asks(paths, name, parameters, total):
    write_jsonl(paths.ailuminate_rows, [{"prompt": f"p{number}"} for number in range(5)])
    looked = watch(paths, "02_train", **parameters)
    RowLog(paths.stage_dir("02_train") / "sweep" / f"{name}_checkpoint-4.jsonl", "hash").append({"id": 0})
    assert looked.look(0.0).total == total


def test_the_models_own_answers_are_followed_without_a_number_that_nothing_says(paths):
    looked = watch(paths, "01_prepare")
    log = RowLog(paths.untuned_rows("distil_samples", "0123456789abcdef"), "hash")
    for number in range(9):
        log.append({**answer(number, correct=number < 3), "sample": 0})
    look = looked.look(0.0)
    assert (look.kind, look.done, look.total) == ("own answers", 9, 0) and look.score.startswith("33.3 % right (")
    (line,) = looked.final_lines()
    assert line.startswith("9 own answers, 33.3 % right (")


def test_prepared_rows_are_no_progress(paths):
    looked = watch(paths, "01_prepare")
    write_jsonl(paths.train_rows, [{"question": "q", "answer": "a"}] * 5)
    assert looked.look(0.0).kind == ""


# --- a line -------------------------------------------------------------------------------------------------------


def test_a_wide_line_says_everything_and_80_columns_keep_what_matters():
    begin, score = "sandbox_one 03  120/263 untuned answers", "74 s left  52.3 % right (43.1 to 61.4)"
    assert FULL.line(119) == f"{begin}  1.92 rows/s  {score}  850 tokens/s  3.1 GiB"
    assert FULL.line(79) == f"{begin}  {score}"


@pytest.mark.parametrize("width", [1, 10, 30, 45, 60, 79, 100, 119, 200])
def test_no_line_is_wider_than_its_room_and_no_part_is_cut(width):
    line = FULL.line(width)
    assert len(line) <= width
    parts = {FULL.speed, FULL.left, FULL.score, FULL.tokens, FULL.memory}
    assert width < 45 or set(line.split("  ")[2:]) <= parts


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (74, "74 s"), (119.4, "119 s"), (185, "3 min"), (7140, "119 min"), (7620, "2 h 07 min")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


# --- telling ------------------------------------------------------------------------------------------------------


def console(width=80, terminal=True):
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, legacy_windows=False)


def show(paths, screen):
    """What is told while four rows are written, each as soon as the one before it was told."""
    with Display(watch(paths), console=screen, every_s=0.05):
        log = RowLog(paths.gsm8k_preds, "hash")
        for number in range(4):
            log.append(answer(number))
            wait_for_words(screen, f"{number + 1}/8 answers")
    return screen.file.getvalue()


def wait_for_words(screen, words):
    wait_for(lambda: words in screen.file.getvalue())


def test_without_a_terminal_there_are_plain_lines(paths, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    told = show(paths, console(terminal=False))
    lines = told.splitlines()
    assert "\x1b" not in told and lines[-1].startswith("  one 03  4/8 answers")
    assert len(lines) == len(set(line.split("/")[0] for line in lines))


def test_in_ci_a_terminal_gets_plain_lines_too(paths, monkeypatch):
    monkeypatch.setenv("CI", "true")
    assert "\x1b" not in show(paths, console())


def test_on_a_terminal_one_line_is_rewritten_and_gone_at_the_end(paths, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    told = show(paths, console())
    assert "4/8 answers" in told and "\x1b[2K" in told
    assert told.count("\n") <= 1


def test_quiet_says_nothing(paths):
    screen = console(terminal=False)
    with Display(watch(paths), console=screen, every_s=0.01, quiet=True) as display:
        RowLog(paths.gsm8k_preds, "hash").append(answer(0))
        assert not display.is_alive(), "nothing is there that could look"
    assert screen.file.getvalue() == ""


@pytest.mark.parametrize(("width", "bar"), [(80, False), (120, False), (140, True)])
def test_a_live_line_never_wraps(width, bar):
    screen = console(width)
    screen.print(_live_line(FULL, width))
    (line,) = screen.file.getvalue().splitlines()
    assert len(line.rstrip()) < width and ("━" in line) is bar


def test_no_character_of_a_row_reaches_the_terminal(paths, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    screen = console(terminal=False)
    with Display(watch(paths), console=screen, every_s=0.05):
        RowLog(paths.gsm8k_preds, "hash").append(answer(0) | {"model_output": "\x1b[31mred [bold]"})
        wait_for_words(screen, "1/8 answers")
    assert "1/8 answers" in screen.file.getvalue() and "red" not in screen.file.getvalue()


def test_memory_is_that_of_the_programs_that_were_started():
    code = "data = bytearray(b'x') * 2**28; print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        words = memory_words()
        child.communicate(b"\n")
    assert float(words.split()[0]) >= 0.2 and words.split()[1] == "GiB"


@pytest.mark.parametrize(
    ("script", "gib"),
    [("echo 1024; echo 2048", 3.0), ("echo '[N/A]'", 0.0), ("echo broken >&2; exit 9", 0.0)],
)
def test_memory_of_gpus_is_what_their_driver_says(tmp_path, monkeypatch, script, gib):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert memory_words().endswith(f"GPU {gib} GiB" if gib else "")
    assert ("GPU" in memory_words()) is bool(gib)


def test_progress_needs_no_torch():
    code = "import sys, lib.driver.display; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT).returncode == 0
