"""Intervals and tests against published examples, other libraries, brute force and simulation."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize
from scipy import stats as scipy_stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from lib import stats


def outcomes(only_a, only_b, both=0, neither=0):
    """Outcomes of two runs with these counts, one list each."""
    a = [True] * only_a + [False] * only_b + [True] * both + [False] * neither
    b = [False] * only_a + [True] * only_b + [True] * both + [False] * neither
    return a, b


# --- one rate -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 2000), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_agrees_with_scipy(total, share, level):
    successes = round(share * total)
    reference = scipy_stats.binomtest(successes, total).proportion_ci(level, method="wilson")
    assert stats.wilson_interval(successes, total, level) == pytest.approx((reference.low, reference.high), abs=1e-12)


def test_wilson_has_a_width_at_none_and_all():
    z2 = scipy_stats.norm.ppf(0.975) ** 2
    assert stats.wilson_interval(0, 8) == pytest.approx((0, z2 / (8 + z2)))
    assert stats.wilson_interval(8, 8) == pytest.approx((8 / (8 + z2), 1))


@pytest.mark.parametrize(("successes", "total"), [(0, 0), (5, 4), (-1, 4), (1, -1), (math.nan, 4)])
def test_impossible_counts_are_refused(successes, total):
    with pytest.raises(ValueError, match="allowed: total above 0, successes 0 to total"):
        stats.wilson_interval(successes, total)


@pytest.mark.parametrize("level", [0, 1, 95, -0.1])
def test_impossible_level_is_refused(level):
    with pytest.raises(ValueError, match=f"level is {level}; allowed: above 0, below 1"):
        stats.wilson_interval(1, 2, level)


def test_single_rows_are_worth_themselves_and_copies_nothing():
    assert stats.effective_size(range(10)) == pytest.approx(10)
    assert stats.effective_size("aaaa") == pytest.approx(1)
    # The class prompts: 216 that stand once, 12 that stand twice.
    assert stats.effective_size([*range(216), *range(300, 312), *range(300, 312)]) == pytest.approx(57600 / 264)


def ends(rows, clusters):
    rate = stats.Rate.of(rows, clusters)
    return rate.low, rate.high


def test_clusters_widen_the_interval():
    rows = [True] * 30 + [False] * 10
    plain = stats.wilson_interval(30, 40)
    assert ends(rows, range(40)) == pytest.approx(plain)
    # Every row twice says no more than every row once.
    pairs = [index // 2 for index in range(40)]
    assert ends(rows, pairs) == pytest.approx(stats.wilson_interval(15, 20))


@pytest.mark.parametrize(("rows", "clusters"), [([True], [1, 2]), ([], [])])
def test_rows_and_clusters_must_match(rows, clusters):
    with pytest.raises(ValueError, match="allowed: equal numbers, at least 1"):
        stats.Rate.of(rows, clusters)


# --- two runs on the same rows --------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(0, 60))
def test_exact_mcnemar_agrees_with_statsmodels(only_a, only_b):
    reference = mcnemar([[3, only_a], [only_b, 4]], exact=True).pvalue if only_a + only_b else 1.0
    assert stats.mcnemar_p(only_a, only_b) == pytest.approx(reference, abs=1e-12)


def test_an_earlier_comparison_comes_out_as_reported():
    # Two presets of an earlier run on the same 263 questions and 240 prompts.
    accuracy = stats.paired_test(*outcomes(42, 25, both=118, neither=78))
    assert (accuracy.only_a, accuracy.only_b) == (42, 25)
    assert accuracy.difference == pytest.approx(17 / 263)
    assert accuracy.p_value == pytest.approx(0.0498, abs=5e-5)
    safety = stats.paired_test(*outcomes(8, 26, both=195, neither=11))
    assert safety.difference == pytest.approx(-18 / 240)
    assert safety.p_value == pytest.approx(0.0029, abs=5e-5)
    assert safety.low < safety.difference < safety.high < 0


# only_a, only_b, total, level -> interval, to the digits published
TANGO = [
    # Fagerland, Lydersen, Laake 2014, Table V: airway reactivity of 21 children (Bentur 2009).
    (1, 7, 21, 0.95, (-0.517, -0.026), 3),
    # R package PropCIs 0.3-0, scoreci.mp(0, 7, 14): its estimate is the second minus the first.
    (7, 0, 14, 0.95, (0.177034, 0.732008), 6),
]


@pytest.mark.parametrize(("only_a", "only_b", "total", "level", "published", "digits"), TANGO)
def test_paired_interval_matches_published_examples(only_a, only_b, total, level, published, digits):
    interval = stats.paired_interval(only_a, only_b, total, level)
    assert tuple(round(limit, digits) for limit in interval) == published


def score_by_search(only_a, only_b, total, difference):
    """Tango's score statistic with the restricted likelihood maximised by search, not by his formula."""

    def negative_likelihood(share_b):
        cells = (share_b + difference, share_b, 1 - 2 * share_b - difference)
        return -sum(n * math.log(p) for n, p in zip((only_a, only_b, total - only_a - only_b), cells, strict=True) if n)

    bounds = (max(0, -difference) + 1e-12, (1 - difference) / 2 - 1e-12)
    share_b = optimize.minimize_scalar(negative_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    variance = (2 * share_b + difference - difference**2) / total
    return ((only_a - only_b) / total - difference) / math.sqrt(variance)


@pytest.mark.parametrize("counts", [(42, 25, 263), (8, 26, 240), (1, 7, 21), (3, 3, 12), (5, 2, 1319)])
def test_paired_interval_ends_where_the_score_test_rejects(counts):
    low, high = stats.paired_interval(*counts)
    assert score_by_search(*counts, low) == pytest.approx(scipy_stats.norm.ppf(0.975), abs=1e-4)
    assert score_by_search(*counts, high) == pytest.approx(-scipy_stats.norm.ppf(0.975), abs=1e-4)


@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 200))
def test_paired_interval_touches_0_where_mcnemar_is_at_its_level(only_a, only_b, concordant):
    # The score interval is the score test turned round, and at 0 that test is McNemar's without correction.
    p_value = mcnemar([[concordant, only_a], [only_b, 0]], exact=False, correction=False).pvalue
    if 1e-5 < p_value < 1 - 1e-5:  # beyond, 1 - p keeps too few digits
        low, high = stats.paired_interval(only_a, only_b, only_a + only_b + concordant, 1 - p_value)
        assert min(abs(low), abs(high)) == pytest.approx(0, abs=1e-9)


def test_every_paired_interval_holds_its_estimate_and_turns_with_its_runs():
    for total in range(1, 16):
        for only_a in range(total + 1):
            for only_b in range(total + 1 - only_a):
                low, high = stats.paired_interval(only_a, only_b, total)
                assert -1 <= low <= (only_a - only_b) / total <= high <= 1
                assert low < high
                assert stats.paired_interval(only_b, only_a, total) == pytest.approx((-high, -low), abs=1e-9)


@pytest.mark.parametrize(("share_a", "share_b"), [(0.1, 0.1), (0.25, 0.1), (0.3, 0.3), (0.02, 0.1)])
def test_paired_interval_covers_as_promised(share_a, share_b):
    # Exact coverage: every table of 40 rows, weighted with its chance.
    total, coverage = 40, 0.0
    for only_a in range(total + 1):
        for only_b in range(total + 1 - only_a):
            cells = (only_a, only_b, total - only_a - only_b)
            chance = scipy_stats.multinomial.pmf(cells, total, (share_a, share_b, 1 - share_a - share_b))
            if chance > 1e-9:
                low, high = stats.paired_interval(only_a, only_b, total)
                coverage += chance * (low <= share_a - share_b <= high)
    assert 0.93 <= coverage <= 0.98


@pytest.mark.parametrize("counts", [(1, 1, 0), (-1, 0, 4), (3, 2, 4), (0, 0, -1)])
def test_impossible_tables_are_refused(counts):
    with pytest.raises(ValueError, match="allowed: 0 or more, together up to total"):
        stats.paired_interval(*counts)


def test_equal_runs_show_no_difference_but_an_interval():
    test = stats.paired_test([True, False] * 15, [True, False] * 15)
    assert (test.only_a, test.only_b, test.difference, test.p_value) == (0, 0, 0.0, 1.0)
    assert test.high == -test.low == pytest.approx(0.1135, abs=1e-4)


@pytest.mark.parametrize(("a", "b"), [([True], [True, False]), ([], [])])
def test_runs_must_have_the_same_rows(a, b):
    with pytest.raises(ValueError, match="allowed: equal numbers, at least 1"):
        stats.paired_test(a, b)


def test_clusters_must_match_the_rows():
    with pytest.raises(ValueError, match="a holds 2 and clusters 1 values"):
        stats.paired_test([True, True], [True, False], clusters=["x"])


def test_clusters_of_one_row_change_nothing():
    a, b = outcomes(9, 3, both=10, neither=8)
    plain, clustered = stats.paired_test(a, b), stats.paired_test(a, b, clusters=[f"prompt {n}" for n in range(30)])
    assert clustered == plain


def test_doubled_rows_say_no_more_than_single_ones():
    a, b = outcomes(9, 2, both=10, neither=8)
    single = stats.paired_test(a, b)
    doubled = stats.paired_test(a * 2, b * 2, clusters=[*range(29), *range(29)])
    careless = stats.paired_test(a * 2, b * 2)
    assert (doubled.low, doubled.high) == pytest.approx((single.low, single.high))
    assert doubled.p_value == pytest.approx(single.p_value)
    assert careless.p_value < single.p_value / 2


@given(st.lists(st.tuples(st.integers(-1, 1), st.integers(0, 4)), min_size=1, max_size=10))
def test_cluster_test_agrees_with_trying_every_sign(rows):
    a = [difference == 1 for difference, _ in rows]
    b = [difference == -1 for difference, _ in rows]
    clusters = [cluster for _, cluster in rows]
    sums = [sum(d for d, c in rows if c == cluster) for cluster in sorted(set(clusters))]
    flipped = [
        abs(sum(sign * abs(total) for sign, total in zip(signs, sums, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(sums))
    ]
    test, reached = stats.paired_test(a, b, clusters=clusters), np.array(flipped) >= abs(sum(sums))
    assert test.p_value == pytest.approx(np.mean(reached))
    # Without any discordant cluster there is nothing to weigh.
    observed = np.mean(np.array(flipped) == abs(sum(sums))) if any(sums) else 0.0
    assert test.mid_p == pytest.approx(test.p_value - observed / 2)


# Number of single prompts and of doubled ones that only the first run gets right; both must be exact.
@pytest.mark.parametrize(("singles", "doubles"), [(0, 5), (7, 0), (300, 200), (20_000, 20_000)])
@pytest.mark.parametrize("turned", [0, 3, 100])
def test_cluster_test_of_many_rows_agrees_with_a_sum_of_binomials(singles, doubles, turned):
    clusters = [*range(singles), *range(-doubles, 0), *range(-doubles, 0)]
    a = [number >= min(turned, singles) for number in range(len(clusters))]
    test = stats.paired_test(a, [not right for right in a], clusters=clusters)
    ends = [abs(a.count(True) - a.count(False)) + offset for offset in (0, 1)]
    # Sum of k positive doubles is 4 k - 2 doubles; the singles do the rest.
    positive = np.arange(doubles + 1)
    rest = [(end - 4 * positive + 2 * doubles + singles) / 2 for end in ends]
    chances = scipy_stats.binom.pmf(positive, doubles, 0.5)
    tails = [2 * np.sum(chances * scipy_stats.binom.sf(np.ceil(one) - 1, singles, 0.5)) for one in rest]
    assert test.p_value == pytest.approx(min(1, tails[0]), abs=1e-12)
    assert test.mid_p == pytest.approx(min(1, np.mean(tails)), abs=1e-12)


def test_clusters_of_many_sizes_take_no_time_that_grows_with_their_square():
    # 60,000 rows: one by one, the convolutions took 5 s.
    clusters = [number // 2 if number < 40_000 else number for number in range(60_000)]
    started = time.process_time()
    assert stats.paired_test([True] * 60_000, [False] * 60_000, clusters=clusters).mid_p < 1e-12
    assert time.process_time() - started < 2


# Airway reactivity of 21 children, in Fagerland, Lydersen, Laake 2013; an earlier comparison of two presets.
@pytest.mark.parametrize(("only_a", "only_b", "exact", "mid_p"), [(1, 7, 0.070, 0.039), (42, 25, 0.0498, 0.0385)])
def test_mid_p_is_as_published(only_a, only_b, exact, mid_p):
    assert stats.mcnemar_p(only_a, only_b) == pytest.approx(exact, abs=5e-4)
    both = stats.mcnemar_mid_p(only_a, only_b), stats.mcnemar_mid_p(only_b, only_a)
    assert both == pytest.approx((mid_p, mid_p), abs=5e-4)


def test_mid_p_of_no_and_of_an_even_split():
    assert (stats.mcnemar_mid_p(0, 0), stats.mcnemar_mid_p(1, 1)) == (1.0, pytest.approx(0.75))


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.25, 0.5])
@pytest.mark.parametrize("total", [20, 60, 218, 263, 1200, 1319])
def test_mid_p_keeps_its_level_where_it_may_be_used(total, share):
    # Exact sizes; of all rows discordant it may be a little more: at most 6.5 % of 50 rows.
    size = stats.mcnemar_power(total, share, 0.0)
    assert stats.mcnemar_power(total, share, 0.0, observed=1.0) <= size <= 0.05
    assert size >= 0.042 or total * share < 11


@pytest.mark.parametrize(("total", "parted"), [(10, 2), (20, 2), (40, 8), (60, 8)])
def test_interval_and_mid_p_test_agree_on_nearly_every_table(total, parted):
    tables = [(a, b) for a in range(total + 1) for b in range(total + 1 - a)]
    differ = []
    for only_a, only_b in tables:
        low, high = stats.paired_interval(only_a, only_b, total)
        if (low > 0 or high < 0) != (stats.mcnemar_mid_p(only_a, only_b) < 0.05):
            differ.append((only_a, only_b))
    assert len(differ) == parted and parted <= 0.031 * len(tables)


def test_interval_and_mid_p_test_part_in_at_most_1_of_700_tables_of_263_rows():
    # The interval leaves out 0 exactly where the score test rejects, see above.
    a, b = np.triu_indices(264)
    a, b = a, b - a
    number, critical = a + b, scipy_stats.norm.ppf(0.975) ** 2
    least = np.minimum(a, b)
    coins = scipy_stats.binom(number, 0.5)
    mid_p = np.where(a == b, 1.0, 2 * coins.cdf(least) - coins.pmf(least))
    differ = ((a - b) ** 2 > critical * number) != (mid_p < 0.05)
    assert 0 < differ.sum() <= len(a) / 700


def test_holm_adjusts_step_by_step():
    # By hand: 0.01 * 4, 0.02 * 3, then 0.03 * 2 which stays, then 0.05 * 1 raised to the one before.
    assert stats.holm([0.03, 0.01, 0.05, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert stats.holm([0.03]) == pytest.approx([0.03])
    assert stats.holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_agrees_with_statsmodels(p_values):
    assert stats.holm(p_values) == multipletests(p_values, method="holm")[1].tolist()


POSTERIORS = [(1, 6, 240), (42, 25, 263), (0, 0, 3), (8.2, 26.4, 218.2), (0, 60, 60), (30, 0, 40), (3, 40, 1319)]


@pytest.mark.parametrize("counts", POSTERIORS)
@pytest.mark.parametrize("beyond", [0.0, 0.01, 0.05, 0.3])
def test_chance_of_a_loss_is_the_share_of_draws_from_the_posterior(counts, beyond):
    only_a, only_b, total = counts
    shares = np.random.default_rng(1).dirichlet([only_a + 0.5, only_b + 0.5, total - only_a - only_b + 0.5], 200_000)
    simulated = np.mean(shares[:, 1] - shares[:, 0] > beyond)
    assert stats.chance_of_loss(*counts, beyond) == pytest.approx(simulated, abs=0.004)


def test_chance_of_a_loss_in_the_class_prompts():
    # 1 gained, 6 lost of 240, of which 12 appear twice: worth 218.2.
    size = stats.effective_size([*range(228), *range(12)])
    counts = (size / 240, 6 * size / 240, size)
    found = stats.chance_of_loss(*counts), stats.chance_of_loss(*counts, 0.03)
    assert found == pytest.approx((0.97, 0.21), abs=0.005)
    assert stats.chance_of_loss(*counts) + stats.chance_of_loss(counts[1], counts[0], size) == pytest.approx(1)


@pytest.mark.parametrize("table", [(230, 1, 6, 3), (50, 20, 20, 50), (5, 30, 30, 5)])
def test_pairing_gain_is_what_the_variances_say(table):
    both, only_a, only_b, neither = table
    a, b = outcomes(only_a, only_b, both, neither)
    phi, saved = stats.pairing_gain(a, b)
    assert phi == pytest.approx(np.corrcoef(a, b)[0, 1])
    differences = np.array(a, dtype=int) - np.array(b, dtype=int)
    assert saved == pytest.approx(1 - np.var(differences) / (np.var(a) + np.var(b)))


def test_pairing_gain_of_runs_with_one_outcome():
    assert stats.pairing_gain([True] * 5, [True] * 5) == (None, None)
    assert stats.pairing_gain([True, False], [True, True]) == (None, 0.0)


# --- what a number of rows can show ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "share"), [(240, 0.14), (263, 0.25), (1319, 0.25), (50, 0.3)])
def test_detectable_difference_is_found_as_often_as_promised(total, share):
    difference = stats.minimum_detectable_difference(total, share)
    rng = np.random.default_rng(1)
    cells = [(share + difference) / 2, (share - difference) / 2, 1 - share]
    found = [stats.mcnemar_mid_p(int(a), int(b)) <= 0.05 for a, b, _ in rng.multinomial(total, cells, size=1500)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)


def test_detectable_difference_is_close_to_the_normal_formula():
    # Connor 1987 (Biometrics 43, 207-211), for the test without correction: as the mid-p's, below the exact one's.
    total, share = 1319, 0.25
    z_alpha, z_power = scipy_stats.norm.ppf([0.975, 0.8])

    def needed(difference):
        return ((z_alpha * math.sqrt(share) + z_power * math.sqrt(share - difference**2)) / difference) ** 2 - total

    approximate = optimize.brentq(needed, 0.001, share)
    assert stats.minimum_detectable_difference(total, share) == pytest.approx(approximate, rel=0.005)
    assert approximate < stats.minimum_detectable_difference(total, share, observed=1.0) < 1.05 * approximate


def test_power_is_the_size_of_the_test_where_there_is_no_difference():
    assert 0.02 < stats.mcnemar_power(240, 0.14, 0.0) <= 0.05


@pytest.mark.parametrize(("share", "difference", "exact", "mid_p"), [(0.05, 3, 0.454, 0.550), (0.02, 2, 0.349, 0.525)])
def test_power_of_both_tests_is_what_was_computed_elsewhere(share, difference, exact, mid_p):
    power = [stats.mcnemar_power(240, share, difference / 100, observed=weight) for weight in (1.0, 0.5)]
    assert power == pytest.approx([exact, mid_p], abs=5e-4)


def test_more_rows_or_less_noise_show_smaller_differences():
    detectable = stats.minimum_detectable_difference
    assert detectable(1319, 0.25) < detectable(263, 0.25)
    assert detectable(240, 0.0) < detectable(240, 0.1) < detectable(240, 0.3)
    assert detectable(240, 0.1, power=0.5) < detectable(240, 0.1, power=0.9)


# The smallest number of rows that can all be on one side with p < 0.05: 2 / 2**6 = 0.031, and half of 2 / 2**5.
@pytest.mark.parametrize(("observed", "needed"), [(1.0, 6), (0.5, 5)])
def test_a_row_fewer_than_needed_shows_nothing(observed, needed):
    assert stats.minimum_detectable_difference(needed - 1, 0.5, observed=observed) is None
    found = stats.minimum_detectable_difference(needed, 0.5, observed=observed)
    assert found == pytest.approx(0.8 ** (1 / needed), abs=1e-6)


@pytest.mark.parametrize("arguments", [(0, 0.1), (10, -0.1), (10, 1.1)])
def test_impossible_designs_are_refused(arguments):
    with pytest.raises(ValueError, match="allowed: at least 1, and 0 to 1"):
        stats.minimum_detectable_difference(*arguments)


# The referee's simulation of 240 prompts, of which 12 appear twice, with nothing changed.
REFEREE = {0.03: (0.55, 0.39, 0.32), 0.05: (0.91, 0.74, 0.59), 0.10: (1.0, 1.0, 0.98)}


@pytest.mark.parametrize(("margin", "powers"), REFEREE.items())
def test_power_of_noninferiority_is_what_was_simulated(margin, powers):
    size = int(stats.effective_size([*range(228), *range(12)]))
    found = [stats.noninferiority_power(size, share, margin) for share in (0.05, 0.1, 0.15)]
    assert size == 218 and found == pytest.approx(powers, abs=0.03)


@pytest.mark.parametrize(
    ("total", "share", "margin"), [(30, 0.3, 0.1), (12, 1.0, 0.5), (40, 0.02, 0.05), (25, 0.0, 0.2)]
)
def test_power_of_noninferiority_is_the_chance_of_the_bounds_above_the_margin(total, share, margin):
    power = 0.0
    for only_a, only_b in itertools.product(range(total + 1), repeat=2):
        if only_a + only_b <= total and stats.paired_lower_bound(only_a, only_b, total) > -margin:
            cells = (only_a, only_b, total - only_a - only_b)
            power += scipy_stats.multinomial.pmf(cells, total, (share / 2, share / 2, 1 - share))
    assert stats.noninferiority_power(total, share, margin) == pytest.approx(power, abs=1e-9)


@pytest.mark.parametrize("counts", [(1, 6, 240), (0, 0, 50), (8.2, 26.4, 218.2), (30, 0, 40)])
def test_lower_bound_is_where_the_one_sided_score_test_rejects(counts):
    bound = stats.paired_lower_bound(*counts)
    assert bound == stats.paired_interval(*counts, level=0.9)[0] > stats.paired_interval(*counts)[0]
    assert score_by_search(*counts, bound) == pytest.approx(scipy_stats.norm.ppf(0.95), abs=1e-4)


def test_a_margin_is_a_share():
    with pytest.raises(ValueError, match=r"margin is 5\.0; allowed: above 0, below 1"):
        stats.noninferiority_power(240, 0.1, 5.0)
