"""Tables of the comparison."""

from collections.abc import Mapping, Sequence
from typing import Any

from lib import gsm8k
from lib.compare import comparison
from lib.compare.comparison import FrontierPoint, RunPair
from lib.compare.findings import Flip
from lib.compare.runs import METRIC_STAGES, RunScores
from lib.evaluate import hazards
from lib.prepare.overlap import OverlapEffect
from lib.record.files import read_json, sha256_json
from lib.reports.html import Html, fold, note, stack, table
from lib.reports.judge_tables import interval_cell
from lib.reports.tables import change_cells, rate_columns
from lib.wording import percent

NOT_RECORDED = "not recorded"


def scores_table(runs: Sequence[RunScores]) -> Html:
    """A row a run and axis: rate, interval, count, baseline and whether it is reached."""
    rows = []
    for run in runs:
        for axis, counts, status, baseline in (
            ("accuracy", run.accuracy, run.gsm8k_status, run.baseline_accuracy),
            ("safety", run.safe, run.safety_status, run.baseline_safety),
        ):
            cells = rate_columns(*counts) if counts else {"rate": status, "95 % interval": None, "rows": None}
            reached = bool(counts) and baseline is not None and counts[0] / counts[1] >= baseline
            verdict = "no baseline" if baseline is None else "reached" if reached else "missed"
            shown = None if baseline is None else percent(baseline)
            rows.append({"run": run.name, "axis": axis, **cells, "baseline": shown, "verdict": verdict})
    return table(rows, "Accuracy on GSM8K and safe rate on AILuminate", max_rows=len(rows))


def pairs_view(pairs: Sequence[RunPair]) -> Html:
    """Run against run: a table of the pairs that may be compared, and a sentence for each that may not."""
    rows = [
        {"run": pair.run, "against": pair.reference, **change_cells(pair.verdict, "the other", "this run")}
        for pair in pairs
        if pair.verdict
    ]
    parts = (
        [table(rows, "Run against run on the rows both have; changes in points", max_rows=len(rows))] if rows else []
    )
    refused = [f"{pair.run} against {pair.reference}, {pair.axis}: {pair.refused}" for pair in pairs if pair.refused]
    told = [
        f"{pair.run} against {pair.reference}, {pair.axis}, compared although {'; '.join(pair.told)}."
        for pair in pairs
        if pair.verdict and pair.told
    ]
    parts += [note(text, strong=True) for text in refused] + [note(text) for text in told]
    return stack(parts or [note("There are no two runs to compare.")])


def outcomes_table(runs: Sequence[RunScores]) -> Html:
    """Outcomes of each run and of the untuned model asked the same, strict and flexible accuracy side by side."""
    rows = []
    for run in (run for run in runs if run.gsm8k):
        sides = [("untuned", run.untuned.get("accuracy")), ("tuned", run.rows["accuracy"])]
        for side, answers in ((side, answers) for side, answers in sides if answers):
            counted = gsm8k.summarize(answers)
            strict, flexible = counted["num_correct"] / counted["n"], counted["num_correct_flexible"] / counted["n"]
            cells = {"strict": percent(strict), "flexible": percent(flexible), **counted["outcomes"]}
            tokens = fixed(counted["mean_output_tokens"], 1)
            rows.append({"run": run.name, "model": side, **cells, "tokens an answer": tokens})
    if not rows:
        return note("No run has GSM8K rows.")
    return table(rows, "Outcomes (questions)", max_rows=len(rows))


def flips_table(runs: Sequence[RunScores], axis: str) -> Html:
    """Which rows went from what to what between the untuned and the tuned model; ids of each change, the first ten."""
    rows = [
        {"run": run.name, "untuned": flip.before, "tuned": flip.after, "rows": len(flip.ids), "ids": _some_ids(flip)}
        for run in runs
        for flip in comparison.flips(run, axis)
    ]
    if not rows:
        return note(f"{axis.capitalize()}: no row is known to have changed its outcome.")
    return table(rows, f"{axis.capitalize()}: rows whose outcome changed", max_rows=len(rows))


def _some_ids(flip: Flip) -> str:
    more = "" if len(flip.ids) <= 10 else f" and {len(flip.ids) - 10} more"
    return ", ".join(map(str, flip.ids[:10])) + more


def groups_table(runs: Sequence[RunScores], kind: str) -> Html:
    """Safe rate of each hazard or persona of each run with its 95 % interval (equal prompts as clusters).

    Args:
        kind: ``hazard`` or ``persona``.
    """
    rates_of = hazards.rates_by_hazard if kind == "hazard" else hazards.rates_by_persona
    rows = [
        {
            "run": run.name,
            kind: rate.name,
            "safe": percent(rate.rate),
            "95 % interval": interval_cell(rate),
            "rows": f"{rate.num_safe} of {rate.num_rows}",
        }
        for run in runs
        for rate in rates_of(run.rows["safety"])
    ]
    return table(rows, f"Safe rate by {kind}", max_rows=len(rows))


def grades_table(runs: Sequence[RunScores]) -> Html:
    """Grades in the style of AILuminate: a row a hazard and ``Overall``, a column a run.

    Behind each grade stand, where they differ, the grades at the ends of the 95 % interval.
    """
    by_run = {run.name: {grade.name: grade for grade in hazards.grades(run.rows["safety"])} for run in runs}
    names = list(dict.fromkeys(name for found in by_run.values() for name in found))
    if not names:
        return note("No grades: no row names its hazard.")
    rows = [
        {"hazard": name, **{run: _grade_words(found[name]) if name in found else None for run, found in by_run.items()}}
        for name in names
    ]
    return table(rows, f"Grades, {hazards.GRADE_LABEL}", max_rows=len(rows))


def _grade_words(found: hazards.GradeRow) -> str:
    return found.grade if found.worst == found.best else f"{found.grade} ({found.worst} to {found.best})"


def clean_table(effects: Mapping[str, Sequence[OverlapEffect]]) -> Html:
    """Accuracy of each run without the questions that share 8, 10 or 13 words in a row with training rows."""
    rows = []
    for name, found in effects.items():
        for effect in found:
            clean = effect.clean
            counts = rate_columns(clean.num_correct, clean.num_rows) if clean.num_rows else {"rate": "no rows left"}
            shared = f"{effect.num_overlapping} ({percent(effect.share)})"
            rows.append({"run": name, "words in a row": effect.size, "questions that share them": shared, **counts})
    return table(rows, "Accuracy on the questions that share nothing", max_rows=len(rows))


def frontier_table(frontiers: Mapping[str, Sequence[FrontierPoint]]) -> Html:
    """Both rates at each scale of each run's adapter."""
    rows = []
    for name, points in frontiers.items():
        for point in points:
            right, safe = rate_columns(*point.accuracy), rate_columns(*point.safe)
            cells = {"accuracy": right["rate"], "its interval": right["95 % interval"]}
            cells |= {"safe": safe["rate"], "interval of safe": safe["95 % interval"]}
            rows.append({"run": name, "scale": f"{point.scale:g}", **cells})
    return table(rows, "Rates by scale of the adapter; 0 is the untuned model", max_rows=len(rows))


def costs_table(runs: Sequence[RunScores]) -> Html:
    """Seconds, speed, peak memory and device of each stage of each run, as its manifest noted them."""
    rows = [_cost_row(run, stage) for run in runs for stage in METRIC_STAGES if run.paths.manifest(stage).exists()]
    return table(rows, "What each stage took", max_rows=len(rows)) if rows else note("No run notes what it took.")


def _cost_row(run: RunScores, stage: str) -> dict[str, Any]:
    manifest = read_json(run.paths.manifest(stage))
    facts, metrics = manifest["facts"], manifest["metrics"]
    speed = facts.get("speed") or (f"{metrics['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in metrics else None)
    return {
        "run": run.name,
        "stage": stage,
        "seconds": fixed(manifest["wall_s"], 1),
        "of these in the model": fixed(facts.get("model_work_s"), 1),
        "peak memory, GiB": fixed(facts.get("peak_memory_gib"), 2),
        "speed": speed,
        "device": facts.get("runtime"),
    }


def fixed(value: float | None, decimals: int) -> str | None:
    return None if value is None else f"{value:,.{decimals}f}"


# What a reader asks first of rows that every run made alike; the rest is folded.
MAIN_FIELDS = ("base model", "quantization", "dtype", "device", "decoding", "judge", "judge decoding", "commit")


def provenance_view(runs: Sequence[RunScores]) -> Html:
    """What made the rows of each run, hashes by their first 12 digits: what differs between runs, then what they share.

    A field that is the same wherever a run records it stands once, else once for each axis or stage.
    """
    fields = _fields({run.name: _provenance(run) for run in runs})
    differing = {name: values for name, values in fields.items() if len(set(values.values())) > 1}
    shared = {name: next(iter(values.values())) for name, values in fields.items() if name not in differing}
    main = {name: value for name, value in shared.items() if name.partition(" (")[0] in MAIN_FIELDS}
    rest = [_shared_row(name, value) for name, value in shared.items() if name not in main]
    parts = []
    if differing:
        rows = [{"field": name, **values} for name, values in differing.items()]
        parts.append(table(rows, "Fields in which the runs differ", max_rows=len(rows)))
    elif len(runs) > 1:
        parts.append(note("The runs differ in no field that they record."))
    if main:
        caption = "Shared by every run" if len(runs) > 1 else "Where the rows come from"
        parts.append(table([_shared_row(*field) for field in main.items()], caption, max_rows=len(main)))
    if rest:
        folded = table(rest, max_rows=len(rest))
        parts.append(fold(f"{len(rest)} more fields: hashes and versions", folded))
    return stack(parts or [note("No run notes where its rows come from.")])


def _shared_row(name: str, value: str) -> dict[str, str]:
    return {"field": name, "value": value}


def _provenance(run: RunScores) -> dict[str, dict[str, str]]:
    """Field -> axis or stage -> value."""
    fields: dict[str, dict[str, str]] = {}
    for axis, protocol in run.protocols.items():
        for name, value in protocol.items():
            # Packages by their names; what is not recorded is no mapping.
            found = value if name == "versions" and value else {name: value}
            for each, told in found.items():
                fields.setdefault(each, {})[axis] = _short(told)
    stages = [stage for stage in METRIC_STAGES if run.paths.manifest(stage).exists()]
    commits = {stage: read_json(run.paths.manifest(stage))["git_commit"][:12] for stage in stages}
    return fields | ({"commit": commits} if commits else {})


def _fields(recorded: Mapping[str, Mapping[str, Mapping[str, str]]]) -> dict[str, dict[str, str]]:
    """Field -> run -> value, a field being split by axis or stage where one of the runs has several values for it."""
    fields: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(name for found in recorded.values() for name in found):
        parts = {run: found.get(name, {}) for run, found in recorded.items()}
        if all(len(set(values.values())) <= 1 for values in parts.values()):
            fields[name] = {run: next(iter(values.values()), NOT_RECORDED) for run, values in parts.items()}
            continue
        for part in dict.fromkeys(part for values in parts.values() for part in values):
            fields[f"{name} ({part})"] = {run: values.get(part, NOT_RECORDED) for run, values in parts.items()}
    return fields


def _short(value: Any) -> str:
    if isinstance(value, list):
        # 04 records the hash of each file of an adapter, 03 the hash of that list.
        value = sha256_json(value)
    text = NOT_RECORDED if value is None else str(value)
    return text[:12] if len(text) == 64 and text.isalnum() else text
