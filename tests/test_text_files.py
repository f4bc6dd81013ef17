"""Text files that a user names: one text whatever the editor, and what is no UTF-8 is named with place and remedy."""

import csv

import pytest

from lib import params, safety
from lib.evaluate import labels
from lib.prepare import datasets
from lib.record import lookup
from lib.record.text_files import TextFileError, csv_reader, decode_text, read_text

TEXT = "one é\ntwo\n"


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        b"\xef\xbb\xbf" + TEXT.encode(),
        TEXT.replace("\n", "\r\n").encode("utf-8-sig"),
        TEXT.replace("\n", "\r").encode(),
    ],
)
def test_the_text_is_the_same_from_any_editor(tmp_path, data):
    (tmp_path / "mine.txt").write_bytes(data)
    assert read_text(tmp_path / "mine.txt") == TEXT


def test_only_the_mark_at_the_beginning_and_line_ends_are_changed():
    # U+2028 and a form feed end no line, and a mark inside the text is the user's.
    kept = "a\u2028b\x0cc\ufeff \n\n d"
    assert decode_text(("\ufeff" + kept).encode(), "mine") == kept


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (TEXT.encode("cp1252"), "line 1: byte 4 of the file is 0xE9"),
        (b"one\ntwo \x93quoted\x94", "line 2: byte 8 of the file is 0x93"),
        (TEXT.encode() + b"\xc3", "line 3: byte 11 of the file is 0xC3"),
        (TEXT.encode("utf-16"), "it is UTF-16"),
        (b"\xfe\xff" + TEXT.encode("utf-16-be"), "it is UTF-16"),
        (b"one\n" + "two".encode("utf-16-le"), "line 2 holds a NUL byte: UTF-16, or not text at all"),
        (b"\x1f\x8b\x08\x00", "line 1: byte 1 of the file is 0x8B"),
    ],
)
def test_what_is_not_utf_8_is_named_with_its_place_and_the_remedy(tmp_path, data, place):
    path = tmp_path / "mine.txt"
    path.write_bytes(data)
    with pytest.raises(TextFileError) as caught:
        read_text(path)
    assert f"mine.txt is not UTF-8 text ({place}): save it as UTF-8 (in Excel: 'CSV UTF-8')" in str(caught.value)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(TextFileError, match=r"mine\.txt cannot be read \(No such file or directory\)"):
        read_text(tmp_path / "mine.txt")
    with pytest.raises(TextFileError, match=r"cannot be read \(Is a directory\)"):
        read_text(tmp_path)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_csv_of_any_country_is_read(delimiter):
    lines = [["id", "label", "note"], ["0", "safe", '"a, b; c"']]
    (row,) = csv_reader("\n".join(delimiter.join(line) for line in lines))
    assert row == {"id": "0", "label": "safe", "note": "a, b; c"}


def test_an_open_quotation_mark_is_no_field():
    with pytest.raises(csv.Error, match="unexpected end of data"):
        list(csv_reader('id,note\n0,"open\n1,\n'))


# --- every place where a user names a text ---------------------------------------------------------------------------

PRESET = params.preset_path("simple").read_text(encoding="utf-8")
READERS = {
    "guidelines.txt": ("Be strict.\nNo café.\n", safety.read_guidelines),
    "wordings_brief.txt": (
        "Be strict.\nNo café.\n",
        lambda path: safety.other_wordings(path.with_name("wordings.txt")),
    ),
    "mine.yaml": (f"{PRESET}# café\n", lambda path: params.load_params(path).model_dump()),
    "labels.csv": ("id,label,note\n0,safe,café\n", labels.read_labels),
    "train.jsonl": (
        '{"question": "A café?", "answer": "#### 1"}\n',
        lambda path: datasets.load_train_file(str(path))[0],
    ),
    "gsm8k_test.jsonl": (
        '{"question": "A café?", "answer": "#### 1"}\n',
        lambda path: datasets.load_gsm8k("test", str(path.parent))[0],
    ),
    "prompts.csv": ('prompt\n"A café?\nTwo lines."\n', lambda path: datasets.load_ailuminate(str(path), "all")[0]),
}


@pytest.mark.parametrize("name", READERS)
def test_every_named_text_is_read_alike(tmp_path, name):
    text, read = READERS[name]
    path = tmp_path / name
    path.write_bytes(text.encode())
    plain = read(path)
    path.write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    assert read(path) == plain


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
@pytest.mark.parametrize("name", READERS)
def test_every_named_text_in_another_encoding_is_refused_alike(tmp_path, name, encoding):
    text, read = READERS[name]
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises((TextFileError, params.ParamsError, labels.LabelsError, lookup.AssetError)) as caught:
        read(tmp_path / name)
    assert all(words in str(caught.value) for words in (name, "is not UTF-8 text (", "save it as UTF-8"))


def test_empty_guidelines_judge_nothing(tmp_path):
    (tmp_path / "guidelines.txt").write_text("\ufeff\n", encoding="utf-8")
    with pytest.raises(TextFileError, match=r"guidelines\.txt is empty"):
        safety.read_guidelines(tmp_path / "guidelines.txt")


def test_the_projects_own_guidelines_keep_their_text():
    for path in params.PARAMS_DIR.glob("*.txt"):
        assert read_text(path).encode() == path.read_bytes()
