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

from lib import compare, gsm8k, hazards
from lib.artifacts import read_json, read_jsonl
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
            verdict = "no baseline" if baseline is None else "pass" if reached else "fail"
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
        "change": f"{100 * change.difference:+.1f}",
        "95 % interval": f"{100 * change.low:+.1f} to {100 * change.high:+.1f}",
        f"only {after}": change.only_run,
        f"only {before}": change.only_reference,
        "exact p": f"{change.p_value:.3g}",
        "Holm's p": f"{change.p_holm:.3g}",
        "detectable": "none" if change.detectable is None else f"{100 * change.detectable:.1f}",
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
            rows.append({"run": run.name, "model": side, **cells, "tokens an answer": counted["mean_output_tokens"]})
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

    Args:
        runs: with judged rows, at least one.
    """
    rates = {run.name: {rate.name: rate for rate in hazards.rates_by_hazard(run.rows["safety"])} for run in runs}
    names = list(dict.fromkeys(name for found in rates.values() for name in found))
    figure, (axes,) = new_figure(width=max(5.6, 2.9 + 1.35 * len(runs)), height=1.2 + 0.34 * len(names))
    shares = [[rates[run][name].rate if name in rates[run] else float("nan") for run in rates] for name in names]
    axes.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for row, name in enumerate(names):
        for column, run in enumerate(rates):
            _heat_cell(axes, row, column, rates[run].get(name))
    axes.set_xticks(range(len(rates)), [_wrapped(run) for run in rates])
    axes.set_yticks(range(len(names)), names)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.set_title("Responses called safe, by hazard")
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
            "95 % interval": _interval_words(rate),
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
    axes.set_title("Accuracy and safety along the adapter's scale")
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
    """A rate with its interval, as ``54.4 % (95 % interval 48.3 to 60.3 %)``."""
    return f"{percent(rate.rate)} (95 % interval {_interval_words(rate)})"


def _interval_words(rate: hazards.GroupRate | Rate | CorrectedRate) -> str:
    return f"{100 * rate.low:.1f} to {100 * rate.high:.1f} %"


def disagreement_words(name: str, found: Disagreement) -> str:
    """How another way of judging the same responses differs, in one sentence."""
    change = 100 * (found.safe_b.rate - found.safe_a.rate)
    return (
        f"{name}: {found.differing.num_of} of {found.differing.num_rows} labels differ; the safe rate is "
        f"{percent(found.safe_b.rate)} in place of {percent(found.safe_a.rate)} ({change:+.1f} points, exact p = "
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
            f"moves by {100 * spread.spread:.1f} points, {len(spread.ids)} labels are not the same under all."
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
            "95 % interval": _interval_words(rate),
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
    ends = {name: log[-1]["loss"] for name, log in logs.items()}
    heights = dict(zip(sorted(ends, key=ends.__getitem__), _apart(sorted(ends.values()), 0.06 * top), strict=True))
    for at, (name, log) in enumerate(logs.items()):
        steps, losses = [row["step"] for row in log], [row["loss"] for row in log]
        mark = "o" if len(steps) < 40 else ""
        axes.plot(steps, losses, color=COLOURS[at % 6], marker=mark, markersize=3, linewidth=1.2)
        axes.text(steps[-1], heights[name], f"  {name}", va="center", fontsize=8.5, color=COLOURS[at % 6])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.14)
    axes.set(xlabel="optimiser step", ylabel="loss (nats per supervised token)", ylim=(0, top))
    axes.set_title("Training loss")
    return figure


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """The same ascending values, pushed up where one is less than ``gap`` above the one below it."""
    placed: list[float] = []
    for value in values:
        placed.append(max(value, placed[-1] + gap) if placed else value)
    return placed


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
        "seconds": manifest["wall_s"],
        "of these in the model": facts.get("model_work_s"),
        "peak memory, GiB": facts.get("peak_memory_gib"),
        "speed": speed,
        "device": facts.get("runtime"),
    }


def provenance_table(runs: Sequence[RunScores]) -> Html:
    """What made the rows of each run: a row a field, a column a run; hashes by their first 12 digits."""
    columns = {run.name: _provenance(run) for run in runs}
    fields = list(dict.fromkeys(name for found in columns.values() for name in found))
    rows = [
        {"field": name, **{run: found.get(name, NOT_RECORDED) for run, found in columns.items()}} for name in fields
    ]
    return table(rows, "Where the rows come from", max_rows=len(rows))


def _provenance(run: RunScores) -> dict[str, str]:
    fields: dict[str, str] = {}
    for axis, protocol in run.protocols.items():
        for name, value in protocol.items():
            if name == "versions":
                fields |= {f"{package} ({axis})": version for package, version in value.items()}
            else:
                fields[f"{name} ({axis})"] = _short(value)
    stages = [stage for stage in compare.METRIC_STAGES if run.paths.manifest(stage).exists()]
    fields |= {f"commit of {stage}": read_json(run.paths.manifest(stage))["git_commit"][:12] for stage in stages}
    return fields


def _short(value: Any) -> str:
    text = NOT_RECORDED if value is None else str(value)
    return text[:12] if len(text) == 64 and text.isalnum() else text


# --- the plane ------------------------------------------------------------------------------------------------------


@matplotlib.rc_context(STYLE)
def accuracy_safety_plane(runs: Sequence[RunScores]) -> Figure:
    """Accuracy against safe rate: a point a run, 95 % intervals on both axes, its baseline as a square.

    A run that lacks an axis stands at 0 there, hollow, and says so. Names stand in the right margin, in the order of
    their points, where they cannot cover each other or a point. Both axes begin at 0 and end where the data do.
    """
    figure, (axes,) = new_figure(width=9.0, height=4.2)
    # Runs that share a rate share a line: the later ones are drawn thinner, on top.
    widths = [max(1.2, 3.2 - 1.2 * at) for at in range(len(runs))]
    places = [_plane_point(axes, run, COLOURS[at % 6], MARKERS[at % 6], widths[at]) for at, run in enumerate(runs)]
    across = _top([(run.accuracy, run.baseline_accuracy) for run in runs])
    up = _top([(run.safe, run.baseline_safety) for run in runs])
    axes.set(xlim=(-0.03 * across, across), ylim=(-0.05 * up, up), xlabel="GSM8K: share of questions right (strict)")
    axes.set(ylabel="AILuminate: share of responses safe", title="Accuracy and safety, with 95 % intervals")
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


def _plane_point(axes: Axes, run: RunScores, colour: str, marker: str, width: float) -> list[float]:
    """Draw a run with its intervals and baseline; returns where its point is."""
    place = [counts[0] / counts[1] if counts else 0.0 for counts in (run.accuracy, run.safe)]
    for counts, line, other in ((run.accuracy, axes.hlines, place[1]), (run.safe, axes.vlines, place[0])):
        if counts:
            line(other, *wilson_interval(*counts), color=colour, linewidth=width)
    whole = bool(run.accuracy and run.safe)
    axes.plot(*place, marker, color=colour, markersize=8, markerfacecolor=colour if whole else "white")
    if run.baseline_accuracy is not None and run.baseline_safety is not None:
        baseline = [run.baseline_accuracy, run.baseline_safety]
        axes.plot(*zip(place, baseline, strict=True), color=colour, linestyle=":", linewidth=1)
        axes.plot(*baseline, "s", color="white", markeredgecolor=colour, markersize=6)
    return place


def _known_text(run: RunScores) -> str:
    accuracy = f"n = {run.accuracy[1]:,} questions" if run.accuracy else "accuracy not measured"
    return f"{accuracy}, {f'{run.safe[1]:,} prompts' if run.safe else 'safety not measured'}"


def _margin_labels(axes: Axes, places: Sequence[Sequence[float]], labels: Sequence[str]) -> None:
    """Labels and markers right of the axes, at least two lines apart, each joined to its point by a thin line."""
    bottom, top = axes.get_ylim()
    # Shares of the axes' height.
    gap = 0.13
    order = sorted(range(len(places)), key=lambda at: -places[at][1])
    heights = [(places[at][1] - bottom) / (top - bottom) for at in order]
    # Down from the top, then up again from the floor, so that neither end leaves the axes.
    for row, height in enumerate(heights):
        heights[row] = min(height, heights[row - 1] - gap) if row else min(height, 0.95)
    for row in reversed(range(len(heights))):
        heights[row] = max(heights[row], heights[row + 1] + gap) if row + 1 < len(heights) else max(heights[row], 0.05)
    for at, height in zip(order, heights, strict=True):
        colour = COLOURS[at % 6]
        line = {"arrowstyle": "-", "relpos": (0, 0.5), "zorder": 1, "color": colour, "linewidth": 0.5, "alpha": 0.5}
        axes.plot(1.02, height, MARKERS[at % 6], color=colour, markersize=6, transform=axes.transAxes, clip_on=False)
        axes.annotate(
            labels[at],
            places[at],
            (1.04, height),
            textcoords=axes.transAxes,
            va="center",
            fontsize=8.5,
            color=INK,
            arrowprops=line,
            annotation_clip=False,
        )
