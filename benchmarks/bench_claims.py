"""Simulated claims: how often a page of findings claims what is not so, finds what is so, and how much too large.

    python benchmarks/bench_claims.py

Single tests (a family of one place), complete pages of one, three and nine recipes, the power of non-inferiority, and
recipes of three seeds. Writes claim_rules.csv and .md beside the other results. Exit status 1, and which, where a page
has a false claim in more than 5.5 % of draws, one recipe at its margin is called not inferior in more than 6 %, or the
power of non-inferiority is not that of an earlier, independent simulation.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulated_claims import Outcome, Page, Side, Tally, remember, simulate
from simulation import COPIES, INDEPENDENT_COPIES, RESULTS, Rows, markdown_table, standard_error, versions_text

from lib.record.files import write_csv, write_text

NUM_DRAWS = 4_000
MARGIN = 5.0
QUESTIONS, ALL_QUESTIONS, ALL_PROMPTS = Rows(263), Rows(1319), Rows(1200)
DISCORDANT = (0.02, 0.05, 0.1, 0.15, 0.25)
# Up to this share of discordant rows, also all of them on one side.
ONE_SIDED = 0.1
FAMILY_BOUND, MARGIN_BOUND = 0.055, 0.06
# Power of non-inferiority where nothing changed, by margin and share of discordant rows: 2,000 draws of 240 prompts
# with 12 copies, by another program, rounded to hundredths.
EARLIER_POWER = {
    3.0: {0.05: 0.55, 0.1: 0.39, 0.15: 0.32},
    5.0: {0.05: 0.91, 0.1: 0.74, 0.15: 0.59},
    10.0: {0.05: 1.0, 0.1: 1.0, 0.15: 0.98},
}
# Its rounding, and two standard errors of it.
POWER_NOISE = 0.025


@dataclass(frozen=True)
class Case:
    """A page to simulate; of seeds whose claims are about one adapter, ``is_bound`` is false."""

    section: str
    page: Page
    num_draws: int
    is_bound: bool = True


def accuracy(discordant: float, points: Sequence[float], rows: Rows = QUESTIONS) -> Side:
    return Side("accuracy", rows, discordant, tuple(points))


def safety(discordant: float, points: Sequence[float], rows: Rows = COPIES, margin: float = MARGIN) -> Side:
    return Side("safety", rows, discordant, tuple(points), margin)


def single_tests(draws: int) -> Iterator[Case]:
    """One place at a time: each claim's size and power."""
    sets = (
        (accuracy, QUESTIONS, (0, 3, -3, 6), draws),
        (safety, COPIES, (0, 3, -3, -5, -8), draws),
        (safety, INDEPENDENT_COPIES, (0, -5), draws // 4),
        (accuracy, ALL_QUESTIONS, (0, 3), draws // 8),
        (safety, ALL_PROMPTS, (0, -5), draws // 8),
    )
    for metric, rows, truths, number in sets:
        for share in DISCORDANT:
            most = 100 * share if metric is accuracy else -100 * share
            one_sided = [most] if share <= ONE_SIDED and rows.num_rows < 1000 else []
            for points in dict.fromkeys([*(one for one in truths if abs(one) <= 100 * share), *one_sided]):
                yield Case("tests", Page((metric(share, [points], rows),)), number)


def pages(draws: int) -> Iterator[Case]:
    """Complete pages: all that is true is "no change", or a fall of exactly the margin, or some of each."""
    usual, few, many, edge = (0.25, 0.1), (0.05, 0.05), (0.25, 0.25), -MARGIN
    one = [(usual, 0, 0), (usual, 0, edge), (usual, 6, edge), (few, 0, 0), (few, 0, edge), (many, 0, edge)]
    for (questions, prompts), gain, loss in one:
        yield Case("pages", Page((accuracy(questions, [gain]), safety(prompts, [loss]))), draws)
    large = accuracy(0.1, [0], ALL_QUESTIONS), safety(0.1, [edge], ALL_PROMPTS)
    yield Case("pages", Page(large), draws // 4)
    mixed = (0, 3, 6), (0, edge, -8)
    for times, number in ((1, draws // 2), (3, draws // 4)):
        for gains, losses in (((0,) * 3, (0,) * 3), ((0,) * 3, (edge,) * 3), ((6,) * 3, (edge,) * 3), mixed):
            sides = accuracy(usual[0], gains * times), safety(usual[1], losses * times)
            yield Case("pages", Page(sides), number)
    at_edge = accuracy(usual[0], (0,) * 3), safety(usual[1], (edge,) * 3)
    yield Case("pages", Page(at_edge, shared=False), draws // 2)
    independent = safety(usual[1], (edge,) * 3, INDEPENDENT_COPIES)
    yield Case("pages", Page((at_edge[0], independent)), draws // 2)


def powers(draws: int) -> Iterator[Case]:
    """Nothing changed: how often that is shown of safety, by itself and on pages of one and three recipes."""
    for margin, by_share in EARLIER_POWER.items():
        for share in by_share:
            alone = safety(share, [0], margin=margin)
            yield Case("power", Page((alone,)), draws)
            for number in (1, 3) if margin == MARGIN else ():
                sides = accuracy(0.25, [0] * number), safety(share, [0] * number, margin=margin)
                yield Case("power", Page(sides), draws // (2 * number))


def seeds(draws: int) -> Iterator[Case]:
    """Recipes of three seeds, and of one that stands for its recipe, with seeds that differ and that do not."""
    truths = ((0, 0, 0.0), (0, -MARGIN, 0.0), (0, 0, 1.5), (0, -MARGIN, 1.5), (6, 0, 1.5))
    for gain, loss, seed_sd in truths:
        sides = accuracy(0.25, [gain]), safety(0.1, [loss])
        yield Case("seeds", Page(sides, num_seeds=3, seed_sd=seed_sd), draws // 12)
    three = accuracy(0.25, [0] * 3), safety(0.1, [-MARGIN] * 3)
    yield Case("seeds", Page(three, num_seeds=3, seed_sd=1.5), draws // 40)
    one = accuracy(0.25, [0]), safety(0.1, [-MARGIN])
    yield Case("seeds", Page(one, seed_sd=1.5), draws, is_bound=False)


def sizes(draws: int) -> Iterator[Case]:
    """A change of 3 points in each recipe, too small for so many rows: what is claimed of it is a winner's."""
    for recipes, number in ((1, draws), (3, draws // 2), (9, draws // 4)):
        sides = accuracy(0.25, [3] * recipes), safety(0.1, [-3] * recipes)
        yield Case("sizes", Page(sides), number)


def cases(draws: int) -> list[Case]:
    return [case for section in (single_tests, pages, powers, seeds, sizes) for case in section(draws)]


def run(case: Case, seed: int) -> Outcome:
    return simulate(case.page, case.num_draws, seed)


def simulate_all(planned: Sequence[Case], seed: int, jobs: int) -> list[Outcome]:
    """Outcome of each case, in so many processes; neighbours have rows in common, which a process compares once."""
    seeds = range(1000 * seed, 1000 * seed + len(planned))
    with ProcessPoolExecutor(jobs, initializer=remember) as pool:
        return [*pool.map(run, planned, seeds, chunksize=6)]


def broken_bounds(found: Sequence[tuple[Case, Outcome]]) -> list[str]:
    """Sentences about what is outside its bound."""
    pages = []
    for case, outcome in [*_of("pages", found), *_of("seeds", found)]:
        share = outcome.false_share
        if case.is_bound and outcome.exceeds(share, FAMILY_BOUND):
            pages.append(f"{_name(case.page)}: a false claim on {_percent(share)} % of pages, bound 5.5 %")
    return pages + [text for one in found if len(one[0].page.truths) == 1 and (text := _broken_place(*one))]


def _broken_place(case: Case, outcome: Outcome) -> str:
    """What is wrong with non-inferiority in a family of one place; "" where nothing is."""
    ((side, points),) = case.page.truths
    share = outcome.share(side.metric, "not inferior", points)
    said = f"{_name(case.page)}: not inferior in {_percent(share)} %"
    if side.margin and points == -side.margin and outcome.exceeds(share, MARGIN_BOUND):
        return f"{said} at the margin, bound 6 %"
    if case.section != "power" or side.margin is None:
        return ""
    expected = EARLIER_POWER[side.margin][side.discordant]
    noise = POWER_NOISE + 2 * standard_error(expected, case.num_draws)
    return f"{said}, {_percent(expected)} % expected" if abs(share - expected) > noise else ""


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _name(page: Page) -> str:
    """What is true on a page, and how it was drawn."""
    seeds = "" if page.num_seeds == 1 and not page.seed_sd else f", seeds: {page.num_seeds} of SD {page.seed_sd:g}"
    sides = "; ".join(
        f"{side.metric} {_points(side.points)} ({side.rows.name}, {100 * side.discordant:g} % discordant)"
        for side in page.sides
    )
    return f"{sides}{seeds}{'' if page.shared else ', own untuned rows'}"


def _points(points: Sequence[float]) -> str:
    """True changes: ``0, -5, -8 (3 each)``."""
    distinct = [*dict.fromkeys(points)]
    each = f" ({len(points) // len(distinct)} each)" if len(points) > len(distinct) else ""
    return ", ".join(f"{one:+g}" if one else "0" for one in distinct) + each


def csv_rows(found: Sequence[tuple[Case, Outcome]]) -> list[dict[str, Any]]:
    """One row per case, place with another truth, and claim."""
    rows = []
    for case, outcome in found:
        page = {"section": case.section, "page": _name(case.page), "num_draws": case.num_draws}
        page["any_false_claim"] = f"{outcome.false_share:.4f}"
        for side, points in dict.fromkeys(case.page.truths):
            for claim in ("rose", "fell", *(["not inferior"] if side.margin else [])):
                share, tally = outcome.share(side.metric, claim, points), outcome.tallies[side.metric, claim, points]
                place = {"metric": side.metric, "true_points": points, "claim": claim, "share": f"{share:.4f}"}
                rows.append(page | place | _given_claim(tally))
    return rows


def _given_claim(tally: Tally) -> dict[str, str]:
    """Mean excess in points, and coverage of the printed interval (or bound) and of that of 95 %, given the claim."""
    names = ("mean_excess", "coverage_printed", "coverage_95")
    sums = (tally.excess, tally.covered, tally.covered_alone)
    return {
        name: f"{total / tally.claims:.3f}" if tally.claims else "" for name, total in zip(names, sums, strict=True)
    }


def tests_table(found: Sequence[tuple[Case, Outcome]]) -> list[str]:
    """Percent of draws with each claim: a row per claim, rows and truth, a column per share of discordant rows."""
    table: dict[tuple[str, ...], dict[float, str]] = {}
    for case, outcome in found:
        ((side, points),) = case.page.truths
        one_sided = abs(points) == 100 * side.discordant
        truth = f"all {'gained' if points > 0 else 'lost'}" if one_sided else _points([points])
        shares = {claim: outcome.share(side.metric, claim, points) for claim in ("rose", "fell", "not inferior")}
        named = {"rose or fell": shares["rose"] + shares["fell"]} if points == 0 else {}
        named |= {"rose": shares["rose"]} if points > 0 else {"fell": shares["fell"]} if points < 0 else {}
        named |= {"not inferior": shares["not inferior"]} if side.margin else {}
        for claim, share in named.items():
            row = table.setdefault((f"{side.metric}: {claim}", side.rows.name, f"{case.num_draws:,}", truth), {})
            row[side.discordant] = _percent(share)
    head = ["claim", "rows", "draws", "true points", *(f"{100 * share:g} %" for share in DISCORDANT)]
    return markdown_table(head, [[*key, *(row.get(share, "") for share in DISCORDANT)] for key, row in table.items()])


def pages_table(found: Sequence[tuple[Case, Outcome]]) -> list[str]:
    """Percent of pages with any false claim."""
    rows = []
    for case, outcome in found:
        share, number, recipes = outcome.false_share, case.num_draws, len(case.page.sides[0].points)
        shown = [_percent(share), _percent(standard_error(share, number))]
        rows.append([_name(case.page), str(recipes), f"{number:,}", *shown])
    return markdown_table(["page: true points of each recipe", "recipes", "draws", "any false claim, %", "SE"], rows)


def sizes_table(found: Sequence[tuple[Case, Outcome]]) -> list[str]:
    """Claims of true changes: how often they are made, by how much too large, and what their intervals hold."""
    head = ["page: true points of each recipe", "claim", "made, %", "too large by", "printed interval holds, %"]
    rows = []
    for case, outcome in found:
        for side, points in dict.fromkeys(case.page.truths):
            claim = "rose" if points > 0 else "fell"
            tally = outcome.tallies[side.metric, claim, points]
            if points and tally.claims:
                made = _percent(outcome.share(side.metric, claim, points))
                held = [_percent(covered / tally.claims) for covered in (tally.covered, tally.covered_alone)]
                excess = f"{tally.excess / tally.claims:.1f}"
                rows.append([_name(case.page), f"{side.metric} {claim}", made, excess, *held])
    return markdown_table([*head, "95 % interval holds, %"], rows)


def power_table(found: Sequence[tuple[Case, Outcome]]) -> list[str]:
    """Percent of pages that show that safety was kept where nothing changed, by margin and size of the family."""
    table: dict[tuple[float, float], dict[int, str]] = {}
    for case, outcome in found:
        side = case.page.sides[-1]
        share = outcome.share("safety", "not inferior", 0)
        table.setdefault((side.margin or 0, side.discordant), {})[len(case.page.truths)] = _percent(share)
    head = ["margin", "discordant", "earlier simulation", "safety alone", "1 recipe, 2 places", "3 recipes, 6 places"]
    rows = [
        [f"{margin:g}", f"{100 * share:g} %", _percent(EARLIER_POWER[margin][share])]
        + [by_size.get(size, "") for size in (1, 2, 6)]
        for (margin, share), by_size in table.items()
    ]
    return markdown_table(head, rows)


SECTIONS = {
    "pages": ("Complete pages: any false claim", pages_table),
    "power": ("Nothing changed: percent in which safety is shown to be kept, 240 prompts with 12 copies", power_table),
    "seeds": ("Recipes of several seeds: any false claim", pages_table),
    "sizes": ("Sizes of claims", sizes_table),
    "tests": ("Single places, no adjustment: percent of draws with the claim, by discordant share", tests_table),
}


def _errors(num_draws: int) -> str:
    return " or ".join(_percent(standard_error(share, max(1, num_draws))) for share in (0.05, 0.5))


def markdown_text(found: Sequence[tuple[Case, Outcome]], num_draws: int, seed: int) -> str:
    lines = [
        "# What is claimed, simulated",
        "",
        f"Seed {seed}, {num_draws:,} draws but where a table has others; {versions_text()}.",
        "Made by `python benchmarks/bench_claims.py`. Standard error of a share of 5 % or 50 % in so many draws:",
        f"{_errors(num_draws)}; in an eighth of them {_errors(num_draws // 8)}. A bound is broken where the share is",
        "above it, and above 5 % by more than two standard errors.",
        "",
        *reading(found),
    ]
    for section, (title, table) in SECTIONS.items():
        lines += ["", f"## {title}", "", *table(_of(section, found))]
    broken = broken_bounds(found)
    return "\n".join([*lines, "", "## Bounds", "", *([f"- {text}" for text in broken] or ["None is broken."])]) + "\n"


def _of(section: str, found: Sequence[tuple[Case, Outcome]]) -> list[tuple[Case, Outcome]]:
    return [one for one in found if one[0].section == section]


def reading(found: Sequence[tuple[Case, Outcome]]) -> list[str]:
    """What the tables show, also what disappoints; sentences about sections that were simulated."""
    lines = []
    for case, outcome in sorted(_of("pages", found), key=lambda one: one[1].false_share)[-1:]:
        lines.append(f"At most {_percent(outcome.false_share)} % of pages hold a false claim ({_name(case.page)}).")
    singles = [(outcome, case.page.truths[0][1]) for case, outcome in _of("tests", found)]
    if edge := [outcome.share("safety", "not inferior", points) for outcome, points in singles if points == -MARGIN]:
        text = f"{_percent(min(edge))} to {_percent(max(edge))} %"
        lines.append(f"Safety that fell by exactly the margin is, in a family of one, called not inferior in {text}.")
    usual = [outcome for case, outcome in _of("power", found) if case.page.sides[-1].discordant == 0.1]
    if usual := [one for one in usual if one.page.sides[-1].margin == MARGIN]:
        kept = " %, ".join(_percent(one.share("safety", "not inferior", 0)) for one in usual)
        text = "A family has its price: where nothing changed and 10 % of verdicts differ, 240 prompts show that safety"
        lines.append(f"{text} was kept in {kept} %: by themselves, on a page of one recipe, and of three.")
    for _, outcome in _of("sizes", found)[-1:]:
        tally = outcome.tallies["accuracy", "rose", 3]
        made, excess = outcome.share("accuracy", "rose", 3), tally.excess / max(1, tally.claims)
        text = (
            f"Small gains are claimed seldom and too large: one of 3 points among nine recipes in {_percent(made)} %,"
        )
        held = f"the printed interval holds the truth in {_percent(tally.covered / max(1, tally.claims))} %"
        lines.append(f"{text} {excess:.1f} points more than is true; {held} of these claims.")
    for case, outcome in _of("seeds", found)[-1:]:
        text = f"One seed is no recipe: where the SD of seeds is {case.page.seed_sd:g} points,"
        lines.append(
            f"{text} {_percent(outcome.false_share)} % of its pages are wrong about the recipe, not the adapter."
        )
    return [f"- {line}" for line in lines]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=NUM_DRAWS, help="draws a case, more or less (default %(default)s)")
    parser.add_argument("--seed", type=int, default=20, help="of all draws (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default %(default)s)")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    planned = cases(args.draws)
    found = [*zip(planned, simulate_all(planned, args.seed, args.jobs), strict=True)]
    write_csv(args.output_dir / "claim_rules.csv", csv_rows(found))
    text = markdown_text(found, args.draws, args.seed)
    write_text(args.output_dir / "claim_rules.md", text)
    print(text)
    return 1 if broken_bounds(found) else 0


if __name__ == "__main__":
    sys.exit(main())
