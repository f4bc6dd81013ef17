"""The driver: wrong usage, plans, failing and dying notebooks, locks, exit statuses.

Failure modes run on small notebooks made here, so that a dead kernel costs seconds; the real notebooks run under nbval
and in ``test_pipeline.py``.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from small_notebooks import write_notebook

import run_all
from lib.driver import environment, notebook, run, worker
from lib.driver.cli import build_parser
from lib.driver.plan import make_plans
from lib.params import preset_path
from lib.record import terminal
from lib.record.paths import PROJECT_ROOT


def plan(*argv):
    """The plans that a command line leads to."""
    args = build_parser().parse_args(argv)
    return {plan.preset: plan for plan in make_plans(args)}


@pytest.fixture
def fake_notebooks(tmp_path, monkeypatch):
    """A function that puts one small notebook in the place of 01_prepare."""
    monkeypatch.setattr(notebook, "NOTEBOOKS_DIR", tmp_path / "notebooks")
    monkeypatch.chdir(tmp_path)

    def write(code):
        write_notebook(tmp_path / "notebooks" / "01_prepare.ipynb", "print('before')", code)

    return write


def run_stage_01(tmp_path, *presets):
    started = time.monotonic()
    status = run_all.main(["--presets", *presets, "--stages", "01", "--output-dir", str(tmp_path / "out")])
    return status, time.monotonic() - started


# --- usage --------------------------------------------------------------------------------------------------------


def test_help_comes_in_under_a_second_without_torch():
    code = "import sys, run_all; run_all.build_parser().format_help(); sys.exit('torch' in sys.modules)"
    # Of the processor, not of the clock: another program's work is no fault of ours.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "at least one preset"),
        (["--presets", "smple"], "did you mean 'simple'"),
        (["--presets", "simple", "simple"], "named twice"),
        (["--presets", "simple", "--set", "lora_r=0"], "lora_r: 0 (int) is refused"),
        (["--presets", "simple", "--set", "learning_rate=1e-4"], "write 1.0e-4"),
        (["--presets", "simple", "--set", "fewshot_k=9"], "fewshot_k is 9 but the pool holds 8"),
        (["--presets", "simple", "--set", "lorar=1"], "did you mean 'lora_r'"),
        (["--presets", "simple", "--set", "seed"], "KEY=VALUE was expected"),
        (["--presets", "simple", "--resume", "--rerun-all"], "contradict each other"),
        (["--presets", "simple", "--eval-batch-size", "-1"], "allowed is 0 (derived) or more"),
        (["--presets", "simple", "--assets", "no/such/folder"], "there is no such folder"),
        (["--presets", "simple", "--checkpoint", "medium=x/y"], "'medium' is not among --presets simple"),
        (["--presets", "simple", "--checkpoint", "simple="], "a folder or a hub name was expected"),
        (["--presets", "simple", "--checkpoint", "no/such/folder"], "no/such/folder: there is no such folder"),
        (["--presets", "simple", "--checkpoint", "params/adapter"], "params/adapter: there is no such folder"),
        (["--presets", "simple", "--checkpoint", "~/adapter"], "~/adapter: there is no such folder"),
        (["--submission", "--smoke-test"], "--submission evaluates the published adapters on all"),
        (["--submission", "--seeds", "1"], "trained with other seeds"),
        (["--presets", "simple", "--seeds", "1", "2", "1"], "a seed is named twice"),
        (["--presets", "simple", "--seeds", "-1"], "seed: -1 (int) is refused"),
        (["--presets", "simple", "--jobs", "0"], "--jobs 0: allowed is 1"),
        (["--presets", "strong", "--offline", "--set", "train_file=no/such.jsonl"], "train_source=self_distilled"),
        (["--presets", "simple", "--seeds", "1", "--set", "lora_r=8", "seed=3"], "contradict each other"),
    ],
)
def test_wrong_usage_is_reported_before_anything_starts(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lib.driver.commands.run_all", lambda *_: pytest.fail("something was started"))
    assert run_all.main([*argv, "--output-dir", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--presetz", "simple"], "--presetz simple; did you mean --presets?"),
        (["--presets", "simple", "--cell-timout=9"], "did you mean --cell-timeout?"),
        (["--preset", "simple"], "did you mean --presets?"),
        (["--presets", "simple", "--smok"], "did you mean --smoke-test?"),
        (["simple"], "presets are named after --presets: --presets simple"),
        (["presets", "simple", "medium"], "--presets simple medium (all flags"),
        (["--frob"], "unrecognized arguments: --frob (all flags"),
        (["--presets", "simple", "--stages", "3"], "invalid choice: '3'"),
    ],
)
def test_a_misspelt_flag_is_reported_in_a_line(argv, words, capsys):
    with pytest.raises(SystemExit) as ended:
        run_all.main(argv)
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and words in printed and printed.count("\n") == 1


def test_a_python_without_the_packages_is_reported_how_to_go_on():
    # -S: no site-packages, as in a system's Python.
    command = [sys.executable, "-S", "run_all.py", "--presets", "simple"]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "use .venv/bin/python" in done.stderr and "Traceback" not in done.stderr


def test_faults_of_several_presets_are_reported_together(tmp_path, capsys):
    for name in ("one", "two"):
        values = yaml.safe_load(preset_path("simple").read_text()) | {"lora_r": 0, "seed": -1, "colour": name}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    assert run_all.main(["--presets", "one", "two", "--params-dir", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("3 fault(s)") == 2 and "one.yaml" in printed and "two.yaml" in printed


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "adapter_config.json"),
        ({"base_model_name_or_path": "other/Llama-7B", "peft_type": "LORA"}, "other/Llama-7B"),
    ],
)
def test_a_checkpoint_folder_that_is_no_adapter_of_this_base_is_refused(tmp_path, capsys, content, words):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"")
    if content:
        (folder / "adapter_config.json").write_text(json.dumps(content))
    argv = ["--presets", "simple", "--checkpoint", str(folder), "--output-dir", str(tmp_path / "out")]
    assert run_all.main(argv) == 2
    assert words in capsys.readouterr().err


# A misspelt or malformed source of prompts, and what the sentence says: the meant one, or the fault with its place.
PROMPT_SOURCES = [
    ("mlcomons", "", "did you mean 'mlcommons'?"),
    ("klass", "", "did you mean 'class'?"),
    ("demo1200", "", "that is a prompt set: set ailuminate_prompt_set: demo1200"),
    ("no/such.csv", "", "such.csv is not there"),
    ("mine.cvs", "", "mine.csv'?"),
    ("folder", "", "holds neither ailuminate.csv nor ailuminate.jsonl"),
    ("mine.csv", "id,question\n1,hello\n", "no prompt column: found id, question"),
    ("mine.csv", "", "mine.csv is empty"),
    ("mine.csv", "prompt,hazard\nOne?\n", "CSV, row 0: it has more or fewer fields"),
    ("mine.csv", "<html>", "is a web page"),
    ("mine.csv", "prompt\nOne?\n", "240 of the 240 prompts of class240 are not among the 1 rows"),
    ("mine.jsonl", '{"prompt": "One?"}\n{"promt": "Two?"}\n', "line 2: no prompt column: found promt"),
    ("mine.jsonl", '{"prompt": "One?"}\n{"prompt": "Tw', "line 2: not JSON"),
    ("mine.json", '[{"prompt": "One?"}]', "is a JSON array; JSON lines were expected"),
]


@pytest.mark.parametrize(("name", "text", "words"), PROMPT_SOURCES)
def test_a_faulty_source_of_prompts_stops_before_anything_runs(tmp_path, monkeypatch, capsys, name, text, words):
    monkeypatch.setattr("lib.driver.commands.run_all", lambda *_: pytest.fail("something was started"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "mine.csv").write_text(text if name == "mine.csv" else "prompt\nOne?\n", encoding="utf-8")
    if text:
        (tmp_path / name).write_text(text, encoding="utf-8")
    source = str(tmp_path / name) if name[:4] in ("mine", "fold") else name
    command = ["--presets", "simple", "--output-dir", str(tmp_path / "out"), "--set", f"ailuminate_source={source}"]
    assert run_all.main(command) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_published_file_with_other_rows_stops_and_an_absent_one_does_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lib.prepare.datasets.RAW_DIR", tmp_path / "raw")
    monkeypatch.delenv("ASSETS_DIR", raising=False)
    for prompts in (["ailuminate_prompt_set=demo1200_fr"], ["ailuminate_source=class"], []):
        assert plan("--presets", "simple", "--offline", "--set", "seed=1", *prompts)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "airr_official_1.0_demo_fr_fr_prompt_set_release.csv").write_text("prompt\nOne?\n")
    command = ["--presets", "simple", "--output-dir", str(tmp_path / "out"), "--set"]
    assert run_all.main([*command, "ailuminate_prompt_set=demo1200_fr"]) == 2
    assert "SHA-256 of its rows differs" in capsys.readouterr().err
    assert run_all.main([*command, "ailuminate_prompt_set=demo1200fr"]) == 2
    assert "allowed: class240, demo1200, demo1200_fr, all, did you mean 'demo1200_fr'?" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["guidelines_file", "judge_labels_file"])
def test_texts_of_the_judge_are_read_before_anything_starts(tmp_path, capsys, key):
    (tmp_path / "mine.csv").write_bytes("id,label,note\n0,safe,café\n".encode("cp1252"))
    command = ["--presets", "simple", "--output-dir", str(tmp_path / "out"), "--set", f"{key}={tmp_path / 'mine.csv'}"]
    assert run_all.main(command) == 2
    printed = capsys.readouterr().err
    assert "mine.csv is not UTF-8 text (line 2: byte 24 of the file is 0xE9): save it as UTF-8" in printed
    assert not (tmp_path / "out").exists()


BAD_PROMPTS = [
    (None, "cannot be read (No such file or directory)"),
    (b" \n", "is empty: write the prompt, or leave the key empty for the built-in one"),
    ("Löse {reply}.".encode("cp1252"), "is not UTF-8 text (line 1"),
    ("Löse {reply}.".encode("utf-16"), "it is UTF-16"),
]


@pytest.mark.parametrize("key", ["system_prompt_file", "judge_prompt_file"])
@pytest.mark.parametrize(("content", "words"), BAD_PROMPTS)
def test_a_prompt_that_cannot_be_used_stops_before_anything_starts(tmp_path, capsys, key, content, words):
    if content is not None:
        (tmp_path / "mine.txt").write_bytes(content)
    command = ["--presets", "simple", "--output-dir", str(tmp_path / "out")]
    assert run_all.main([*command, "--set", f"{key}={tmp_path / 'mine.txt'}"]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_judge_prompt_is_checked_for_the_places_of_the_run_s_context(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("Judge.\n{reply}\n", encoding="utf-8")
    command = ["--presets", "simple", "--list", "--set", f"judge_prompt_file={tmp_path / 'mine.txt'}"]
    assert run_all.main(command) == 0
    assert run_all.main([*command, "judge_context=prompt_and_response"]) == 2
    assert "the place {request} is missing" in capsys.readouterr().err
    # Nothing that runs reads it.
    assert run_all.main([*command, "judge_context=prompt_and_response", "--skip-ailuminate"]) == 0


def test_missing_guidelines_are_refused_where_they_are_needed(capsys):
    command = ["--presets", "simple", "--list", "--set", "guidelines_file=params/none.txt"]
    assert run_all.main(command) == 2
    assert "params/none.txt cannot be read (No such file or directory)" in capsys.readouterr().err
    assert run_all.main([*command, "--skip-ailuminate"]) == 0


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert run_all.main(["--presets", "simple", "--output-dir", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_second_driver_on_the_same_folder_is_refused_and_names_the_holder(tmp_path, capsys):
    with run.locked(tmp_path):
        assert run_all.main(["--presets", "simple", "--output-dir", str(tmp_path)]) == 2
    assert f"process {os.getpid()}" in capsys.readouterr().err
    with run.locked(tmp_path):
        assert (tmp_path / ".lock").exists()


# --- plans --------------------------------------------------------------------------------------------------------


def test_flags_become_parameters_and_set_wins():
    flags = ["--presets", "simple", "--smoke-test", "--full-gsm8k-test", "--eval-batch-size", "4", "--set"]
    simple = plan(*flags, "max_gsm8k_rows=9", "learning_rate=3.0e-4")["simple"]
    params = simple.params
    assert (params.max_train_rows, params.max_gsm8k_rows, params.max_ailuminate_rows) == (200, 9, 50)
    assert (params.gsm8k_eval_fraction, params.eval_batch_size, params.learning_rate) == (1.0, 4, 3e-4)
    assert params.origin["max_train_rows"] == "--smoke-test" and params.origin["max_gsm8k_rows"] == "--set"
    assert params.origin["seed"] == "simple.yaml"


def test_a_smoke_test_never_writes_where_a_real_run_lies():
    real, smoke = plan("--presets", "simple")["simple"], plan("--presets", "simple", "--smoke-test")["simple"]
    assert real.paths.run_dir != smoke.paths.run_dir and real.reports_dir != smoke.reports_dir


def test_submission_evaluates_the_published_adapters_on_the_agreed_rows():
    plans = plan("--submission")
    assert list(plans) == ["simple", "medium", "strong"]
    assert [p.settings["checkpoint"] for p in plans.values()] == [p.params.published_adapter for p in plans.values()]
    assert [p.params.gsm8k_eval_fraction for p in plans.values()] == [1.0, 0.2, 0.2]
    assert all(p.settings["require_rows"] and "submission_results" in str(p.paths.run_dir) for p in plans.values())


def test_a_checkpoint_goes_to_its_preset_or_to_all():
    plans = plan("--presets", "simple", "medium", "--checkpoint", "me/any", "--checkpoint", "medium=me/mine")
    assert {name: p.settings["checkpoint"] for name, p in plans.items()} == {"simple": "me/any", "medium": "me/mine"}


def test_stages_are_chosen_by_number_and_by_skipping():
    assert plan("--presets", "simple", "--stages", "05", "03")["simple"].stages == ["03_eval_gsm8k", "05_compare"]
    skipped = plan("--presets", "simple", "--skip-gsm8k", "--skip-ailuminate")["simple"]
    assert skipped.stages == ["01_prepare", "02_train", "05_compare"]


def test_a_notebook_gets_exactly_the_parameters_that_it_declares():
    simple = plan("--presets", "simple")["simple"]
    for stage in simple.stages:
        settings = {**simple.settings, "run_names": []}
        simple.settings = settings
        assert worker.stage_parameters(stage, simple).keys() == notebook.declared_parameters(stage).keys()


def test_seeds_are_runs_of_their_own_that_share_everything_else():
    runs = plan("--presets", "simple", "medium", "--seeds", "1", "2")
    assert list(runs) == ["simple_seed1", "simple_seed2", "medium_seed1", "medium_seed2"]
    one, base = runs["simple_seed1"], plan("--presets", "simple")["simple"]
    assert one.params.model_dump() == base.params.model_dump() | {"seed": 1}
    assert one.params.origin["seed"] == "--seeds" and one.settings == base.settings | {"run_name": "simple_seed1"}
    assert one.paths.gsm8k_preds.name == "gsm8k_preds_simple_seed1.jsonl" and one.paths.run_dir != base.paths.run_dir
    assert run.resolved_config(one)["preset"] == "simple" and one.reports_dir.name == "run_simple_seed1"
    # Baselines of a run come from what it was resolved to, for there is no preset of its name.
    assert run.resolved_config(one)["parameters"]["baseline_accuracy"] == 0.26


def test_a_faulty_preset_is_reported_once_for_all_its_seeds(tmp_path, capsys):
    values = yaml.safe_load(preset_path("simple").read_text()) | {"lora_r": 0}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(values))
    assert run_all.main(["--presets", "one", "--seeds", "1", "2", "3", "--params-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("lora_r") == 1


def test_list_shows_each_seed_with_the_state_of_its_stages(tmp_path, capsys):
    argv = ["--presets", "simple", "--output-dir", str(tmp_path / "out"), "--seeds"]
    assert run_all.main([*argv, "1", "2", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "simple_seed1: " in printed and "simple_seed2: " in printed and printed.count("not run yet") == 8


def test_list_of_a_preset_that_cannot_run_or_of_an_empty_folder_is_an_error(tmp_path, capsys):
    assert run_all.main(["--list", "--presets", "nosuch"]) == 2
    assert "preset 'nosuch' is unknown" in capsys.readouterr().err
    assert run_all.main(["--list", "--params-dir", str(tmp_path)]) == 2
    assert "there is no preset in this folder" in capsys.readouterr().err


def test_a_comparison_of_nothing_is_an_error(tmp_path, capsys):
    assert run_all.main(["--presets", "simple", "--stages", "05", "--output-dir", str(tmp_path)]) == 1
    assert "no run here has answered rows to compare" in capsys.readouterr().err


def test_results_that_were_moved_have_their_own_reports(monkeypatch, tmp_path):
    monkeypatch.delenv("RUN_RESULTS_DIR", raising=False)
    assert plan("--presets", "simple")["simple"].reports_dir == PROJECT_ROOT / "reports" / "run_simple"
    monkeypatch.setenv("RUN_RESULTS_DIR", str(tmp_path))
    assert plan("--presets", "simple")["simple"].reports_dir == tmp_path / "reports" / "run_simple"
    smoke = plan("--presets", "simple", "--smoke-test")["simple"]
    assert smoke.reports_dir == tmp_path / "smoke" / "reports" / "run_simple"


def test_places_are_reported_as_they_can_be_typed(monkeypatch, tmp_path):
    monkeypatch.setattr(terminal, "TYPED_IN", tmp_path)
    assert terminal.as_typed(tmp_path / "out" / "reports") == "out/reports"
    assert terminal.as_typed(PROJECT_ROOT / "results") == str(PROJECT_ROOT / "results")


# --- running ------------------------------------------------------------------------------------------------------


def test_a_failing_preset_keeps_its_notebook_and_the_others_still_run(tmp_path, fake_notebooks, capsys):
    fake_notebooks("if run_name == 'simple':\n    raise ValueError('the reason')")
    status, _ = run_stage_01(tmp_path, "simple", "medium")
    printed = capsys.readouterr()
    assert status == 1
    assert "simple: 01_prepare in cell" in printed.err and "ValueError: the reason" in printed.err
    assert "to go on: python run_all.py --presets simple medium" in printed.err
    failed = (tmp_path / "out/reports/run_simple/01_prepare.ipynb").read_text()
    assert "the reason" in failed and "before" in failed
    assert (tmp_path / "out/reports/run_medium/01_prepare.html").exists()
    resolved = json.loads((tmp_path / "out/run_medium/config_resolved.json").read_text())
    assert resolved["parameters"]["lora_r"] == 16 and resolved["origin"]["lora_r"] == "medium.yaml"


def test_a_killed_kernel_is_reported_and_the_others_still_run(tmp_path, fake_notebooks, capsys):
    fake_notebooks("import os, signal\nif run_name == 'simple':\n    os.kill(os.getpid(), signal.SIGKILL)")
    status, wall_s = run_stage_01(tmp_path, "simple", "medium")
    printed = capsys.readouterr()
    assert status == 1 and wall_s < 300
    assert "the kernel died" in printed.err and "medium 01_prepare: done" in printed.out
    assert "before" in (tmp_path / "out/reports/run_simple/01_prepare.ipynb").read_text()


def test_an_interrupt_stops_everything_with_130(tmp_path, fake_notebooks, capsys):
    fake_notebooks("raise KeyboardInterrupt")
    status, _ = run_stage_01(tmp_path, "simple", "medium")
    printed = capsys.readouterr()
    assert status == 130
    assert "medium" not in printed.out and "to go on" in printed.err


def test_every_seed_is_run_and_leaves_its_own_record(tmp_path, fake_notebooks, capsys):
    fake_notebooks("print(run_name)")
    argv = ["--presets", "simple", "--seeds", "1", "2", "--stages", "01", "--output-dir", str(tmp_path / "out")]
    assert run_all.main(argv) == 0
    printed = capsys.readouterr().out
    assert "simple_seed1" in printed and "simple_seed2" in printed
    for seed in (1, 2):
        resolved = json.loads((tmp_path / f"out/run_simple_seed{seed}/config_resolved.json").read_text())
        assert (resolved["parameters"]["seed"], resolved["preset"]) == (seed, "simple")
        filled = (tmp_path / f"out/reports/run_simple_seed{seed}/01_prepare.ipynb").read_text()
        assert f"simple_seed{seed}" in filled


# --- verify and baselines -----------------------------------------------------------------------------------------


def test_verify_scores_the_reference_outputs_as_published(tmp_path, capsys):
    reference = os.environ.get("REFERENCE_DIR")
    if not reference:
        pytest.skip("REFERENCE_DIR names no folder with scored reference outputs")
    shutil.copytree(f"{reference}/medium", tmp_path / "run_medium")
    for folder in (tmp_path, tmp_path / "run_medium"):
        assert run_all.main(["--verify", str(folder)]) == 0
        printed = capsys.readouterr().out
        assert "143 of 263" in printed and "221 of 240" in printed


def test_verify_of_a_folder_that_is_not_there_is_an_error(tmp_path, capsys):
    assert run_all.main(["--verify", str(tmp_path / "misspelt")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_verify_of_a_folder_without_runs_is_an_error(tmp_path, capsys):
    assert run_all.main(["--verify", str(tmp_path)]) == 1
    assert "run_" in capsys.readouterr().err


# --- names and terminals ----------------------------------------------------------------------------------------------

NOBODY = (
    "import pwd, sys\n"
    "def unknown(number): raise KeyError(f'getpwuid(): uid not found: {number}')\n"
    "pwd.getpwuid = unknown\n"
    "import run_all\n"
    "sys.exit(run_all.main(sys.argv[1:]))\n"
)


def run_python(code, *argv, **environment):
    """A driver's process; a variable that is None is not set in it."""
    kept = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    return subprocess.run([sys.executable, "-c", code, *argv], cwd=PROJECT_ROOT, env=kept, capture_output=True)


@pytest.mark.parametrize("command", [["--list"], ["--presets", "nope"], ["--verify", "tests"], ["--report-only"]])
def test_a_user_without_an_account_and_a_home_gets_the_same(tmp_path, command):
    command = [*command, "--output-dir", str(tmp_path)]
    nobody = run_python(NOBODY, *command, HOME=None, USER=None, LOGNAME=None)
    somebody = run_python("import run_all, sys; sys.exit(run_all.main(sys.argv[1:]))", *command)
    assert (nobody.returncode, b"Traceback" in nobody.stderr) == (somebody.returncode, False), nobody.stderr
    assert nobody.stdout == somebody.stdout


def test_a_user_without_a_home_has_one_for_the_libraries_and_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    environment.ensure_home()
    assert Path(os.environ["HOME"]).parent == tmp_path
    assert f"libraries keep their files in {os.environ['HOME']}" in capsys.readouterr().err
    environment.ensure_home()
    assert capsys.readouterr().err == ""


def test_kernels_import_this_checkout_wherever_the_environment_leads(tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "__init__.py").touch()
    code = (
        "import subprocess, sys; from lib.driver import environment; environment.set_kernel_environment(offline=True)\n"
        "subprocess.run([sys.executable, '-P', '-c', 'import lib; print(lib.__file__)'], cwd='/', check=True)"
    )
    done = run_python(code, PYTHONPATH=str(tmp_path))
    assert done.stdout.decode().strip() == str(PROJECT_ROOT / "lib" / "__init__.py"), done.stderr


@pytest.fixture
def dashed(tmp_path):
    """A folder with a preset whose description has letters of many alphabets."""
    text = (PROJECT_ROOT / "params" / "sandbox_one.yaml").read_text(encoding="utf-8")
    text = re.sub(r"^description: .*$", 'description: "a dash \u2013 and \u6f22"', text, flags=re.MULTILINE)
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "dashed.yaml").write_text(text, encoding="utf-8")
    return tmp_path / "params"


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"PYTHONIOENCODING": "latin-1"}, b"dashed: a dash ? and ?"),
        ({"PYTHONIOENCODING": "ascii:strict"}, b"dashed: a dash ? and ?"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, b"dashed: a dash ? and ?"),
        ({"PYTHONIOENCODING": "utf-8"}, "dashed: a dash \u2013 and \u6f22".encode()),
    ],
)
def test_a_terminal_without_a_letter_shows_a_question_mark(dashed, environment, shown):
    code = "import run_all, sys; sys.exit(run_all.main(sys.argv[1:]))"
    done = run_python(code, "--list", "--params-dir", str(dashed), **environment)
    assert done.returncode == 0 and shown in done.stdout, done.stderr
    # On standard error and through argparse too.
    assert run_python(code, "--nope\u2013", **environment).stderr.startswith(b"run_all.py: unrecognized arguments")


def test_closed_and_full_outputs_end_nothing():
    code = "import run_all, sys; sys.exit(run_all.main(['--list', '--presets', 'sandbox_one']))"
    for redirect, shown in ((">&-", b""), (">&- 2>&-", b""), (">/dev/full", b"No space left on device): what follows")):
        command = f"exec '{sys.executable}' -c \"{code}\" {redirect}"
        done = subprocess.run(["sh", "-c", command], cwd=PROJECT_ROOT, capture_output=True)
        assert done.returncode == 0 and shown in done.stderr, redirect
        assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("flag", ["--output-dir", "--assets", "--params-dir", "--verify", "--checkpoint"])
def test_a_name_that_is_not_utf8_is_refused_in_a_sentence(tmp_path, capsys, flag):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    assert run_all.main(["--presets", "simple", flag, str(folder)]) == 2
    shown = capsys.readouterr().err
    assert "caf\\udce9: this name is not UTF-8; rename it" in shown and not list(folder.iterdir())


def test_a_working_directory_that_is_not_utf8_is_refused_in_a_sentence(tmp_path, monkeypatch, capsys):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert run_all.main(["--list"]) == 2 and "not UTF-8" in capsys.readouterr().err
