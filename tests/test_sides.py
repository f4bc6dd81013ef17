"""lib.evaluate.sides: which row file a side has, and what the manifest says of it."""

from lib.evaluate.sides import CONTROL, TUNED, UNTUNED, Sides, scales_between
from lib.record.files import sha256_json
from lib.record.paths import run_paths

PROTOCOL = {"base model": "tiny", "adapter": "abc"}
# As runs made before hash them: their rows must stay.
UNTUNED_HASH = sha256_json({"base model": "tiny", "adapter": "none (untuned)"})
SCALE_HASH = sha256_json({**PROTOCOL, "adapter scale": 0.5})


def test_each_side_has_its_file_and_its_protocol(tmp_path):
    paths = run_paths(str(tmp_path), "one")
    sides = Sides(paths, "03_eval_gsm8k", "gsm8k_preds", PROTOCOL)
    files = {side: sides.log(side).path.relative_to(tmp_path).as_posix() for side in (TUNED, UNTUNED, 0.5)}
    assert files == {
        TUNED: "run_one/gsm8k_preds_one.jsonl",
        UNTUNED: f"untuned/gsm8k_preds_untuned_{UNTUNED_HASH[:12]}.jsonl",
        0.5: "run_one/03_eval_gsm8k/scales/gsm8k_preds_0.5.jsonl",
    }
    assert [sides.log(side).protocol_hash for side in files] == [sha256_json(PROTOCOL), UNTUNED_HASH, SCALE_HASH]
    assert [path.relative_to(tmp_path).as_posix() for path in sides.files] == list(files.values())
    facts = sides.facts()
    assert facts["untuned_rows"] == f"../../untuned/gsm8k_preds_untuned_{UNTUNED_HASH[:12]}.jsonl"
    assert facts["scale_rows"] == {"0.5": "scales/gsm8k_preds_0.5.jsonl"} and facts["protocol"] == PROTOCOL
    sides.log(UNTUNED).finish([])


def test_a_side_that_was_not_made_is_not_named(tmp_path):
    sides = Sides(run_paths(str(tmp_path), "one"), "04_eval_safety", "ailuminate_preds", PROTOCOL)
    assert sides.facts() == {"protocol": PROTOCOL, "untuned_rows": "", "scale_rows": {}} and not sides.files
    assert sides.kept_text() == "0 rows are reused, 0 rows of another protocol were dropped"


def test_the_control_has_a_shared_file_that_is_resumed_and_not_that_of_the_first_pass(tmp_path):
    made_by = sha256_json({"base model": "tiny", "adapter": "none (untuned)", "rows at once": "half"})
    for name in ("one", "two"):
        sides = Sides(run_paths(str(tmp_path), name), "03_eval_gsm8k", "gsm8k_preds", PROTOCOL | {"adapter": name})
        first, again = sides.log(UNTUNED), sides.log(CONTROL)
        assert (
            again.path.relative_to(tmp_path).as_posix() == f"untuned/gsm8k_preds_control_untuned_{made_by[:12]}.jsonl"
        )
        assert again.protocol_hash == made_by and not first.rows
        assert [*again.rows] == ([0] if name == "two" else [])
        assert sides.facts()["control_rows"] == f"../../{again.path.relative_to(tmp_path).as_posix()}"
        assert again.path in sides.files
        again.append({"id": int(name == "two")})
        again.finish([*again.rows])
        first.finish([])


def test_the_ends_of_the_scale_are_sides_of_their_own():
    assert scales_between([0, 0.25, 1, 0.5, 1.0]) == [0.25, 0.5]
