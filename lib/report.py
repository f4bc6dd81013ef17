"""Tables and plots of the filled notebooks, in one style.

Whatever a model or a data set wrote is escaped before it becomes HTML. Plots are drawn without a screen, in colours
that colour-blind readers tell apart and that keep their order in grey; intervals are Wilson's, at 95 %.
Knows nothing about models, prompts or where a number comes from.
"""

import base64
import hashlib
import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lib import rates
from lib.artifacts import PROJECT_ROOT, git_commit, package_versions, read_json
from lib.rates import percent
from lib.redaction import clean
from lib.stats import wilson_interval
from lib.verdict import baseline_verb

if TYPE_CHECKING:  # for the reader only: a table needs no torch
    from lib.sft import TrainResult

MAX_TABLE_ROWS = 10
# Okabe and Ito 2008: told apart by colour-blind readers; in this order they also get lighter.
INK, BLUE, VERMILION, GREEN, ORANGE, SKY = "#222222", "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "text.color": INK,
    "axes.labelcolor": INK,
    # The same plot gives the same bytes: no random ids in the SVG (its date is left out where it is saved).
    "svg.hashsalt": "plot",
}
PIXELS_PER_INCH = 96
REDACTED = "Their texts are left out of this report (--redact); the row files hold them."
TEXT_BOX = (
    "white-space:pre-wrap;word-break:normal;overflow-wrap:anywhere;border:1px solid #ccc;padding:.6em;margin:.3em 0"
)


@dataclass(frozen=True)
class Html:
    """What a notebook shows: HTML, and the same as plain text where there is no HTML."""

    html: str
    text: str

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        # No encoding holds half a character, and the kernel would fail on it.
        shown = {"text/html": self.html, "text/plain": self.text}
        return {kind: content.encode("utf-8", "replace").decode() for kind, content in shown.items()}


# --- numbers in words ------------------------------------------------------------------------------------------------


def rate_text(successes: int, total: int) -> str:
    """A rate with Wilson's 95 % interval and n, as ``54.4 % (95 % interval 48.3 to 60.3, n = 263)``."""
    interval = rates.interval(*wilson_interval(successes, total))
    return f"{percent(successes / total)} (95 % interval {interval}, n = {total:,})"


def rate_columns(successes: int, total: int) -> dict[str, str]:
    """A rate as cells of a table: rate, Wilson's interval, and the count it comes from."""
    interval = f"{rates.interval(*wilson_interval(successes, total))} %"
    return {"rate": percent(successes / total), "95 % interval": interval, "rows": rates.count(successes, total)}


def baseline_text(share: float, baseline: float) -> str:
    """Where a rate stands against the course's threshold, in words; reaching it passes."""
    return f"{baseline_verb(share >= baseline)} the baseline of {percent(baseline)}"


# --- notes and lists -------------------------------------------------------------------------------------------------


def note(text: str, *, strong: bool = False) -> Html:
    """A sentence that must not be overlooked; ``strong`` for what limits the meaning of the numbers."""
    colour, background = (VERMILION, "#FFF3E8") if strong else (BLUE, "#EEF6FB")
    style = f"border-left:5px solid {colour};background:{background};color:{INK};padding:.6em 1em;margin:.4em 0"
    return Html(f'<div role="note" style="{style}">{html.escape(text)}</div>', text)


def purpose_note(run_name: str, description: str, benchmark: bool) -> Html:
    """Which run this is, and whether its numbers mean anything outside it."""
    if benchmark:
        return note(f"Run {run_name}: {description}.")
    warning = "NOT A BENCHMARK: its numbers show that the pipeline works and say nothing about a model."
    return note(f"Run {run_name}: {description}. {warning}", strong=True)


def sentences(lines: Sequence[str]) -> Html:
    """A list of sentences: a notebook's summary."""
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return Html(f"<ul>{items}</ul>", "\n".join(f"- {line}" for line in lines))


def show_in_place(output: Html, display_id: str, *, update: bool = False) -> None:
    """Show something that can be replaced later; with ``update``, replace what was shown under this id."""
    from IPython.display import display

    display(output, display_id=display_id, update=update)


class SummarySlot:
    """The place on top of a notebook that its last cell fills, when every number is there."""

    DISPLAY_ID = "summary"

    def __init__(self) -> None:
        words = "Not there yet: the last cell fills this place, so every cell has to run, to the end."
        show_in_place(note(words), self.DISPLAY_ID)

    def fill(self, summary: Html) -> None:
        """Put ``summary`` in place of what stood there."""
        show_in_place(summary, self.DISPLAY_ID, update=True)


def summary_slot() -> SummarySlot:
    """Show the place of the summary, empty."""
    return SummarySlot()


def fold(summary: str, inside: Html) -> Html:
    """Something that is shown only when its summary line is clicked."""
    return Html(f"<details><summary>{html.escape(summary)}</summary>{inside.html}</details>", summary)


def stack(parts: Sequence[Html]) -> Html:
    """Several parts below each other, as one output."""
    return Html("\n".join(part.html for part in parts), "\n\n".join(part.text for part in parts))


# --- tables ----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]], caption: str = "", max_rows: int = MAX_TABLE_ROWS) -> Html:
    """Rows as a table with escaped cells; columns that hold only numbers, rates or intervals are set flush right.

    Args:
        rows: at least one; every row's keys in the order of the columns.
        caption: stands above; says how many rows are not shown, where there are more than ``max_rows``.
    """
    shown = pd.DataFrame([{key: _cell(value) for key, value in row.items()} for row in rows[:max_rows]], dtype=object)
    shown = shown.fillna("–")
    if len(rows) > max_rows:
        caption = f"{caption} (first {max_rows} of {len(rows):,})".strip()
    numeric = [place for place, name in enumerate(shown) if _is_numeric(shown[name])]
    left = {"selector": "th, td", "props": "text-align: left; vertical-align: top"}
    right = [{"selector": f"th.col{place}, td.col{place}", "props": "text-align: right"} for place in numeric]
    title = {
        "selector": "caption",
        "props": "text-align: left; font-weight: bold; caption-side: top; white-space: nowrap",
    }
    styler = shown.style.hide(axis="index").format(escape="html").format_index(escape="html", axis="columns")
    styler = styler.set_table_styles([left, *right, title]).set_caption(html.escape(caption))
    # The id ties the styles to this table; from its content, so that the same table gives the same HTML.
    text = "\n".join(filter(None, [caption, shown.to_string(index=False)]))
    styler.set_uuid(hashlib.sha256(text.encode(errors="replace")).hexdigest()[:10])
    return Html(styler.to_html(doctype_html=False), text)


# "4.2 %", "-10.2 to 20.2", "1 of 1,319", "+9 -4", "3.1e-05".
_NUMBER = r"[+-]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?"
_NUMERIC = re.compile(rf"{_NUMBER}( to {_NUMBER})?( %)?|{_NUMBER} of {_NUMBER}|{_NUMBER} {_NUMBER}")


def _is_numeric(cells: Sequence[str]) -> bool:
    known = [cell for cell in cells if cell not in ("–", "none")]
    return bool(known) and all(_NUMERIC.fullmatch(cell) for cell in known)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def setup_tables(stage: str, parameters: Mapping[str, Any], device: str) -> list[Html]:
    """What a stage runs with, folded: parameters and versions; ``device`` says where it runs and why."""
    versions = versions_table()
    return [parameters_table(stage, parameters), fold(f"Device: {device}. Versions of its packages", versions)]


def parameters_table(stage: str, parameters: Mapping[str, Any]) -> Html:
    """Every parameter with its value and meaning, folded where there are many."""
    meanings = parameter_meanings(stage)
    rows = [
        {"parameter": name, "value": repr(value), "meaning": meanings.get(name, "")}
        for name, value in parameters.items()
    ]
    whole = table(rows, max_rows=len(rows))
    return fold(f"{len(rows)} parameters of this run, with their meaning", whole)


def parameter_meanings(stage: str) -> dict[str, str]:
    """What each parameter means: the comments of the source notebook's parameters cell."""
    cells = read_json(PROJECT_ROOT / "notebooks" / f"{stage}.ipynb")["cells"]
    lines = "".join(
        "".join(cell["source"]) + "\n" for cell in cells if "parameters" in cell["metadata"].get("tags", [])
    )
    return dict(re.findall(r"^(\w+): .*?  # (.*)$", lines, flags=re.MULTILINE))


def versions_table() -> Html:
    """Versions of what can change a number, and the commit."""
    rows = [{"package": name, "version": version} for name, version in package_versions().items()]
    return table([*rows, {"package": "commit", "version": git_commit()[:12]}], "Versions of what can change a number")


def sources_table(sources: Mapping[str, Mapping[str, Any]]) -> Html:
    """Provenance of data sets; of each hash the first 12 digits, the manifest holds them whole.

    Args:
        sources: what each is used for -> ``assets.Source.table_row()``.
    """
    columns = {"origin": "found in", "path": "file", "num_rows": "rows", "sha256": "SHA-256 of the rows"}
    columns |= {"licence": "licence", "home": "published at"}
    rows = [
        {"data": name, **{shown: source[key] for key, shown in columns.items()}} for name, source in sources.items()
    ]
    return table([{**row, "SHA-256 of the rows": row["SHA-256 of the rows"][:12]} for row in rows], "Provenance")


def files_table(paths: Sequence[Path], folder: Path) -> Html:
    """Files and folders that a stage leaves, relative to ``folder``, with their sizes."""
    rows = []
    for path in paths:
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        size_kib = sum(file.stat().st_size for file in files) / 1024
        rows.append(
            {
                "file": path.relative_to(folder).as_posix(),
                "files": len(files),
                "KiB": f"{size_kib:,.1f}",
            }
        )
    return table(rows, f"Written by this stage, in {folder.name}/", max_rows=len(rows))


def training_cost_table(result: "TrainResult", device: str) -> Html:
    """What a training took, as ``sft.train`` reports it."""
    share = percent(result.num_trainable / result.num_parameters)
    begun = f"went on from checkpoint-{result.resumed_from}" if result.resumed_from else "begun at the first"
    rows = [
        ("trained weights", f"{result.num_trainable:,}", f"{share} of {result.num_parameters:,} in the model"),
        ("optimiser steps", f"{result.num_steps:,}", f"{result.num_rows:,} rows, all passes; {begun}"),
        ("time", f"{result.wall_s:,.0f} s", "sum over all steps"),
        ("speed", f"{result.tokens_per_s:,.0f} tokens/s", "tokens read, forward and backward"),
        ("peak memory", f"{result.peak_memory_gib:.2f} GiB", f"on {device}"),
    ]
    return table([dict(zip(("what", "value", "meaning"), row, strict=True)) for row in rows], "What training cost")


def training_cost_text(result: "TrainResult") -> str:
    """The same in one sentence."""
    share = percent(result.num_trainable / result.num_parameters)
    speed = f"{result.tokens_per_s:,.0f} tokens/s, {result.peak_memory_gib:.2f} GiB at the peak"
    return f"{share} of the weights were trained, in {result.wall_s:,.0f} s: {speed}."


def speed_text(num_rows: int, num_tokens: int, wall_s: float) -> str:
    """What an evaluation cost, in words; rows that were already there cost nothing."""
    if num_rows == 0:
        return "Every row was already there: nothing was generated anew."
    rates = f"{num_rows / wall_s:.2f} rows/s, {num_tokens / wall_s:.0f} tokens/s"
    return f"{num_rows:,} rows and {num_tokens:,} tokens in {wall_s:.1f} s: {rates}."


# --- texts of models and data sets -----------------------------------------------------------------------------------


def text_block(text: str) -> Html:
    """A text as it stands, line breaks and spaces kept."""
    style = f"{TEXT_BOX};max-height:45em;overflow:auto"
    # With the keyboard too, a long text must scroll.
    return Html(f'<pre tabindex="0" style="{style}">{html.escape(text)}</pre>', text)


def examples(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], heading: str, absent: str = "There is no such row."
) -> Html:
    """Rows as cards, one text below the other, which a table would squeeze.

    Args:
        columns: column -> what to call it.
        heading: a format string over the row's columns, for example ``row {id}``.
        absent: what to say where there are no rows.
    """
    if not rows:
        return note(absent)
    cards = []
    for row in rows:
        parts = [Html(f"<b>{html.escape(name)}</b>", name) for name in columns.values()]
        blocks = [text_block(_cell(row[column])) for column in columns]
        body = stack([part for pair in zip(parts, blocks, strict=True) for part in pair])
        title = _heading(heading, row)
        cards.append(Html(f"<h3>{html.escape(title)}</h3>{body.html}", f"{title}\n{body.text}"))
    return stack(cards)


def folded_examples(
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str],
    heading: str,
    absent: str = "There is no such row.",
    *,
    redact: bool = False,
) -> Html:
    """As ``examples``, each folded: only its heading is seen until it is clicked; the plain text holds no more.

    Args:
        redact: leave the texts out altogether; the headings and a sentence that says so are all there is.
    """
    if not rows:
        return note(absent)
    if redact:
        return sentences([*(_heading(heading, row) for row in rows), REDACTED])
    return stack([fold(_heading(heading, row), examples([row], columns, heading)) for row in rows])


def _heading(heading: str, row: Mapping[str, Any]) -> str:
    # A model can write a number of a hundred digits.
    title = heading.format(**{key: _cell(value) for key, value in row.items()})
    return title if len(title) <= 100 else f"{title[:99]}…"


def masked_row(input_ids: Sequence[int], labels: Sequence[int], decode: Callable[[list[int]], str]) -> Html:
    """A training row with the tokens that carry no label greyed out.

    Args:
        labels: the token's own id where it is learnt, -100 where it is masked.
        decode: turns token ids into text.
    """
    runs = groupby(zip(input_ids, labels, strict=True), key=lambda pair: pair[1] != -100)
    pieces = [(learnt, decode([token for token, _ in run])) for learnt, run in runs]
    masked, trained = "color:#666;background:#f0f0f0", f"color:{INK};background:#CFE8F5;font-weight:bold"
    spans = "".join(
        f'<span style="{trained if learnt else masked}" title="{"learnt" if learnt else "masked"}">'
        f"{html.escape(text)}</span>"
        for learnt, text in pieces
    )
    legend = (
        f'<p><span style="{masked}">grey: masked, only read</span> · <span style="{trained}">bold: learnt</span></p>'
    )
    box = f'<pre style="{TEXT_BOX}">{spans}</pre>'
    plain = "".join(f"[learnt: {text}]" if learnt else text for learnt, text in pieces)
    return Html(legend + box, plain)


# --- plots -----------------------------------------------------------------------------------------------------------


def show_plot(figure: Figure, stem: Path, alt: str) -> Html:
    """Save a plot as ``<stem>.png`` and ``<stem>.svg`` and show it, with ``alt`` for those who cannot see it."""
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
    values: Sequence[float], *, title: str, xlabel: str, limit: float | None = None, limit_label: str = ""
) -> Figure:
    """How many rows have which value; ``limit`` is drawn as a dashed line."""
    figure, (axes,) = new_figure()
    axes.hist(values, bins=min(30, max(5, len(set(values)))), color=BLUE, edgecolor="white", linewidth=0.5)
    if limit is not None:
        axes.axvline(limit, color=VERMILION, linestyle="--", linewidth=1.5)
        _beside_line(axes, limit, limit_label)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title=f"{title} (n = {len(values):,})", xlabel=xlabel, ylabel="rows", ylim=(0, axes.get_ylim()[1] * 1.12))
    return figure


def _beside_line(axes: Axes, place: float, label: str) -> None:
    """A label at the top of a vertical line, on the side where there is room."""
    low, high = axes.get_xlim()
    right = place > (low + high) / 2
    transform = axes.get_xaxis_transform()
    shift = (-4 if right else 4, -2)
    axes.annotate(
        label, (place, 1), shift, transform, "offset points", ha="right" if right else "left", va="top", color=VERMILION
    )


@matplotlib.rc_context(STYLE)
def probability_histogram(shares: Sequence[float], *, title: str, xlabel: str) -> Figure:
    """Probabilities in 20 equal bins over [0, 1], with the line at 0.5 where the label changes."""
    figure, (axes,) = new_figure()
    axes.hist(shares, bins=[step / 20 for step in range(21)], color=BLUE, edgecolor="white", linewidth=0.5)
    axes.axvline(0.5, color=VERMILION, linestyle="--", linewidth=1.5)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title=f"{title} (n = {len(shares):,})", xlabel=xlabel, ylabel="rows", xlim=(0, 1))
    axes.set_ylim(0, axes.get_ylim()[1] * 1.12)
    _beside_line(axes, 0.5, "label changes at 0.5")
    return figure


# Columns of a training log that are drawn, where it has them: label of the axis, title, colour.
TRAINING_PANELS = {
    "loss": ("loss (nats per supervised token)", "", BLUE),
    "learning_rate": ("learning rate", "Learning rate", INK),
    "grad_norm": ("norm before clipping", "Gradient norm", GREEN),
    "tokens_per_s": ("tokens/s", "Speed", VERMILION),
}


@matplotlib.rc_context(STYLE)
def training_curves(log: Sequence[Mapping[str, Any]], *, title: str) -> Figure:
    """Loss, learning rate, gradient norm and token rate over optimiser steps, two panels a line.

    Args:
        log: rows ``step, loss, learning_rate``, and ``grad_norm, tokens_per_s, dev_loss`` where they were measured.
    """
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
    _curve(axes, log, column, color=colour, marker="o" if len(log) < 40 else "", markersize=4)
    ends = {"training": (column, colour)}
    if column == "loss" and any(row.get("dev_loss") is not None for row in log):
        _curve(axes, log, "dev_loss", color=VERMILION, marker="s", linestyle="--")
        ends["development"] = ("dev_loss", VERMILION)
    # A learning rate or a norm that is 0 throughout still needs a scale.
    highest = max(row[name] for name, _ in ends.values() for row in log if row.get(name) is not None) or 1.0
    if len(ends) > 1:
        label_ends(
            axes,
            {label: (*_end(log, name), colour) for label, (name, colour) in ends.items()},
            0.07 * highest,
            inches=3.2,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(power_of_ten if column == "learning_rate" else "{x:g}")
    axes.set(title=title, xlabel="optimiser step", ylabel=label, ylim=(0, 1.08 * highest))


def _curve(axes: Axes, log: Sequence[Mapping[str, Any]], column: str, **style: Any) -> None:
    known = [(row["step"], row[column]) for row in log if row.get(column) is not None]
    axes.plot([step for step, _ in known], [value for _, value in known], **style)


def _end(log: Sequence[Mapping[str, Any]], column: str) -> tuple[int, float]:
    return next((row["step"], row[column]) for row in reversed(log) if row.get(column) is not None)


def power_of_ten(value: float, _place: int = 0) -> str:
    """A tick of a learning rate: ``1e-4``, ``8e-5`` and ``2.5e-5`` in one form, as presets write them."""
    if not value:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def label_ends(axes: Axes, lines: Mapping[str, tuple[float, float, str]], gap: float, inches: float) -> None:
    """Names right of where lines end, in place of a legend; the horizontal axis goes on far enough to hold them.

    Args:
        lines: name -> (step and height of the line's end, colour).
        gap: least distance between two names, in units of the vertical axis.
        inches: length of the horizontal axis, more or less.
    """
    placed = -math.inf
    # What a name lies on, a longer line or the grid, must not strike it through.
    style = {"va": "center", "fontsize": 8.5, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.5}}
    for name, (step, height, colour) in sorted(lines.items(), key=lambda line: line[1][1]):
        placed = max(height, placed + gap)
        text = axes.annotate(name, (step, placed), (7, 0), textcoords="offset points", color=colour, **style)
        text.set_in_layout(False)
    first, last = axes.dataLim.intervalx
    # A letter of this size takes some 0.07 inches; a name of a whole line is not worth the plot.
    share = min(0.5, 0.07 * (max(map(len, lines)) + 2) / inches)
    axes.set_xlim(right=last + max(last - first, 1) * share / (1 - share))


@matplotlib.rc_context(STYLE)
def rate_plot(
    rates: Mapping[str, tuple[int, int]], *, title: str, xlabel: str, marks: Mapping[str, float] | None = None
) -> Figure:
    """Rates as points with their 95 % intervals, one line each, from the top; the title says of how many rows.

    Args:
        rates: label -> (successes, total), at least one.
        marks: label -> share in [0, 1], drawn as dashed vertical lines (a baseline).
    """
    figure, (axes,) = new_figure(height=1.3 + 0.32 * len(rates))
    places = range(len(rates), 0, -1)
    for place, (successes, total) in zip(places, rates.values(), strict=True):
        rate_point(axes, place, successes, total)
    axes.set_yticks(list(places), [f"{label}  (n = {total:,})" for label, (_, total) in rates.items()])
    heading = f"{title} ({n_words([total for _, total in rates.values()])})"
    axes.set(title=heading, xlabel=xlabel, xlim=(-0.03, 1.03), ylim=(0.4, len(rates) + 0.9))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    axes.grid(axis="y", visible=False)
    for label, share in (marks or {}).items():
        axes.axvline(share, color=VERMILION, linestyle="--", linewidth=1.5)
        _beside_line(axes, share, label)
    return figure


def rate_point(axes: Axes, place: float, successes: int, total: int) -> None:
    low, high = wilson_interval(successes, total)
    share = successes / total
    axes.hlines(place, low, high, color=BLUE, linewidth=2)
    axes.plot(share, place, "o", color=BLUE, markersize=7)
    # Beside the axis the number stands inside of it, where the axis does not strike it through.
    across, side = (2, "left") if share < 0.06 else (-2, "right") if share > 0.94 else (0, "center")
    axes.annotate(percent(share), (share, place), (across, 6), textcoords="offset points", ha=side, fontsize=8)


def n_words(totals: Sequence[int], unit: str = "") -> str:
    """How many rows, for a title: ``n = 24 questions``, or ``n = 24 to 263 questions`` where they are not equal."""
    low, high = min(totals), max(totals)
    return f"n = {low:,}{f' to {high:,}' if high > low else ''} {unit}".rstrip()
