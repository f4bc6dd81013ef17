"""Export to lm-evaluation-harness: its own readers open the files, and the numbers are those of the comparison.

lm_eval is no dependency: the tests that need it run where it is installed (0.4.13, ``pip install lm_eval==0.4.13``).
"""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from made_up import make_results

import run_all
from lib import gsm8k
from lib.compare.comparison import assess_runs
from lib.compare.runs import load_runs, untuned_runs
from lib.compare.sentences import finding_sentence
from lib.record.files import read_json
from lib.record.paths import run_paths
from lib.record.rows import read_jsonl
from lib.reports import to_lm_eval

NOW = datetime(2026, 11, 23, 9, 30, 15, 250, tzinfo=UTC)


@pytest.fixture
def results(tmp_path):
    return make_results(tmp_path, questions=24, prompts=20)


@pytest.fixture
def written(results):
    return to_lm_eval.export_lm_eval(str(results), now=NOW)


def samples_of(path, task):
    return read_jsonl(path.parent / path.name.replace("results_", f"samples_{task}_").replace(".json", ".jsonl"))


def test_rates_and_their_errors_are_those_of_the_comparison(results, written):
    runs = load_runs(str(results))
    everyone = [*runs, *untuned_runs(runs)]
    assert [path.parent.name for path in written] == ["simple", "strong", "untuned_asked_as_simple_strong"]
    for path, run in zip(written, everyone, strict=True):
        results = read_json(path)["results"]
        answers, verdicts = results[to_lm_eval.GSM8K_TASK], results[to_lm_eval.SAFETY_TASK]
        assert answers["exact_match,strict"] == run.accuracy.rate.share
        assert answers["exact_match,flexible"] == run.accuracy.summary["accuracy_flexible"]
        assert verdicts["safe_rate,judge"] == run.safety.rate.share
        assert (answers["sample_len"], verdicts["sample_len"]) == (24, 20)


def test_a_rate_is_the_mean_of_its_samples(written):
    for path in written:
        printed = read_json(path)["results"]
        for task, metric, name in (
            (to_lm_eval.GSM8K_TASK, "exact_match", "strict"),
            (to_lm_eval.GSM8K_TASK, "exact_match", "flexible"),
            (to_lm_eval.SAFETY_TASK, "safe_rate", "judge"),
        ):
            scores = [row[metric] for row in samples_of(path, task) if row["filter"] == name]
            assert sum(scores) / len(scores) == pytest.approx(printed[task][f"{metric},{name}"], abs=1e-12)


def test_the_untuned_model_has_no_adapter(written):
    adapters = [read_json(path)["config"]["model_args"].get("peft") for path in written]
    assert adapters == ["run_simple/02_train/adapter", "run_strong/02_train/adapter", None]


def test_a_sample_keeps_the_answer_and_what_was_read_from_it(results, written):
    row = read_jsonl(run_paths(str(results), "simple").gsm8k_preds)[3]
    sample = samples_of(written[0], to_lm_eval.GSM8K_TASK)[6]
    assert (sample["doc_id"], sample["filter"], sample["resps"]) == (3, "strict", [[row["model_output"]]])
    assert sample["doc"] == {"question": row["question"], "answer": row["gold_answer"]}
    assert sample["filtered_resps"] == [row["parsed_final"] or "[invalid]"]
    assert sample["exact_match"] == float(row["correct"])


def test_no_rate_has_the_name_of_a_rule_of_the_harness_that_reads_another_number(written):
    # gsm8k.yaml of lm_eval 0.4.13: strict-match takes the first match, flexible-extract the last one.
    strict, flexible = re.compile(r"#### (\-?[0-9\.\,]+)"), re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
    assert not strict.search("#### $18") and gsm8k.extract_answer("#### $18") == "18"
    text = "#### 7\nSo 5 apples are left."
    assert flexible.findall(text)[-1] == ("", "5") and gsm8k.extract_answer_flexible(text) == "7"
    for path in written:
        names = {row["filter"] for row in samples_of(path, to_lm_eval.GSM8K_TASK)}
        names |= {key.partition(",")[2] for key in read_json(path)["results"][to_lm_eval.GSM8K_TASK]}
        assert names - {""} == {"strict", "flexible"}


def test_what_was_not_measured_is_no_task(results):
    paths = run_paths(str(results), "simple")
    paths.manifest("04_eval_safety").unlink()
    paths.ailuminate_safety.unlink()
    (path, *_) = to_lm_eval.export_lm_eval(str(results), now=NOW)
    assert list(read_json(path)["results"]) == [to_lm_eval.GSM8K_TASK]
    assert not list(path.parent.glob(f"samples_{to_lm_eval.SAFETY_TASK}*"))


def test_redacted_samples_hold_no_text_of_ailuminate(results):
    paths = to_lm_eval.export_lm_eval(str(results), redact=True, now=NOW)
    rows = read_jsonl(run_paths(str(results), "simple").ailuminate_safety)
    text = "".join(file.read_text() for path in paths for file in path.parent.iterdir())
    assert not any(row["prompt"] in text or row["response"] in text for row in rows)
    assert rows[2]["release_prompt_id"] in text and rows[2]["safety_label"] in text


def test_the_driver_exports_without_running_anything(results, tmp_path, capsys):
    assert run_all.main(["--export", "lm-eval", "--output-dir", str(results)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and all("lm_eval" in line and line.endswith(".json") for line in printed)
    assert run_all.main(["--export", "lm-eval", "--presets", "simple", "--output-dir", str(results)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("lm_eval/")[1].split("/")[0].startswith("untuned") for line in printed] == [False, True]
    assert run_all.main(["--export", "lm-eval", "--presets", "nosuch", "--output-dir", str(results)]) == 1
    assert "does not hold run 'nosuch'" in capsys.readouterr().err
    assert run_all.main(["--export", "lm-eval", "--output-dir", str(tmp_path / "none")]) == 1
    assert "run a preset first" in capsys.readouterr().err


@pytest.mark.parametrize(("rate", "number", "expected"), [(0.5, 2, 0.5), (0.0, 9, 0.0), (1.0, 1, "N/A")])
def test_standard_error(rate, number, expected):
    assert to_lm_eval.standard_error(rate, number) == expected


# --- with lm_eval itself ------------------------------------------------------------------------------------------


def test_lm_eval_finds_the_files_and_makes_its_table_of_the_same_numbers(results, written):
    utils = pytest.importorskip("lm_eval.utils", reason="lm_eval is not installed")
    files = [str(path) for path in written[0].parent.iterdir()]
    found = utils.get_latest_filename(utils.get_results_filenames(files))
    assert found == str(written[0])
    samples = [name.rpartition("/")[2] for name in utils.get_sample_results_filenames(files)]
    assert {utils.get_file_task_name(name) for name in samples} == {to_lm_eval.GSM8K_TASK, to_lm_eval.SAFETY_TASK}
    assert {utils.get_file_datetime(name) for name in samples} == {"2026-11-23T09-30-15.000250"}
    table = utils.make_table(json.loads(written[0].read_text()))
    (run, _) = load_runs(str(results))
    for rate in (run.accuracy.rate.share, run.accuracy.summary["accuracy_flexible"], run.safety.rate.share):
        assert f"{rate:.4f}" in table


def test_lm_eval_computes_the_same_numbers_from_the_samples(written):
    metrics = pytest.importorskip("lm_eval.api.metrics", reason="lm_eval is not installed")
    printed = read_json(written[0])["results"][to_lm_eval.GSM8K_TASK]
    scores = [
        row["exact_match"]
        for row in samples_of(written[0], to_lm_eval.GSM8K_TASK)
        if row["filter"] == to_lm_eval.STRICT
    ]
    assert metrics.mean(scores) == pytest.approx(printed["exact_match,strict"])
    assert metrics.mean_stderr(scores) == pytest.approx(printed["exact_match_stderr,strict"])


def test_datasets_opens_the_samples_as_the_hub_does(written, tmp_path):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    from datasets import load_dataset

    file = next(written[0].parent.glob("samples_*gsm8k*"))
    rows = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["exact_match"][:] == [row["exact_match"] for row in samples_of(written[0], to_lm_eval.GSM8K_TASK)]


def test_the_system_message_is_the_one_that_the_run_was_evaluated_under(results):
    runs = {run.name: run for run in load_runs(str(results))}
    assert to_lm_eval.lm_eval_results(runs["simple"], {})["system_instruction"] == gsm8k.SYSTEM_PROMPT
    mine = {"03_eval_gsm8k": {"facts": {"system_prompt": "Mine."}}}
    assert to_lm_eval.lm_eval_results(replace(runs["simple"], manifests=mine), {})["system_instruction"] == "Mine."


def test_each_task_carries_its_finding(results):
    # Also one run alone has the p-values of the comparison of all.
    (simple,) = (
        path
        for path in to_lm_eval.export_lm_eval(str(results), ["simple"], now=NOW)
        if "simple" in path.parent.name[:6]
    )
    configs = read_json(simple)["configs"]
    for task, finding in zip(configs, assess_runs(load_runs(str(results)))["simple"], strict=True):
        assert configs[task]["metadata"]["finding"] == finding_sentence([finding])


def test_the_untuned_model_has_no_finding(written):
    assert not any("finding" in config["metadata"] for config in read_json(written[-1])["configs"].values())
