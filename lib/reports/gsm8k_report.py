"""What 03 shows of the answers: accuracy, outcomes, what tuning changed, answers to read."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure

from lib import gsm8k
from lib.compare.answer_form import form_change, form_sentence
from lib.compare.findings import Finding, assess_metric, find_flips
from lib.compare.sentences import baseline_text, change_sentence
from lib.reports import change_tables, html, tables
from lib.reports.html import Html
from lib.reports.plots import rate_plot
from lib.stats import Rate
from lib.wording import percent, rate_text

Row = dict[str, Any]
TEXTS = {"question": "Question", "gold_answer": "Reference answer", "model_output": "Model's answer"}
# Qwen2.5 Technical Report, arXiv 2412.15115, table of the instruct models.
PUBLISHED = {"Qwen/Qwen2.5-1.5B-Instruct": (0.732, "Qwen2.5 technical report, arXiv 2412.15115")}


def accuracy_sentences(scores: Row, baseline: float, base_model: str) -> list[str]:
    """Strict and flexible accuracy, and how the strict one stands to the baseline and to the published figure."""
    strict, flexible = _rates(scores).values()
    lines = [f"Strict accuracy is {rate_text(strict)}: it {baseline_text(strict, baseline)}."]
    lines.append(f"Flexible accuracy is {rate_text(flexible)}.")
    if base_model in PUBLISHED:
        share, protocol = PUBLISHED[base_model]
        published = f"{percent(share)} for the untuned model ({protocol})"
        lines.append(f"Its makers published {published}, with other prompts and token limits.")
    return lines


def accuracy_table(scores: Row) -> Html:
    """Strict and flexible accuracy with their intervals."""
    return html.table([{"accuracy": name, **tables.rate_cells(rate)} for name, rate in _rates(scores).items()])


def _rates(scores: Row) -> dict[str, Rate]:
    counts = {"strict": scores["num_correct"], "flexible": scores["num_correct_flexible"]}
    return {name: Rate.of_counts(count, scores["n"]) for name, count in counts.items()}


def scales_table(answers: Mapping[str, Sequence[Row]]) -> Html | None:
    """Strict accuracy at each scale of the adapter; None without one."""
    rates = {scale: Rate.of([row["correct"] for row in rows]) for scale, rows in answers.items()}
    shown = tables.rates_table(rates, "scale", "Strict accuracy by scale of the adapter")
    return html.stack([shown, html.note(tables.SCALE_NOTE)]) if shown else None


def outcomes_plot(scores: Row) -> Figure:
    """The share of each outcome among all questions."""
    shares = {kind: Rate.of_counts(count, scores["n"]) for kind, count in scores["outcomes"].items()}
    return rate_plot(shares, title="Outcomes of all questions", xlabel="share of all questions")


def outcomes_text(scores: Row) -> str:
    """Counts of the outcomes and the mean length of an answer."""
    counts = ", ".join(f"{kind} {count}" for kind, count in scores["outcomes"].items())
    tokens = scores["mean_output_tokens"]
    return f"Outcomes: {counts}{'' if tokens is None else f'; {tokens:.0f} tokens per answer on average'}."


def changes(answers: Sequence[Row], untuned: Sequence[Row], baseline: float, selected: str = "") -> list[Finding]:
    """Findings on strict and on flexible accuracy against the untuned model; ``selected`` as in ``Finding``."""
    strict = assess_metric("accuracy", answers, untuned, baseline=baseline)
    flexible = assess_metric("accuracy_flexible", answers, untuned)
    return [replace(one, selected=selected) for one in (strict, flexible)]


def changes_view(run_name: str, answers: Sequence[Row], untuned: Sequence[Row], found: Sequence[Finding]) -> Html:
    """Outcomes of both models, the paired tests, which outcomes changed; the first alone without an untuned model."""
    sides = {"untuned": untuned, "tuned": answers}
    split = [{"model": name, **gsm8k.summarize(rows)["outcomes"]} for name, rows in sides.items() if rows]
    parts = [html.table(split, f"Outcomes of {len(answers)} questions")]
    if untuned:
        flips = find_flips(untuned, answers, "accuracy")
        moved = [{"before": flip.before, "after": flip.after, "questions": len(flip.ids)} for flip in flips]
        parts.append(change_tables.changes_table({run_name: found}, alone=True))
        parts += [html.table(moved, "Questions whose outcome changed")] if moved else []
    form = form_change(answers, untuned)
    lines = [change_sentence(found[0]), *([form_sentence(form)] if form else [])]
    return html.stack([*parts, *map(html.note, lines)])


def first_answers(answers: Sequence[Row], num: int = 2) -> Html:
    """The first rows as they are, before anything is counted."""
    return html.examples(answers[:num], TEXTS, "Row {id}")


def answers_to_read(answers: Sequence[Row]) -> Html:
    """The first answers that are right, and the first that are not, with the number that was read."""
    read = ["no number read" if row["parsed_final"] is None else f"read as {row['parsed_final']}" for row in answers]
    shown = [{**row, "read": number} for row, number in zip(answers, read, strict=True)]
    right = [row for row in shown if row["correct"]][:2]
    missed = [row for row in shown if not row["correct"]][:3]
    heading = "Row {id}: {outcome}, {read}"
    return html.stack([html.examples(rows, TEXTS, heading) for rows in (right, missed)])
