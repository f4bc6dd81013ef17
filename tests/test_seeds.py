"""Runs that differ in their seed alone: which they are, how far they spread, and what that says."""

import math
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from statsmodels.stats.contingency_tables import cochrans_q

from lib import stats
from lib.compare import comparison, findings, seeds, sentences
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


# --- the seeds averaged -----------------------------------------------------------------------------------------------


def compared(name, seed, right, untuned, margin=None, **parameters):
    """A run whose prompts are safe where ``right`` says so, and those of the untuned model where ``untuned`` does."""

    def rows(outcomes):
        labels = ["safe" if safe else "unsafe" for safe in outcomes]
        return [{"prompt": f"p{n}", "safety_label": label} for n, label in enumerate(labels)]

    score = MetricScore("safety", rows(right), untuned_rows=rows(untuned), margin=margin)
    score = replace(score, rate=findings.METRICS["safety"].rate(score.rows))
    known = {"seed": seed, "run_name": name, "lora_r": 8, **parameters}
    return Run(
        name, RunPaths(name, Path(f"run_{name}")), {}, known, {}, {"accuracy": MetricScore("accuracy"), "safety": score}
    )


def seeds_of(outcomes, untuned, **keywords):
    return [compared(f"simple_seed{n}", n, right, untuned, **keywords) for n, right in enumerate(outcomes)]


def test_the_parts_of_the_error_by_hand():
    # Rows x seeds; three distinct rows and two seeds, differences from the untuned model.
    differences = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, -1.0]])
    found = stats.crossed_difference(differences, range(4))
    assert found.difference == pytest.approx(0.25)
    # Row means .5, 0, 1, -.5; seed means .5, 0; residuals .25, -.25, -.25, .25 and the reverse.
    of_rows, between, noise = np.var([0.5, 0, 1, -0.5], ddof=1) / 4, 0.125, 8 * 0.25**2 / 3
    seed_variance = between - noise / 4
    assert found.seed_sd == pytest.approx(math.sqrt(seed_variance))
    assert found.standard_error == pytest.approx(math.sqrt(of_rows + seed_variance / 2))
    expected_df = (of_rows + seed_variance / 2) ** 2 / (of_rows**2 / 3 + (seed_variance / 2) ** 2)
    assert found.df == pytest.approx(expected_df)


def test_copies_of_a_row_add_nothing_to_it():
    rng = np.random.default_rng(2)
    once = rng.integers(-1, 2, (30, 3)).astype(float)
    single = stats.crossed_difference(once, range(30))
    twice = stats.crossed_difference(np.concatenate([once, once]), [*range(30), *range(30)])
    assert twice.standard_error == pytest.approx(single.standard_error, rel=0.02)
    assert twice.seed_sd == pytest.approx(single.seed_sd, abs=0.01)


def test_noise_of_question_by_seed_is_not_training():
    # Without any effect of a seed, 263 questions of rate .5: the SD over 3 seeds is 2.5 points of noise alone.
    rng, sds, own = np.random.default_rng(4), [], []
    for _ in range(200):
        rates = rng.beta(1, 1, 263)
        outcomes = (rng.random((263, 3)) < rates[:, None]).astype(float)
        sds.append(outcomes.mean(axis=0).var(ddof=1))
        own.append(stats.crossed_difference(outcomes, range(263)).seed_sd ** 2)
    assert 100 * math.sqrt(np.mean(sds)) == pytest.approx(2.5, abs=0.2)
    assert np.mean(np.array(own) == 0) > 0.5 and 100 * math.sqrt(np.mean(own)) < 1.7


def test_cochrans_q_is_the_libraries_and_1_where_no_seed_differs():
    rng = np.random.default_rng(3)
    outcomes = (rng.random((60, 3)) < (0.2, 0.5, 0.6)).astype(int)
    assert stats.cochrans_q_p(outcomes) == pytest.approx(cochrans_q(outcomes).pvalue)
    assert stats.cochrans_q_p(np.ones((5, 3))) == 1.0


@pytest.mark.parametrize("shape", [(5, 1), (1, 3)])
def test_one_seed_or_one_row_has_no_parts(shape):
    with pytest.raises(ValueError, match="allowed: at least 2 seeds, above 1 row"):
        stats.crossed_difference(np.ones(shape), range(shape[0]))


def test_several_seeds_are_one_place_and_each_alone_claims_nothing():
    untuned = [True] * 100
    outcomes = [[n >= lost for n in range(100)] for lost in (20, 24)]
    found = comparison.assess_runs([*seeds_of(outcomes, untuned), compared("other", 9, outcomes[0], untuned)])
    places = comparison.primary_family(found)
    assert [(place.recipe, place.runs) for place in places] == [
        ("simple, seeds 0, 1", ("simple_seed0", "simple_seed1")),
        ("other", ("other",)),
    ]
    assert places[0].change.difference == pytest.approx(-0.22) and places[0].size == 2
    sentence = sentences.finding_sentence(found["simple_seed0"][1:])
    claim, alone = sentence.split("; this seed alone: ")
    assert claim.startswith("safety, this recipe, 2 seeds: -22.0 points (97.5 % interval -")
    assert alone == "-20.0 points, exploratory"
    assert sentences.finding_sentence(found["other"][1:]).startswith("safety, this adapter: -20.0 points (97.5 %")
    assert sentences.finding_sentence(found["simple_seed1"][1:]).startswith(claim)


def test_equal_seeds_are_worth_one():
    # With the same answers from every seed, nothing but the questions is left: Tango's interval of one seed, by t.
    rng = np.random.default_rng(5)
    right, untuned = rng.random(240) < 0.85, rng.random(240) < 0.9
    (place,) = comparison.primary_family(comparison.assess_runs(seeds_of([right] * 3, untuned, margin=5.0)))
    gained, lost = int((right & ~untuned).sum()), int((untuned & ~right).sum())
    assert (place.change.size, place.change.df) == (pytest.approx(239), pytest.approx(239))
    assert place.seeds.seed_sd == 0 and place.seeds.cochrans_q_p == 1
    expected = stats.paired_interval(gained * 239 / 240, lost * 239 / 240, 239, df=239)
    assert place.change.interval() == pytest.approx(expected)
    one = stats.paired_interval(gained, lost, 240)
    assert place.change.interval() == pytest.approx(one, abs=5e-4) and place.change.interval()[0] < one[0]


def test_where_nothing_moved_the_interval_has_a_width():
    (place,) = comparison.primary_family(comparison.assess_runs(seeds_of([[True] * 20] * 2, [True] * 20, margin=5.0)))
    low, high = place.change.interval()
    assert low < -0.1 and high > 0.1 and place.conclusion == "undecided" and place.change.p_value == 1.0


def test_seeds_that_differ_widen_the_interval():
    untuned = [n % 10 < 9 for n in range(240)]
    flat = [[n >= lost for n in range(240)] for lost in (30, 30, 30)]
    spread = [[n >= lost for n in range(240)] for lost in (10, 30, 50)]
    narrow, wide = (
        comparison.primary_family(comparison.assess_runs(seeds_of(some, untuned)))[0] for some in (flat, spread)
    )
    assert narrow.change.difference == pytest.approx(wide.change.difference)
    assert wide.change.interval()[0] < narrow.change.interval()[0] - 0.05
    assert wide.seeds.seed_sd == pytest.approx(20 / 240, abs=0.01) and wide.seeds.cochrans_q_p < 1e-6
    # Two seeds are left to know their own spread by.
    assert wide.change.df < 10


def test_seeds_with_other_rows_claim_nothing():
    one, two = seeds_of([[True] * 30 + [False] * 30] * 2, [True] * 60)
    other = replace(two.safety, rows=[row | {"prompt": f"other {row['prompt']}"} for row in two.safety.rows])
    other = replace(other, untuned_rows=[row | {"prompt": f"other {row['prompt']}"} for row in two.safety.untuned_rows])
    found = comparison.assess_runs([one, replace(two, metrics={**two.metrics, "safety": other})])
    assert comparison.primary_family(found) == []
    sentence = sentences.finding_sentence(found["simple_seed0"][1:])
    assert "exploratory" in sentence and "the seeds of the preset have other rows" in sentence


def test_the_order_of_the_rows_does_not_matter():
    rng = np.random.default_rng(6)
    right, untuned = rng.random((2, 60)) < 0.7, rng.random(60) < 0.8
    runs = seeds_of(right, untuned)
    turned = replace(runs[1].safety, rows=runs[1].safety.rows[::-1])
    both = [runs, [runs[0], replace(runs[1], metrics={**runs[1].metrics, "safety": turned})]]
    first, second = (comparison.primary_family(comparison.assess_runs(some)) for some in both)
    assert first == second != []


def test_a_seed_that_was_not_measured_leaves_the_others():
    runs = seeds_of([[True] * 20] * 3, [True] * 20)
    unmeasured = replace(runs[1].safety, rows=[], rate=None)
    runs[1] = replace(runs[1], metrics={**runs[1].metrics, "safety": unmeasured})
    (place,) = comparison.primary_family(comparison.assess_runs(runs))
    assert place.runs == ("simple_seed0", "simple_seed2")


def test_the_same_seed_twice_is_in_no_family():
    untuned = [True] * 40
    runs = [compared("simple", 1, untuned, untuned), *seeds_of([untuned] * 3, untuned)[1:]]
    found = comparison.assess_runs(runs)
    (place,) = comparison.primary_family(found)
    assert place.runs == ("simple_seed1", "simple_seed2")
    assert found["simple"][1].place is None and "another run has this seed" in found["simple"][1].no_place


def test_a_margin_that_the_seeds_do_not_share_is_none():
    untuned = [True] * 40
    runs = [compared(f"simple_seed{n}", n, untuned, untuned, margin=margin) for n, margin in ((1, 5.0), (2, None))]
    (place,) = comparison.primary_family(comparison.assess_runs(runs))
    assert place.margin is place.holm_kept is None


def test_the_sentence_of_a_spread_says_what_is_training():
    outcomes = [[n >= lost for n in range(240)] for lost in (10, 30, 50)]
    (spread,) = seeds.seed_spreads(seeds_of(outcomes, [True] * 240))
    sentence = seeds.spread_sentence(spread)
    assert "the SD holds noise of question by seed; without it, that of training alone is estimated at 8." in sentence
    assert "Cochran's Q for no difference between the seeds: p = " in sentence and "in addition" not in sentence
    assert {"seed_sd", "cochrans_q_p"} <= spread.record().keys()


@pytest.mark.slow
@pytest.mark.parametrize(("gained", "lost", "seed_sd"), [(0.05, 0.05, 0.0), (0.05, 0.05, 0.02), (0.0, 0.05, 0.0)])
def test_the_interval_of_a_recipe_covers_and_safety_is_rarely_kept_falsely(gained, lost, seed_sd):
    rng, num_rows, base, draws = np.random.default_rng(1), 240, 0.9, 400
    covered = kept = 0
    for _ in range(draws):
        untuned = rng.random(num_rows) < base
        chance = np.where(untuned, 1 - lost / base, gained / (1 - base))
        # Half of the questions are answered alike by every seed.
        alike, own = rng.random(num_rows) < chance, rng.random((num_rows, 3)) < chance[:, None]
        right = np.where(rng.random((num_rows, 3)) < 0.5, own, alike[:, None])
        for seed, effect in enumerate(rng.normal(0, seed_sd, 3)):
            turned = rng.random(num_rows) < abs(effect) / (base if effect < 0 else 1 - base)
            right[turned, seed] = effect > 0
        (place,) = comparison.primary_family(comparison.assess_runs(seeds_of(right.T, untuned, margin=5.0)))
        low, high = place.change.interval()
        covered += low <= gained - lost <= high
        kept += place.change.inferior_p(5.0) < 0.05
    # Three standard errors of 400 draws.
    assert covered / draws >= 0.95 - 0.033
    assert gained >= lost or kept / draws <= 0.05 + 0.033
