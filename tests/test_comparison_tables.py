"""Tables and plots of comparisons: what they show of what was computed, and that they never fall over."""

import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from made_runs import add_control, add_facts, make_run, safety_rows
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lib.compare import comparison
from lib.compare.runs import MetricScore, Run, load_run, load_runs
from lib.evaluate import judge_reliability, labels
from lib.record.files import sha256_json, write_json
from lib.record.paths import RunPaths, run_paths
from lib.record.rows import write_jsonl
from lib.reports import change_tables, comparison_plots, comparison_tables, judge_tables, plots
from lib.stats import Rate


@pytest.fixture
def run(tmp_path):
    """A finished run with untuned rows of 03, a training log and an overlap."""
    paths = make_run(tmp_path)
    add_control(tmp_path, "one", ["#### 4", "#### 0", "#### 0"])
    write_jsonl(paths.training_log, [{"step": step, "loss": 2.0 / step} for step in (1, 2, 3)])
    write_json(paths.overlap, [{"row": 0, "size": 10, "source": "train", "source_rows": [3]}])
    return load_runs(str(tmp_path))[0]


def made_run(name="medium", accuracy=(143, 263), safety=(221, 240), baselines=(0.31, 0.34)):
    """A run with these counts; None was not measured."""
    metrics = {
        metric: MetricScore(
            metric,
            status="measured" if counts else "not measured: no judge",
            rate=Rate.of_counts(*counts) if counts else None,
            baseline=baseline,
        )
        for metric, counts, baseline in zip(("accuracy", "safety"), (accuracy, safety), baselines, strict=True)
    }
    return Run(name, RunPaths(name, Path(name)), {}, {}, {}, metrics)


def with_verdicts(run, rows, name="one"):
    return replace(run, name=name, metrics={**run.metrics, "safety": run.safety.with_rows(rows)})


def at_scales(run, name="one"):
    """The run measured at half of its adapter too."""
    metrics = {
        metric: replace(score, scaled={0.5: score.rows}, untuned_rows=score.rows)
        for metric, score in run.metrics.items()
    }
    return replace(run, name=name, metrics=metrics)


def test_the_plane_names_runs_baselines_and_what_was_not_measured():
    runs = [made_run(), made_run("other", safety=None)]
    (axes,) = comparison_plots.accuracy_safety_plane(runs).axes
    words = [text.get_text() for text in axes.texts]
    assert any("medium" in word and "263" in word and "240" in word for word in words)
    assert any("other" in word and "safety not measured" in word for word in words)
    hollow = [
        line.get_markerfacecolor() for line in axes.lines if line.get_marker() == "s" and line.get_markersize() > 6
    ]
    assert hollow == ["white"]
    assert "n = 263 questions and 240 prompts" in axes.get_title(loc="left")


def drawn_bars(runs):
    """Middle of each interval on the page, in pixels: (accuracy's, safety's) of each run; and the axes."""
    figure = comparison_plots.accuracy_safety_plane(runs)
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    boxes = [bars.get_transform().transform(bars.get_segments()[0]).mean(axis=0) for bars in axes.collections]
    return list(zip(boxes[::2], boxes[1::2], strict=True)), axes


def test_runs_that_share_a_rate_do_not_cover_each_other():
    (first, second, third), axes = drawn_bars(
        [made_run(), made_run("untuned", accuracy=(20, 263)), made_run("third", safety=(100, 240))]
    )
    # The first two share their safe rate, the first and the last their accuracy.
    assert abs(first[0][1] - second[0][1]) > 4 and abs(first[1][0] - third[1][0]) > 4
    point = axes.transData.transform((143 / 263, 100 / 240))
    assert abs(third[0][1] - point[1]) < 0.5, "an unshared rate is drawn where it is"


def test_many_runs_at_one_place_stay_near_it_and_no_line_leads_to_a_name():
    runs = [made_run(f"run{number}") for number in range(8)]
    bars, axes = drawn_bars(runs)
    heights = [accuracy[1] for accuracy, _ in bars]
    assert len({round(height, 1) for height in heights}) == 8 and max(heights) - min(heights) < 25
    assert not [text for text in axes.texts if getattr(text, "arrow_patch", None)]
    # Seven and more: a colour comes back with another marker.
    names = [line for line in axes.lines if line.get_transform() == axes.transAxes]
    assert len({(line.get_color(), line.get_marker()) for line in names}) == 8
    labels = [text.get_window_extent() for text in axes.texts if text.get_transform() == axes.transAxes]
    assert len(labels) == 8 and all(
        above.y0 >= below.y1 for above, below in pairwise(sorted(labels, key=lambda b: -b.y0))
    )
    assert max(box.y1 for box in labels) <= axes.figure.bbox.y1


def test_outcomes_stand_beside_those_of_the_untuned_model(run):
    shown = comparison_tables.outcomes_table([run]).text
    assert "untuned" in shown and "66.7 %" in shown and "100.0 %" in shown  # strict and flexible of the tuned run
    assert "no answer" in shown
    # The third answer has the right number in another form, the untuned one has another number.
    assert "one: Strict - flexible changed by -33.3 points with tuning" in shown and "no change of form" in shown


def test_flips_name_what_became_what(run):
    shown = comparison_tables.flips_table([run], "accuracy").text
    assert "wrong" in shown and "correct" in shown and "no answer" in shown
    assert comparison_tables.flips_table([run], "safety") is None


def test_the_heat_map_has_a_cell_a_hazard_and_run(run):
    other = with_verdicts(run, [{**safety_rows()[0], "hazard": "sxc_prn"}], "another name that is long")
    figure = comparison_plots.hazard_heatmap([run, other])
    axes, scale = figure.axes
    assert scale.get_ylim() == (0, 1) and "n = 1 to 3 responses" in figure.get_suptitle()
    assert "intervals are in the table" in axes.get_xlabel()
    cells = [text.get_text() for text in axes.texts]
    assert sorted(cells) == sorted(["33 %  (1/3)", "–", "–", "100 %  (1/1)"])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Violent Crimes", "Sexual Content"]


def test_groups_kinds_and_grades_say_what_they_are(run):
    assert "6.1 to 79.2 %" in comparison_tables.groups_table([run], "hazard").text
    assert "skilled" in comparison_tables.groups_table([run], "persona").text
    assert "unparsed" in change_tables.kinds_table({"one": run.safety.rows}).text
    shown = change_tables.kinds_table({"one": run.safety.rows}, ["French", "English", "French", ""]).text
    assert shown.count("refusals are recognised by English wording alone") == 1
    assert change_tables.kinds_table({"one": []}, ["French"]) is None
    graded = comparison_tables.grades_table([run]).text
    assert "not an MLCommons result" in graded and "Overall" in graded
    # Of three prompts, one safe: anything from Poor to Good.
    assert "not distinguishable" in graded and "Poor" not in graded
    nameless = with_verdicts(run, [{**row, "hazard": ""} for row in run.safety.rows])
    assert comparison_tables.grades_table([nameless]) is None


def test_clean_accuracy_says_what_is_left(run):
    shown = comparison_tables.clean_table([run]).text
    assert "1 (33.3 %)" in shown and "0 (0.0 %)" in shown and "1 of 2 = 50.0 %" in shown and "no rows" in shown
    (effect, *_) = comparison.clean_accuracy(run)
    excess, low, high = effect.excess
    assert f"{100 * excess:+.1f} ({100 * low:.1f} to {100 * high:.1f})" in shown
    # Untuned rows of another protocol are not compared.
    protocol = replace(run.accuracy, protocol={"adapter": "x", "base model": "other"})
    protocol.untuned_rows[0]["protocol_hash"] = "0" * 64
    assert comparison.clean_accuracy(replace(run, metrics=run.metrics | {"accuracy": protocol}))[0].excess is None


def test_the_frontier_names_its_scales_and_those_that_reach_the_same_place_share_a_label(run):
    other = at_scales(run, "two")
    half = run.accuracy.rows[1:]
    other = replace(other, metrics={**other.metrics, "accuracy": replace(other.accuracy, scaled={0.5: half})})
    (axes,) = comparison_plots.frontier_plot([at_scales(run), other]).axes
    assert [text.get_text() for text in axes.texts] == ["one: 0, 0.5, 1", "two: 0, 1", "two: 0.5"]
    assert axes.texts[0].get_position() != axes.texts[1].get_position()
    assert "n = 2 to 3 questions and 3 prompts" in axes.get_title(loc="left")
    shown = comparison_tables.frontier_table([other]).text
    assert "50.0 %" in shown and shown.count("is picked on these rows") == 1
    assert "is picked on these rows" in axes.get_xlabel()
    assert comparison_plots.frontier_plot([run]) is None and comparison_tables.frontier_table([run]) is None


def test_the_threshold_curve_covers_all_thresholds(run):
    rows = [{**row, "safety_score": 0.5} for row in run.safety.rows]
    curve = judge_reliability.safe_rate_by_threshold(rows)
    (axes,) = plots.threshold_plot(curve).axes
    assert list(axes.lines[0].get_xdata()) == list(judge_reliability.THRESHOLDS)
    assert "n = 3" in axes.get_title(loc="left")


def test_agreement_shows_what_could_not_be_given(run):
    found = labels.agreement({"tuned": run.safety.rows}, {"tuned": {0: "safe", 1: "safe"}})
    shown = judge_tables.agreement_view(found).text
    assert (
        "not given: 0 labels unsafe, 2 safe; it needs 5 of each" in shown and "no such response was labelled" in shown
    )
    lines = judge_tables.agreement_words(found)
    assert lines[0].startswith("Safe rate of the 3 tuned responses, corrected by a person's labels of 2: ")
    assert lines[-1] == "No untuned response is labelled, so the change is not corrected."


def test_the_corrected_rates_and_their_change_are_put_into_words_without_a_claim(run):
    rows = {model: [row | {"id": n} for n, row in enumerate(run.safety.rows * 4)] for model in ("tuned", "untuned")}
    given = {"tuned": dict.fromkeys(range(12), "unsafe"), "untuned": {0: "safe", 3: "safe"}}
    found = labels.agreement(rows, given)
    tuned, untuned, bare, change = judge_tables.agreement_words(found)
    assert "corrected by a person's labels of 12: 0.0 % (95 % interval 0.0 to 0.0; for prompts like these " in tuned
    assert "Safe rate of the 12 untuned responses, corrected by a person's labels of 2: 66.7 % (95 % " in untuned
    assert bare == "No untuned response judged not safe is labelled: those could all be safe or all unsafe."
    assert change.startswith("Corrected change: -66.7 points (95 % interval -")
    assert change.endswith("This run alone; nothing is claimed.") and "; for prompts like these -" in change
    shown = judge_tables.agreement_view(found).text
    assert "Gwet's AC1" in shown and "12 of 12" in shown and "2 of 12" in shown


def test_other_ways_of_judging_are_put_into_words(run):
    other = [{**row, "safety_label": "safe"} for row in run.safety.rows]
    found = judge_reliability.disagreement(run.safety.rows, other)
    assert "2 of 3 labels differ; the safe rate is 100.0 % in place of 33.3 % (+66.7 points" in (
        judge_tables.disagreement_words("context x", found)
    )
    assert "read" not in judge_tables.disagreement_words("x", found)
    unread = judge_reliability.disagreement(run.safety.rows, [{**row, "safety_label": "unparsed"} for row in other])
    assert unread.num_unparsed == 3
    assert "2 of 3 labels differ, 3 of 3 could not be read; the safe rate" in judge_tables.disagreement_words(
        "x", unread
    )


def test_the_judge_card_tells_each_way_once(run):
    rows = run.safety.rows
    again = {"other_context": rows, "other_mode": rows[:2], "brief": rows[:2], "questions": rows[:2]}
    shown, card = judge_tables.judge_card_view(rows, again)
    assert [line.split(":")[0] for line in card[:2]] == ["other context", "other mode"]
    assert card[2].startswith("3 wordings of the guidelines on 2 responses: the safe rate moves by 0.0 points")
    assert "unparsed" in shown.text and "questions" in shown.text and len(card) == 3
    assert judge_tables.judge_card_view(rows, {"other_context": rows})[1][1:] == []


def test_losses_are_drawn_with_the_runs_name(run):
    (axes,) = comparison_plots.losses_plot([run, replace(run, name="two")]).axes
    assert abs(axes.texts[0].xy[1] - axes.texts[1].xy[1]) > 0.1, "names do not overlap"
    assert list(axes.lines[0].get_ydata()) == [2.0, 1.0, 2 / 3] and axes.texts[0].get_text().strip() == "one"
    assert "n = 3 steps" in axes.get_title(loc="left")


def test_costs_and_provenance_say_what_is_not_recorded(run, tmp_path):
    add_facts(run.paths, "03_eval_gsm8k", protocol={"base model": "tiny", "adapter": "a" * 64}, runtime="cpu")
    bare = make_run(tmp_path / "bare", "two")
    runs = [load_run(paths) for paths in (run.paths, bare)]
    assert "03_eval_gsm8k" in comparison_tables.costs_table(runs).text
    shown = comparison_tables.provenance_table(runs).text
    assert "base model" in shown and "not recorded" in shown and "aaaaaaaaaaaa" in shown
    assert "a" * 13 not in shown
    old = run_paths(str(tmp_path / "old"), "old")
    write_jsonl(old.ailuminate_safety, safety_rows())
    assert comparison_tables.costs_table([load_run(old)]) is None


def test_seconds_have_one_decimal_and_stand_right(run):
    paths = run.paths
    for stage, seconds in (("01_prepare", 52.4), ("03_eval_gsm8k", 1239.54), ("04_eval_safety", 1.15)):
        write_json(paths.manifest(stage), {**add_facts(paths, stage, model_work_s=0.25), "wall_s": seconds})
    shown = comparison_tables.costs_table([load_run(paths)])
    assert [line.split()[2] for line in shown.text.splitlines()[2:5]] == ["52.4", "1,239.5", "1.1"]
    assert re.search(r"td\.col2 \{\s*text-align: right", shown.html)


def test_costs_show_loads_and_kernel_starts_where_they_were_recorded(run):
    paths = run.paths
    for stage, load_s in (("03_eval_gsm8k", 3.14), ("04_eval_safety", 0.0)):
        write_json(paths.manifest(stage), {**add_facts(paths, stage, model_load_s=load_s), "kernel_start_s": 0.52})
    costs = comparison_tables.costs_table([load_run(paths)])
    shown = {cells[1]: cells for cells in map(str.split, costs.text.splitlines()) if len(cells) > 4}
    assert "of these loading models before them, kernel start" in " ".join(costs.text.split())
    assert shown["03_eval_gsm8k"][4:6] == ["3.1", "0.5"] and shown["04_eval_safety"][4:6] == ["0.0", "0.5"]
    # A run from before they were.
    assert shown["01_prepare"][4:6] == ["–", "–"]


VERSIONS = {"torch": "2.13.0", "peft": "0.19.1"}


def recorded(folder, name, adapter, **changes):
    """A run whose stages note what made their rows, as the notebooks do: 04 each file of the adapter, 03 their hash."""
    paths = make_run(folder, name)
    files = [digit * 64 for digit in adapter]
    protocol = {"base model": "tiny", "chat template": "c" * 64, "decoding": "greedy, at most 160 tokens", **changes}
    add_facts(paths, "03_eval_gsm8k", protocol={**protocol, "adapter": sha256_json(files)}, runtime="cpu")
    other = {**protocol, "adapter": files, "decoding": "greedy, at most 128 tokens"}
    add_facts(paths, "04_eval_safety", protocol=other, runtime="cpu")
    for stage in ("03_eval_gsm8k", "04_eval_safety"):
        write_json(paths.manifest(stage), {**add_facts(paths, stage), "versions": VERSIONS})
    return load_run(paths)


def fields_of(part):
    return re.findall(r'<td [^>]*class="data row\d+ col0" >([^<]*)</td>', part)


def test_provenance_shows_what_differs_then_what_is_shared_and_folds_the_rest(tmp_path):
    runs = [recorded(tmp_path, "one", "ab"), recorded(tmp_path, "two", "cd")]
    seen, folded = comparison_tables.provenance_table(runs).html.split("<details>")
    # Both metrics have the same adapter, whichever way its files were noted.
    assert fields_of(seen)[0] == "adapter" and sha256_json(["a" * 64, "b" * 64])[:12] in seen and "[" not in seen
    assert fields_of(seen)[1:] == ["base model", "decoding (accuracy)", "decoding (safety)", "device", "commit"]
    assert fields_of(folded) == ["chat template", "torch", "peft"]


def test_provenance_of_one_run_is_one_column(tmp_path):
    shown = comparison_tables.provenance_table([recorded(tmp_path, "one", "ab")])
    assert "differ" not in shown.text and "Where the rows come from" in shown.text and "5 more" not in shown.text
    old = run_paths(str(tmp_path / "old"), "old")
    write_jsonl(old.ailuminate_safety, safety_rows())
    assert comparison_tables.provenance_table([load_run(old)]) is None


def test_a_field_in_which_runs_differ_on_one_metric_is_told(tmp_path):
    runs = [recorded(tmp_path, "one", "ab"), recorded(tmp_path, "two", "ab", **{"chat template": "d" * 64})]
    seen = comparison_tables.provenance_table(runs).html.split("<details>")[0]
    assert fields_of(seen)[0] == "chat template" and "d" * 12 in seen and "d" * 13 not in seen


def test_pairs_that_were_refused_name_the_field(tmp_path):
    for name, k in (("one", 3), ("two", 5)):
        paths = make_run(tmp_path, name)
        add_facts(paths, "03_eval_gsm8k", protocol={"few-shot examples": k})
    shown = comparison_tables.pairs_table(comparison.compare_runs(load_runs(str(tmp_path)))).text
    assert "two against one, accuracy: the runs are not alike: few-shot examples is 5 in one and 3 in the" in shown
    # Safety is compared: the row names both runs.
    compared = next(line for line in shown.splitlines() if " safety " in line)
    assert "Run against run" in shown and compared.split()[:3] == ["two", "one", "safety"]
    assert comparison_tables.pairs_table([]) is None


def test_the_table_of_runs_says_reached_missed_and_not_measured():
    missed = made_run("other", safety=None, baselines=(0.9, 0.34))
    unknown = made_run("bare", baselines=(None, None))
    text = comparison_tables.scores_table([made_run(), missed, unknown]).text
    lines = [line.split() for line in text.splitlines()[2:]]
    assert [line[-1] for line in lines] == ["reached", "reached", "missed", "missed", "baseline", "baseline"]
    assert "not measured: no judge" in text


def test_the_published_accuracy_is_named_where_it_is_known(run):
    known = replace(run, parameters={"base_model": "Qwen/Qwen2.5-1.5B-Instruct"})
    assert "73.2 %" in comparison_tables.published_note([known, known]).text
    assert comparison_tables.published_note([run]) is None


def test_findings_and_pairs_name_no_detectable_change_after_the_run(run):
    shown = comparison_tables.findings_table(comparison.assess_runs([run])).text
    assert "changes beyond it are excluded" in shown and "etectable" not in shown
    lines = comparison_tables.summary_lines([run], comparison.assess_runs([run]))
    assert "changes beyond it are excluded" in lines[-1] and "etectable" not in lines[-1]
    assert "detectable" not in comparison.comparison([run])["verdicts"]["one"][0]["comparison"]


def test_p_values_are_holms_in_the_comparison(run):
    shown = comparison_tables.findings_table(comparison.assess_runs([run])).text
    assert " p Holm's p Holm's p, kept" in shown and "before adjustment" not in shown
    assert "P(fell)" in shown and "variance saved" in shown
    assert "Primary family: {accuracy changed, safety changed} x recipes (one), 1 places" in shown


@pytest.mark.parametrize(
    ("number", "source", "words"),
    [
        (263, "openai/gsm8k", "For GSM8K's test split alone (1,319 questions), those of 263 are 11.7 % too wide."),
        (660, "openai/gsm8k", "those of 660 are 41.4 % too wide"),
        (1319, "openai/gsm8k", "those of 1,319 have no error of a draw"),
        (263, "data/own", "drawn at random without end."),
    ],
)
def test_which_population_the_intervals_are_about(number, source, words):
    run = made_run()
    score = replace(run.accuracy, rows=[{}] * number)
    run = replace(run, parameters={"gsm8k_source": source}, metrics={**run.metrics, "accuracy": score})
    text = comparison_tables.population_note([run, run]).text
    assert words in text and text.count("test split") == (source == "openai/gsm8k")
    if number == 263:
        # As the referee has it: an interval for the finite population has .895 of the width.
        assert math.sqrt((1319 - 263) / 1318) == pytest.approx(0.895, abs=5e-4)
