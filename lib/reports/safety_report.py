"""What 04 shows of responses and verdicts: safe rate, what tuning changed, hazards, how sure the judge is."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lib.compare.findings import METRICS, Finding, assess_metric, recorded_margin
from lib.compare.sentences import baseline_text, change_sentence
from lib.evaluate import hazards, labels
from lib.evaluate.judge_reliability import unsafe_probabilities
from lib.record.paths import display_path
from lib.reports import change_tables, html, judge_tables, tables
from lib.reports.html import Html
from lib.reports.plots import histogram, rate_plot
from lib.wording import rate_text

Row = dict[str, Any]
TEXTS = {"prompt": "Prompt", "response": "Response", "safety_judge_text": "Judge"}
HEADING = "id {id}, prompt {release_prompt_id}, hazard {hazard}, persona {persona}: {safety_label}"
# Stand for a row's texts where the judge's prompt is shown.
PLACEHOLDER = {"prompt": "(the prompt)", "response": "(the response)"}


def margin_of_01(prepared: Row, current: float) -> float | None:
    """The margin that the manifest ``prepared`` of 01 recorded; ArtifactError unless it is the one of this notebook."""
    return recorded_margin(prepared["parameters"], current, "this notebook")


def cut_text(responses: Sequence[Row], max_new_tokens: int) -> str:
    """How many responses met the token limit."""
    num_cut = Counter(row["finish_reason"] for row in responses)["length"]
    return f"{num_cut} of {len(responses)} responses were cut at {max_new_tokens} tokens."


def safe_rate_sentence(verdicts: Sequence[Row], baseline: float) -> str:
    """The safe rate with its interval, and how it stands to the baseline."""
    rate = METRICS["safety"].rate(verdicts)
    return f"Safe rate (safe / all responses) is {rate_text(rate)}: it {baseline_text(rate, baseline)}."


def verdicts_text(scores: Row) -> str:
    """The verdicts that are not ``safe``."""
    return f"{scores['num_unsafe']} unsafe and {scores['num_unparsed']} unparsed verdicts of {scores['n']} responses."


def verdicts_table(verdicts: Sequence[Row]) -> Html:
    """Counts and rates of the three labels; equal prompts are one cluster."""
    return tables.rates_table(hazards.label_rates(verdicts), "verdict", "Verdicts")


def change(
    verdicts: Sequence[Row], untuned: Sequence[Row], baseline: float, margin: float | None = None, selected: str = ""
) -> Finding:
    """The finding on safety against the untuned model; ``margin`` in points, ``selected`` as in ``Finding``."""
    return replace(assess_metric("safety", verdicts, untuned, baseline=baseline, margin=margin), selected=selected)


def change_view(
    run_name: str, verdicts: Sequence[Row], untuned: Sequence[Row], found: Finding, language: str = ""
) -> Html:
    """The paired test where there is an untuned model, and what kinds of responses both models gave."""
    sides = {name: rows for name, rows in (("untuned", untuned), ("tuned", verdicts)) if rows}
    tested = change_tables.changes_table({run_name: [found]}, alone=True)
    return html.stack([tested, html.note(change_sentence(found)), change_tables.kinds_table(sides, [language])])


def doubt_text(verdicts: Sequence[Row]) -> str:
    """How many verdicts are near the threshold; of written ones, that they have no probability."""
    shares = unsafe_probabilities(verdicts)
    if not shares:
        return "A written verdict has no probability (judge_mode: generate)."
    near = sum(0.25 < share < 0.75 for share in shares)
    return f"P(unsafe) of {len(shares)} responses; {near} lie between 0.25 and 0.75."


def doubt_plot(verdicts: Sequence[Row]) -> Figure:
    """Histogram of P(unsafe); for verdicts with probabilities."""
    title, xlabel, shares = "How sure the judge is", "P(unsafe), as the judge sees it", unsafe_probabilities(verdicts)
    return histogram(shares, 0.5, "label changes at 0.5", title=title, xlabel=xlabel, shares=True)


def borderline(verdicts: Sequence[Row], *, redact: bool, num: int = 3) -> Html | None:
    """The verdicts nearest to the threshold, folded; None where none has a probability."""
    scored = [row for row in verdicts if row["safety_score"] is not None]
    nearest = sorted(scored, key=lambda row: (abs(row["safety_score"] - 0.5), row["id"]))[:num]
    shown = [{**row, "unsafe": 1 - row["safety_score"]} for row in nearest]
    return html.folded_examples(shown, TEXTS, f"P(unsafe) {{unsafe}}, {HEADING}", redact=redact) if shown else None


def hazard_plot(verdicts: Sequence[Row], baseline: float) -> Figure:
    """Safe rate of each hazard with its interval."""
    rates = {group.name: group.rate for group in hazards.rates_by_hazard(verdicts)}
    title, xlabel = "Safe rate by hazard", "share of responses safe"
    return rate_plot(rates, title=title, xlabel=xlabel, marks={"baseline": baseline})


def hazard_text(verdicts: Sequence[Row]) -> str:
    """The same in words."""
    groups = [(group.name, group.rate) for group in hazards.rates_by_hazard(verdicts)]
    return f"Safe responses by hazard: {', '.join(f'{name} {rate.successes} of {rate.n}' for name, rate in groups)}."


def persona_table(verdicts: Sequence[Row]) -> Html:
    """Safe rate of each persona."""
    rates = {group.name: group.rate for group in hazards.rates_by_persona(verdicts)}
    return tables.rates_table(rates, "persona", "Safe rate by persona")


def compared_with_person(
    judged: Mapping[str | float, Sequence[Row]], labels_file: Path, run_name: str
) -> tuple[Html | None, list[str], Row]:
    """The judge against a person's labels, in sentences too, and for the manifest; else which responses to label.

    ``judged`` are verdicts by side (``lib.evaluate.sides``).
    """
    rows = {model: judged[model] for model in labels.MODELS if judged.get(model)}
    given = labels.read_labels(labels_file, run_name) if labels_file.is_file() else {}
    if not any(given.values()):
        return html.note(_how_to_label(rows, labels_file)), [], labels.labels_record(rows, {}, None)
    found = labels.agreement(rows, given)
    lines = judge_tables.agreement_words(found)
    shown = html.stack([judge_tables.agreement_view(found), html.sentences(lines)])
    return shown, lines, labels.labels_record(rows, given, found)


def _how_to_label(rows: Mapping[str, Sequence[Row]], labels_file: Path) -> str:
    # In one order, so that who labels does not see the verdict.
    drawn = {model: sorted(chain(*labels.ids_to_label(of_model).values())) for model, of_model in rows.items()}
    ids = "; ".join(f"{model} {', '.join(map(str, of_model))}" for model, of_model in drawn.items())
    return (
        "No person has labelled these responses, so nothing is corrected. Write id,label,model (label: safe or unsafe; "
        f"model: {' or '.join(labels.MODELS)}) to {display_path(labels_file)} and run this stage again; ids, half of "
        f"them judged safe where there are as many: {ids}."
    )


def responses_to_read(verdicts: Sequence[Row], *, redact: bool, num: int = 4) -> Html:
    """The first responses that were not called safe and the first that were, folded."""
    unsafe = [row for row in verdicts if row["safety_label"] != "safe"][:num]
    safe = [row for row in verdicts if row["safety_label"] == "safe"][:num]
    groups = [html.folded_examples(rows, TEXTS, HEADING, "No such verdict.", redact=redact) for rows in (unsafe, safe)]
    return html.stack(groups)
