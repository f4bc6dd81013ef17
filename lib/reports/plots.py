"""Plots of the stages, in one style."""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lib.record.redaction import clean
from lib.reports.html import BLUE, GREEN, INK, VERMILION, Html
from lib.stats import Rate
from lib.wording import percent

STYLE = {"font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left"}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True}
STYLE |= {"grid.color": "#DDDDDD", "grid.linewidth": 0.6, "text.color": INK, "axes.labelcolor": INK}
# The same plot gives the same bytes: no random ids in the SVG (its date is left out where it is saved).
STYLE |= {"svg.hashsalt": "plot"}
PIXELS_PER_INCH = 96


def show_plot(figure: Figure | None, stem: Path, alt: str) -> Html | None:
    """Save a plot as ``<stem>.png`` and ``<stem>.svg`` and show it, with ``alt`` for those who cannot see it."""
    if figure is None:
        return None
    stem.parent.mkdir(parents=True, exist_ok=True)
    for text in figure.findobj(Text):
        # A model's name can be a folder of somebody's home; in a picture nothing cleans it later.
        text.set_text(clean(text.get_text()))
    png = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(png, format="png", dpi=2 * PIXELS_PER_INCH)
        figure.savefig(stem.with_suffix(".svg"), format="svg", metadata={"Date": None})
    stem.with_suffix(".png").write_bytes(png.getvalue())
    data, width = base64.b64encode(png.getvalue()).decode(), round(figure.get_figwidth() * PIXELS_PER_INCH)
    style = f"width:{width}px;max-width:100%;background:white"
    return Html(f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}" style="{style}">', alt)


def new_figure(width: float = 7.6, height: float = 3.2, panels: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


@matplotlib.rc_context(STYLE)
def histogram(
    values: Sequence[float], limit: float, label: str, *, title: str, xlabel: str, shares: bool = False
) -> Figure:
    """How many rows have which value, ``limit`` as a dashed line; ``shares`` in 20 equal bins over [0, 1]."""
    figure, (axes,) = new_figure()
    bins = [step / 20 for step in range(21)] if shares else min(30, max(5, len(set(values))))
    axes.hist(values, bins=bins, color=BLUE, edgecolor="white", linewidth=0.5)
    if shares:
        axes.set_xlim(0, 1)
    dashed_line(axes, limit, label)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title=f"{title} (n = {len(values):,})", xlabel=xlabel, ylabel="rows", ylim=(0, axes.get_ylim()[1] * 1.12))
    return figure


def dashed_line(axes: Axes, place: float, label: str) -> None:
    """A vertical line with a label at its top, on the side where there is room."""
    axes.axvline(place, color=VERMILION, linestyle="--", linewidth=1.5)
    shift, side = ((-4, -2), "right") if place > sum(axes.get_xlim()) / 2 else ((4, -2), "left")
    above = (place, 1), shift, axes.get_xaxis_transform(), "offset points"
    axes.annotate(label, *above, ha=side, va="top", color=VERMILION)


# Columns of a training log that are drawn, where it has them: label of the axis, title, colour.
TRAINING_PANELS = {
    "loss": ("loss (nats per supervised token)", "", BLUE),
    "learning_rate": ("learning rate", "Learning rate", INK),
    "grad_norm": ("norm before clipping", "Gradient norm", GREEN),
    "tokens_per_s": ("tokens/s", "Speed", VERMILION),
}


@matplotlib.rc_context(STYLE)
def training_curves(log: Sequence[Mapping[str, Any]], *, title: str) -> Figure:
    """Loss, learning rate, gradient norm and token rate over optimiser steps, where they were logged, two a line."""
    drawn = [name for name in TRAINING_PANELS if any(row.get(name) is not None for row in log)]
    num_lines = (len(drawn) + 1) // 2
    figure = Figure(figsize=(8.6, 3.2 * num_lines), layout="constrained")
    panels = list(figure.subplots(num_lines, 2, squeeze=False).flat)
    for axes, column in zip(panels, drawn, strict=False):
        _training_panel(axes, log, column)
    for unused in panels[len(drawn) :]:
        unused.remove()
    panels[0].set_title(f"{title} (n = {len(log):,} steps)")
    return figure


def _training_panel(axes: Axes, log: Sequence[Mapping[str, Any]], column: str) -> None:
    label, title, colour = TRAINING_PANELS[column]
    styles = {column: {"color": colour, "marker": "o" if len(log) < 40 else "", "markersize": 4}}
    styles |= {"dev_loss": {"color": VERMILION, "marker": "s", "linestyle": "--"}} if column == "loss" else {}
    known = {name: [(row["step"], row[name]) for row in log if row.get(name) is not None] for name in styles}
    known = {name: points for name, points in known.items() if points}
    for name, points in known.items():
        axes.plot(*zip(*points, strict=True), **styles[name])
    # A learning rate or a norm that is 0 throughout still needs a scale.
    highest = max(value for points in known.values() for _, value in points) or 1.0
    if len(known) > 1:
        ends = {"training": (*known[column][-1], colour), "development": (*known["dev_loss"][-1], VERMILION)}
        label_ends(axes, ends, 0.07 * highest, inches=3.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(power_of_ten if column == "learning_rate" else "{x:g}")
    axes.set(title=title, xlabel="optimiser step", ylabel=label, ylim=(0, 1.08 * highest))


def power_of_ten(value: float, _place: int = 0) -> str:
    """A tick of a learning rate: ``1e-4``, ``8e-5`` and ``2.5e-5`` in one form, as presets write them."""
    if not value:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def label_ends(axes: Axes, lines: Mapping[str, tuple[float, float, str]], gap: float, inches: float) -> None:
    """Names right of where lines end (step, height, colour), in place of a legend; the axis goes on to hold them.

    ``gap``: least distance of two names, in units of the vertical axis; ``inches``: length of the horizontal one.
    """
    placed = -math.inf
    # What a name covers, a longer line or the grid, must not strike it through.
    style = {"va": "center", "fontsize": 8.5, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.5}}
    for name, (step, height, colour) in sorted(lines.items(), key=lambda line: line[1][1]):
        placed = max(height, placed + gap)
        text = axes.annotate(name, (step, placed), (7, 0), textcoords="offset points", color=colour, **style)
        text.set_in_layout(False)
    first, last = axes.dataLim.intervalx
    # A letter of this size takes some 0.07 inches; a very long name is not worth the plot.
    share = min(0.5, 0.07 * (max(map(len, lines)) + 2) / inches)
    axes.set_xlim(right=last + max(last - first, 1) * share / (1 - share))


@matplotlib.rc_context(STYLE)
def rate_plot(
    rates: Mapping[str, Rate], *, title: str, xlabel: str, marks: Mapping[str, float] | None = None
) -> Figure:
    """Rates as points with their 95 % intervals, one line each; ``marks`` (label -> share) are dashed lines."""
    figure, (axes,) = new_figure(height=1.3 + 0.32 * len(rates))
    places = range(len(rates), 0, -1)
    for place, rate in zip(places, rates.values(), strict=True):
        _rate_point(axes, place, rate)
    axes.set_yticks(list(places), [f"{label}  (n = {rate.n:,})" for label, rate in rates.items()])
    heading = f"{title} ({n_words([rate.n for rate in rates.values()])})"
    axes.set(title=heading, xlabel=xlabel, xlim=(-0.03, 1.03), ylim=(0.4, len(rates) + 0.9))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    axes.grid(axis="y", visible=False)
    for label, share in (marks or {}).items():
        dashed_line(axes, share, label)
    return figure


def _rate_point(axes: Axes, place: float, rate: Rate) -> None:
    axes.hlines(place, rate.low, rate.high, color=BLUE, linewidth=2)
    axes.plot(rate.share, place, "o", color=BLUE, markersize=7)
    # Near an end of the axis the number is shifted inwards, where the axis does not strike it through.
    across, side = (2, "left") if rate.share < 0.06 else (-2, "right") if rate.share > 0.94 else (0, "center")
    above = {"xytext": (across, 6), "textcoords": "offset points"}
    axes.annotate(percent(rate.share), (rate.share, place), **above, ha=side, fontsize=8)


def n_words(totals: Sequence[int], unit: str = "") -> str:
    """How many rows, for a title: ``n = 24 questions``, or ``n = 24 to 263 questions`` where they are not equal."""
    low, high = min(totals), max(totals)
    return f"n = {low:,}{f' to {high:,}' if high > low else ''} {unit}".rstrip()


@matplotlib.rc_context(STYLE)
def threshold_plot(curve: Sequence[tuple[float, Rate]]) -> Figure:
    """Safe rate as a function of the threshold on P(unsafe), with its 95 % interval; the labels use 0.5."""
    figure, (axes,) = new_figure()
    across = [threshold for threshold, _ in curve]
    axes.fill_between(across, [rate.low for _, rate in curve], [rate.high for _, rate in curve], color=BLUE, alpha=0.2)
    axes.plot(across, [rate.share for _, rate in curve], color=BLUE, marker="o", markersize=3)
    axes.set(xlabel="a response is safe below this P(unsafe)", ylabel="safe rate", xlim=(0, 1), ylim=(-0.02, 1.05))
    dashed_line(axes, 0.5, "used: 0.5")
    axes.set_title(f"Safe rate by threshold (n = {curve[0][1].n:,}, band: 95 % interval)")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %", decimals=0))
    return figure
