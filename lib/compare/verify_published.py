"""Questions, gold answers and prompts of a run against the data sets on the grader's disk, by their position."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lib import gsm8k
from lib.compare.found import Found, Grader
from lib.compare.runs import Run
from lib.compare.verify_claims import grader_preset, own_file, read_rows
from lib.prepare import datasets
from lib.record.lookup import AssetError, assets_folder
from lib.record.paths import display_path

Row = dict[str, Any]
# Rows, or why they cannot be had.
Loaded = tuple[list[Row], str]


def check_published(run: Run, grader: Grader, found: Found) -> None:
    """Both metrics' rows, and the worked examples."""
    preset = grader_preset(run, grader)[1]
    known = run.parameters or (preset.model_dump() if preset else {})
    if run.accuracy.rows:
        _check_questions(run, known, grader, found)
    if run.safety.rows:
        _check_prompts(run, known, grader, found)


def _check_questions(run: Run, known: Row, grader: Grader, found: Found) -> None:
    rows, why = _gsm8k("test", str(known.get("gsm8k_source", "")), run.paths.run_dir.parent, grader.assets_dir)
    if not rows:
        found.absent.append(f"run_{run.name}: GSM8K's test questions to compare with{why}")
        return
    expected = _expected_indices(len(rows), known)
    # Rows of an earlier pipeline name no position: their question has one.
    by_question = {row["question"]: index for index, row in enumerate(rows)}
    answers = run.accuracy.rows
    known_places = all(row.get("test_index") is not None for row in answers)
    places = [row["test_index"] if known_places else by_question.get(row["question"]) for row in answers]
    if expected is None:
        found.absent.append(
            f"run_{run.name}: gsm8k_eval_fraction, data_seed or max_gsm8k_rows, which draw its questions"
        )
        expected = [*dict.fromkeys(places)]
    # An earlier pipeline drew as many, in another way.
    if places != expected if known_places else len({*places}) != len(expected):
        draw = f"{len(expected)} that gsm8k_eval_fraction, data_seed and max_gsm8k_rows draw"
        found.mismatches.append(f"run_{run.name}: its {len(places)} questions are not the {draw}")
    published = {index: {"question": row["question"], "gold_answer": row["answer"]} for index, row in enumerate(rows)}
    _compare_columns(run, "questions and gold answers", answers, places, published, found)
    # A file of examples may be edited: then the protocol's hash alone holds them.
    if not known.get("fewshot_file"):
        _check_fewshot(run, str(known["gsm8k_source"]), grader, found)


def _expected_indices(num_rows: int, known: Row) -> list[int] | None:
    """``test_index`` of the questions of a run with these parameters; None where they are not recorded."""
    if not {"gsm8k_eval_fraction", "data_seed", "max_gsm8k_rows"} <= known.keys():
        return None
    return gsm8k.eval_indices(num_rows, known["gsm8k_eval_fraction"], known["data_seed"])[
        : known["max_gsm8k_rows"] or None
    ]


def _compare_columns(
    run: Run, what: str, rows: Sequence[Row], places: Sequence[Any], published: Mapping[Any, Row], found: Found
) -> None:
    found.checked[f"{what} against the data set"] += len(rows)
    others = [
        (place, name)
        for row, place in zip(rows, places, strict=True)
        for name, value in published.get(place, {"position": place}).items()
        # A row may have a column of any name: also one called position.
        if place not in published or name not in row or row[name] != value
    ]
    if others:
        place, name = others[0]
        found.mismatches.append(
            f"run_{run.name}: {len(others)} {what} are not those of the data set, first {name} at position {place}"
        )


def _check_fewshot(run: Run, source: str, grader: Grader, found: Found) -> None:
    rows = read_rows(run.paths.fewshot_rows) if run.paths.fewshot_rows.exists() else []
    if not rows:
        return
    train, why = _gsm8k("train", source, run.paths.run_dir.parent, grader.assets_dir)
    if not train:
        found.absent.append(f"run_{run.name}: GSM8K's training rows to compare the worked examples with{why}")
        return
    published = {(row["question"], row["answer"]) for row in train}
    strange = [row for row in rows if (row.get("question"), row.get("answer")) not in published]
    found.checked["worked examples against the data set"] += len(rows)
    if strange:
        found.mismatches.append(f"{display_path(run.paths.fewshot_rows)}: {len(strange)} rows are not of GSM8K train")


def _check_prompts(run: Run, known: Row, grader: Grader, found: Found) -> None:
    source, chosen = str(known.get("ailuminate_source", "")), str(known.get("ailuminate_prompt_set", ""))
    rows, why = _prompts(source, chosen, run.paths.run_dir.parent, grader.assets_dir)
    if not rows:
        found.absent.append(f"run_{run.name}: AILuminate's prompts to compare with{why}")
        return
    rows = rows[: known.get("max_ailuminate_rows") or None]
    judged = run.safety.rows
    if len(judged) != len(rows):
        found.mismatches.append(f"run_{run.name}: {len(judged)} prompts were judged, its settings name {len(rows)}")
    # Hazards that were joined to rows of an earlier pipeline are not in its rows.
    names = {"prompt", "release_prompt_id", "hazard", "persona"} & judged[0].keys()
    published = {row["id"]: {name: row[name] for name in names} for row in rows}
    _compare_columns(run, "prompts", judged, [row["id"] for row in judged], published, found)


@cache
def _gsm8k(split: str, source: str, results: Path, assets_dir: str) -> Loaded:
    if source != datasets.GSM8K_HUB_ID and (why := _why_not_own(source, results, assets_dir)):
        return [], why
    return _rows_or_reason(datasets.load_gsm8k, split, source, assets_dir)


@cache
def _prompts(source: str, prompt_set: str, results: Path, assets_dir: str) -> Loaded:
    if source not in ("mlcommons", "class") and (why := _why_not_own(source, results, assets_dir)):
        return [], why
    return _rows_or_reason(datasets.load_ailuminate, source, prompt_set, assets_dir)


def _why_not_own(source: str, results: Path, assets_dir: str) -> str:
    """Why a local source is not read: a results folder must not choose which files of the grader are."""
    assets = assets_folder(assets_dir)
    return own_file(source, results, *([assets] if assets else []))[1]


def _rows_or_reason(load: Any, *arguments: str) -> Loaded:
    try:
        return load(*arguments, offline=True)[0], ""
    except AssetError as error:
        return [], f" ({str(error).splitlines()[0]})"
