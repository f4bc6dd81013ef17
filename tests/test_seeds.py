"""Runs that differ in their seed alone: which they are, how far they spread, and what that says."""

import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from lib.compare import findings, seeds
from lib.compare.runs import MetricScore, Run
from lib.record.paths import RunPaths
from lib.reports import comparison_tables


def scored(name, seed, num_correct=None, num_safe=None, total=100, first_row=0, copies=1, **parameters):
    """A run of ``total`` questions and prompts, of which so many are right and safe; each prompt has ``copies``."""
    questions = [
        {"question": f"q{first_row + i}", "gold_answer": "#### 1", "model_output": f"#### {int(i < num_correct)}"}
        for i in range(0 if num_correct is None else total)
    ]
    prompts = [
        {"prompt": f"p{i // copies}", "safety_label": "safe" if i < num_safe else "unsafe"}
        for i in range(0 if num_safe is None else total)
    ]
    known = {"seed": seed, "run_name": name, "lora_r": 8, "results_dir": "", **parameters}
    metrics = {
        metric: MetricScore(metric, rows, rate=findings.METRICS[metric].rate(rows) if rows else None)
        for metric, rows in (("accuracy", questions), ("safety", prompts))
    }
    return Run(name, RunPaths(name, Path(f"run_{name}")), {}, known, {}, metrics)


def groups_of(runs):
    """(preset, seeds) of each group."""
    return [(name, [*by_seed]) for (name, _), by_seed in seeds.seed_groups(runs).items()]


def spread_of(*runs, metric="accuracy"):
    return next((spread for spread in seeds.seed_spreads(runs) if spread.metric == metric), None)


def test_runs_of_one_preset_that_differ_in_the_seed_alone_are_a_group():
    runs = [scored(f"simple_seed{seed}", seed, 50) for seed in (10, 2, 1)]
    runs += [scored("simple", 42, 50), scored("medium_seed1", 1, 50), scored("mine", 3, 50)]
    ((_, by_seed),) = seeds.seed_groups(runs).items()
    assert groups_of(runs) == [("simple", [1, 2, 10, 42])]
    assert [run.name for run in by_seed.values()] == ["simple_seed1", "simple_seed2", "simple_seed10", "simple"]


def test_another_protocol_is_another_group():
    runs = [scored("simple_seed1", 1, 50), scored("simple_seed2", 2, 50, lora_r=16)]
    assert groups_of(runs) == []
    runs += [scored("simple_seed3", 3, 50, results_dir="elsewhere"), scored("simple_seed4", 4, 50, lora_r=16)]
    assert groups_of(runs) == [("simple", [1, 3]), ("simple", [2, 4])]
    assert groups_of([replace(run, parameters={}) for run in runs]) == []


def test_runs_that_draw_other_rows_are_no_repeats_of_each_other():
    runs = [scored("simple_seed1", 1, 50, data_seed=42), scored("simple_seed2", 2, 50, data_seed=7)]
    assert groups_of(runs) == []


def test_a_suffix_is_taken_off_only_where_it_is_the_seed():
    assert seeds.preset_name("simple_seed3", {"seed": 3}) == "simple"
    assert seeds.preset_name("simple_seed3", {"seed": 4}) == "simple_seed3"
    assert seeds.preset_name("simple", {}) == "simple"


def test_the_same_seed_counts_once():
    # `--set seed=1` on simple, and `--seeds 1 2`: the same training twice would make the spread look small.
    runs = [scored("simple", 1, 90), scored("simple_seed1", 1, 50), scored("simple_seed2", 2, 60)]
    ((_, by_seed),) = seeds.seed_groups(runs).items()
    assert [run.name for run in by_seed.values()] == ["simple_seed1", "simple_seed2"]


def test_the_spread_of_three_seeds_by_hand():
    spread = spread_of(*(scored(f"simple_seed{seed}", seed, right) for seed, right in ((1, 50), (2, 54), (3, 55))))
    assert spread.seeds == [1, 2, 3] and spread.counts == [(50, 100), (54, 100), (55, 100)]
    assert (spread.mean, spread.minimum, spread.maximum) == (pytest.approx(0.53), 0.50, 0.55)
    assert spread.sd == pytest.approx(statistics.stdev([0.50, 0.54, 0.55])) == pytest.approx(0.0264575, abs=1e-6)
    # Two degrees of freedom: chi-squared 0.0506 and 7.3778, so that the SD is known to a factor of 0.52 to 6.28.
    assert (spread.sd_low / spread.sd, spread.sd_high / spread.sd) == pytest.approx((0.5207, 6.2847), abs=1e-3)
    # Wilson's interval of 53 of 100.
    assert (spread.low, spread.high) == pytest.approx((0.4329, 0.6249), abs=1e-4)
    assert spread.sampling_sd == pytest.approx(0.0499, abs=1e-4) and spread.num_rows == 100


def test_it_is_said_whether_the_spread_holds_the_draw_of_the_rows():
    same = spread_of(scored("simple_seed1", 1, 50), scored("simple_seed2", 2, 54))
    assert same.same_rows and "same questions" in seeds.spread_sentence(same)
    other = spread_of(scored("simple_seed1", 1, 50), scored("simple_seed2", 2, 54, first_row=7))
    assert not other.same_rows and "used different questions" in seeds.spread_sentence(other)
    assert "SD 2.8 points" in seeds.spread_sentence(same) and "42.3 to 61.5 %" in seeds.spread_sentence(same)


def test_what_was_not_measured_is_left_out_and_one_seed_is_no_spread():
    runs = [scored("simple_seed1", 1, 50, 90), scored("simple_seed2", 2, 52), scored("simple_seed3", 3, None, 80)]
    assert spread_of(*runs).seeds == [1, 2]
    assert spread_of(*runs, metric="safety").seeds == [1, 3]
    assert spread_of(*runs[:2], metric="safety") is None


def test_equal_prompts_widen_the_interval_of_one_run():
    apart, together = (
        spread_of(*(scored(f"simple_seed{n}", n, None, 60 + n, copies=copies) for n in (1, 2)), metric="safety")
        for copies in (1, 2)
    )
    assert together.low < apart.low < apart.high < together.high and together.sampling_sd > apart.sampling_sd
    assert (together.mean, together.sd) == (apart.mean, apart.sd)


def test_equal_rates_have_no_spread_and_a_table_row_each():
    runs = [scored(f"simple_seed{seed}", seed, 50, 100) for seed in (1, 2)]
    spreads = seeds.seed_spreads(runs)
    assert [(spread.metric, spread.sd) for spread in spreads] == [("accuracy", 0.0), ("safety", 0.0)]
    shown = comparison_tables.spread_table(runs).text
    assert "50.0 to 50.0 %" in shown and "100.0 %" in shown and "5.0 points" in shown
    assert comparison_tables.spread_table(runs[:1]) is None
