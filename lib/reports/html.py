"""HTML of notebooks: notes, tables, texts. Whatever a model wrote is escaped."""

import hashlib
import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pandas as pd

MAX_TABLE_ROWS = 10
# Okabe and Ito 2008: distinguishable by colour-blind readers; in this order they also get lighter.
INK, BLUE, VERMILION, GREEN, ORANGE, SKY = "#222222", "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9"
REDACTED = "Their texts are left out of this report (--redact); the row files hold them."
TEXT_BOX = "white-space:pre-wrap;word-break:normal;overflow-wrap:anywhere;border:1px solid #ccc;"
TEXT_BOX += "padding:.6em;margin:.3em 0"
# "4.2 %", "-10.2 to 20.2", "1 of 1,319", "+9 -4", "3.1e-05".
_NUMBER = r"[+-]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?"
_NUMERIC = re.compile(rf"{_NUMBER}( to {_NUMBER})?( %)?|{_NUMBER} of {_NUMBER}|{_NUMBER} {_NUMBER}")


@dataclass(frozen=True)
class Html:
    """What a notebook shows: HTML, and the same as plain text where there is no HTML."""

    html: str
    text: str

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        # No encoding holds half a character, and the kernel would fail on it.
        shown = {"text/html": self.html, "text/plain": self.text}
        return {kind: content.encode("utf-8", "replace").decode() for kind, content in shown.items()}


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


def sentences(lines: Sequence[str]) -> Html | None:
    """A list of sentences; None without any."""
    if not lines:
        return None
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return Html(f"<ul>{items}</ul>", "\n".join(f"- {line}" for line in lines))


class SummarySlot:
    """The place on top of a notebook that its last cell fills, when every number is there."""

    def __init__(self) -> None:
        self._show(note("Not there yet: the last cell fills this place, so every cell has to run, to the end."))

    def fill(self, summary: Html | None) -> None:
        self._show(summary, update=True)

    def _show(self, output: Html | None, *, update: bool = False) -> None:
        from IPython.display import display

        display(output, display_id="summary", update=update)


def fold(summary: str, inside: Html | None) -> Html | None:
    """Something that is shown only when its summary line is clicked."""
    if inside is None:
        return None
    return Html(f"<details><summary>{html.escape(summary)}</summary>{inside.html}</details>", summary)


def stack(parts: Sequence[Html | None]) -> Html | None:
    """Several parts below each other, as one output, without those that are None; None where nothing is left."""
    shown = [part for part in parts if part]
    return Html("\n".join(part.html for part in shown), "\n\n".join(part.text for part in shown)) if shown else None


def table(rows: Sequence[Mapping[str, Any]], caption: str = "", max_rows: int = MAX_TABLE_ROWS) -> Html:
    """Rows (at least one) as a table with escaped cells; numbers flush right. The caption counts hidden rows."""
    cells = [{key: cell_text(value) for key, value in row.items()} for row in rows[:max_rows]]
    shown = pd.DataFrame(cells, dtype=object).fillna("–")
    if len(rows) > max_rows:
        caption = f"{caption} (first {max_rows} of {len(rows):,})".strip()
    numeric = [place for place, name in enumerate(shown) if _is_numeric(shown[name])]
    left = {"selector": "th, td", "props": "text-align: left; vertical-align: top"}
    right = [{"selector": f"th.col{place}, td.col{place}", "props": "text-align: right"} for place in numeric]
    props = "text-align: left; font-weight: bold; caption-side: top; white-space: nowrap"
    styler = shown.style.hide(axis="index").format(escape="html").format_index(escape="html", axis="columns")
    styler = styler.set_table_styles([left, *right, {"selector": "caption", "props": props}]).set_caption(
        html.escape(caption)
    )
    # The id ties the styles to this table; from its content, so that the same table gives the same HTML.
    text = "\n".join(filter(None, [caption, shown.to_string(index=False)]))
    styler.set_uuid(hashlib.sha256(text.encode(errors="replace")).hexdigest()[:10])
    return Html(styler.to_html(doctype_html=False), text)


def _is_numeric(cells: Sequence[str]) -> bool:
    known = [cell for cell in cells if cell not in ("–", "none")]
    return bool(known) and all(_NUMERIC.fullmatch(cell) for cell in known)


def cell_text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(cell_text, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def text_block(text: str) -> Html:
    """A text with its line breaks and spaces."""
    style = f"{TEXT_BOX};max-height:45em;overflow:auto"
    # With the keyboard too, a long text must scroll.
    return Html(f'<pre tabindex="0" style="{style}">{html.escape(text)}</pre>', text)


def examples(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], heading: str, absent: str = "There is no such row."
) -> Html:
    """Rows as cards, one text below the other; ``columns`` names them, ``heading`` is a format string over a row."""
    if not rows:
        return note(absent)
    cards = []
    for row in rows:
        named = [(Html(f"<b>{html.escape(name)}</b>", name), row[column]) for column, name in columns.items()]
        body = stack([part for name, value in named for part in (name, text_block(cell_text(value)))])
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
    """As ``examples``, each folded below its heading; ``redact`` leaves the texts out and says so."""
    if not rows:
        return note(absent)
    if redact:
        return sentences([*(_heading(heading, row) for row in rows), REDACTED])
    return stack([fold(_heading(heading, row), examples([row], columns, heading)) for row in rows])


def _heading(heading: str, row: Mapping[str, Any]) -> str:
    # A model can write a number of a hundred digits.
    title = heading.format(**{key: cell_text(value) for key, value in row.items()})
    return title if len(title) <= 100 else f"{title[:99]}…"


def masked_row(input_ids: Sequence[int], labels: Sequence[int], decode: Callable[[list[int]], str]) -> Html:
    """A training row with the tokens that carry no label (-100) greyed out; ``decode`` turns ids into text."""
    runs = groupby(zip(input_ids, labels, strict=True), key=lambda pair: pair[1] != -100)
    pieces = [(learnt, decode([token for token, _ in run])) for learnt, run in runs]
    masked, trained = "color:#666;background:#f0f0f0", f"color:{INK};background:#CFE8F5;font-weight:bold"
    spans = "".join(
        f'<span style="{trained if learnt else masked}" title="{"learnt" if learnt else "masked"}">'
        f"{html.escape(text)}</span>"
        for learnt, text in pieces
    )
    legend = f'<span style="{masked}">grey: masked, only read</span> · <span style="{trained}">bold: learnt</span>'
    plain = "".join(f"[learnt: {text}]" if learnt else text for learnt, text in pieces)
    return Html(f'<p>{legend}</p><pre style="{TEXT_BOX}">{spans}</pre>', plain)
