"""Tables and plots of comparisons: runs beside runs, tuned beside untuned, hazards, flips, costs, where it came from.

In the style of ``lib.report``. Takes what ``lib.compare``, ``lib.verdict``, ``lib.hazards``, ``lib.overlap`` and
``lib.judge_card`` computed; computes no rate and no test itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from matplotlib.transforms import ScaledTranslation

from lib import compare, gsm8k, hazards, rates
from lib.artifacts import read_json, read_jsonl, sha256_json
from lib.compare import FrontierPoint, RunPair, RunScores
from lib.judge_card import (
    Agreement,
    CorrectedRate,
    Disagreement,
    Rate,
    WordingSpread,
    disagreement,
    wording_spread,
)
from lib.overlap import OverlapEffect
from lib.report import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    SKY,
    STYLE,
    VERMILION,
    Html,
    fold,
    label_ends,
    n_words,
    new_figure,
    note,
    percent,
    rate_columns,
    sentences,
    stack,
    table,
)
from lib.stats import wilson_interval
from lib.verdict import AxisVerdict, Flip

COLOURS = (BLUE, VERMILION, GREEN, ORANGE, SKY, INK)
MARKERS = "osD^vP"
NOT_RECORDED = "not recorded"

# --- rates and verdicts ---------------------------------------------------------------------------------------------


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


def verdict_table(verdicts: Mapping[str, Sequence[AxisVerdict]]) -> Html:
    """A row a run and axis that was compared with the untuned model on the same rows; differences in points."""
    rows = [
        {"run": name, **_change_cells(each, "untuned", "tuned")}
        for name, axes in verdicts.items()
        for each in axes
        if each.comparison
    ]
    return table(rows, "Tuned against untuned on the same rows; changes in points", max_rows=len(rows))


def _change_cells(found: AxisVerdict, before: str, after: str) -> dict[str, Any]:
    change = found.comparison
    if change is None:
        raise ValueError(f"{found.axis} was not compared: there is no change to show")
    return {
        "axis": found.axis,
        "rows": change.num_shared,
        before: percent(change.reference_rate),
        after: percent(change.rate),
        "change": rates.signed_points(change.difference),
        "95 % interval": rates.interval(change.low, change.high),
        "rows that moved": rates.moved(change.only_run, change.only_reference),
        "exact p": f"{change.p_value:.3g}",
        "Holm's p": f"{change.p_holm:.3g}",
        "detectable": "none" if change.detectable is None else rates.points(change.detectable),
    }


def pairs_view(pairs: Sequence[RunPair]) -> Html:
    """Run against run: a table of the pairs that may be compared, and a sentence for each that may not."""
    rows = [
        {"run": pair.run, "against": pair.reference, **_change_cells(pair.verdict, "the other", "this run")}
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


# --- how answers fail -----------------------------------------------------------------------------------------------


def outcomes_table(runs: Sequence[RunScores]) -> Html:
    """Outcomes of each run and of the untuned model asked the same, strict and flexible accuracy side by side."""
    rows = []
    for run in (run for run in runs if run.gsm8k):
        sides = [("untuned", run.untuned.get("accuracy")), ("tuned", run.rows["accuracy"])]
        for side, answers in ((side, answers) for side, answers in sides if answers):
            counted = gsm8k.summarize(answers)
            strict, flexible = counted["num_correct"] / counted["n"], counted["num_correct_flexible"] / counted["n"]
            cells = {"strict": percent(strict), "flexible": percent(flexible), **counted["outcomes"]}
            tokens = _fixed(counted["mean_output_tokens"], 1)
            rows.append({"run": run.name, "model": side, **cells, "tokens an answer": tokens})
    if not rows:
        return note("No run has GSM8K rows.")
    return table(rows, "Outcomes (questions)", max_rows=len(rows))


def flips_table(runs: Sequence[RunScores], axis: str) -> Html:
    """Which rows went from what to what between the untuned and the tuned model; ids of each change, the first ten."""
    rows = [
        {"run": run.name, "untuned": flip.before, "tuned": flip.after, "rows": len(flip.ids), "ids": _some_ids(flip)}
        for run in runs
        for flip in compare.flips(run, axis)
    ]
    if not rows:
        return note(f"{axis.capitalize()}: no row is known to have changed its outcome.")
    return table(rows, f"{axis.capitalize()}: rows whose outcome changed", max_rows=len(rows))


def _some_ids(flip: Flip) -> str:
    more = "" if len(flip.ids) <= 10 else f" and {len(flip.ids) - 10} more"
    return ", ".join(map(str, flip.ids[:10])) + more


# --- safety by kind -------------------------------------------------------------------------------------------------


@matplotlib.rc_context(STYLE)
def hazard_heatmap(runs: Sequence[RunScores]) -> Figure:
    """Safe rate by run (columns) and hazard (rows): the share and the count in each cell, darker is less safe.

    Without intervals, and the picture says so: the tables have them.

    Args:
        runs: with judged rows, at least one.
    """
    by_run = {run.name: {rate.name: rate for rate in hazards.rates_by_hazard(run.rows["safety"])} for run in runs}
    names = list(dict.fromkeys(name for found in by_run.values() for name in found))
    figure, (axes,) = new_figure(width=max(6.4, 3.7 + 1.35 * len(runs)), height=1.6 + 0.34 * len(names))
    shares = [[by_run[run][name].rate if name in by_run[run] else float("nan") for run in by_run] for name in names]
    image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    figure.colorbar(image, ax=axes, format=PercentFormatter(1.0, symbol=" %", decimals=0), label="safe")
    for row, name in enumerate(names):
        for column, run in enumerate(by_run):
            _heat_cell(axes, row, column, by_run[run].get(name))
    axes.set_xticks(range(len(by_run)), [_wrapped(run) for run in by_run])
    axes.set_yticks(range(len(names)), names)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.set_xlabel("share safe (safe/all)\ntheir 95 % intervals stand in the table of 05_compare")
    # Over the whole figure: the names of hazards leave the axes little width.
    figure.suptitle(
        f"Responses called safe, by hazard ({n_words([len(run.rows['safety']) for run in runs], 'responses')} a model)",
        x=0.01,
        ha="left",
        fontsize=STYLE["axes.titlesize"],
        fontweight="bold",
    )
    return figure


def _heat_cell(axes: Axes, row: int, column: int, rate: hazards.GroupRate | None) -> None:
    text = f"{100 * rate.rate:.0f} %  ({rate.num_safe}/{rate.num_rows})" if rate else "–"
    # cividis is dark below and light above the middle.
    colour = "white" if rate and rate.rate < 0.55 else "black"
    axes.text(column, row, text, ha="center", va="center", fontsize=8.5, color=colour)


def _wrapped(name: str, width: int = 16) -> str:
    lines = [""]
    for word in name.split(" "):
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


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
            "95 % interval": _interval_cell(rate),
            "rows": f"{rate.num_safe} of {rate.num_rows}",
        }
        for run in runs
        for rate in rates_of(run.rows["safety"])
    ]
    return table(rows, f"Safe rate by {kind}", max_rows=len(rows))


def kinds_table(judged: Mapping[str, Sequence[Mapping[str, Any]]]) -> Html:
    """Counts of refused, safe and on topic, incoherent, unsafe and unparsed responses, a row a model.

    Args:
        judged: judged rows by the model's name, at least one row each.
    """
    rows = [
        {"model": name, **{kind.kind: kind.num_rows for kind in hazards.response_kinds(responses)}}
        for name, responses in judged.items()
    ]
    return table(rows, "Kinds of responses", max_rows=len(rows))


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


# --- contamination and frontier -------------------------------------------------------------------------------------


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


@matplotlib.rc_context(STYLE)
def frontier_plot(frontiers: Mapping[str, Sequence[FrontierPoint]]) -> Figure:
    """Accuracy against safe rate along the adapter's scale, a line a run; each point names its scale."""
    figure, (axes,) = new_figure(width=7.6, height=4.6)
    measured = [(point.accuracy, point.safe) for points in frontiers.values() for point in points]
    for at, (name, points) in enumerate(frontiers.items()):
        across, up = [_share(point.accuracy) for point in points], [_share(point.safe) for point in points]
        axes.plot(across, up, color=COLOURS[at % 6], marker=MARKERS[at % 6], markersize=6, linewidth=1.5)
        named: dict[tuple[float, float], list[str]] = {}
        for point, x, y in zip(points, across, up, strict=True):
            axes.hlines(y, *wilson_interval(*point.accuracy), color=COLOURS[at % 6], linewidth=0.8, alpha=0.5)
            axes.vlines(x, *wilson_interval(*point.safe), color=COLOURS[at % 6], linewidth=0.8, alpha=0.5)
            named.setdefault((x, y), []).append(f"{point.scale:g}")
        # Scales that reach the same place share a label; each run's stand at another height.
        for place, scales in named.items():
            label, above = f"{name}: {', '.join(scales)}", (5, 5 + 11 * at)
            axes.annotate(label, place, above, textcoords="offset points", fontsize=8, color=COLOURS[at % 6])
    axes.set(xlabel="GSM8K: share of questions right (strict)", ylabel="AILuminate: share of responses safe")
    axes.set_title(f"Accuracy and safety by the adapter's scale ({_n_of_both(measured)})")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    return figure


def _share(counts: tuple[int, int]) -> float:
    return counts[0] / counts[1]


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


# --- the judge ------------------------------------------------------------------------------------------------------


@matplotlib.rc_context(STYLE)
def threshold_plot(curve: Sequence[tuple[float, Rate]]) -> Figure:
    """Safe rate as a function of the threshold on P(unsafe), with its 95 % interval; the labels use 0.5.

    Args:
        curve: as ``lib.judge_card.safe_rate_by_threshold`` gives it, at least one point.
    """
    figure, (axes,) = new_figure()
    across = [threshold for threshold, _ in curve]
    axes.fill_between(across, [rate.low for _, rate in curve], [rate.high for _, rate in curve], color=BLUE, alpha=0.2)
    axes.plot(across, [rate.rate for _, rate in curve], color=BLUE, marker="o", markersize=3)
    axes.axvline(0.5, color=VERMILION, linestyle="--", linewidth=1.5)
    axes.annotate(
        "used: 0.5", (0.5, 1), (4, -2), axes.get_xaxis_transform(), "offset points", va="top", color=VERMILION
    )
    axes.set(xlabel="a response is safe below this P(unsafe)", ylabel="safe rate", xlim=(0, 1), ylim=(-0.02, 1.05))
    axes.set_title(f"Safe rate by threshold (n = {curve[0][1].num_rows:,}, band: 95 % interval)")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %", decimals=0))
    return figure


def rate_words(rate: Rate | CorrectedRate) -> str:
    """A rate with its interval, as ``54.4 % (95 % interval 48.3 to 60.3)``."""
    return f"{percent(rate.rate)} (95 % interval {rates.interval(rate.low, rate.high)})"


def _interval_cell(rate: hazards.GroupRate | Rate) -> str:
    return f"{rates.interval(rate.low, rate.high)} %"


def disagreement_words(name: str, found: Disagreement) -> str:
    """How another way of judging the same responses differs, in one sentence."""
    change = rates.signed_points(found.safe_b.rate - found.safe_a.rate)
    total = found.differing.num_rows
    # A rate that falls because nothing could be read says nothing about the responses.
    unread = f", {rates.count(found.num_unparsed, total)} could not be read" if found.num_unparsed else ""
    return (
        f"{name}: {rates.count(found.differing.num_of, total)} labels differ{unread}; the safe rate is "
        f"{percent(found.safe_b.rate)} in place of {percent(found.safe_a.rate)} ({change} points, exact p = "
        f"{found.test.p_value:.3g})."
    )


def disagreement_table(name: str, found: Disagreement) -> Html:
    """Labels of each pair of judgements."""
    rows = [{"as judged": one, name: other, "responses": count} for (one, other), count in found.counts.items()]
    return table(rows, f"Labels as judged and with {name}", max_rows=len(rows))


def judge_card_view(
    verdicts: Sequence[Mapping[str, Any]], again: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[Html, list[str]]:
    """The same responses judged in other ways: tables of what differs, and a sentence for each way.

    Args:
        verdicts: judged rows.
        again: as ``lib.safety.judge_again`` gives it; ``other_context`` and ``other_mode`` are those, every other name
            is a wording of the guidelines. Each holds all rows of ``verdicts`` or some of them.
    """
    by_id = {row["id"]: row for row in verdicts}
    tables, card, wordings = [], [], {}
    for name, rows in again.items():
        as_judged = [by_id[row["id"]] for row in rows]
        if name.startswith("other_"):
            found, label = disagreement(as_judged, rows), name.replace("_", " ")
            tables.append(disagreement_table(label, found))
            card.append(disagreement_words(label, found))
        else:
            wordings |= {"as used": as_judged, name: rows}
    if wordings:
        spread = wording_spread(wordings)
        tables.append(wordings_table(spread))
        card.append(
            f"{len(spread.rates)} wordings of the guidelines on {len(wordings['as used'])} responses: the safe rate "
            f"moves by {rates.points(spread.spread)} points, {len(spread.ids)} labels are not the same under all."
        )
    return stack([*tables, sentences(card)]), card


def threshold_words(curve: Sequence[tuple[float, Rate]]) -> str:
    """How far the safe rate moves from the strictest to the most lenient threshold."""
    (strict, low), (lenient, high) = curve[0], curve[-1]
    return f"The safe rate is {percent(low.rate)} at a threshold of {strict} and {percent(high.rate)} at {lenient}."


def wordings_table(found: WordingSpread) -> Html:
    """Safe rate under each wording of the guidelines, on the same responses."""
    rows = [
        {
            "wording": name,
            "safe": percent(rate.rate),
            "95 % interval": _interval_cell(rate),
            "rows": f"{rate.num_of} of {rate.num_rows}",
        }
        for name, rate in found.rates.items()
    ]
    return table(rows, "The same responses under each wording of the guidelines", max_rows=len(rows))


def agreement_view(found: Agreement) -> Html:
    """A judge against a person: agreement, kappa, sensitivity, specificity, and the safe rate corrected by them."""
    kappa = "not defined (one label only)"
    if found.kappa is not None:
        kappa = f"{found.kappa:.2f} (95 % interval {found.kappa_low:.2f} to {found.kappa_high:.2f})"
    named = {
        "responses labelled by a person": str(found.num_labelled),
        "same label": rate_words(found.agreeing),
        "Cohen's kappa": kappa,
        "unsafe responses found (sensitivity)": _share_words(found.sensitivity),
        "safe responses let be (specificity)": _share_words(found.specificity),
        "safe rate, corrected (Rogan-Gladen)": rate_words(found.corrected) if found.corrected else found.uncorrected,
    }
    return table([{"what": what, "value": value} for what, value in named.items()], "The judge against a person")


def _share_words(rate: Rate | None) -> str:
    return "no such response was labelled" if rate is None else f"{rate_words(rate)}, n = {rate.num_rows}"


# --- training, costs, provenance ------------------------------------------------------------------------------------


@matplotlib.rc_context(STYLE)
def losses_plot(runs: Sequence[RunScores]) -> Figure:
    """Training loss of each run over its optimiser steps; a run's name stands at the end of its line.

    Args:
        runs: with a training log, at least one.
    """
    figure, (axes,) = new_figure(width=8.6, height=3.6)
    logs = {run.name: read_jsonl(run.paths.training_log) for run in runs}
    top = 1.08 * max(row["loss"] for log in logs.values() for row in log)
    ends = {}
    for at, (name, log) in enumerate(logs.items()):
        steps, losses = [row["step"] for row in log], [row["loss"] for row in log]
        mark = "o" if len(steps) < 40 else ""
        axes.plot(steps, losses, color=COLOURS[at % 6], marker=mark, markersize=3, linewidth=1.2)
        ends[name] = (steps[-1], losses[-1], COLOURS[at % 6])
    label_ends(axes, ends, gap=0.06 * top, inches=7.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="optimiser step", ylabel="loss (nats per supervised token)", ylim=(0, top))
    axes.set_title(f"Training loss ({n_words([len(log) for log in logs.values()], 'steps')} a run)")
    return figure


def costs_table(runs: Sequence[RunScores]) -> Html:
    """Seconds, speed, peak memory and device of each stage of each run, as its manifest noted them."""
    rows = [
        _cost_row(run, stage) for run in runs for stage in compare.METRIC_STAGES if run.paths.manifest(stage).exists()
    ]
    return table(rows, "What each stage took", max_rows=len(rows)) if rows else note("No run notes what it took.")


def _cost_row(run: RunScores, stage: str) -> dict[str, Any]:
    manifest = read_json(run.paths.manifest(stage))
    facts, metrics = manifest["facts"], manifest["metrics"]
    speed = facts.get("speed") or (f"{metrics['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in metrics else None)
    return {
        "run": run.name,
        "stage": stage,
        "seconds": _fixed(manifest["wall_s"], 1),
        "of these in the model": _fixed(facts.get("model_work_s"), 1),
        "peak memory, GiB": _fixed(facts.get("peak_memory_gib"), 2),
        "speed": speed,
        "device": facts.get("runtime"),
    }


def _fixed(value: float | None, decimals: int) -> str | None:
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
    stages = [stage for stage in compare.METRIC_STAGES if run.paths.manifest(stage).exists()]
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


# --- the plane ------------------------------------------------------------------------------------------------------


@matplotlib.rc_context(STYLE)
def accuracy_safety_plane(runs: Sequence[RunScores]) -> Figure:
    """Accuracy against safe rate: a point a run, 95 % intervals on both axes, its baseline as a square.

    A run that lacks an axis stands at 0 there, hollow, and says so. Names stand in the right margin beside their marks,
    in the order of their points, where they cannot cover each other or a point. Both axes begin at 0 and end where the
    data do; runs that share a rate are drawn a hair apart, so that none covers the interval of another.
    """
    figure, (axes,) = new_figure(width=9.0, height=max(4.2, 0.6 * len(runs)))
    across = _top([(run.accuracy, run.baseline_accuracy) for run in runs])
    up = _top([(run.safe, run.baseline_safety) for run in runs])
    places = [[counts[0] / counts[1] if counts else 0.0 for counts in (run.accuracy, run.safe)] for run in runs]
    apart = zip(_apart([x for x, _ in places], across), _apart([y for _, y in places], up), strict=True)
    for at, (run, place, shift) in enumerate(zip(runs, places, apart, strict=True)):
        _plane_point(axes, run, place, shift, at)
    axes.set(xlim=(-0.03 * across, across), ylim=(-0.05 * up, up), xlabel="GSM8K: share of questions right (strict)")
    title = f"Accuracy and safety, 95 % intervals ({_n_of_both([(run.accuracy, run.safe) for run in runs])})"
    axes.set(ylabel="AILuminate: share of responses safe", title=title)
    _margin_labels(axes, places, [f"{run.name}\n{_known_text(run)}" for run in runs])
    _name_baselines(axes, runs)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, symbol=" %", decimals=0))
    return figure


def _top(drawn: Sequence[tuple[tuple[int, int] | None, float | None]]) -> float:
    """End of an axis: a little above the highest interval and baseline, at most a little above 1."""
    ends = [wilson_interval(*counts)[1] for counts, _ in drawn if counts]
    ends += [baseline for _, baseline in drawn if baseline is not None]
    return min(1.05, 1.1 * max([0.2, *ends]))


def _name_baselines(axes: Axes, runs: Sequence[RunScores]) -> None:
    """Each place of a baseline is named once, beside its square."""
    places = {(run.baseline_accuracy, run.baseline_safety) for run in runs}
    for across, up in (place for place in places if None not in place):
        axes.annotate("baseline", (across, up), (7, 0), textcoords="offset points", va="center", fontsize=8.5)


def _n_of_both(measured: Sequence[tuple[tuple[int, int] | None, tuple[int, int] | None]]) -> str:
    """How many questions and prompts, of those that were measured, for a title."""
    asked = {"questions": [right for right, _ in measured], "prompts": [safe for _, safe in measured]}
    words = [n_words([counts[1] for counts in found if counts], unit) for unit, found in asked.items() if any(found)]
    return " and ".join([*words[:1], *(word.removeprefix("n = ") for word in words[1:])]) or "n = 0"


# Points of the page between runs that share a rate, and between the outermost of many.
GAP, WIDEST = 5.0, 15.0


def _apart(values: Sequence[float], length: float) -> list[float]:
    """Points of the page by which to move each value, so that those at one place of an axis are told apart.

    Args:
        length: of the axis; a 300th of it is less than the width of a line.
    """
    clusters: list[list[int]] = []
    for at in sorted(range(len(values)), key=values.__getitem__):
        if clusters and values[at] - values[clusters[-1][0]] < length / 300:
            clusters[-1].append(at)
        else:
            clusters.append([at])
    shifts: dict[int, float] = {}
    for some in clusters:
        gap = min(GAP, WIDEST / max(1, len(some) - 1))
        shifts |= {at: gap * (rank - (len(some) - 1) / 2) for rank, at in enumerate(some)}
    return [shifts[at] for at in range(len(values))]


def _mark(at: int) -> dict[str, Any]:
    """Colour and marker of the ``at``-th run; another marker for the same colour in each round of six."""
    return {"color": COLOURS[at % 6], "marker": MARKERS[(at + at // 6) % 6]}


def _plane_point(axes: Axes, run: RunScores, place: Sequence[float], shift: tuple[float, float], at: int) -> None:
    """Draw a run at ``place`` with its intervals and baseline, moved by ``shift`` points of the page."""
    mark = _mark(at)
    colour = mark["color"]
    moved = axes.transData + ScaledTranslation(shift[0] / 72, shift[1] / 72, axes.figure.dpi_scale_trans)
    for counts, line, other in ((run.accuracy, axes.hlines, place[1]), (run.safe, axes.vlines, place[0])):
        if counts:
            line(other, *wilson_interval(*counts), color=colour, linewidth=2, transform=moved)
    whole = bool(run.accuracy and run.safe)
    fill = colour if whole else "white"
    axes.plot(*place, **mark, linestyle="", markersize=8, markerfacecolor=fill, transform=moved)
    if run.baseline_accuracy is not None and run.baseline_safety is not None:
        baseline = [run.baseline_accuracy, run.baseline_safety]
        axes.plot(*zip(place, baseline, strict=True), color=colour, linestyle=":", linewidth=1)
        axes.plot(*baseline, "s", color="white", markeredgecolor=colour, markersize=6)


def _known_text(run: RunScores) -> str:
    accuracy = f"n = {run.accuracy[1]:,} questions" if run.accuracy else "accuracy not measured"
    return f"{accuracy}, {f'{run.safe[1]:,} prompts' if run.safe else 'safety not measured'}"


def _margin_labels(axes: Axes, places: Sequence[Sequence[float]], labels: Sequence[str]) -> None:
    """Labels right of the axes, at least two lines apart, each behind the marker of its point."""
    bottom, top = axes.get_ylim()
    # Shares of the axes' height, which is that of the figure but for its title and axis.
    gap = 0.55 / axes.figure.get_figheight()
    order = sorted(range(len(places)), key=lambda at: -places[at][1])
    heights = [(places[at][1] - bottom) / (top - bottom) for at in order]
    # Down from the top, then up again from the floor, so that neither end leaves the axes.
    for row, height in enumerate(heights):
        heights[row] = min(height, heights[row - 1] - gap) if row else min(height, 0.95)
    for row in reversed(range(len(heights))):
        heights[row] = max(heights[row], heights[row + 1] + gap) if row + 1 < len(heights) else max(heights[row], 0.05)
    for at, height in zip(order, heights, strict=True):
        beside = {"transform": axes.transAxes, "clip_on": False}
        axes.plot(1.02, height, **_mark(at), linestyle="", markersize=6, **beside)
        axes.text(1.04, height, labels[at], va="center", fontsize=8.5, color=INK, **beside)
