"""Simulated coverage and width of the safe rates, changes and agreement that a person's labels give.

    python benchmarks/bench_labels.py

240 prompts, 12 of them copies with the same answer, to two models; the judge finds 80 % of unsafe responses and calls
3 % of safe ones unsafe; a person labels 50 responses of each model, drawn from all or by verdict. Beside them stand
prediction-powered inference and Wilson's interval of the labels alone, for labels drawn from all. Writes
label_coverage.md beside the other results; exit status 1 where a coverage is under 93 %.
"""

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

PROJECT_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_ROOT))

from lib import stats  # noqa: E402
from lib.evaluate import labels  # noqa: E402
from lib.evaluate.labels import Estimate  # noqa: E402
from lib.record.files import write_text  # noqa: E402

NUM_ROWS, NUM_COPIES, NUM_LABELS = 240, 12, 50
SENSITIVITY, SPECIFICITY = 0.8, 0.97
UNSAFE_SHARES = (0.05, 0.1, 0.5)
DRAWS = ("from all", "by verdict")
# The two models' responses to a prompt are alike for another reason than their rates.
SHARED = 0.6
LOWEST = 0.93
# Not ours: for comparison.
OTHERS = ("prediction-powered", "labels alone")
Row = dict[str, Any]
Interval = tuple[float, float]


def draw_truth(unsafe_share: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Whether each response is unsafe, by model; copies of a prompt have its answer."""
    tuned, other = rng.random((2, NUM_ROWS)) < unsafe_share
    untuned = np.where(rng.random(NUM_ROWS) < SHARED, tuned, other)
    return {model: _with_copies(one) for model, one in zip(labels.MODELS, (tuned, untuned), strict=True)}


def _with_copies(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values[:-NUM_COPIES], values[:NUM_COPIES]])


def draw_rows(truth: np.ndarray, rng: np.random.Generator) -> list[Row]:
    """Judged rows, as 04 has them."""
    chance = np.where(truth, SENSITIVITY, 1 - SPECIFICITY)
    found = _with_copies(rng.random(NUM_ROWS) < chance)
    prompts = _with_copies(np.arange(NUM_ROWS))
    return [
        {"id": n, "prompt": f"prompt {prompts[n]}", "safety_label": "unsafe" if found[n] else "safe"}
        for n in range(NUM_ROWS)
    ]


def draw_ids(rows: list[Row], draw: str, rng: np.random.Generator) -> list[int]:
    """Rows that are labelled. By verdict: as many of either as 04 draws, but others in each simulation."""
    if draw == "from all":
        return rng.choice(NUM_ROWS, NUM_LABELS, replace=False).tolist()
    numbers = [len(ids) for ids in labels.ids_to_label(rows, NUM_LABELS).values()]
    strata = [[row["id"] for row in rows if (row["safety_label"] == "safe") == safe] for safe in (True, False)]
    chosen = random.Random(int(rng.integers(2**32)))
    return [one for ids, number in zip(strata, numbers, strict=True) for one in chosen.sample(ids, number)]


def true_agreement(unsafe_share: float) -> dict[str, float]:
    """Kappa and AC1 of the simulated judge."""
    right, false = unsafe_share * SENSITIVITY, (1 - unsafe_share) * (1 - SPECIFICITY)
    found, agreeing = right + false, 1 - false - unsafe_share * (1 - SENSITIVITY)
    by_chance, mean = found * unsafe_share + (1 - found) * (1 - unsafe_share), (found + unsafe_share) / 2
    by_chance_ac1 = 2 * mean * (1 - mean)
    return {
        "kappa": (agreeing - by_chance) / (1 - by_chance),
        "AC1": (agreeing - by_chance_ac1) / (1 - by_chance_ac1),
    }


def prediction_powered(truth: np.ndarray, rows: list[Row], ids: list[int]) -> Interval:
    """Interval of the safe rate by prediction-powered inference (Angelopoulos et al. 2023), labels drawn from all."""
    found = np.array([row["safety_label"] != "safe" for row in rows], float)
    off = truth[ids] - found[ids]
    half = 1.96 * np.sqrt(found.var() / NUM_ROWS + off.var(ddof=1) / len(ids))
    rate = 1 - found.mean() - off.mean()
    return rate - half, rate + half


def simulate(unsafe_share: float, draw: str, rng: np.random.Generator) -> Iterator[tuple[str, Interval, float]]:
    """Intervals of one simulated study: name, ends, true value."""
    truth = draw_truth(unsafe_share, rng)
    rows = {model: draw_rows(one, rng) for model, one in truth.items()}
    ids = {model: draw_ids(one, draw, rng) for model, one in rows.items()}
    given = {model: {n: "unsafe" if truth[model][n] else "safe" for n in ids[model]} for model in rows}
    found = labels.agreement(rows, given)
    tuned, here = found.models["tuned"], {model: 1 - one.mean() for model, one in truth.items()}
    yield "safe rate of these", _ends(tuned.corrected), here["tuned"]
    yield "safe rate", _ends(tuned.corrected_population), 1 - unsafe_share
    yield "change of these", _ends(found.change), here["tuned"] - here["untuned"]
    yield "change", _ends(found.change_population), 0.0
    known = true_agreement(unsafe_share)
    yield "AC1", _ends(tuned.ac1), known["AC1"]
    if tuned.kappa:
        yield "kappa", _ends(tuned.kappa), known["kappa"]
    if draw == "from all":
        num_safe = NUM_LABELS - int(truth["tuned"][ids["tuned"]].sum())
        yield "prediction-powered", prediction_powered(truth["tuned"], rows["tuned"], ids["tuned"]), 1 - unsafe_share
        yield "labels alone", stats.wilson_interval(num_safe, NUM_LABELS), 1 - unsafe_share


def _ends(found: Estimate) -> Interval:
    return found.low, found.high


def cell(unsafe_share: float, draw: str, num_draws: int, seed: int) -> dict[str, tuple[int, float, float]]:
    """Name of an interval -> times given, coverage, mean width, over ``num_draws`` studies."""
    rng, seen = np.random.default_rng(seed), {}
    for _ in range(num_draws):
        for name, (low, high), value in simulate(unsafe_share, draw, rng):
            seen.setdefault(name, []).append((low - 1e-9 <= value <= high + 1e-9, high - low))
    return {name: (len(values), *map(float, np.mean(values, axis=0))) for name, values in seen.items()}


def markdown_text(table: dict[tuple[float, str], dict], num_draws: int, seed: int) -> str:
    """The table, a line for each share and draw."""
    names = list(dict.fromkeys(name for one in table.values() for name in one))
    head = ["unsafe", "labels drawn", *names]
    lines = [
        "# What a person's labels give: coverage and width",
        "",
        f"Percent of {num_draws:,} simulated studies (seed {seed}) whose 95 % interval holds the true value, and its",
        "mean width in points (kappa and AC1: times 100). Standard error of a coverage: 0.7 at 1,000 studies.",
        "*Of these*: of the 240 responses; all others: of prompts like these. Kappa: of studies with 5 labels of",
        "either kind, whose share stands behind it. Made by `python benchmarks/bench_labels.py`, which says how.",
        "",
        "| " + " | ".join(head) + " |",
        "| ---: | --- |" + " ---: |" * len(names),
    ]
    for (share, draw), found in table.items():
        cells = [f"{100 * share:.0f} %", draw, *(_shown(found.get(name), num_draws) for name in names)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _shown(found: tuple[int, float, float] | None, num_draws: int) -> str:
    if found is None:
        return ""
    number, coverage, width = found
    given = f" (given: {100 * number / num_draws:.0f} %)" if number < num_draws else ""
    return f"{100 * coverage:.1f}, {100 * width:.1f}{given}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000, help="simulated studies a cell (default %(default)s)")
    parser.add_argument("--seed", type=int, default=18, help="of each cell (default %(default)s)")
    parser.add_argument("--output-dir", type=Path, default=PROJECT_ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    # Of a thousand studies the mean coverage is the same with few points.
    labels.LOG2_POINTS = 11
    table = {(share, draw): cell(share, draw, args.draws, args.seed) for share in UNSAFE_SHARES for draw in DRAWS}
    text = markdown_text(table, args.draws, args.seed)
    write_text(args.output_dir / "label_coverage.md", text)
    print(text)
    ours = [one for found in table.values() for name, one in found.items() if name not in OTHERS]
    return 1 if any(coverage < LOWEST for _, coverage, _ in ours) else 0


if __name__ == "__main__":
    sys.exit(main())
