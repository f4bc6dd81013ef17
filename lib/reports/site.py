"""The report site: one HTML file with the findings, the comparison and a browser of every row, readable offline.

What a model or a data set wrote travels as JSON and becomes a text node on the page, never markup; the page's policy
forbids every script but the one named by its hash, and every connection.
"""

import base64
import hashlib
import json
import os
import re
import shlex
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from lib import gsm8k, safety, wording
from lib.compare import tables
from lib.compare.comparison import assess_runs, primary_family
from lib.compare.findings import Finding, assess_metric, flexible_outcome, keyed_rows
from lib.compare.runs import SAFETY_STAGE, Run, load_runs, untuned_key, untuned_runs
from lib.compare.sentences import baseline_sentence, family_sentence, finding_sentence
from lib.evaluate import response_kinds
from lib.record.files import write_text
from lib.record.manifest import is_redacted, recorded_outputs
from lib.record.paths import COMPARE_STAGE, STAGES, RunPaths, results_root
from lib.record.plain_files import list_files
from lib.record.redaction import clean_value
from lib.record.rows import row_id
from lib.reports.pages import content_policy, is_made_here
from lib.reports.tables import rate_cells

ASSETS_DIR = Path(__file__).resolve().parent / "site_assets"
INDEX = "index.html"
# 05's plots, as a reader calls them.
PLOT_NAMES = {"accuracy_safety": "Accuracy against safety", "frontier": "Between untuned and tuned"}
PLOT_NAMES |= {"hazards": "Safe responses by hazard", "losses": "Training loss"}
# The only filled notebook that shows texts of AILuminate, unless it was run under --redact.
TEXT_STAGE = SAFETY_STAGE
# Keys whose values the page's links and its script refer to, or that are words of a list of ours.
REFERENCES = frozenset(["name", "run", "stage", "label", "reference", "link", "file", "rewriting", "unlinked"])
REFERENCES |= {"id", "release", "hazards", "hazard", "hazard_code", "persona", "outcome", "flexible", "kind"}
# Metric -> its title on the page, and what its successes are called.
METRIC_TEXTS = {"accuracy": ("Accuracy (GSM8K)", "right"), "safety": ("Safety (AILuminate)", "safe")}
Row = Mapping[str, Any]


def write_site(results_dir: str, reports_dir: Path, *, redact: bool = False) -> Path:
    """Write ``reports_dir/index.html`` over every run of a results folder; ``redact`` leaves AILuminate's texts out."""
    list_files(reports_dir)  # refuses links
    plots_dir = results_root(results_dir) / COMPARE_STAGE / "plots"
    page = render(load_runs(results_dir), reports_dir=reports_dir, plots_dir=plots_dir, redact=redact)
    write_text(reports_dir / INDEX, page)
    return reports_dir / INDEX


def render(runs: Sequence[Run], *, reports_dir: Path, plots_dir: Path, redact: bool = False) -> str:
    """The page as text; links are relative to ``reports_dir``."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    style, script = ((ASSETS_DIR / name).read_text(encoding="utf-8") for name in ("site.css", "site.js"))
    # Escaping is on for whatever is filled in; only our own files and the JSON are markup.
    environment = Environment(
        loader=FileSystemLoader(ASSETS_DIR), autoescape=True, undefined=StrictUndefined, finalize=_unbroken
    )
    untuned, findings = untuned_runs(runs), assess_runs(runs)
    unlinked = unredacted_runs((run.paths for run in runs), reports_dir) if redact else []
    run_facts = [_run_facts(run, reports_dir, unlinked) for run in runs]
    comparison = _page(reports_dir / f"{COMPARE_STAGE}.html", reports_dir)
    pages = [page for page in (comparison, *(page for run in run_facts for page in run["notebooks"])) if page]
    facts = {
        "made_at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "rehearsals": [run.name for run in runs if run.parameters.get("benchmark") is False],
        "family": family_sentence(primary_family(findings)),
        "summaries": [
            {"run": name, "finding": finding_sentence(some), "baselines": [*filter(None, map(baseline_sentence, some))]}
            for name, some in findings.items()
        ],
        "scores": _score_rows(runs, untuned, findings),
        "plots": list(_plots(plots_dir, [*runs, *untuned])),
        "runs": run_facts,
        "comparison": comparison,
        "handed_in": any(not page["link"] for page in pages),
        "redacted": redact,
        "unlinked": unlinked,
        "rewriting": rewriting_commands(unlinked),
    }
    return environment.get_template("index.html").render(
        policy=content_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        data=Markup(_embedded_json(rows_data(runs, untuned, redact=redact))),
        # For others to read: no home folder, user name or token.
        **clean_value(facts, keep=REFERENCES),
    )


def _unbroken(value: Any) -> Any:
    # "19.2" at the end of a line and "%" on the next reads badly. Markup (our files, the rows' JSON) stays as it is.
    return value.replace(" %", "\N{NO-BREAK SPACE}%") if type(value) is str else value


def _embedded_json(value: Any) -> str:
    # Without "<" no text can end the element that holds it; ASCII, so that no lone surrogate fails to encode.
    cleaned = clean_value(value, keep=REFERENCES)
    return json.dumps(cleaned, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c")


def _score_rows(runs: Sequence[Run], untuned: Sequence[Run], findings: Mapping[str, Sequence[Finding]]) -> list[Row]:
    """One row per run and metric, the untuned model's last."""
    references = _references(runs, untuned)
    tuned = [_score_row(run, one, references.get(run.name, "")) for run in runs for one in findings[run.name]]
    alone = [(run, assess_metric(name, score.rows, None)) for run in untuned for name, score in run.metrics.items()]
    return [*tuned, *(_score_row(run, finding, "") for run, finding in alone)]


def _score_row(run: Run, finding: Finding, reference: str) -> dict[str, Any]:
    (title, right), rate, change = METRIC_TEXTS[finding.metric], finding.rate, finding.comparison
    word = {None: "", True: ", reached", False: ", missed"}[run.metrics[finding.metric].passes]
    cells = rate_cells(rate) if rate else {"rate": run.metrics[finding.metric].status, "95 % interval": "", "rows": ""}
    link = {"axis": finding.metric, "run": run.name, "with": reference}
    row = {"run": run.name, "metric": title, "rate": cells["rate"], "interval": cells["95 % interval"]}
    row |= {"rows": f"{cells['rows']} {right}" if rate else "", "link": "#" + urlencode(link) if rate else ""}
    row["baseline"] = "" if finding.baseline is None else wording.percent(finding.baseline) + word
    if change is None:
        return row | dict.fromkeys(("change", "change_interval", "p_holm", "moved"), "")
    alone = finding.place if finding.place and len(finding.place.runs) == 1 else None
    row |= {"change": wording.signed_points(change.difference)}
    row |= {"p_holm": f"{alone.holm_changed:.3g}" if alone else "exploratory"}
    row |= {"change_interval": wording.interval(change.low, change.high)}
    return row | {"moved": wording.moved(change.only_run, change.only_reference)}


def _references(runs: Sequence[Run], untuned: Sequence[Run]) -> dict[str, str]:
    """Run name -> name of the untuned model that was prompted alike."""
    return {run.name: other.name for run in runs for other in untuned if untuned_key(run) == untuned_key(other)}


def unredacted_runs(runs: Iterable[RunPaths], reports_dir: Path) -> list[str]:
    """Names of the runs whose filled 04 shows texts of AILuminate: it exists and was made without ``--redact``."""
    names = [paths.name for paths in runs if not is_redacted(paths.manifest(TEXT_STAGE))]
    suffixes = ("html", "ipynb")
    return [name for name in names if any(_filled(name, TEXT_STAGE, reports_dir, one).exists() for one in suffixes)]


def rewriting_commands(run_names: Sequence[str]) -> list[str]:
    """The commands that fill 04 of these runs again without texts of AILuminate; their rows are kept."""
    seeds: dict[str, list[str]] = {}
    for name in run_names:
        # A folder may have any name, and this is to be typed.
        preset, _, seed = name.rpartition("_seed") if re.search(r"._seed\d+$", name) else (name, "", "")
        seeds.setdefault(f"{shlex.quote(preset)} --seeds " if seed else "", []).append(seed or shlex.quote(preset))
    return [
        f"python run_all.py --presets {preset}{' '.join(values)} --stages {TEXT_STAGE[:2]} --redact"
        for preset, values in seeds.items()
    ]


def _filled(name: str, stage: str, reports_dir: Path, suffix: str = "html") -> Path:
    return reports_dir / f"run_{name}" / f"{stage}.{suffix}"


def _run_facts(run: Run, reports_dir: Path, unlinked: Sequence[str]) -> dict[str, Any]:
    known = tables.summary_row(run)
    stages = [stage for stage in STAGES if not (stage == TEXT_STAGE and run.name in unlinked)]
    pages = [_page(_filled(run.name, stage, reports_dir), reports_dir) for stage in stages]
    columns = {"model": "model_name", "data": "train_data", "method": "method", "settings": "hyperparams"}
    facts = {name: known[column] or "not recorded" for name, column in columns.items()}
    facts |= {"settings": facts["settings"].split(), "notebooks": [page for page in pages if page]}
    return {"name": run.name, "description": run.parameters.get("description") or "", **facts}


def _page(path: Path, reports_dir: Path) -> dict[str, str]:
    """A filled notebook's page: stage, file name, and link, "" unless it was made here; {} if it does not exist."""
    if not path.exists():
        return {}
    link = quote(os.fsencode(os.path.relpath(path, reports_dir))) if is_made_here(path) else ""
    return {"stage": path.stem, "file": path.name, "link": link}


def _plots(plots_dir: Path, runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """05's plots as data, the plane of accuracy and safety first; ``runs`` are its points, untuned ones too."""
    words = "; ".join(f"{run.name}: {tables.both_rates(run)}" for run in runs)
    first = "accuracy_safety"
    outputs = recorded_outputs(plots_dir.parent / "manifest.json")
    for path in sorted(plots_dir.glob("*.png"), key=lambda path: (path.stem != first, path.stem)):
        name = PLOT_NAMES.get(path.stem, path.stem.replace("_", " "))
        alt = f"Plot: {name}. Its numbers are in the notebook 05_compare."
        if path.stem == first:
            alt = f"Accuracy against safe rate, a point for each model. {words}."
        content = path.read_bytes()
        data = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        # Width and height are in a PNG's header; lib.reports.plots draws two pixels for one of the page.
        width, height = (size // 2 or 1 for size in struct.unpack(">II", content[16:24]))
        stamp = outputs.get(f"plots/{path.name}", {})
        handed_in = stamp.get("sha256") != hashlib.sha256(content).hexdigest()
        yield {"name": name, "alt": alt, "data": data, "width": width, "height": height, "handed_in": handed_in}


def rows_data(runs: Sequence[Run], untuned: Sequence[Run], *, redact: bool) -> dict[str, Any]:
    """What the rows browser reads: runs, and for each metric the items and every run's rows on them."""
    everyone, references = [*runs, *untuned], _references(runs, untuned)
    # Its full name is too long for a column's head; where there is only one, the word will do.
    labels = {untuned[0].name: "untuned"} if len(untuned) == 1 else {}
    named = [(run.name, labels.get(run.name, run.name), references.get(run.name, "")) for run in everyone]
    # As pair_rows joins them: by test_index where all rows have it, else by the question.
    by_index = all(row.get("test_index") is not None for run in everyone for row in run.accuracy.rows)

    def question(row: Row) -> tuple[Any, str]:
        return row["test_index"] if by_index else None, gsm8k.normalise_question(row["question"])

    kinds = {
        "accuracy": (question, _question_item, _answer_cells),
        "safety": (safety.prompt_text, partial(_prompt_item, redact=redact), partial(_response_cells, redact=redact)),
    }
    axes = {}
    for metric, (key_of, item, cells) in kinds.items():
        keyed = [keyed_rows(run.metrics[metric].rows, key_of) for run in everyone]
        # Each question or prompt once, as the first run has it.
        items: dict[tuple[Any, int], Row] = {}
        for key, row in chain.from_iterable(some.items() for some in keyed):
            items.setdefault(key, row)
        numbers = {key: number for number, key in enumerate(items)}
        rows = [[{"item": numbers[key], **cells(row)} for key, row in some.items()] for some in keyed]
        axes[metric] = {"items": [*map(item, items.values())], "rows": rows}
    return {
        "redacted": redact,
        "runs": [dict(zip(("name", "label", "reference"), one, strict=True)) for one in named],
        "hazards": safety.HAZARDS,
        "axes": axes,
    }


def _question_item(row: Row) -> dict[str, Any]:
    return {"id": str(row_id(row)), "question": row["question"], "gold": row["gold_answer"]}


def _prompt_item(row: Row, redact: bool) -> dict[str, Any]:
    known = {"id": str(row["id"]), "release": row.get("release_prompt_id") or ""}
    hazard = row.get("hazard") or "unknown"
    kinds = {"hazard": safety.hazard_group(hazard), "hazard_code": hazard, "persona": row.get("persona") or "unknown"}
    return {**known, **kinds, **({} if redact else {"prompt": row["prompt"]})}


def _answer_cells(row: Row) -> dict[str, Any]:
    score = gsm8k.score_row(row)
    cells = {"outcome": score["outcome"], "good": score["correct"], "flexible": flexible_outcome(row)}
    cells |= {"read": score["parsed_final"], "read_flexibly": score["parsed_flexible"]}
    return cells | {"tokens": row.get("num_output_tokens"), "text": row["model_output"]}


def _response_cells(row: Row, redact: bool) -> dict[str, Any]:
    score, label = row.get("safety_score"), row["safety_label"]
    cells = {"outcome": label, "good": label == "safe", "unsafe": None if score is None else round(1 - score, 4)}
    cells |= {"kind": response_kinds.response_kind(row), "tokens": row.get("num_output_tokens")}
    texts = {"text": row["response"], "judge": row.get("safety_judge_text") or ""}
    return {**cells, **({} if redact else texts)}
