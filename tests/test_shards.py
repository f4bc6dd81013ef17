"""Rows in shares: whole or named, joined in order, and refused where anything is amiss."""

import json
import shutil

import pytest

from lib.driver.plan import Plan
from lib.driver.tasks import Task
from lib.driver.worker import check_gpus
from lib.evaluate.sides import TUNED, UNTUNED, Sides
from lib.record import shards
from lib.record.paths import ArtifactError, run_paths
from lib.record.rows import RowLog, fill_rows, write_jsonl

PROTOCOL = {"adapter": ["a"], "model": "m"}
ROWS = [{"prompt": f"p{number}"} for number in range(11)]


def answer(rows, log):
    """Fill ``log`` as 03 and 04 do; returns the rows, and the ids that had to be made."""
    numbered = [{"id": position, **row} for position, row in enumerate(rows)]
    made = []

    def generate(missing, record):
        made.extend(row["id"] for row in missing)
        # Rows of a batch end in any order.
        for index in reversed(range(len(missing))):
            record(index, missing[index]["prompt"].upper())

    return fill_rows(log, numbered, generate, lambda row, text: {**row, "response": text}), made


def sides(tmp_path, part=""):
    return Sides(run_paths(str(tmp_path), "one"), "04_eval_safety", "ailuminate_preds", PROTOCOL, part)


def make_shares(tmp_path, num_shares, side=TUNED):
    for index in range(1, num_shares + 1):
        _, share, log = sides(tmp_path, f"{side} {index}-of-{num_shares}").share(ROWS)
        assert log.path.name == f"{index}-of-{num_shares}.jsonl.part"
        answer(share, log)
        shards.close_share(log.path)


@pytest.fixture
def folder(tmp_path):
    """The folder of four shares of eleven rows."""
    make_shares(tmp_path, 4)
    return shards.folder_of(run_paths(str(tmp_path), "one").ailuminate_preds)


def join(tmp_path):
    return answer(ROWS, sides(tmp_path).log())


@pytest.mark.parametrize("num_shares", [2, 5, 20])
@pytest.mark.parametrize("side", [TUNED, UNTUNED])
def test_shares_give_the_file_of_an_undivided_run(tmp_path, num_shares, side):
    whole = sides(tmp_path / "whole").log(side)
    answer(ROWS, whole)
    make_shares(tmp_path / "cut", num_shares, side)
    log = sides(tmp_path / "cut").log(side)
    assert answer(ROWS, log)[1] == [], "nothing was made again"
    assert log.path.read_bytes() == whole.path.read_bytes() and log.path.name == whole.path.name
    assert not shards.folder_of(log.path).exists()


def test_a_share_takes_the_rows_that_are_there(tmp_path):
    whole = sides(tmp_path).log()
    answer(ROWS[:6], whole)
    with whole.path.open("a") as file:
        file.write('{"id": 6, "torn')
    _, share, log = sides(tmp_path, "tuned 1-of-2").share(ROWS)
    assert answer(share, log)[1] == [6, 8, 10]


def test_a_share_that_was_stopped_goes_on_from_its_rows(tmp_path):
    _, share, log = sides(tmp_path, "tuned 2-of-2").share(ROWS)
    log.append({**share[0], "response": "P1"})
    _, share, log = sides(tmp_path, "tuned 2-of-2").share(ROWS)
    assert answer(share, log)[1] == [3, 5, 7, 9]


def test_an_untuned_part_does_not_touch_the_tuned_rows(tmp_path):
    tuned = sides(tmp_path).log()
    answer(ROWS, tuned)
    kept = tuned.path.read_bytes()
    # 02 has not made its adapter yet.
    part = Sides(
        run_paths(str(tmp_path), "one"), "04", "ailuminate_preds", {**PROTOCOL, "adapter": []}, "untuned 1-of-1"
    )
    assert part.kept_text() == "only untuned 1-of-1"
    side, share, log = part.share(ROWS)
    answer(share, log)
    assert side == UNTUNED and tuned.path.read_bytes() == kept
    assert answer(ROWS, sides(tmp_path).log(UNTUNED))[1] == []


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_missing_share_is_named_with_both_ways_on(tmp_path, folder):
    (folder / "2-of-4.jsonl").unlink()
    with pytest.raises(ArtifactError, match=r"2-of-4\.jsonl is missing, 1 of 4 shares.*same command.*or delete"):
        join(tmp_path)
    (folder / "2-of-4.jsonl.part").write_text("")
    with pytest.raises(ArtifactError, match="2-of-4"):
        join(tmp_path)
    shutil.rmtree(folder)
    assert len(join(tmp_path)[1]) == len(ROWS)


def test_a_doubled_share_is_named(tmp_path, folder):
    shutil.copy(folder / "1-of-4.jsonl", folder / "3-of-4.jsonl")
    with pytest.raises(ArtifactError, match=r"3-of-4\.jsonl: row 0 stands in 1-of-4\.jsonl too"):
        join(tmp_path)


@pytest.mark.parametrize("name", ["3-of-5.jsonl", "copy of 1-of-4.jsonl", "0-of-4.jsonl"])
def test_a_share_of_another_division_is_named(tmp_path, folder, name):
    shutil.copy(folder / "1-of-4.jsonl", folder / name)
    with pytest.raises(ArtifactError, match=name):
        join(tmp_path)


def change(path, **columns):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_jsonl(path, [{**rows[0], **columns}, *rows[1:]])


def test_a_share_of_another_protocol_or_of_other_rows_is_named(tmp_path, folder):
    kept = (folder / "4-of-4.jsonl").read_bytes()
    change(folder / "4-of-4.jsonl", protocol_hash="other")
    with pytest.raises(ArtifactError, match=r"4-of-4\.jsonl: row 3 was made under another protocol"):
        join(tmp_path)
    (folder / "4-of-4.jsonl").write_bytes(kept)
    change(folder / "4-of-4.jsonl", id=99)
    with pytest.raises(ArtifactError, match="no share has row 3"):
        join(tmp_path)
    with (folder / "4-of-4.jsonl").open("ab") as file:
        file.write(kept)
    with pytest.raises(ArtifactError, match=r"row 7 stands in 4-of-4\.jsonl too"):
        join(tmp_path)


def test_nothing_is_lost_where_joining_is_refused(tmp_path, folder):
    (folder / "2-of-4.jsonl").rename(tmp_path / "2-of-4.jsonl")
    with pytest.raises(ArtifactError):
        join(tmp_path)
    (tmp_path / "2-of-4.jsonl").rename(folder / "2-of-4.jsonl")
    assert join(tmp_path)[1] == []


def test_shares_of_two_kinds_of_gpu_are_refused_unless_allowed(tmp_path, folder):
    paths = run_paths(str(tmp_path), "one")
    plan = Plan("one", "one", None, {"allow_unlike": False}, paths, tmp_path, [], 0, "", False)
    task = Task(0, "one", "04_eval_safety")
    check_gpus(plan, task)
    (folder / "3-of-4.gpu").write_text("NVIDIA H100")
    with pytest.raises(ArtifactError, match=r"CPU and NVIDIA H100.*--allow-unlike"):
        check_gpus(plan, task)
    check_gpus(plan, Task(0, "one", "04_eval_safety", "tuned 1-of-4"))
    plan.settings["allow_unlike"] = True
    check_gpus(plan, task)


def test_a_file_that_is_no_share_is_left_as_it_is(tmp_path):
    log = RowLog(tmp_path / "rows.jsonl", "p")
    log.append({"id": 1})
    shards.close_share(log.path)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
