"""The schema of every file of a results folder, checked before anything reads it: others hand in such folders.

Values are checked only where no number could be computed from them: a gold answer without its number.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, Strict, ValidationInfo, model_validator

from lib import gsm8k
from lib.compare.parsed import read_once
from lib.record.files import read_csv, read_json
from lib.record.paths import METRICS_CSV, METRICS_JSON, SUMMARY, ArtifactError, display_path, find_runs, is_utf8
from lib.record.plain_files import check_readable, limited_memory, list_files
from lib.record.rows import read_jsonl
from lib.record.schema import FileName, Manifest, Record, Stamp, find_faults, kind_name, one_of, shown

# Our own files are six deep at most; Python's own functions fail at about a thousand.
MAX_DEPTH = 40
# Faults of one value that a message lists.
MAX_FAULTS = 5
# A folder whose files take more is checked run by run: brackets of some megabytes become lists of gigabytes.
MAX_MEMORY_BYTES = 700_000_000
# What is hashed takes seconds: about as much as a 1.5B model's adapters and checkpoints have.
MAX_HASHED_BYTES = 4_000_000_000
# Of all runs together: each name in a manifest is looked up, and all pictures stand in one page. One run has a hundred
# kilobytes of the former, and each of our pictures too.
MAX_MANIFEST_BYTES, MAX_PICTURE_BYTES = 10_000_000, 20_000_000
PNG_START = b"\x89PNG\r\n\x1a\n"

Share = Annotated[float, Field(ge=0, le=1)]
# Every integer up to here is exact as a float too, and in a browser.
MAX_COUNT = 2**53
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Id = Annotated[Any, one_of(int, str)]
Label = Literal["safe", "unsafe", "unparsed"]


# Runs answer the same questions: each gold answer is read once.
@lru_cache(maxsize=16_384)
def _gold_answer(text: str) -> str:
    if gsm8k.extract_answer(text) is None:
        raise ValueError(f"no number after '####': {text[-80:]!r}")
    return text


class Hazard(Record):
    """What a comparison adds to rows that do not name their hazard."""

    release_prompt_id: Id | None = None
    hazard: str | None = None
    persona: str | None = None


class Row(Hazard):
    """Columns of any row file; rows of an earlier pipeline lack those with a default."""

    id: Id
    parsed_final: str | None = None
    test_index: Count | None = None
    finish_reason: str | None = None
    num_output_tokens: Annotated[float, Field(ge=0, le=MAX_COUNT)] | None = None
    safety_score: Share | None = None
    safety_judge_text: str | None = None
    safety_label: Label = "safe"
    protocol_hash: str | None = None


class Answer(Row):
    question: str
    gold_answer: Annotated[str, AfterValidator(_gold_answer)]
    model_output: str


class Response(Row):
    prompt: str
    response: str


class Verdict(Response):
    safety_label: Label


STAGE_ROWS: dict[str, type[Row]] = {"03_eval_gsm8k": Answer, "04_eval_safety": Verdict}


class Parameters(Record):
    """Parameters that a score or a table is made from, where present; the others are only shown."""

    base_model: str = ""
    baseline_accuracy: Share | None = None
    baseline_safety: Share | None = None
    benchmark: bool = False
    checkpoint: str = ""
    description: str = ""
    gsm8k_source: str = ""
    quantization: str = ""
    safety_margin: Annotated[float, Field(gt=0, le=50)] | None = None
    seed: Count = 0
    submission_ailuminate_rows: int | None = None
    submission_gsm8k_rows: int | None = None
    train_file: str = ""
    train_source: str = ""


class Config(Record):
    parameters: Parameters
    settings: Parameters

    @model_validator(mode="after")
    def _source_of_answers(self) -> "Config":
        known = self.parameters
        if known.train_source == "self_distilled" and "gsm8k_source" not in known.model_fields_set:
            raise ValueError("'gsm8k_source' is missing")
        return self


def named_path(manifest: Path, name: str) -> str:
    """Absolute path of an input or output that ``manifest`` names."""
    # Texts: pathlib takes seconds for some ten thousand names.
    return os.path.normpath(name if name.startswith("/") else f"{manifest.parent}/{name}")


def _in_results_folder(name: str, info: ValidationInfo) -> str:
    # By its name alone: where a link in the folder leads is up to whoever put it there.
    manifest, root = info.context
    if not named_path(manifest, name).startswith(f"{root}/"):
        raise ValueError(f"{shown(name)} is not in this results folder")
    return name


RowFile = Annotated[FileName, AfterValidator(_in_results_folder)]
Scale = Annotated[float, Strict(False)]


class Protocol(Record):
    adapter: Annotated[Any, one_of(str, list)]


class PersonLabels(Record):
    """A person's labels by model and row id; what follows from them is recomputed."""

    labels: dict[str, dict[Annotated[str, Field(pattern=r"^[0-9]{1,15}$")], Literal["safe", "unsafe"]]]


class Facts(Record):
    checkpoints: list[Any] = Field(default_factory=list)
    distil: dict[str, Any] | None = None
    labels: PersonLabels | None = None
    protocol: Protocol | None = None
    # As many as there are wordings of the guidelines, and three.
    other_judgements: dict[str, dict[Literal["tuned", "untuned"], RowFile]] = Field(default_factory=dict, max_length=64)
    scale_rows: dict[Scale, RowFile] = Field(default_factory=dict)
    selected_on: str | None = None
    untuned_rows: Annotated[RowFile | None, BeforeValidator(lambda name: None if name == "" else name)] = None
    control_rows: RowFile | None = None
    # Texts where a checkpoint was selected on the test set.
    adapter: Any = None
    sweep_metric: Any = None

    @model_validator(mode="after")
    def _selection(self) -> "Facts":
        if self.selected_on == "the test set" and not (type(self.adapter) is type(self.sweep_metric) is str):
            raise ValueError("'adapter' or 'sweep_metric' is missing or not a text")
        return self


class CompareManifest(Manifest):
    outputs: dict[RowFile, Stamp]


class RunManifest(CompareManifest):
    parameters: Parameters
    facts: Facts
    versions: dict[str, Any]


class Overlap(Record):
    model_config = ConfigDict(extra="forbid")

    row: Id
    size: int
    source: str
    source_rows: list[Any]


def _unique(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("a name appears twice")
    return names


class Comparison(Record):
    # Each run is compared with each earlier one.
    runs: Annotated[list[str], AfterValidator(_unique), Field(max_length=64)]
    hazards_added: dict[str, list[Hazard]]
    allow_unlike: bool


class RunMetrics(Record):
    run_name: str


def check_folder(folder: Path, *, for_report: bool = False) -> None:
    """Raise ArtifactError for the first malformed file of a results folder, or of one ``run_<name>`` folder.

    ``for_report``: no table, no comparison, and no row file of an unfinished stage, whose last row may be torn.
    """
    folder = folder.resolve()
    try:
        with limited_memory(MAX_MEMORY_BYTES):
            sizes = files_of(folder)
            for path, size in sizes.items():
                check_readable(path, size)
            manifests = [size for path, size in sizes.items() if path.name == "manifest.json"]
            _check_total(folder, "manifests", sum(manifests), MAX_MANIFEST_BYTES)
            _check_files(folder, for_report)
            _check_hashed(folder, sizes, for_report)
    except MemoryError:
        most = f"{MAX_MEMORY_BYTES / 1e6:.0f} MB"
        raise ArtifactError(f"{display_path(folder)} takes over {most} of memory: name one of its runs") from None


def files_of(folder: Path) -> dict[Path, int]:
    """``list_files`` of a results folder, or of one run and the untuned rows beside it."""
    beside = [folder.parent / "untuned"] if is_run(folder) else []
    return {path: size for one in (folder, *beside) for path, size in list_files(one).items()}


def is_run(folder: Path) -> bool:
    """Whether this is one ``run_<name>`` folder; a folder of runs may have such a name too."""
    return folder.name.startswith("run_") and not find_runs(str(folder))


def _check_files(folder: Path, for_report: bool) -> None:
    runs = [folder] if is_run(folder) else sorted(folder.glob("run_*"))
    # Runs share the rows of the untuned model: each file is read once.
    row_files: dict[Path, type[Row]] = {}
    for run in runs:
        _check_run(run)
        row_files |= {file: form for file, form in _row_files(run) if not (for_report and _is_unfinished(file, run))}
    for file, form in row_files.items():
        _check_rows(file, form)
    if for_report:
        _check_pictures(folder / "05_compare" / "plots")
        return
    _check_json(folder / "05_compare" / "comparison.json", Comparison)
    _check_json(folder / "05_compare" / "manifest.json", CompareManifest, folder)
    _check_json(folder / METRICS_JSON, list[RunMetrics])
    for name in (SUMMARY, METRICS_CSV):
        if (folder / name).exists():
            read_csv(folder / name)


def _check_total(folder: Path, what: str, size: int, allowed: int) -> None:
    if size > allowed:
        sizes = f"{size / 1e6:,.0f} MB of {what}: allowed are {allowed / 1e6:,.0f} MB"
        raise ArtifactError(f"{display_path(folder)} has {sizes}; name one of its runs")


def _check_hashed(folder: Path, sizes: Mapping[Path, int], for_report: bool) -> None:
    """Refuse more bytes than can be hashed in seconds, in the files that its checked manifests name."""
    kinds = ("inputs",) if for_report else ("inputs", "outputs")
    checked = [*folder.glob("0*/manifest.json" if is_run(folder) else "run_*/0*/manifest.json")]
    checked += [] if for_report else folder.glob("05_compare/manifest.json")
    manifests = {path: read_once(path, read_json) for path in checked}
    names = (named_path(path, name) for path, one in manifests.items() for kind in kinds for name in one[kind])
    by_name = {str(path): size for path, size in sizes.items()}
    _check_total(folder, "files to hash", sum(by_name.get(name, 0) for name in {*names}), MAX_HASHED_BYTES)


def _check_run(run: Path) -> None:
    if run.name.startswith("run_.") or not is_utf8(run.name):
        raise ArtifactError(f"{display_path(run)}: not a name for a run; rename or remove the folder")
    _check_json(run / "config_resolved.json", Config)
    for manifest in sorted(run.glob("0*/manifest.json")):
        _check_json(manifest, RunManifest, run.parent)
    _check_json(run / "01_prepare" / "overlap.json", list[Overlap])


def _check_json(path: Path, form: Any, root: Path | None = None) -> None:
    if not path.exists():
        return
    where, value = display_path(path), read_once(path, read_json)
    _check_depth(where, value)
    if not is_utf8(json.dumps(value, ensure_ascii=False)):
        raise ArtifactError(f"{where}: a text in it is not Unicode (a lone surrogate)")
    _check_form(where, form, value, (path, root))


def _check_form(where: str, form: Any, value: Any, context: Any = None) -> None:
    if faults := find_faults(where, form, value, context):
        raise ArtifactError("\n".join(faults[:MAX_FAULTS]))


def _check_depth(where: str, value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        if any(type(item) is float and not math.isfinite(item) for item in level):
            raise ArtifactError(f"{where}: a value is NaN or infinite")
        holders = [item for item in level if type(item) in (list, dict)]
        if not holders:
            return
        level = [item for holder in holders for item in (holder.values() if type(holder) is dict else holder)]
    if level:
        raise ArtifactError(f"{where}: lists and objects are nested more than {MAX_DEPTH} deep")


def _row_files(run: Path) -> Iterator[tuple[Path, type[Row]]]:
    name = run.name.removeprefix("run_")
    yield run / f"gsm8k_preds_{name}.jsonl", Answer
    yield run / f"ailuminate_preds_{name}.jsonl", Response
    yield run / f"ailuminate_safety_{name}.jsonl", Verdict
    for stage, form in STAGE_ROWS.items():
        manifest = run / stage / "manifest.json"
        facts = read_once(manifest, read_json)["facts"] if manifest.exists() else {}
        named = [facts.get("untuned_rows"), facts.get("control_rows"), *facts.get("scale_rows", {}).values()]
        named += [file for sides in facts.get("other_judgements", {}).values() for file in sides.values()]
        yield from (((run / stage / file).resolve(), form) for file in named if file)


def _is_unfinished(file: Path, run: Path) -> bool:
    stage = "03_eval_gsm8k" if file.name.startswith("gsm8k") else "04_eval_safety"
    # Rows without any manifest come from an earlier pipeline, and are complete.
    begun = (run / "01_prepare" / "manifest.json").exists()
    return file.parent == run and begun and not (run / stage / "manifest.json").exists()


def _check_rows(path: Path, form: type[Row]) -> None:
    where, rows = display_path(path), read_once(path, read_jsonl) if path.exists() else []
    for number, row in enumerate(rows, start=1):
        _check_form(f"{where}, line {number}", form, row)
        _check_depth(f"{where}, line {number}", row)
    # Rows are sorted and joined by this key.
    keys = {kind_name(row["id"] if row.get("test_index") is None else row["test_index"]) for row in rows}
    if len(keys) > 1:
        raise ArtifactError(f"{where}: some ids are {' and others '.join(sorted(keys))}, expected one kind of id")


def _check_pictures(folder: Path) -> None:
    pictures = sorted(folder.glob("*.png"))
    _check_total(folder, "pictures", sum(path.stat().st_size for path in pictures), MAX_PICTURE_BYTES)
    for path in pictures:
        with path.open("rb") as stream:
            header = stream.read(24)
        if len(header) < 24 or not header.startswith(PNG_START):
            raise ArtifactError(f"{display_path(path)} is not a PNG picture; delete it, and 05 draws it again")
