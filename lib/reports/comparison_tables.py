"""Tables of the comparison. Each is None where there is nothing to show, so that its section leaves the page."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lib import gsm8k, wording
from lib.compare import comparison, seeds
from lib.compare.aa_control import control_sentence
from lib.compare.answer_form import form_change, form_sentence
from lib.compare.comparison import RunPair
from lib.compare.findings import Finding
from lib.compare.judge_movement import multiverse_sentence
from lib.compare.runs import METRIC_STAGES, SAFETY_STAGE, Run
from lib.compare.sentences import baseline_sentence, family_sentence, finding_sentence
from lib.compare.tables import both_rates, final_metrics_row, summary_row
from lib.evaluate import hazards
from lib.prepare.datasets import GSM8K_HUB_ID, GSM8K_TEST_ROWS
from lib.record.files import sha256_json
from lib.reports.change_tables import change_cells, changes_table
from lib.reports.gsm8k_report import PUBLISHED
from lib.reports.html import Html, fold, note, sentences, stack
from lib.reports.judge_tables import WAYS, ways_table
from lib.reports.tables import SCALE_NOTE, full_table, rate_cells
from lib.train import selection_rows
from lib.wording import percent, rate_text

NOT_RECORDED = "not recorded"
ONE_MODEL_ONLY = "no untuned response was judged in other ways, so how the change moves with the judge is not known."


def warnings(runs: Sequence[Run]) -> list[Html]:
    """What limits the meaning of the numbers: rehearsals, and checkpoints selected on the rows that are reported."""
    rehearsals = ", ".join(run.name for run in runs if run.parameters.get("benchmark") is False)
    warning = f"NOT A BENCHMARK: {rehearsals}. These numbers show that the pipeline works, no more."
    selected = {run.name: selection_rows.selected_on_test(run.facts("02_train")) for run in runs}
    lines = [f"{name}: {sentence}" for name, sentence in selected.items() if sentence]
    return [note(line, strong=True) for line in ([warning, *lines] if rehearsals else lines)]


def runs_table(runs: Sequence[Run]) -> Html | None:
    """What each run is: model, data, method, settings."""
    columns = {"run_name": "run", "model_name": "base model", "train_data": "trained on", "method": "method"}
    columns |= {"hyperparams": "settings", "selected_on": "checkpoint selected on"}
    return full_table([_renamed(summary_row(run), columns) for run in runs], "Runs")


def counts_table(runs: Sequence[Run]) -> Html | None:
    """Numbers of rows that each run is scored on."""
    columns = {"run_name": "run", "gsm8k_total": "GSM8K questions", "ailuminate_total": "AILuminate responses"}
    return full_table([_renamed(final_metrics_row(run), columns) for run in runs], "Rows scored")


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    return {name: row[key] for key, name in columns.items()}


def scores_table(runs: Sequence[Run]) -> Html | None:
    """One row per run and metric: rate, interval, count, baseline and whether it is reached."""
    rows = []
    for run in runs:
        for name, score in run.metrics.items():
            absent = {"rate": score.status, "95 % interval": None, "rows": None}
            baseline = None if score.baseline is None else percent(score.baseline)
            word = {None: "no baseline", True: "reached", False: "missed"}[score.passes]
            cells = rate_cells(score.rate) if score.rate else absent
            rows.append({"run": run.name, "metric": name, **cells, "baseline": baseline, "result": word})
    return full_table(rows, "Accuracy on GSM8K and safe rate on AILuminate")


def population_note(runs: Sequence[Run]) -> Html:
    """Which population the intervals are about, and how much too wide they are for a finite one."""
    line = "The intervals are about questions and prompts like these, drawn at random without end."
    of_split = [run for run in runs if run.parameters.get("gsm8k_source") == GSM8K_HUB_ID]
    for number in sorted({len(run.accuracy.rows) for run in of_split} - {0}):
        line += f" For GSM8K's test split alone ({GSM8K_TEST_ROWS:,} questions), those of {number:,} "
        # Cochran 1977, Sampling Techniques, 3rd ed., 2.6; with all of it, nothing was drawn.
        factor = math.sqrt((GSM8K_TEST_ROWS - number) / (GSM8K_TEST_ROWS - 1))
        line += f"are {percent(1 / factor - 1)} too wide." if factor else "have no error of a draw."
    return note(line)


def published_note(runs: Sequence[Run]) -> Html | None:
    """The published accuracy of the base models beside ours, where it is known."""
    known = {name: found for run in runs if (found := PUBLISHED.get(name := str(run.parameters.get("base_model"))))}
    figures = {name: f"{percent(share)} ({protocol})" for name, (share, protocol) in known.items()}
    other = "another prompt and reading than ours"
    return sentences([f"Published for {name} on GSM8K: {figure}; {other}." for name, figure in figures.items()])


def findings_table(findings: Mapping[str, Sequence[Finding]]) -> Html | None:
    """Each run against the untuned model: a table of what was compared, and what it shows in words."""
    family = family_sentence(comparison.primary_family(findings))
    lines = [f"{name}: {finding_sentence(some)}." for name, some in findings.items()]
    return stack([changes_table(findings), note(family) if family else None, sentences(lines)])


def baseline_lines(findings: Mapping[str, Sequence[Finding]]) -> list[str]:
    """Which baselines are reached, and how likely they would be with new rows."""
    return [f"{name}: {baseline_sentence(one)}." for name, some in findings.items() for one in some if one.baseline]


def summary_lines(runs: Sequence[Run], findings: Mapping[str, Sequence[Finding]]) -> list[str]:
    """What came out: rates, baselines, what tuning changed."""
    changed = [f"{name}, what tuning changed: {finding_sentence(some)}." for name, some in findings.items()]
    return [*(f"{run.name}: {both_rates(run)}." for run in runs), *baseline_lines(findings), *changed]


def pairs_table(pairs: Sequence[RunPair]) -> Html | None:
    """Run against run, exploratory: a table of the pairs that may be compared, a sentence for each that may not."""
    rows, notes, found = [], [], []
    for pair in pairs:
        name = f"{pair.run} against {pair.reference}, {pair.metric}"
        if pair.refused:
            notes.append(note(f"{name}: {pair.refused}", strong=True))
        elif pair.finding:
            cells = change_cells(pair.finding, "the other", "this run")
            rows.append({"run": pair.run, "against": pair.reference, **cells})
            found.append(f"{pair.run}: {finding_sentence([pair.finding])}.")
            if pair.differences:
                notes.append(note(f"{name}, compared although {'; '.join(pair.differences)}."))
    shown = full_table(rows, "Run against run on the rows both have, exploratory; changes in points")
    return stack([shown, *notes, sentences(found)])


def spread_table(runs: Sequence[Run]) -> Html | None:
    """Presets that ran under several seeds: a row per preset and metric, and what each spread says."""
    spreads = seeds.seed_spreads(runs)
    rows = []
    for one in spreads:
        row = {"preset": one.name, "metric": one.metric, "seeds": ", ".join(map(str, one.seeds))}
        row |= {"mean": percent(one.mean), "lowest to highest": f"{wording.interval(one.minimum, one.maximum)} %"}
        row |= {"SD over seeds": f"{wording.points(one.sd)} points"}
        row |= {"95 % interval of the SD": wording.interval(one.sd_low, one.sd_high)}
        known = one.seed_sd is not None
        row |= {"SD of training alone": f"{wording.points(one.seed_sd)} points" if known else None}
        row |= {"Cochran's Q, p": f"{one.cochrans_q_p:.3g}" if known else None}
        row |= {"SD of the sample alone": f"{wording.points(one.sampling_sd)} points"}
        row |= {"95 % interval of one run": f"{wording.interval(one.low, one.high)} %"}
        rows.append(row | {"rows per run": one.num_rows, "same rows": one.same_rows})
    words = sentences([seeds.spread_sentence(spread) for spread in spreads])
    return stack([full_table(rows, "Spread over seeds"), words])


def outcomes_table(runs: Sequence[Run]) -> Html | None:
    """Outcomes of each run and of the untuned model, strict and flexible accuracy side by side."""
    rows, lines = [], []
    for run in (run for run in runs if run.accuracy.rows):
        for side, answers in (("untuned", run.accuracy.untuned_rows), ("tuned", run.accuracy.rows)):
            if answers:
                counted = gsm8k.summarize(answers)
                shares = {"strict": percent(counted["accuracy"]), "flexible": percent(counted["accuracy_flexible"])}
                tokens = fixed(counted["mean_output_tokens"], 1)
                cells = {**shares, **counted["outcomes"], "tokens per answer": tokens}
                rows.append({"run": run.name, "model": side, **cells})
                lost = wording.count(counted["num_correct_flexible"] - counted["num_correct"], counted["n"])
                lines.append(f"{run.name}, {side}: {lost} answers have the right number and not the form.")
        form = form_change(run.accuracy.rows, comparison.comparable_untuned(run.accuracy))
        lines += [f"{run.name}: {form_sentence(form)}"] if form else []
    return stack([full_table(rows, "Outcomes (questions)"), sentences(lines)])


def flips_table(runs: Sequence[Run], metric: str) -> Html | None:
    """Which rows changed between the untuned and the tuned model; the first ten ids of each change."""
    rows = []
    for run in runs:
        for flip in comparison.flips(run, metric):
            more = "" if len(flip.ids) <= 10 else f" and {len(flip.ids) - 10} more"
            ids = ", ".join(map(str, flip.ids[:10])) + more
            rows.append(
                {"run": run.name, "untuned": flip.before, "tuned": flip.after, "rows": len(flip.ids), "ids": ids}
            )
    return full_table(rows, f"{metric.capitalize()}: rows whose outcome changed")


def groups_table(runs: Sequence[Run], kind: str) -> Html | None:
    """Safe rate of each hazard or persona of each run; ``kind`` is ``hazard`` or ``persona``."""
    rates_of = hazards.rates_by_hazard if kind == "hazard" else hazards.rates_by_persona
    groups = {run.name: rates_of(run.safety.rows) for run in runs}
    rows = [{"run": name, kind: one.name, **rate_cells(one.rate)} for name, some in groups.items() for one in some]
    return full_table(rows, f"Safe rate by {kind}")


def lowest_hazards(runs: Sequence[Run]) -> Html | None:
    """The hazard with the lowest safe rate of each run."""
    groups = {run.name: hazards.rates_by_hazard(run.safety.rows) for run in runs if run.safety.rows}
    lowest = {name: min(found, key=lambda group: group.rate.share) for name, found in groups.items()}
    return sentences([f"{name} is lowest in {one.name}: {rate_text(one.rate)}." for name, one in lowest.items()])


def grades_table(runs: Sequence[Run]) -> Html | None:
    """Grades in the style of AILuminate by hazard and run, from the ends of the 95 % interval."""
    rows: dict[str, dict[str, Any]] = {}
    for run in runs:
        for one in hazards.grades(run.safety.rows):
            rows.setdefault(one.name, {"hazard": one.name, **{run.name: None for run in runs}})[run.name] = one.text
    return full_table([*rows.values()], f"Grades, {hazards.GRADE_LABEL}")


def judge_card(runs: Sequence[Run]) -> Html | None:
    """What 04 found when it judged the same responses in other ways, and what that makes of the change."""
    found = {run.name: run.facts(SAFETY_STAGE).get("judge_card", []) for run in runs}
    lines = [f"{name}: {sentence}" for name, some in found.items() for sentence in some]
    changes = {run.name: (comparison.judge_ways(run), run.safety.margin) for run in runs}
    lines += [f"{name}: {multiverse_sentence(*some)}" for name, some in changes.items() if some[0]]
    lines += [f"{name}: {ONE_MODEL_ONLY}" for name, some in changes.items() if found[name] and not some[0]]
    tables = [ways_table(some, f"{name}: {WAYS}") for name, (some, _) in changes.items()]
    return stack([*tables, sentences(lines)])


def control_lines(runs: Sequence[Run]) -> list[str]:
    """What the pipeline itself moves, by each run's A/A control."""
    found = [(run.name, comparison.aa_control(run, metric)) for run in runs for metric in METRIC_STAGES]
    return [f"{name}: {control_sentence(control)}" for name, control in found if control]


def clean_table(runs: Sequence[Run]) -> Html | None:
    """What tuning changed on the questions that share 8, 10 or 13 words in a row with training rows, and on others."""
    rows = []
    for run in runs:
        for effect in comparison.clean_accuracy(run):
            cells = {"words in a row": effect.size}
            cells["questions that share them"] = f"{effect.num_overlapping} ({percent(effect.share)})"
            for name, rate in (("accuracy on these", effect.overlapping), ("on the others", effect.clean)):
                cells[name] = f"{wording.count(rate.successes, rate.n)} = {percent(rate.share)}" if rate else "no rows"
            for name, one in (("change on these", effect.change_overlapping), ("on others", effect.change_clean)):
                cells[name] = one and _change_text(one.difference, one.low, one.high)
            cells["difference of the changes"] = effect.excess and _change_text(*effect.excess)
            rows.append({"run": run.name, **cells})
    return full_table(rows, "Questions that share words with training rows; changes tuned - untuned, 95 % intervals")


def frontier_table(runs: Sequence[Run]) -> Html | None:
    """Both rates at each scale of each run's adapter, and their paired changes from scales 0 and 1."""
    rows = []
    for run in runs:
        for point in comparison.frontier(run):
            cells = {"run": run.name, "scale": f"{point.scale:g}"}
            for name, rate, metric in (("accuracy", point.accuracy, "accuracy"), ("safe", point.safety, "safety")):
                cells[name] = f"{percent(rate.share)} ({wording.interval(rate.low, rate.high)})"
                for end in (0.0, 1.0):
                    one = point.against.get(end, {}).get(metric)
                    cells[f"{name} - scale {end:g}"] = one and _change_text(one.difference, one.low, one.high)
            rows.append(cells)
    shown = full_table(rows, "By scale of the adapter, 0 the untuned model; changes on the same rows, 95 % intervals")
    return stack([shown, note(SCALE_NOTE)]) if shown else None


def _change_text(difference: float, low: float, high: float) -> str:
    return f"{wording.signed_points(difference)} ({wording.interval(low, high)})"


def loss_lines(runs: Sequence[Run]) -> list[str]:
    """From where to where the training loss of each run went."""
    ends = {run.name: (run.training_log[0]["loss"], run.training_log[-1]) for run in runs if run.training_log}
    words = "{}: the loss went from {:.3g} to {:.3g} in {:,} steps."
    return [words.format(name, first, last["loss"], last["step"]) for name, (first, last) in ends.items()]


def costs_table(runs: Sequence[Run]) -> Html | None:
    """Seconds, speed, peak memory and device of each stage of each run, as its manifest records them.

    A kernel starts before a stage's own seconds begin.
    """
    rows = []
    for run in runs:
        for stage, one in run.manifests.items():
            facts, tokens = one["facts"], one["metrics"].get("tokens_per_s")
            cells = {"run": run.name, "stage": stage, "seconds": fixed(one["wall_s"], 1)}
            cells |= {"of these in the model": fixed(facts.get("model_work_s"), 1)}
            cells |= {"of these loading models": fixed(facts.get("model_load_s"), 1)}
            cells |= {"before them, kernel start": fixed(one.get("kernel_start_s"), 1)}
            cells |= {"peak memory, GiB": fixed(facts.get("peak_memory_gib"), 2)}
            cells |= {"speed": facts.get("speed") or (None if tokens is None else f"{tokens:,.0f} tokens/s")}
            rows.append(cells | {"device": facts.get("runtime")})
    seconds = {run.name: sum(one["wall_s"] for one in run.manifests.values()) for run in runs if run.manifests}
    lines = [f"{name}: {fixed(total, 0)} s in all." for name, total in seconds.items()]
    return stack([full_table(rows, "What each stage took"), sentences(lines)])


def fixed(value: float | None, decimals: int) -> str | None:
    """A number with this many decimals."""
    return None if value is None else f"{value:,.{decimals}f}"


# What a reader wants first of rows that every run made alike; the rest is folded.
MAIN_FIELDS = ("base model", "quantization", "dtype", "device", "decoding", "judge", "judge decoding", "commit")


def provenance_table(runs: Sequence[Run]) -> Html | None:
    """What made the rows of each run, hashes by their first 12 digits: what differs, then what all share."""
    fields = _fields({run.name: _provenance(run) for run in runs})
    values_of = {name: [*dict.fromkeys(values.values())] for name, values in fields.items()}
    differing = [{"field": name, **values} for name, values in fields.items() if len(values_of[name]) > 1]
    shared = [{"field": name, "value": values[0]} for name, values in values_of.items() if len(values) == 1]
    main = [row for row in shared if row["field"].partition(" (")[0] in MAIN_FIELDS]
    rest = [row for row in shared if row not in main]
    alike = note("The runs differ in no field that they record.") if fields and len(runs) > 1 else None
    shown = [full_table(differing, "Fields in which the runs differ") or alike]
    shown.append(full_table(main, "Shared by every run" if len(runs) > 1 else "Where the rows come from"))
    return stack([*shown, fold(f"{len(rest)} more fields: hashes and versions", full_table(rest))])


def _provenance(run: Run) -> dict[str, dict[str, str]]:
    """Field -> metric or stage -> value."""
    fields: dict[str, dict[str, str]] = {}
    for metric, score in run.metrics.items():
        for name, value in score.protocol.items():
            # Packages by their names; what is not recorded is no mapping.
            for each, found in (value if name == "versions" and value else {name: value}).items():
                fields.setdefault(each, {})[metric] = _short(found)
    commits = {stage: manifest["git_commit"][:12] for stage, manifest in run.manifests.items()}
    return fields | ({"commit": commits} if commits else {})


def _fields(recorded: dict[str, dict[str, dict[str, str]]]) -> dict[str, dict[str, str]]:
    """Field -> run -> value, a field being split by metric or stage where one of the runs has several values for it."""
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
