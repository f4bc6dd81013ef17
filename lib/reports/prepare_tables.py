"""Tables and plots of 01_prepare."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase

from lib import gsm8k, safety, stats
from lib.prepare import audit, overlap, self_distillation
from lib.prepare.run_rows import RunData, RunRows
from lib.prepare.self_distillation import Distillation
from lib.reports import html, plots, tables
from lib.reports.html import Html
from lib.reports.stage import Stage
from lib.stats import Rate
from lib.wording import percent, points, rate_text, speed_text

Row = Mapping[str, Any]
# Shares of the rows that only one of two models gets right: what safety runs had, and around it.
DISCORDANT_SHARES, USUAL_SHARE = (0.05, 0.1, 0.15), 0.1
ENOUGH, DEMO_PROMPTS = 0.8, 1200


def provenance(data: RunData) -> dict[str, dict[str, Any]]:
    """Where the data is from, for tables and the manifest."""
    return {name: source.table_row() for name, source in data.sources.items()}


def raw_rows(data: RunData, number: int = 2) -> Html:
    """The first training rows as they are in their file."""
    lines = data.train.lines or range(1, number + 1)
    rows = [{**row, "line": line} for row, line in zip(data.train.rows[:number], lines, strict=False)]
    texts = {"question": "Question", "answer": "Answer"}
    return html.examples(rows, texts, f"{data.train.name}, line {{line}}")


def faults_text(rows: RunRows, data: RunData, action: str) -> str:
    """How many faults there are to decide on, in a sentence."""
    also = "" if data.train is data.gsm8k_train else " and GSM8K train"
    return (
        f"{len(rows.decided)} faults for train_file_faults ({action}) in {len(data.train.rows):,} training rows{also}; "
        f"{rows.num_unknown} questions are not GSM8K's."
    )


def faults(rows: RunRows, data: RunData, action: audit.Action) -> Html:
    """Faults of the training rows by kind, and the first of each kind."""
    kinds = html.table(audit.fault_table(rows.faults, action), f"{len(data.train.rows):,} training rows checked")
    caption = "The first of each kind, by line and file"
    first = html.table(audit.first_offenders(rows.faults), caption) if rows.faults else None
    return html.stack([kinds, first, html.note(faults_text(rows, data, action), strong=bool(rows.decided))])


def offenders(found: Sequence[audit.Fault], text: str) -> Html:
    """A sentence about faults and the first of them."""
    first = html.table(audit.first_offenders(found, per_kind=5), "The first of them") if found else None
    return html.stack([html.note(text, strong=any(fault.kind != "too long" for fault in found)), first])


def coverage_rates(made: Distillation) -> dict[int, Rate]:
    """Samples per question -> share of questions with a correct answer among them."""
    return {number: Rate.of_counts(*counts) for number, counts in self_distillation.coverage(made.sampled).items()}


def own_answers_text(made: Distillation) -> str:
    """How many questions have a correct answer of the model's own, in a sentence."""
    rate, distilled = coverage_rates(made)[made.sampled.num_samples], made.distilled
    return (
        f"Questions with a correct answer of the model's own: {rate_text(rate)}; {distilled.num_gold} rows are "
        f"GSM8K's answer instead, {distilled.num_dropped} questions have no row."
    )


def own_answers(made: Distillation | None, stage: Stage) -> Html | None:
    """What made the answers, how many questions they cover and what became of them."""
    if made is None:
        return None
    sampled, text = made.sampled, own_answers_text(made)
    counts, total = self_distillation.count_outcomes(sampled), len(sampled.rows)
    became = [{"answers": name, "number": n, "share": percent(n / total)} for name, n in counts.items()]
    rates = {f"{number} sampled": rate for number, rate in coverage_rates(made).items()}
    figure = plots.rate_plot(rates, title="Questions with a correct answer", xlabel="share of the training questions")
    protocol = [{"part": name, "value": value} for name, value in made.protocol.items()]
    shown = [html.fold("Protocol of the answers", tables.full_table(protocol))]
    shown.append(html.note(speed_text(sampled.num_new, sampled.num_new_tokens, sampled.wall_s)))
    shown += [stage.plot(figure, "own_answers", text), html.table(became, f"What became of {total:,} answers")]
    return html.stack([*shown, html.note(text)])


def own_examples(made: Distillation | None, tokenizer: PreTrainedTokenizerBase) -> Html | None:
    """Lengths of the answers, and the first kept and rejected ones."""
    if made is None:
        return None
    lengths = self_distillation.length_rows(made.sampled, made.distilled, tokenizer)
    rejected = [row for row in made.sampled.rows if self_distillation.outcome(row) != "correct"]
    texts = {"question": "Question", "gold_answer": "GSM8K's answer", "model_output": "Model's answer"}
    heading = "Question {question_number}, sample {sample}: {became}, read as {parsed_final}"
    shown = [html.table(lengths, "Answers in tokens")]
    for title, rows in {"Kept, the first two": made.distilled.chosen, "Rejected, the first two": rejected}.items():
        named = [{**row, "became": self_distillation.outcome(row)} for row in rows[:2]]
        shown += [html.note(title, strong=True), html.examples(named, texts, heading)]
    return html.stack(shown)


def num_seen(rows: RunRows, train: Sequence[Row]) -> int:
    """Evaluation questions that are also among the training, pool or development rows."""
    evaluated = {gsm8k.normalise_question(row["question"]) for row in rows.gsm8k_eval}
    return len(evaluated & {gsm8k.normalise_question(row["question"]) for row in [*train, *rows.pool, *rows.dev]})


def run_rows(rows: RunRows, train: Sequence[Row], data: RunData, parameters: Mapping[str, Any]) -> Html:
    """How many rows of each kind the run has and where they are from."""
    source, prompts = parameters["train_source"], data.no_prompts
    prompts = prompts or f"set {parameters['ailuminate_prompt_set']}, language: {data.language}"
    examples = data.examples.name if data.examples else "GSM8K train"
    counts = [
        ("training", train, f"{len(data.train.rows):,} rows of {source}"),
        ("few-shot pool", rows.pool, f"{examples}; {len(rows.fewshot)} are shown"),
        ("development", rows.dev, "GSM8K train, to choose a checkpoint on"),
        ("GSM8K evaluation", rows.gsm8k_eval, f"{len(data.gsm8k_test):,} rows of GSM8K test"),
        ("AILuminate", rows.prompts, prompts),
    ]
    shown = [{"rows": name, "n": len(kind), "from": where} for name, kind, where in counts]
    left = f"{rows.num_removed} rows left training because pool or development rows have their question"
    seen = f"{num_seen(rows, train)} of {len(rows.gsm8k_eval)} evaluation questions are also in the rows above."
    return html.stack([html.table(shown, f"Rows of this run; {left}"), html.note(seen)])


def overlap_tables(overlaps: Sequence[overlap.Overlap], rows: RunRows, train: Sequence[Row]) -> Html:
    """How many questions share words with training rows, and which."""
    held_out = {"dev": rows.dev, "fewshot": rows.pool}
    sizes = []
    for size in overlap.SIZES:
        hits = Counter(shared.source for shared in overlaps if shared.size >= size)
        sizes.append({"words in a row": f"{size} or more"})
        sizes[-1] |= {f"evaluation with {name}": hits[name] for name in ("train", "fewshot")}
        sizes[-1] |= {f"{name} with train": overlap.num_sharing(kind, train, size) for name, kind in held_out.items()}
    listed = []
    for shared in overlaps:
        places = ", ".join(map(str, shared.source_rows[:5])) + (", …" if len(shared.source_rows) > 5 else "")
        listed.append({"test_index": shared.row, "words": shared.size, "source": shared.source, "source rows": places})
    numbers = f"{len(rows.gsm8k_eval):,} evaluation, {len(rows.dev)} dev and {len(rows.pool)} pool questions"
    counts = html.table(sizes, f"Of {numbers}, how many share so many words with a row")
    return html.stack(
        [counts, html.table(listed, "Which, and with which rows of that file (from 0)") if listed else None]
    )


def lengths_plot(lengths: Sequence[int], limit: int, base_model: str) -> Figure:
    """Training rows by their tokens."""
    title, xlabel = "Training rows by length", f"tokens of the {base_model} chat template"
    return plots.histogram(lengths, limit, f"max_seq_length = {limit}", title=title, xlabel=xlabel)


def lengths_text(lengths: Sequence[int], num_long: int) -> str:
    """Range of the lengths, in a sentence."""
    return f"Rows have {min(lengths)} to {max(lengths)} tokens; {num_long} of {len(lengths)} are too long."


def hazard_counts(prompts: Sequence[Row]) -> Counter[str]:
    return Counter(safety.hazard_group(row["hazard"] or "unknown") for row in prompts)


def hazards(prompts: Sequence[Row], data: RunData) -> Html:
    """Prompts by hazard, or why there are no prompts."""
    if data.no_prompts:
        return html.note(f"AILuminate prompts are missing: safety will be not measured. {data.no_prompts}", strong=True)
    counts = hazard_counts(prompts).most_common()
    rows = [{"hazard": safety.HAZARDS.get(code, code), "code": code, "prompts": number} for code, number in counts]
    caption = f"Hazards of the {len(prompts)} prompts, language: {data.language}"
    return html.table(rows, caption, max_rows=len(safety.HAZARDS))


def planning(rows: RunRows, margin: float) -> Html:
    """What the numbers of rows can show: detectable changes, and the power to show that safety was kept."""
    num_prompts, num_questions = len(rows.prompts), len(rows.gsm8k_eval)
    sizes = {num_prompts: num_distinct(rows)} if num_prompts else {}
    head = f"power: safety did not fall by more than {margin:g} points"
    shown = []
    for number, size in ({DEMO_PROMPTS: DEMO_PROMPTS} | sizes).items():
        for share in DISCORDANT_SHARES:
            power = percent(stats.noninferiority_power(size, share, margin / 100, _level(1)))
            shown.append({**_detectable(f"{number:,} AILuminate prompts", size, share), head: power})
    shown += [_detectable(f"{num_questions:,} GSM8K questions", num_questions, share) for share in DISCORDANT_SHARES]
    text = margin_text(rows, margin)
    return html.stack([html.table(shown, "Changes in points", len(shown)), html.note(text) if text else None])


def num_distinct(rows: RunRows) -> int:
    """Independent prompts that the prompts of a run are worth."""
    texts = [safety.prompt_text(row) for row in rows.prompts]
    return math.floor(stats.effective_size(texts) + 1e-9) if texts else 0


def _level(num_presets: int) -> float:
    """Of a claim at Holm's first step: each preset has two places in the primary family (``lib.compare.family``)."""
    return 1 - 0.05 / (2 * num_presets)


def _detectable(name: str, size: int, share: float) -> dict[str, str]:
    row = {"rows": name, "discordant": percent(share)}
    for number, presets in ((1, "1 preset"), (3, "3 presets")):
        found = stats.minimum_detectable_difference(size, share, ENOUGH, _level(number))
        row[f"detectable (80 % power), {presets}"] = "none" if found is None else points(found)
    return row


def margin_text(rows: RunRows, margin: float) -> str:
    """Whether the prompts of a run can carry the margin, and what would; "" without prompts."""
    if not rows.prompts:
        return ""
    sizes = (num_distinct(rows), DEMO_PROMPTS)
    own, more = (stats.noninferiority_power(size, USUAL_SHARE, margin / 100, _level(1)) for size in sizes)
    text = (
        f"Safety margin: {margin:g} points. Where nothing changed and {percent(USUAL_SHARE)} of the verdicts differ, "
        f"{len(rows.prompts):,} prompts show that safety did not fall by more with a chance of {percent(own)}"
    )
    if own >= ENOUGH:
        return f"{text}."
    if more < ENOUGH:
        return f"{text}: too few, as are the 1,200 of demo1200 ({percent(more)}). Only a larger margin can be shown."
    return (
        f"{text}: too few. Recommended is ailuminate_prompt_set: demo1200 (all of its 1,200 prompts, with "
        f"ailuminate_source: mlcommons and max_ailuminate_rows: 0), with a chance of {percent(more)}."
    )


def summary(
    rows: RunRows,
    train: Sequence[Row],
    data: RunData,
    parameters: Mapping[str, Any],
    own: Distillation | None,
    unlearnable: Sequence[audit.Fault],
    too_long: Sequence[audit.Fault],
    overlaps: Sequence[overlap.Overlap],
) -> list[str]:
    """The stage in sentences."""
    num_prompts, source = len(rows.prompts), parameters["train_source"]
    most = max(overlap.SIZES)
    num_overlapping = len({shared.row for shared in overlaps if shared.size >= most})
    prompts = f"{tables.prompts_text(num_prompts, data.language)} Hazards: {len(hazard_counts(rows.prompts))}."
    return [
        f"{len(train):,} rows to train on, {len(rows.dev)} to choose a checkpoint on; {len(too_long)} are too long.",
        f"{len(unlearnable)} more were left out because they cannot be learnt.",
        faults_text(rows, data, parameters["train_file_faults"]),
        *([own_answers_text(own)] if own else [f"The answers to learn are those of {source}."]),
        f"{len(rows.gsm8k_eval):,} GSM8K questions to answer, each after {len(rows.fewshot)} worked examples.",
        f"No prompts: {data.no_prompts}"
        if data.no_prompts
        else f"{prompts} {margin_text(rows, parameters['safety_margin'])}",
        f"{num_seen(rows, train)} evaluation questions are also among the rows that training or the examples use.",
        f"{num_overlapping} evaluation questions share {most} words in a row with a training row or an example.",
    ]
