"""What 03 shows of the answers: accuracy, outcomes, what tuning changed, answers to read."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from lib import gsm8k
from lib.compare.findings import AxisVerdict, find_flips, judge_axis, verdict_sentence
from lib.reports import html, tables
from lib.reports.html import Html
from lib.reports.plots import rate_plot
from lib.wording import percent

Row = dict[str, Any]
TEXTS = {"question": "Question", "gold_answer": "Reference answer", "model_output": "Model's answer"}
# Qwen2.5 Technical Report, arXiv 2412.15115, table of the instruct models.
PUBLISHED = {"Qwen/Qwen2.5-1.5B-Instruct": 0.732}


def accuracy_sentences(scores: Row, baseline: float, base_model: str) -> list[str]:
    """Strict and flexible accuracy, and how the strict one stands to the baseline and to the published figure."""
    strict = tables.rate_text(scores["num_correct"], scores["n"])
    flexible = tables.rate_text(scores["num_correct_flexible"], scores["n"])
    lines = [f"Strict accuracy is {strict}: it {tables.baseline_text(scores['accuracy'], baseline)}."]
    lines.append(f"Flexible accuracy is {flexible}.")
    if base_model in PUBLISHED:
        published = f"{percent(PUBLISHED[base_model])} (arXiv 2412.15115)"
        lines.append(f"Its makers published {published} for the untuned model, with other prompts and token limits.")
    return lines


def accuracy_table(scores: Row) -> Html:
    """Strict and flexible accuracy with their intervals."""
    counts = {"strict": scores["num_correct"], "flexible": scores["num_correct_flexible"]}
    return html.table([{"accuracy": name, **tables.rate_columns(num, scores["n"])} for name, num in counts.items()])


def scales_table(answers: Mapping[str, Sequence[Row]]) -> Html | None:
    """Strict accuracy at each scale of the adapter; None without one."""
    scores = {scale: gsm8k.summarize(rows) for scale, rows in answers.items()}
    rows = [{"scale": scale, **tables.rate_columns(one["num_correct"], one["n"])} for scale, one in scores.items()]
    return html.table(rows, "Strict accuracy by scale of the adapter") if rows else None


def outcomes_plot(scores: Row) -> Figure:
    """The share of each outcome among all questions."""
    shares = {kind: (count, scores["n"]) for kind, count in scores["outcomes"].items()}
    return rate_plot(shares, title="Outcomes of all questions", xlabel="share of all questions")


def outcomes_text(scores: Row) -> str:
    """Counts of the outcomes and the mean length of an answer."""
    counts = ", ".join(f"{kind} {count}" for kind, count in scores["outcomes"].items())
    tokens = scores["mean_output_tokens"]
    return f"Outcomes: {counts}{'' if tokens is None else f'; {tokens:.0f} tokens per answer on average'}."


def changes(answers: Sequence[Row], untuned: Sequence[Row], baseline: float) -> list[AxisVerdict]:
    """Findings on strict and on flexible accuracy against the untuned model."""
    return [
        judge_axis("accuracy", answers, untuned, baseline=baseline),
        judge_axis("accuracy_flexible", answers, untuned),
    ]


def change_sentence(found: Sequence[AxisVerdict]) -> str:
    """What tuning changed in strict accuracy, as a sentence."""
    text = verdict_sentence(found[:1])
    return f"{text[0].upper()}{text[1:]}."


def changes_view(run_name: str, answers: Sequence[Row], untuned: Sequence[Row], found: Sequence[AxisVerdict]) -> Html:
    """Outcomes of both models, the paired tests, and which outcomes changed; None without an untuned model."""
    sides = {"untuned": untuned, "tuned": answers}
    split = [{"model": name, **gsm8k.summarize(rows)["outcomes"]} for name, rows in sides.items() if rows]
    parts = [html.table(split, f"Outcomes of {len(answers)} questions")]
    if untuned:
        flips = find_flips(untuned, answers, "accuracy")
        moved = [{"before": flip.before, "after": flip.after, "questions": len(flip.ids)} for flip in flips]
        parts.append(tables.verdict_table({run_name: found}))
        parts += [html.table(moved, "Questions whose outcome changed")] if moved else []
    return html.stack([*parts, html.note(change_sentence(found))])


def first_answers(answers: Sequence[Row], num: int = 2) -> Html:
    """The first rows as they are, before anything is counted."""
    return html.examples(answers[:num], TEXTS, "Row {id}")


def answers_to_read(answers: Sequence[Row]) -> Html:
    """The first answers that are right, and the first that are not, with the number that was read."""
    shown = [{**row, "read": _read(row)} for row in answers]
    right = [row for row in shown if row["correct"]][:2]
    missed = [row for row in shown if not row["correct"]][:3]
    heading = "Row {id}: {outcome}, {read}"
    return html.stack([html.examples(rows, TEXTS, heading) for rows in (right, missed)])


def _read(row: Row) -> str:
    return "no number read" if row["parsed_final"] is None else f"read as {row['parsed_final']}"
