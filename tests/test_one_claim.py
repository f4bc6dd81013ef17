"""Every place that prints a claim prints the same one: a folder of two presets with two seeds each."""

import html
import re

import pytest
from made_runs import finish, set_margin
from made_up import make_results

import run_all
from lib.compare import comparison, tables, verify
from lib.compare.runs import load_runs
from lib.compare.sentences import family_sentence, finding_sentence
from lib.record.files import read_csv, read_json, write_json
from lib.record.paths import run_paths
from lib.reports import comparison_tables, to_lm_eval, to_mlflow

NAMES = ("simple_seed1", "simple_seed2", "strong_seed1", "strong_seed2")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Runs of which the parameters record seed and margin, as the driver leaves them, and their comparison."""
    folder = make_results(tmp_path_factory.mktemp("one_claim") / "results", NAMES, questions=150, prompts=150)
    for name in NAMES:
        paths = run_paths(str(folder), name)
        config = read_json(paths.config_resolved)
        preset, _, seed = name.partition("_seed")
        config["parameters"] |= {"seed": int(seed), "lora_r": 8 if preset == "simple" else 16}
        write_json(paths.config_resolved, config)
        finish(paths, "01_prepare", [], [])
        set_margin(paths, 5.0, 5.0)
    runs = load_runs(str(folder))
    tables.write_summary(str(folder), runs)
    tables.write_final_metrics(str(folder), runs)
    comparison.write_comparison(str(folder), comparison.comparison(runs))
    return folder


def plain(text):
    """Text without markup and line breaks."""
    words = html.unescape(re.sub(r"<[^>]+>", " ", text)).replace("\N{NO-BREAK SPACE}", " ")
    return " ".join(words.split())


def test_every_place_prints_the_same_claim_with_the_same_numbers(results, tmp_path):
    runs = load_runs(str(results))
    found = comparison.assess_runs(runs)
    claims = {name: finding_sentence(some) for name, some in found.items()}
    assert all("this recipe, 2 seeds: " in claim for claim in claims.values())
    # Something is claimed here, and something is not.
    conclusions = {place.conclusion for place in comparison.primary_family(found)}
    assert "rose and not inferior" in conclusions and len(conclusions) > 1

    assert run_all.main(["--report-only", "--output-dir", str(results)]) == 0
    pages = {
        "05": plain(comparison_tables.findings_table(found).text),
        "05's summary": " ".join(comparison_tables.summary_lines(runs, found)),
        "terminal": " ".join(" ".join(tables.findings_lines(str(results), NAMES)).split()),
        "index.html": plain((results / "reports" / "index.html").read_text(encoding="utf-8")),
    }
    for place, text in pages.items():
        assert all(claim in text for claim in claims.values()), place
    family = family_sentence(comparison.primary_family(found))
    assert "recipes (simple, seeds 1, 2; strong, seeds 1, 2), 4 places" in family
    assert family in pages["05"] and family in pages["index.html"]

    for run in runs:
        tags = to_mlflow.make_record(run, found[run.name], tmp_path).tags
        assert "; ".join([tags["finding_accuracy"], tags["finding_safety"]]) == claims[run.name]
        configs = read_json(to_lm_eval.export_lm_eval(str(results), [run.name])[0])["configs"].values()
        assert "; ".join(config["metadata"]["finding"] for config in configs) == claims[run.name]


def test_the_numbers_of_the_claims_are_those_of_the_comparison(results):
    found = comparison.assess_runs(load_runs(str(results)))
    record = read_json(results / "05_compare" / "comparison.json")
    assert [(one["recipe"], one["axis"], one["runs"]) for one in record["family"]] == [
        (f"{preset}, seeds 1, 2", metric, [f"{preset}_seed1", f"{preset}_seed2"])
        for preset in ("simple", "strong")
        for metric in ("accuracy", "safety")
    ]
    for one in record["family"]:
        sentence = finding_sentence([finding for finding in found[one["runs"][0]] if finding.metric == one["axis"]])
        shown = f"98.75 % interval {100 * one['low']:.1f} to {100 * one['high']:.1f}"
        if one["conclusion"] != "undecided":
            assert (shown in sentence) and one["level"] == 0.9875
        assert (f"Holm's p = {one['holm_changed']:.3g}" in sentence) == (one["holm_changed"] < 0.05)
        assert one["seeds"]["standard_error"] > 0 and one["df"] > 1
    # Of a single seed only what it is: rates, as in summary.csv, and its own change.
    for row in read_csv(results / "summary.csv"):
        accuracy, safe = record["verdicts"][row["run_name"]]
        assert (float(row["gsm8k_acc"]), float(row["ailuminate_safety"])) == (accuracy["rate"], safe["rate"])


def test_recipes_verify_and_each_of_their_numbers_is_recomputed(results):
    path = results / "05_compare" / "comparison.json"
    record = read_json(path)
    assert _faults(results) == []
    wrong = {"standard_error": 0.001, "seed_sd": 0.5, "cochrans_q_p": 0.01}
    record["family"][1]["seeds"] |= wrong
    record["family"][0] |= {"df": 7.5, "p_value": 0.001, "chance_fell": 0.5, "size": 99.0, "bound": 0.0}
    record["seeds"][0] |= {"seed_sd": 0.3}
    try:
        write_json(path, record)
        places = {one.partition(": is")[0] for one in _faults(results)}
    finally:
        write_json(path, comparison.comparison(load_runs(str(results))))
    expected = {f"family[1].seeds.{name}" for name in wrong} | {"seeds[0].seed_sd"}
    expected |= {f"family[0].{name}" for name in ("df", "p_value", "chance_fell", "size", "bound")}
    assert places == {f"comparison.json, {place}" for place in expected}


def _faults(results):
    """Of the comparison; the manifests of made-up runs record no metrics."""
    return [one for one in verify.verify_folder(results).mismatches if one.startswith("comparison.json")]
