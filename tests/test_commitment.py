"""One hash over a run's rows, adapter and records, as a person can send it, check it and sign it."""

import hashlib
import subprocess

import pytest
from forger import forge, gold_answer
from made_runs import add_control, change, make_run

from lib.compare.verify import verify_folder
from lib.record.commitment import COMMITMENT, write_commitment
from lib.record.manifest import start_stage


@pytest.fixture
def paths(tmp_path):
    paths = make_run(tmp_path)
    add_control(paths.run_dir.parent, "one", ["#### 4", "#### 0", "#### 0"])
    return paths


def names(paths):
    return [line[66:] for line in (paths.run_dir / COMMITMENT).read_text().splitlines()]


def test_the_last_stage_leaves_a_commitment_that_sha256sum_checks(paths):
    assert {"gsm8k_preds_one.jsonl", "ailuminate_safety_one.jsonl", "config_resolved.json"} <= {*names(paths)}
    assert {"01_prepare/manifest.json", "04_eval_safety/manifest.json"} <= {*names(paths)}
    check = ["sha256sum", "--check", "--strict", COMMITMENT]
    assert subprocess.run(check, cwd=paths.run_dir, capture_output=True).returncode == 0
    change(paths.gsm8k_preds, 0, model_output="#### 5")
    assert subprocess.run(check, cwd=paths.run_dir, capture_output=True).returncode == 1


def test_verification_shows_its_hash_and_finds_what_changed_afterwards(paths):
    digest = hashlib.sha256((paths.run_dir / COMMITMENT).read_bytes()).hexdigest()
    found = verify_folder(paths.run_dir.parent)
    assert found.commitments == [f"run_one: {digest}"] and found.mismatches == []
    forge(paths.run_dir.parent, paths.gsm8k_preds, gold_answer)
    found = verify_folder(paths.run_dir.parent)
    assert found.commitments != [f"run_one: {digest}"]
    assert any(line.endswith("gsm8k_preds_one.jsonl") for line in found.mismatches if COMMITMENT in line)
    # Whoever writes it again has another hash than the one that was sent.
    write_commitment(paths.run_dir)
    assert verify_folder(paths.run_dir.parent).commitments != [f"run_one: {digest}"]


def test_a_stage_that_runs_again_withdraws_it_until_it_is_finished(paths):
    record = start_stage(paths.manifest("03_eval_gsm8k"), "03_eval_gsm8k", "one", {})
    assert not (paths.run_dir / COMMITMENT).exists()
    record.finish(inputs=[], outputs=[paths.gsm8k_preds], facts={})
    assert (paths.run_dir / COMMITMENT).exists()


def test_no_commitment_is_made_to_files_that_a_stage_did_not_write(paths):
    change(paths.gsm8k_preds, 0, model_output="a longer answer than the one that was generated")
    write_commitment(paths.run_dir)
    assert not (paths.run_dir / COMMITMENT).exists()


def test_the_same_files_elsewhere_have_the_same_commitment(paths, tmp_path_factory):
    before = (paths.run_dir / COMMITMENT).read_bytes()
    moved = tmp_path_factory.mktemp("other") / "hand-in"
    paths.run_dir.parent.rename(moved)
    write_commitment(moved / "run_one")
    assert (moved / "run_one" / COMMITMENT).read_bytes() == before
