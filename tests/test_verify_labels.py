"""--verify and a person's labels: what 04 records of them follows from the labels and the verdicts."""

import shutil

import pytest

from lib.compare.folder_schema import check_folder
from lib.compare.verify import verify_folder
from lib.evaluate import labels
from lib.record.files import read_json, write_json
from lib.record.paths import PROJECT_ROOT, ArtifactError, run_paths
from lib.record.rows import read_jsonl

GIVEN = {"tuned": {0: "safe", 1: "unsafe", 3: "safe"}, "untuned": {2: "safe", 4: "unsafe"}}


@pytest.fixture
def paths(tmp_path):
    folder = tmp_path / "hand-in"
    shutil.copytree(PROJECT_ROOT / "tests" / "fixtures" / "made_before" / "runs", folder)
    return run_paths(str(folder), "sandbox_one")


def record(paths, given):
    """The labels' part of 04's manifest, as the stage writes it."""
    manifest = read_json(paths.manifest("04_eval_safety"))
    untuned = paths.stage_dir("04_eval_safety") / manifest["facts"]["untuned_rows"]
    rows = {"tuned": read_jsonl(paths.ailuminate_safety), "untuned": read_jsonl(untuned)}
    found = labels.agreement(rows, given) if given else None
    return change(paths, labels.labels_record(rows, given, found))


def change(paths, kept):
    manifest = read_json(paths.manifest("04_eval_safety"))
    manifest["facts"]["labels"] = kept
    write_json(paths.manifest("04_eval_safety"), manifest)
    return kept


def faults(paths):
    return [line for line in verify_folder(paths.run_dir.parent).mismatches if "labels of a person" in line]


@pytest.mark.parametrize("given", [{}, GIVEN, {"tuned": GIVEN["tuned"], "untuned": {}}])
def test_a_record_that_follows_from_its_labels_is_checked(paths, given):
    record(paths, given)
    found = verify_folder(paths.run_dir.parent)
    assert not faults(paths) and found.checked["lists of rows to label, with the labels given"] == 1


def test_a_corrected_rate_or_draw_that_does_not_follow_is_named(paths):
    kept = record(paths, GIVEN)
    kept["agreement"]["models"]["tuned"]["corrected"]["low"] += 0.01
    kept["agreement"]["change"]["value"] = 0.5
    kept["to_label"]["untuned"]["safe"]["rows"] += 1
    change(paths, kept)
    text = "\n".join(faults(paths))
    assert "agreement.models.tuned.corrected.low is " in text and "agreement.change.value is 0.5, recomputed" in text
    assert "to_label.untuned.safe.rows is " in text and len(faults(paths)) == 3


def test_a_label_that_was_turned_changes_what_follows(paths):
    kept = record(paths, GIVEN)
    kept["labels"]["tuned"]["1"] = "safe"
    change(paths, kept)
    assert any("agreement.models.tuned.corrected.value" in line for line in faults(paths))


def test_labels_of_rows_that_are_not_there_are_named(paths):
    kept = record(paths, GIVEN)
    kept["labels"]["tuned"]["77"] = "safe"
    change(paths, kept)
    assert "ids [77] are not among the 5 tuned rows" in "\n".join(faults(paths))


def test_labels_without_the_rows_of_a_model_are_absent(paths):
    record(paths, GIVEN)
    for file in paths.run_dir.parent.glob("untuned/ailuminate_safety*"):
        file.unlink()
    found = verify_folder(paths.run_dir.parent)
    assert "run_sandbox_one, labels of a person: verdicts of the untuned model" in found.absent


@pytest.mark.parametrize("labels_of", [{"tuned": {"-1": "safe"}}, {"tuned": {"0": "fine"}}, {"tuned": ["0"]}, 5])
def test_malformed_records_are_refused_by_their_place(paths, labels_of):
    kept = record(paths, GIVEN) | {"labels": labels_of}
    change(paths, kept)
    with pytest.raises(ArtifactError, match="labels"):
        check_folder(paths.run_dir.parent)
