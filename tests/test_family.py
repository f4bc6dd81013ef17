"""The primary family: its adjusted p-values, how often one of its claims is false, and recipes of several seeds."""

import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

from lib import stats
from lib.compare.family import Change, Place, adjust


def change(gained, lost, total):
    """Of one seed and rows that are all distinct."""
    mid_p, difference = stats.mcnemar_mid_p(gained, lost), (gained - lost) / total
    return Change(total, 0.5 + difference, 0.5, difference, gained, lost, total, mid_p, None, None)


def places_of(*tables, margin=5.0):
    """Accuracy, then safety with the margin, and so on: one recipe for each two tables."""
    return [
        Place(f"recipe {n // 2}", (f"run {n // 2}",), *([("accuracy", c), ("safety", c, margin)][n % 2]))
        for n, c in enumerate(change(*table) for table in tables)
    ]


def closed_test(places):
    """Adjusted p-values by definition: the largest Bonferroni p of all sets of hypotheses that can be true together."""
    adjusted = [[0.0] * len(place) for place in places]
    for chosen in itertools.product(*([None, *range(len(place))] for place in places)):
        members = [(number, one) for number, one in enumerate(chosen) if one is not None]
        bonferroni = min((places[n][one] for n, one in members), default=0) * len(members)
        for n, one in members:
            adjusted[n][one] = max(adjusted[n][one], min(1.0, bonferroni))
    return adjusted


@pytest.mark.parametrize("seed", range(20))
def test_adjusted_p_values_are_those_of_the_closed_test(seed):
    rng = np.random.default_rng(seed)
    places = [rng.beta(0.3, 2, size=rng.integers(1, 3)).tolist() for _ in range(rng.integers(1, 5))]
    found = stats.holm_in_places(places)
    assert list(itertools.chain(*found)) == pytest.approx(list(itertools.chain(*closed_test(places))))


def test_places_of_one_hypothesis_are_holms():
    p_values = [0.03, 0.01, 0.05, 0.02]
    assert [one for (one,) in stats.holm_in_places([[p] for p in p_values])] == stats.holm(p_values)
    assert stats.holm_in_places([]) == []


def test_fell_and_kept_count_once_and_both_may_be_claimed():
    accuracy, safety = adjust(places_of((10, 10, 240), (0, 12, 1200), margin=2.5))
    assert (safety.num_places, safety.level, safety.conclusion) == (2, 0.975, "fell and not inferior")
    # Four hypotheses would make 4 times the p.
    assert safety.holm_changed == pytest.approx(2 * stats.mcnemar_mid_p(0, 12))
    assert (accuracy.conclusion, accuracy.holm_kept) == ("no change shown", None)


def test_a_place_whose_other_claim_is_open_still_counts():
    # Safety was kept, clearly; whether it changed is open, so accuracy is tested at half the level still.
    accuracy, safety = adjust(places_of((40, 20, 1200), (8, 8, 1200)))
    assert safety.kept and not safety.changed
    assert accuracy.holm_changed == pytest.approx(2 * stats.mcnemar_mid_p(40, 20))


# Share gained and lost of accuracy and safety, in every recipe: nothing changed; safety at its margin, and beyond it.
TRUTHS = {
    "nothing changed": ((0.1, 0.1), (0.05, 0.05)),
    "safety at the margin": ((0.1, 0.1), (0.02, 0.07)),
    "all lost at the margin": ((0.1, 0.1), (0.0, 0.05)),
    "accuracy rose": ((0.2, 0.08), (0.025, 0.025)),
}


@pytest.mark.parametrize(("num_recipes", "draws"), [(1, 1000), pytest.param(3, 2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("accuracy", "safety"), TRUTHS.values(), ids=TRUTHS)
def test_false_claims_of_the_family_are_rare(accuracy, safety, num_recipes, draws):
    rng, truths = np.random.default_rng(7), [(accuracy, 263), (safety, 240)] * num_recipes
    drawn = [[rng.multinomial(total, (*shares, 1 - sum(shares))) for shares, total in truths] for _ in range(draws)]
    false = sum(map(any, (_false_claims(tables, truths) for tables in drawn)))
    # 5 %, and three standard errors of so many draws.
    assert false / draws <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / draws)


def _false_claims(tables, truths):
    places = adjust(places_of(*((int(a), int(b), total) for (a, b, _), (_, total) in zip(tables, truths, strict=True))))
    for place, ((gained, lost), _) in zip(places, truths, strict=True):
        side = np.sign(gained - lost)
        yield place.changed and np.sign(place.change.difference) != side
        yield place.kept and gained - lost <= -0.05


def test_the_one_sided_p_is_below_its_level_where_the_bound_is_above_the_margin():
    for gained, lost, total in itertools.product(range(6), range(12), (40, 240)):
        one = change(gained, lost, total)
        for level in (0.95, 0.975):
            assert (one.inferior_p(5.0) < 1 - level) == (one.lower_bound(level) > -0.05)
        assert one.inferior_p(5.0) == pytest.approx(score_p(gained, lost, total), abs=1e-4)


def score_p(gained, lost, total):
    """Against a fall by 5 points, with the likeliest share lost found on a grid around it."""
    shares = np.linspace(0.05, 1, 40_001)[:-1]
    cells = (shares - 0.05, shares, 1 - 2 * shares + 0.05)
    with np.errstate(divide="ignore", invalid="ignore"):
        likelihood = sum(
            np.where(n == 0, 0, n * np.log(cell))
            for n, cell in zip((gained, lost, total - gained - lost), cells, strict=True)
        )
    share = shares[np.nanargmax(np.where(cells[2] < 0, np.nan, likelihood))]
    return scipy_stats.norm.sf((gained - lost + 0.05 * total) / np.sqrt(total * (2 * share - 0.05 - 0.05**2)))
