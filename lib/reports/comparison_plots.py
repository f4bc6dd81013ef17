"""Plots of the comparison. Each is None where there is nothing to draw."""

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from matplotlib.transforms import ScaledTranslation

from lib.compare.comparison import frontier
from lib.compare.runs import MetricScore, Run
from lib.evaluate import hazards
from lib.reports.html import BLUE, GREEN, INK, ORANGE, SKY, VERMILION
from lib.reports.plots import STYLE, label_ends, n_words, new_figure
from lib.stats import Rate

COLOURS = (BLUE, VERMILION, GREEN, ORANGE, SKY, INK)
MARKERS = "osD^vP"


@matplotlib.rc_context(STYLE)
def hazard_heatmap(runs: Sequence[Run]) -> Figure | None:
    """Safe rate by run (columns) and hazard (rows): the share and the count in each cell, darker is less safe."""
    runs = [run for run in runs if run.safety.rows]
    if not runs:
        return None
    by_run = {run.name: {one.name: one.rate for one in hazards.rates_by_hazard(run.safety.rows)} for run in runs}
    names = list(dict.fromkeys(name for found in by_run.values() for name in found))
    figure, (axes,) = new_figure(width=max(6.4, 3.7 + 1.35 * len(runs)), height=1.6 + 0.34 * len(names))
    shares = [[found[name].share if name in found else float("nan") for found in by_run.values()] for name in names]
    image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    figure.colorbar(image, ax=axes, format=PercentFormatter(1.0, symbol=" %", decimals=0), label="safe")
    for row, name in enumerate(names):
        for column, found in enumerate(by_run.values()):
            rate = found.get(name)
            text = f"{100 * rate.share:.0f} %  ({rate.successes}/{rate.n})" if rate else "–"
            # cividis is dark below and light above the middle.
            colour = "white" if rate and rate.share < 0.55 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=8.5, color=colour)
    axes.set_xticks(
        range(len(by_run)), [textwrap.fill(run, 16, break_long_words=False, break_on_hyphens=False) for run in by_run]
    )
    axes.set_yticks(range(len(names)), names)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.set_xlabel("share safe (safe/all)\ntheir 95 % intervals are in the table of 05_compare")
    # Over the figure: the names of hazards leave the axes little width.
    counts = n_words([len(run.safety.rows) for run in runs], "responses")
    style = {"fontsize": STYLE["axes.titlesize"], "fontweight": "bold"}
    figure.suptitle(f"Responses called safe, by hazard ({counts} per model)", x=0.01, ha="left", **style)
    return figure


@matplotlib.rc_context(STYLE)
def frontier_plot(runs: Sequence[Run]) -> Figure | None:
    """Accuracy against safe rate along the adapter's scale, one line per run; each point names its scale."""
    frontiers = {run.name: points for run in runs if (points := frontier(run))}
    if not frontiers:
        return None
    figure, (axes,) = new_figure(width=7.6, height=4.6)
    for at, (name, points) in enumerate(frontiers.items()):
        colour = COLOURS[at % 6]
        places = [(point.accuracy.share, point.safety.share) for point in points]
        axes.plot(*zip(*places, strict=True), color=colour, marker=MARKERS[at % 6], markersize=6, linewidth=1.5)
        named: dict[tuple[float, float], list[str]] = {}
        for point, (x, y) in zip(points, places, strict=True):
            axes.hlines(y, point.accuracy.low, point.accuracy.high, color=colour, linewidth=0.8, alpha=0.5)
            axes.vlines(x, point.safety.low, point.safety.high, color=colour, linewidth=0.8, alpha=0.5)
            named.setdefault((x, y), []).append(f"{point.scale:g}")
        # Scales that reach the same place share a label; each run's are at another height.
        for place, scales in named.items():
            label, above = f"{name}: {', '.join(scales)}", (5, 5 + 11 * at)
            axes.annotate(label, place, above, textcoords="offset points", fontsize=8, color=colour)
    axes.set(xlabel="GSM8K: share of questions right (strict)", ylabel="AILuminate: share of responses safe")
    axes.set_xlabel(f"{axes.get_xlabel()}\na scale that is picked here is picked on these rows")
    every = [point for points in frontiers.values() for point in points]
    counts = _n_of_both([point.accuracy for point in every], [point.safety for point in every])
    axes.set_title(f"Accuracy and safety by the adapter's scale ({counts})")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    return figure


@matplotlib.rc_context(STYLE)
def losses_plot(runs: Sequence[Run]) -> Figure | None:
    """Training loss of each run over its optimiser steps; a run's name is at the end of its line."""
    logs = {run.name: run.training_log for run in runs if run.training_log}
    if not logs:
        return None
    figure, (axes,) = new_figure(width=8.6, height=3.6)
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
    axes.set_title(f"Training loss ({n_words([len(log) for log in logs.values()], 'steps')} per run)")
    return figure


@matplotlib.rc_context(STYLE)
def accuracy_safety_plane(runs: Sequence[Run]) -> Figure:
    """Accuracy against safe rate: a point per run, 95 % intervals in both directions, its baseline as a square.

    A run that lacks a metric is at 0 there, hollow. Names are in the right margin beside their marks, where they
    cannot cover each other or a point; runs that share a rate are drawn a hair apart.
    """
    figure, (axes,) = new_figure(width=9.0, height=max(4.2, 0.6 * len(runs)))
    right, safe = [run.accuracy for run in runs], [run.safety for run in runs]
    across, up = _top(right), _top(safe)
    xs, ys = ([score.rate.share if score.rate else 0.0 for score in scores] for scores in (right, safe))
    apart = zip(_apart(xs, across), _apart(ys, up), strict=True)
    for at, (run, place, shift) in enumerate(zip(runs, zip(xs, ys, strict=True), apart, strict=True)):
        _plane_point(axes, run, place, shift, at)
    axes.set(xlim=(-0.03 * across, across), ylim=(-0.05 * up, up), xlabel="GSM8K: share of questions right (strict)")
    counts = _n_of_both([score.rate for score in right], [score.rate for score in safe])
    axes.set(ylabel="AILuminate: share of responses safe", title=f"Accuracy and safety, 95 % intervals ({counts})")
    questions = [f"n = {one.rate.n:,} questions" if one.rate else "accuracy not measured" for one in right]
    prompts = [f"{one.rate.n:,} prompts" if one.rate else "safety not measured" for one in safe]
    names = [run.name for run in runs]
    _margin_labels(axes, ys, ["{}\n{}, {}".format(*row) for row in zip(names, questions, prompts, strict=True)])
    # Each place of a baseline is named once, beside its square.
    for place in {(run.accuracy.baseline, run.safety.baseline) for run in runs}:
        if None not in place:
            axes.annotate("baseline", place, (7, 0), textcoords="offset points", va="center", fontsize=8.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, symbol=" %", decimals=0))
    return figure


def _top(scores: Sequence[MetricScore]) -> float:
    """End of an axis: a little above the highest interval and baseline, at most a little above 1."""
    ends = [score.rate.high for score in scores if score.rate]
    ends += [score.baseline for score in scores if score.baseline is not None]
    return min(1.05, 1.1 * max([0.2, *ends]))


def _n_of_both(right: Sequence[Rate | None], safe: Sequence[Rate | None]) -> str:
    named = (("questions", [rate.n for rate in right if rate]), ("prompts", [rate.n for rate in safe if rate]))
    return " and ".join(n_words(some, unit) for unit, some in named if some).replace("and n = ", "and ") or "n = 0"


def _apart(values: Sequence[float], length: float) -> list[float]:
    """Points of the page by which to move each value, so that those at one place of an axis can be seen apart."""
    clusters: list[list[int]] = []
    for at in sorted(range(len(values)), key=values.__getitem__):
        if not clusters or values[at] - values[clusters[-1][0]] >= length / 300:
            clusters.append([])
        clusters[-1].append(at)
    shifts = [0.0] * len(values)
    for some in clusters:
        # 5 points between two runs, at most 15 between the outermost of many.
        gap = min(5.0, 15.0 / max(1, len(some) - 1))
        for rank, at in enumerate(some):
            shifts[at] = gap * (rank - (len(some) - 1) / 2)
    return shifts


def _mark(at: int) -> dict[str, Any]:
    """Colour and marker of the ``at``-th run; another marker for the same colour in each round of six."""
    return {"color": COLOURS[at % 6], "marker": MARKERS[(at + at // 6) % 6]}


def _plane_point(axes: Axes, run: Run, place: tuple[float, float], shift: tuple[float, float], at: int) -> None:
    """Draw a run at ``place`` with its intervals and baseline, moved by ``shift`` points of the page."""
    mark, right, safe = _mark(at), run.accuracy, run.safety
    colour = mark["color"]
    moved = axes.transData + ScaledTranslation(shift[0] / 72, shift[1] / 72, axes.figure.dpi_scale_trans)
    for rate, line, other in ((right.rate, axes.hlines, place[1]), (safe.rate, axes.vlines, place[0])):
        if rate:
            line(other, rate.low, rate.high, color=colour, linewidth=2, transform=moved)
    fill = colour if right.rate and safe.rate else "white"
    axes.plot(*place, **mark, linestyle="", markersize=8, markerfacecolor=fill, transform=moved)
    if right.baseline is not None and safe.baseline is not None:
        axes.plot(*zip(place, (right.baseline, safe.baseline), strict=True), color=colour, linestyle=":", linewidth=1)
        axes.plot(right.baseline, safe.baseline, "s", color="white", markeredgecolor=colour, markersize=6)


def _margin_labels(axes: Axes, ys: Sequence[float], labels: Sequence[str]) -> None:
    """Labels right of the axes, at least two lines apart, each behind the marker of its point."""
    bottom, top = axes.get_ylim()
    # Shares of the axes' height, which is that of the figure but for its title and axis.
    gap = 0.55 / axes.figure.get_figheight()
    order = sorted(range(len(ys)), key=lambda at: -ys[at])
    heights = [(ys[at] - bottom) / (top - bottom) for at in order]
    # Down from the top, then up again from the floor, so that neither end leaves the axes.
    for row, height in enumerate(heights):
        heights[row] = min(height, heights[row - 1] - gap) if row else min(height, 0.95)
    for row in reversed(range(len(heights))):
        heights[row] = max(heights[row], heights[row + 1] + gap) if row + 1 < len(heights) else max(heights[row], 0.05)
    for at, height in zip(order, heights, strict=True):
        beside = {"transform": axes.transAxes, "clip_on": False}
        axes.plot(1.02, height, **_mark(at), linestyle="", markersize=6, **beside)
        axes.text(1.04, height, labels[at], va="center", fontsize=8.5, color=INK, **beside)
