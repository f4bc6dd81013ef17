"""Runs that differ in their seed alone: which they are, how far they spread, and what that says."""

import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from lib.compare import seeds
from lib.compare.runs import RunScores
from lib.record.paths import RunPaths


def scored(name, seed, num_correct=None, num_safe=None, total=100, first_row=0, **parameters):
    """A run of ``total`` questions and prompts, of which so many are right and safe."""
    rows = {
        "accuracy": [{"question": f"q{first_row + i}"} for i in range(total)] if num_correct is not None else [],
        "safety": [{"prompt": f"p{i}"} for i in range(total)] if num_safe is not None else [],
    }
    return RunScores(
        name=name,
        paths=RunPaths(name, Path(f"run_{name}")),
        parameters={"seed": seed, "run_name": name, "lora_r": 8, "results_dir": "", **parameters},
        gsm8k=None if num_correct is None else {"num_correct": num_correct, "n": total},
        safety=None if num_safe is None else {"num_safe": num_safe, "n": total},
        gsm8k_status="",
        safety_status="",
        baseline_accuracy=None,
        baseline_safety=None,
        rows=rows,
    )


def spread_of(*runs, axis="accuracy"):
    (group,) = seeds.seed_groups(runs)
    return seeds.seed_spread(group, axis)


def test_runs_of_one_preset_that_differ_in_the_seed_alone_are_a_group():
    runs = [scored(f"simple_seed{seed}", seed, 50) for seed in (10, 2, 1)]
    runs += [scored("simple", 42, 50), scored("medium_seed1", 1, 50), scored("mine", 3, 50)]
    (group,) = seeds.seed_groups(runs)
    assert (group.name, group.seeds) == ("simple", [1, 2, 10, 42])
    assert [run.name for run in group.runs] == ["simple_seed1", "simple_seed2", "simple_seed10", "simple"]


def test_another_protocol_is_another_group():
    runs = [scored("simple_seed1", 1, 50), scored("simple_seed2", 2, 50, lora_r=16)]
    assert seeds.seed_groups(runs) == []
    runs += [scored("simple_seed3", 3, 50, results_dir="elsewhere"), scored("simple_seed4", 4, 50, lora_r=16)]
    assert [(group.name, group.seeds) for group in seeds.seed_groups(runs)] == [
        ("simple", [1, 3]),
        ("simple", [2, 4]),
    ]
    assert seeds.seed_groups([replace(run, parameters={}) for run in runs]) == []


def test_runs_that_draw_other_rows_are_no_repeats_of_each_other():
    runs = [scored("simple_seed1", 1, 50, data_seed=42), scored("simple_seed2", 2, 50, data_seed=7)]
    assert seeds.seed_groups(runs) == []


def test_a_suffix_is_taken_off_only_where_it_is_the_seed():
    assert seeds.preset_name("simple_seed3", {"seed": 3}) == "simple"
    assert seeds.preset_name("simple_seed3", {"seed": 4}) == "simple_seed3"
    assert seeds.preset_name("simple", {}) == "simple"


def test_the_same_seed_counts_once():
    # `--set seed=1` on simple, and `--seeds 1 2`: the same training twice would make the spread look small.
    runs = [scored("simple", 1, 90), scored("simple_seed1", 1, 50), scored("simple_seed2", 2, 60)]
    (group,) = seeds.seed_groups(runs)
    assert [run.name for run in group.runs] == ["simple_seed1", "simple_seed2"]


def test_the_spread_of_three_seeds_by_hand():
    spread = spread_of(*(scored(f"simple_seed{seed}", seed, right) for seed, right in ((1, 50), (2, 54), (3, 55))))
    assert spread.seeds == [1, 2, 3] and spread.counts == [(50, 100), (54, 100), (55, 100)]
    assert (spread.mean, spread.minimum, spread.maximum) == (pytest.approx(0.53), 0.50, 0.55)
    assert spread.sd == pytest.approx(statistics.stdev([0.50, 0.54, 0.55])) == pytest.approx(0.0264575, abs=1e-6)
    # Two degrees of freedom: chi-squared 0.0506 and 7.3778, so that the SD is known to a factor of 0.52 to 6.28.
    assert (spread.sd_low / spread.sd, spread.sd_high / spread.sd) == pytest.approx((0.5207, 6.2847), abs=1e-3)
    # Wilson's interval of 53 of 100.
    assert (spread.low, spread.high) == pytest.approx((0.4329, 0.6249), abs=1e-4)
    assert spread.sampling_sd == pytest.approx(0.0499, abs=1e-4) and (spread.num_seeds, spread.num_rows) == (3, 100)


def test_it_is_said_whether_the_spread_holds_the_draw_of_the_rows():
    same = spread_of(scored("simple_seed1", 1, 50), scored("simple_seed2", 2, 54))
    assert same.same_rows and "same questions" in seeds.spread_sentence(same)
    other = spread_of(scored("simple_seed1", 1, 50), scored("simple_seed2", 2, 54, first_row=7))
    assert not other.same_rows and "asked different questions" in seeds.spread_sentence(other)
    assert "SD 2.8 points" in seeds.spread_sentence(same) and "42.3 to 61.5 %" in seeds.spread_sentence(same)


def test_what_was_not_measured_is_left_out_and_one_seed_is_no_spread():
    runs = [scored("simple_seed1", 1, 50, 90), scored("simple_seed2", 2, 52), scored("simple_seed3", 3, None, 80)]
    (group,) = seeds.seed_groups(runs)
    assert seeds.seed_spread(group, "accuracy").seeds == [1, 2]
    assert seeds.seed_spread(group, "safety").seeds == [1, 3]
    assert seeds.seed_spread(replace(group, seeds=[1, 2], runs=runs[:2]), "safety") is None
    with pytest.raises(ValueError, match="allowed: accuracy, safety"):
        seeds.seed_spread(group, "speed")


def test_equal_rates_have_no_spread_and_a_table_row_each():
    runs = [scored(f"simple_seed{seed}", seed, 50, 100) for seed in (1, 2)]
    spreads = seeds.seed_spreads(runs)
    assert [(spread.axis, spread.sd) for spread in spreads] == [("accuracy", 0.0), ("safety", 0.0)]
    rows = seeds.spread_rows(spreads)
    assert rows[0]["lowest to highest"] == "50.0 to 50.0 %" and rows[1]["mean"] == "100.0 %"
    assert rows[0]["seeds"] == "1, 2" and rows[0]["SD of the sample alone"] == "5.0 points"
