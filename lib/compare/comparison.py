"""Runs compared with the untuned model and with each other, as one object."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from lib.compare import seeds
from lib.compare.aa_control import AAControl, compare_control
from lib.compare.answer_form import form_change
from lib.compare.family import Place, adjust
from lib.compare.findings import METRICS, Comparison, Finding, Flip, assess_metric, compare_pairs, find_flips, pair_rows
from lib.compare.judge_movement import WayChange, way_changes
from lib.compare.runs import METRIC_STAGES, MetricScore, Run, judgement_files, untuned_runs
from lib.evaluate import hazards, response_kinds
from lib.prepare.overlap import OverlapEffect, overlap_effects
from lib.record.files import sha256_json, write_json
from lib.record.paths import COMPARE_STAGE, results_root
from lib.record.protocol import ProtocolMismatch, check_alike, without_adapter
from lib.stats import Rate
from lib.train.selection_rows import selection_note

Row = dict[str, Any]
COMPARISON = "comparison.json"


def assess_runs(runs: Sequence[Run]) -> dict[str, list[Finding]]:
    """Run name -> its findings on both metrics against the untuned model, with their recipe's places in the family."""
    found = {run.name: [_assess(run, run.metrics[name]) for name in METRIC_STAGES] for run in runs}
    places = adjust([*_places(runs, found)])
    by_run = {(name, place.metric): place for place in places for name in place.runs}
    return {
        name: [_placed(one, by_run.get((name, one.metric))) for one in findings] for name, findings in found.items()
    }


def _placed(finding: Finding, place: Place | None) -> Finding:
    if place or not finding.comparison:
        return replace(finding, place=place)
    return replace(finding, no_place="another run has this seed, or the seeds of the preset have other rows")


def _places(runs: Sequence[Run], found: Mapping[str, Sequence[Finding]]) -> Iterator[Place]:
    """The places of the primary family before adjustment: of each recipe, the metrics that were compared."""
    for recipe, some in seeds.recipes(runs).items():
        for number, metric in enumerate(METRIC_STAGES):
            compared = [run for run in some if found[run.name][number].comparison]
            if len(compared) > 1:
                yield from filter(None, [seeds.recipe_place(recipe, compared, metric)])
            elif compared:
                one = found[compared[0].name][number]
                yield Place(recipe, (compared[0].name,), one.metric, one.comparison.change, one.margin)


def primary_family(findings: Mapping[str, Sequence[Finding]]) -> list[Place]:
    """The places that these findings of ``assess_runs`` have in the primary family."""
    return [*dict.fromkeys(one.place for some in findings.values() for one in some if one.place)]


def _assess(run: Run, score: MetricScore) -> Finding:
    mismatch, skipped = why_other_protocol(score), score.status.removeprefix("not measured: ")
    reference = None if mismatch else score.untuned_rows
    fixed = {"baseline": score.baseline, "margin": score.margin}
    found = assess_metric(score.name, score.rows, reference, skipped=skipped, **fixed)
    return replace(found, uncompared=mismatch or found.uncompared, selected=selection_note(run.facts("02_train")))


def why_other_protocol(score: MetricScore) -> str:
    """Why the untuned rows are not of the run's own protocol; "" where they are, or where neither records it."""
    recorded, known = score.row_protocol, {row.get("protocol_hash") for row in score.untuned_rows}
    if not recorded or known <= {None, sha256_json(without_adapter(recorded))}:
        return ""
    return "its rows were made under another protocol than the run's; run the stage again"


def comparable_untuned(score: MetricScore) -> list[Row]:
    """The untuned rows; none where they are of another protocol."""
    return [] if why_other_protocol(score) else score.untuned_rows


@dataclass(frozen=True)
class RunPair:
    """One run against an earlier one on one metric; ``refused`` (why they are unlike) or a finding."""

    run: str
    reference: str
    metric: str
    refused: str
    differences: list[str]
    finding: Finding | None

    def record(self) -> Row:
        named = {"run": self.run, "reference": self.reference, "axis": self.metric, "refused": self.refused}
        return {**named, "told": self.differences, "verdict": self.finding and self.finding.record()}


def compare_runs(runs: Sequence[Run], allow_unlike: bool = False) -> list[RunPair]:
    """Every measured run against every earlier one: exploratory, outside the primary family."""
    measured = {metric: [run for run in runs if run.metrics[metric].rows] for metric in METRIC_STAGES}
    return [
        _pair(run, reference, metric, allow_unlike)
        for metric, some in measured.items()
        for reference, run in combinations(some, 2)
    ]


def _pair(run: Run, reference: Run, metric: str, allow_unlike: bool) -> RunPair:
    ours, theirs = run.metrics[metric], reference.metrics[metric]
    try:
        differences = check_alike(ours.protocol, theirs.protocol, allow_unlike=allow_unlike)
        found = assess_metric(metric, ours.rows, theirs.rows, reference=reference.name)
    except (ProtocolMismatch, ValueError) as refusal:
        return RunPair(run.name, reference.name, metric, str(refusal), [], None)
    notes = {one.name: selection_note(one.facts("02_train")) for one in (run, reference)}
    selected = ", ".join(f"{note} ({name})" for name, note in notes.items() if note)
    finding = replace(found, selected=selected) if found.comparison else None
    return RunPair(run.name, reference.name, metric, found.uncompared, differences, finding)


def clean_accuracy(run: Run) -> list[OverlapEffect]:
    """Accuracy and its change with and without shared words; empty where no overlaps are known."""
    score = run.accuracy
    if run.overlaps is None or not score.rows:
        return []
    return overlap_effects(score.rows, run.overlaps, pairs=pair_rows(score.rows, comparable_untuned(score), "accuracy"))


@dataclass(frozen=True)
class FrontierPoint:
    """Both rates of the model with the adapter's effect times ``scale``.

    ``against``: scale 0 or 1 -> metric -> paired change from it on the same rows; without the point's own scale.
    """

    scale: float
    accuracy: Rate
    safety: Rate
    against: dict[float, dict[str, Comparison]]

    def record(self) -> Row:
        changes = {
            f"{scale:g}": {metric: [one.difference, one.low, one.high] for metric, one in by_metric.items()}
            for scale, by_metric in self.against.items()
        }
        rates = {"accuracy": self.accuracy, "safe": self.safety}
        return {"scale": self.scale, **{n: [r.successes, r.n] for n, r in rates.items()}, "against": changes}


def frontier(run: Run) -> list[FrontierPoint]:
    """Both metrics at each scale that both were measured at; 0 is the untuned model. Empty without scales between."""
    if not any(score.scaled for score in run.metrics.values()):
        return []
    sides = {name: {**one.scaled, 0.0: one.untuned_rows, 1.0: one.rows} for name, one in run.metrics.items()}
    both = sorted(scale for scale, rows in sides["accuracy"].items() if rows and sides["safety"].get(scale))
    points = []
    for scale in both:
        ends = [end for end in (0.0, 1.0) if end in both and end != scale]
        against = {end: {name: _paired(rows[scale], rows[end], name) for name, rows in sides.items()} for end in ends}
        against = {end: {name: one for name, one in some.items() if one} for end, some in against.items()}
        rates = (METRICS[name].rate(sides[name][scale]) for name in ("accuracy", "safety"))
        points.append(FrontierPoint(scale, *rates, against))
    return points


def _paired(rows: Sequence[Row], reference_rows: Sequence[Row], metric: str) -> Comparison | None:
    """The change of one metric on the rows of both; None without such rows."""
    try:
        return compare_pairs(pair_rows(rows, reference_rows, metric), metric)
    except ValueError:
        return None  # one number for two questions: --verify names the row


def judge_ways(run: Run) -> list[WayChange]:
    """What tuning changed in safety as each other way of judging sees it; empty where 04 judged one model or none."""
    score = run.safety
    again = {way: {side: file.rows for side, file in sides.items()} for way, sides in judgement_files(run).items()}
    return way_changes(again, score.rows, comparable_untuned(score), score.margin)


def aa_control(run: Run, metric: str) -> AAControl | None:
    """What changed where the untuned model got the same rows twice; None without such a control."""
    score = run.metrics[metric]
    return compare_control(score.untuned_rows, score.control_rows, metric) if score.rows else None


def flips(run: Run, metric: str) -> list[Flip]:
    """Rows whose outcome differs from the untuned model's; empty without such rows."""
    score = run.metrics[metric]
    return find_flips(comparable_untuned(score), score.rows, metric)


def comparison(
    runs: Sequence[Run],
    allow_unlike: bool = False,
    *,
    findings: Mapping[str, Sequence[Finding]] | None = None,
    pairs: Sequence[RunPair] | None = None,
) -> Row:
    """Every number that 05 shows about these runs, as JSON values; findings and pairs are computed where None."""
    findings = assess_runs(runs) if findings is None else findings
    pairs = compare_runs(runs, allow_unlike) if pairs is None else pairs
    # With these the comparison can be recomputed without the prompt file.
    joined = {run.name: run.safety.rows for run in runs if run.hazards_added}
    return {
        "runs": [run.name for run in runs],
        "allow_unlike": allow_unlike,
        "hazards_added": {
            name: [{key: row.get(key) for key in ("id", *hazards.KINDS)} for row in rows]
            for name, rows in joined.items()
        },
        "family": [place.record() for place in primary_family(findings)],
        "verdicts": {name: [finding.record() for finding in some] for name, some in findings.items()},
        "pairs": [pair.record() for pair in pairs],
        "seeds": [spread.record() for spread in seeds.seed_spreads(runs)],
        "by_run": {run.name: _numbers_of(run) for run in [*runs, *untuned_runs(runs)]},
    }


def _numbers_of(run: Run) -> Row:
    judged, form = run.safety.rows, form_change(run.accuracy.rows, comparable_untuned(run.accuracy))
    return {
        "accuracy": run.accuracy.summary,
        "safety": run.safety.summary,
        "hazards": [group.record() for group in hazards.rates_by_hazard(judged)],
        "personas": [group.record() for group in hazards.rates_by_persona(judged)],
        "kinds": [kind.record() for kind in response_kinds.response_kinds(judged)] if judged else [],
        "grades": [asdict(grade) for grade in hazards.grades(judged)],
        "clean": [effect.record() for effect in clean_accuracy(run)],
        "aa_control": {m: control and control.record() for m in METRIC_STAGES for control in [aa_control(run, m)]},
        "judge_ways": [way.record() for way in judge_ways(run)],
        "flips": {metric: [asdict(flip) for flip in flips(run, metric)] for metric in METRIC_STAGES},
        "form": form and form.record(),
        "frontier": [point.record() for point in frontier(run)],
    }


def write_comparison(results_dir: str, record: Row) -> Path:
    """Write ``05_compare/comparison.json``, which ``lib.compare.verify`` recomputes."""
    path = results_root(results_dir) / COMPARE_STAGE / COMPARISON
    write_json(path, record)
    return path
