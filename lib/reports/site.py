"""The report site: one HTML file with the verdicts, the comparison and a browser of every row, which needs no network.

Every number comes from ``lib.compare.tables`` and ``lib.compare.findings``; here they are only laid out. What a model or a data set
wrote travels as JSON and becomes a text node on the page, never markup; the page's own policy forbids every script but
the one named by its hash, and every connection. Knows nothing about models, and draws no plots: it embeds those of 05.
"""

import base64
import hashlib
import json
import os
import re
import shlex
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lib import gsm8k, safety, wording
from lib.compare import comparison, findings, tables
from lib.compare.findings import AxisVerdict, Comparison
from lib.compare.runs import SAFETY_STAGE, RunScores, collect_runs, untuned_runs
from lib.evaluate import response_kinds
from lib.record.files import write_text
from lib.record.manifest import is_redacted
from lib.record.paths import STAGES, RunPaths, results_root
from lib.record.redaction import clean_value
from lib.record.rows import row_id

ASSETS_DIR = Path(__file__).resolve().parent / "site_assets"
INDEX = "index.html"
# 05's pictures, as a reader calls them.
PLOT_NAMES = {
    "accuracy_safety": "Accuracy against safety",
    "frontier": "Between untuned and tuned",
    "hazards": "Safe responses by hazard",
    "losses": "Training loss",
}
# Its filled notebook shows texts of AILuminate, unless it was run under --redact; no other one does.
TEXT_STAGE = SAFETY_STAGE
Row = Mapping[str, Any]


@dataclass(frozen=True)
class _AxisText:
    """How an axis is called on the page."""

    title: str
    right: str


# Keys whose values the page's links and its script refer to, or that are words of a list of ours.
REFERENCES = frozenset(["name", "run", "stage", "label", "reference", "link", "comparison", "rewriting", "unlinked"])
REFERENCES |= {"id", "release", "hazards", "hazard", "hazard_code", "persona", "outcome", "flexible", "kind"}
AXES = {"accuracy": _AxisText("Accuracy (GSM8K)", "right"), "safety": _AxisText("Safety (AILuminate)", "safe")}

# --- the page -------------------------------------------------------------------------------------------------------


def write_site(results_dir: str, reports_dir: Path, *, redact: bool = False) -> Path:
    """Write ``reports_dir/index.html`` over every run of a results folder.

    Args:
        results_dir: as for ``compare.collect_runs``.
        reports_dir: where the filled notebooks of these runs lie.
        redact: leave prompts and responses of AILuminate out of the file altogether.

    Raises:
        ArtifactError: no run has rows, or a row file cannot be read.
    """
    runs = collect_runs(results_dir)
    plots_dir = results_root(results_dir) / "05_compare" / "plots"
    page = render(runs, reports_dir=reports_dir, plots_dir=plots_dir, redact=redact)
    write_text(reports_dir / INDEX, page)
    return reports_dir / INDEX


def render(runs: Sequence[RunScores], *, reports_dir: Path, plots_dir: Path, redact: bool = False) -> str:
    """The whole page as text; links are relative to ``reports_dir``."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    style, script = ((ASSETS_DIR / name).read_text(encoding="utf-8") for name in ("site.css", "site.js"))
    # Escaping is on for whatever is filled in; only our own files and the JSON are markup.
    environment = Environment(
        loader=FileSystemLoader(ASSETS_DIR), autoescape=True, undefined=StrictUndefined, finalize=_unbroken
    )
    untuned = untuned_runs(runs)
    unlinked = unredacted_runs((run.paths for run in runs), reports_dir) if redact else []
    facts = {"redacted": redact, "unlinked": unlinked, "rewriting": rewriting_commands(unlinked)}
    facts |= _report(runs, untuned, reports_dir, plots_dir, unlinked)
    return environment.get_template("index.html").render(
        policy=_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        data=Markup(_embedded_json(rows_data(runs, untuned, redact=redact))),
        # For others to read: no home folder, user name or token.
        **clean_value(facts, keep=REFERENCES),
    )


def _unbroken(value: Any) -> Any:
    # "19.2" at the end of a line and "%" on the next reads badly. Markup is ours and the rows' JSON: as it is.
    return value.replace(" %", "\N{NO-BREAK SPACE}%") if type(value) is str else value


def _report(
    runs: Sequence[RunScores],
    untuned: Sequence[RunScores],
    reports_dir: Path,
    plots_dir: Path,
    unlinked: Sequence[str],
) -> dict[str, Any]:
    """Everything above the rows browser, in words."""
    judged = comparison.judge_runs(runs)
    return {
        "made_at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "rehearsals": [run.name for run in runs if run.parameters.get("benchmark") is False],
        "summaries": _summaries(judged),
        "scores": list(_score_rows(runs, untuned, judged)),
        "plots": list(_plots(plots_dir, [*runs, *untuned])),
        "runs": [_run_facts(run, reports_dir, unlinked) for run in runs],
        "comparison": _link(reports_dir / "05_compare.html", reports_dir),
    }


def _policy(style: str, script: str) -> str:
    hashes = {name: _policy_hash(text) for name, text in (("style-src", style), ("script-src", script))}
    allowed = "; ".join(f"{name} {value}" for name, value in hashes.items())
    return f"default-src 'none'; {allowed}; img-src data:; base-uri 'none'; form-action 'none'"


def _policy_hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded_json(value: Any) -> str:
    # Without "<" no text can end the element that holds it; ASCII, so that no lone surrogate fails to encode.
    cleaned = clean_value(value, keep=REFERENCES)
    return json.dumps(cleaned, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c")


# --- verdicts and comparison ----------------------------------------------------------------------------------------


def _summaries(judged: Mapping[str, Sequence[AxisVerdict]]) -> list[dict[str, Any]]:
    """A run's verdict and its baselines, in sentences."""
    return [
        {
            "run": name,
            "verdict": findings.verdict_sentence(axes),
            "baselines": [sentence for axis in axes if (sentence := findings.baseline_sentence(axis))],
        }
        for name, axes in judged.items()
    ]


def _score_rows(
    runs: Sequence[RunScores], untuned: Sequence[RunScores], judged: Mapping[str, Sequence[AxisVerdict]]
) -> Iterator[dict[str, Any]]:
    """A row a run and axis, the untuned model's last."""
    references = _references(runs, untuned)
    for run in runs:
        for name, axis in zip(AXES, judged[run.name], strict=True):
            yield _score_row(run, name, axis, references.get(run.name, ""))
    for run in untuned:
        for name in AXES:
            yield _score_row(run, name, findings.judge_axis(name, run.rows.get(name), None), "")


def _score_row(run: RunScores, name: str, axis: AxisVerdict, reference: str) -> dict[str, Any]:
    measured = axis.rate is not None
    status = run.gsm8k_status if name == "accuracy" else run.safety_status
    return {
        "run": run.name,
        "axis": AXES[name].title,
        "rate": wording.percent(axis.rate) if measured else status,
        "interval": _interval(axis) if measured else "",
        "rows": f"{axis.num_succeeded:,} of {axis.num_rows:,} {AXES[name].right}" if measured else "",
        "baseline": _baseline_words(axis),
        **_change_cells(axis.comparison),
        "link": _rows_link(name, run.name, reference) if measured else "",
    }


def _interval(axis: AxisVerdict) -> str:
    return f"{wording.interval(axis.low, axis.high)} %"


def _baseline_words(axis: AxisVerdict) -> str:
    if axis.baseline is None:
        return ""
    word = "reached" if axis.passes else "missed"
    return f"{wording.percent(axis.baseline)}, {word}"


def _change_cells(change: Comparison | None) -> dict[str, str]:
    if change is None:
        return {"change": "", "change_interval": "", "p_holm": "", "moved": ""}
    return {
        "change": wording.signed_points(change.difference),
        "change_interval": wording.interval(change.low, change.high),
        "p_holm": f"{change.p_holm:.3g}",
        "moved": wording.moved(change.only_run, change.only_reference),
    }


def _rows_link(axis: str, run: str, reference: str) -> str:
    from urllib.parse import urlencode

    return "#" + urlencode({"axis": axis, "run": run, "with": reference})


def _references(runs: Sequence[RunScores], untuned: Sequence[RunScores]) -> dict[str, str]:
    """Run name -> name of the untuned model that was asked as it was."""
    return {run.name: other.name for run in runs for other in untuned if run.untuned_files == other.untuned_files}


# --- runs and pictures ----------------------------------------------------------------------------------------------


def unredacted_runs(runs: Iterable[RunPaths], reports_dir: Path) -> list[str]:
    """Names of the runs whose filled 04 shows texts of AILuminate: it lies there and was made without ``--redact``."""
    return [
        paths.name
        for paths in runs
        if any(_filled(paths.name, TEXT_STAGE, reports_dir, suffix).exists() for suffix in ("html", "ipynb"))
        and not is_redacted(paths.manifest(TEXT_STAGE))
    ]


def rewriting_commands(run_names: Sequence[str]) -> list[str]:
    """The commands that fill 04 of these runs anew without texts of AILuminate; their rows are kept."""
    seeds: dict[str, list[str]] = {}
    for name in run_names:
        # A folder may be called anything, and this is to be typed.
        preset, _, seed = name.rpartition("_seed") if re.search(r"._seed\d+$", name) else (name, "", "")
        seeds.setdefault(f"{shlex.quote(preset)} --seeds " if seed else "", []).append(seed or shlex.quote(preset))
    return [
        f"python run_all.py --presets {preset}{' '.join(values)} --stages {TEXT_STAGE[:2]} --redact"
        for preset, values in seeds.items()
    ]


def _filled(name: str, stage: str, reports_dir: Path, suffix: str = "html") -> Path:
    return reports_dir / f"run_{name}" / f"{stage}.{suffix}"


def _run_facts(run: RunScores, reports_dir: Path, unlinked: Sequence[str]) -> dict[str, Any]:
    known = tables.summary_row(run)
    stages = [stage for stage in STAGES if not (stage == TEXT_STAGE and run.name in unlinked)]
    notebooks = ((stage, _filled(run.name, stage, reports_dir)) for stage in stages)
    return {
        "name": run.name,
        "description": run.parameters.get("description") or "",
        "model": known["model_name"] or "not recorded",
        "data": known["train_data"] or "not recorded",
        "method": known["method"] or "not recorded",
        "settings": (known["hyperparams"] or "not recorded").split(),
        "notebooks": [
            {"stage": stage, "link": link} for stage, path in notebooks if (link := _link(path, reports_dir))
        ],
    }


def _link(path: Path, reports_dir: Path) -> str:
    """``path`` as the page links to it; "" where it is not there."""
    from urllib.parse import quote

    return quote(os.fsencode(os.path.relpath(path, reports_dir))) if path.exists() else ""


def _plots(plots_dir: Path, runs: Sequence[RunScores]) -> Iterator[dict[str, Any]]:
    """05's pictures as data, the plane of accuracy and safety first; ``runs`` are its points, untuned ones too."""
    words = "; ".join(f"{run.name}: {tables.both_rates(run)}" for run in runs)
    told = {"accuracy_safety": f"Accuracy against safe rate, a point for each model. {words}."}
    for path in sorted(plots_dir.glob("*.png"), key=lambda path: (path.stem not in told, path.stem)):
        name = PLOT_NAMES.get(path.stem, path.stem.replace("_", " "))
        alt = told.get(path.stem, f"Plot: {name}. Its numbers stand in the notebook 05_compare.")
        content = path.read_bytes()
        data = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        # Width and height stand in a PNG's header; lib.reports.plots draws with two pixels for one of the page.
        width, height = (size // 2 or 1 for size in struct.unpack(">II", content[16:24]))
        yield {"name": name, "alt": alt, "data": data, "width": width, "height": height}


# --- rows -----------------------------------------------------------------------------------------------------------


@dataclass
class _Items:
    """Questions or prompts that runs share, each kept once and numbered in the order in which it is first met."""

    describe: Callable[[Row], dict[str, Any]]
    key_of: Callable[[Row], tuple[Any, ...]]
    items: list[dict[str, Any]] = field(default_factory=list)
    _numbers: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def numbered(self, rows: Sequence[Row]) -> Iterator[tuple[int, Row]]:
        """Rows of one run, each with the number of its item; a text that stands twice is two items."""
        seen: Counter[tuple[Any, ...]] = Counter()
        for row in rows:
            key = self.key_of(row)
            seen[key] += 1
            number = self._numbers.setdefault((*key, seen[key]), len(self.items))
            if number == len(self.items):
                self.items.append(self.describe(row))
            yield number, row


def rows_data(runs: Sequence[RunScores], untuned: Sequence[RunScores], *, redact: bool) -> dict[str, Any]:
    """What the rows browser reads: runs, and for each axis the items and every run's rows on them.

    Args:
        runs: as ``compare.collect_runs`` gives them.
        untuned: as ``compare.untuned_runs`` gives them.
        redact: leave prompts, responses and what the judge wrote out.
    """
    everyone = [*runs, *untuned]
    references = _references(runs, untuned)
    # Its whole name is too long for a column's head; where it was asked in one way only, the word will do.
    labels = {untuned[0].name: "untuned"} if len(untuned) == 1 else {}
    return {
        "redacted": redact,
        "runs": [
            {"name": run.name, "label": labels.get(run.name, run.name), "reference": references.get(run.name, "")}
            for run in everyone
        ],
        "hazards": safety.HAZARDS,
        "axes": {
            "accuracy": _axis_data(everyone, "accuracy", _question_items(everyone), _answer_cells),
            "safety": _axis_data(
                everyone,
                "safety",
                _Items(lambda row: _prompt_item(row, redact), lambda row: (safety.prompt_text(row),)),
                lambda row: _response_cells(row, redact),
            ),
        },
    }


def _axis_data(
    runs: Sequence[RunScores], axis: str, items: _Items, cells: Callable[[Row], dict[str, Any]]
) -> dict[str, Any]:
    rows = [[{"item": number, **cells(row)} for number, row in items.numbered(run.rows.get(axis, []))] for run in runs]
    return {"items": items.items, "rows": rows}


def _question_items(runs: Sequence[RunScores]) -> _Items:
    # As verdict.pair_rows joins them: by test_index where all know it, else by the question.
    by_index = all(row.get("test_index") is not None for run in runs for row in run.rows.get("accuracy", []))

    def key_of(row: Row) -> tuple[Any, ...]:
        return (row["test_index"] if by_index else None, gsm8k.normalise_question(row["question"]))

    return _Items(_question_item, key_of)


def _question_item(row: Row) -> dict[str, Any]:
    return {"id": str(row_id(row)), "question": row["question"], "gold": row["gold_answer"]}


def _prompt_item(row: Row, redact: bool) -> dict[str, Any]:
    known = {"id": str(row["id"]), "release": row.get("release_prompt_id") or ""}
    hazard = row.get("hazard") or "unknown"
    kinds = {"hazard": safety.hazard_group(hazard), "hazard_code": hazard, "persona": row.get("persona") or "unknown"}
    return {**known, **kinds, **({} if redact else {"prompt": row["prompt"]})}


def _answer_cells(row: Row) -> dict[str, Any]:
    score = gsm8k.score_row(row)
    return {
        "outcome": score["outcome"],
        "good": score["correct"],
        "flexible": findings.flexible_outcome(row),
        "read": score["parsed_final"],
        "read_flexibly": score["parsed_flexible"],
        "tokens": row.get("num_output_tokens"),
        "text": row["model_output"],
    }


def _response_cells(row: Row, redact: bool) -> dict[str, Any]:
    score = row.get("safety_score")
    cells = {
        "outcome": row["safety_label"],
        "good": row["safety_label"] == "safe",
        "unsafe": None if score is None else round(1 - score, 4),
        "kind": response_kinds.response_kind(row),
        "tokens": row.get("num_output_tokens"),
    }
    texts = {"text": row["response"], "judge": row.get("safety_judge_text") or ""}
    return {**cells, **({} if redact else texts)}
