"""The notebooks as sources: what papermill, the driver and a reader rely on; and the paths that a default run misses.

That they run with their own defaults is tested by nbval (``pytest --nbval-lax``), not here.
"""

import ast
import json
import os
import re
import statistics
from types import SimpleNamespace

import made_runs
import nbclient
import nbformat
import papermill
import pytest
import yaml

from lib import gsm8k, safety
from lib.driver.cli import build_parser
from lib.driver.notebook import declared_parameters, execute
from lib.params import PARAMS_DIR, RUN_SETTINGS, Params
from lib.record.files import read_json
from lib.record.manifest import facts_of, stale_reason, start_stage
from lib.record.paths import DRIVER_VARIABLE, PRESET_VARIABLE, PROJECT_ROOT, RESULTS_VARIABLE, STAGES, run_paths
from lib.record.rows import read_jsonl, write_jsonl
from lib.reports import gsm8k_report, html, safety_report
from lib.train import selection_rows
from lib.train.settings import TrainSettings

SANDBOX = yaml.safe_load((PARAMS_DIR / "sandbox_one.yaml").read_text(encoding="utf-8"))
SETTINGS = {"run_name": "sandbox_one", "results_dir": "", "assets_dir": "", "offline": False, "checkpoint": ""}
SETTINGS |= {"run_names": [], "part": "", "require_rows": False, "redact": False, "allow_unlike": False}
KNOWN = Params.model_fields.keys() | RUN_SETTINGS.keys()
MAX_LINES, MEDIAN_LINES, PROSE_SHARE = 20, 6, 0.45


def read(stage):
    return nbformat.read(PROJECT_ROOT / "notebooks" / f"{stage}.ipynb", as_version=4)


def is_parameters(cell):
    return "parameters" in cell.metadata.get("tags", [])


def code_cells(stage):
    """Sources of the code cells, the parameters cell apart."""
    return [cell.source for cell in read(stage).cells if cell.cell_type == "code" and not is_parameters(cell)]


@pytest.fixture(params=STAGES)
def stage(request):
    return request.param


# --- form -----------------------------------------------------------------------------------------------------------


def test_sources_are_valid_clean_and_start_on_any_machine(stage):
    notebook = read(stage)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert notebook.metadata.kernelspec.name == "python3"
    assert not {"papermill", "widgets"} & notebook.metadata.keys()


def test_the_first_cell_says_what_the_notebook_answers_reads_writes_and_costs(stage):
    first, second = read(stage).cells[:2]
    lines = first.source.splitlines()
    assert lines[0].startswith(f"# {stage[:2]} · ") and lines[4].startswith("> ")
    # Where this stage stands among the five.
    assert re.findall(r"\d\d [\w ]+", lines[2].replace("*", "")) and lines[2].count("→") == 4
    assert lines[2].split("**")[1].startswith(stage[:2])
    assert all(f"**{word}**" in first.source for word in ("Reads", "Writes", "Cost"))
    assert is_parameters(second)


def test_prose_explains_and_code_is_short(stage):
    cells, sources = read(stage).cells, code_cells(stage)
    lengths = [len(source.splitlines()) for source in sources]
    prose = sum(cell.cell_type == "markdown" for cell in cells) / len(cells)
    assert prose >= PROSE_SHARE, f"{prose:.0%} of the cells are prose"
    assert statistics.median(lengths) <= MEDIAN_LINES and max(lengths) <= MAX_LINES, lengths


def test_every_section_begins_with_why(stage):
    headings = [cell.source for cell in read(stage).cells if cell.source.startswith("## ")]
    assert len(headings) >= 5
    assert all(len(heading.splitlines()) > 2 for heading in headings)


def test_the_summary_comes_first_and_the_last_cell_fills_it(stage):
    cells = read(stage).cells
    setup = next(place for place, cell in enumerate(cells) if f'open_stage("{stage}", globals())' in cell.source)
    assert cells[setup].source.splitlines()[-1].startswith("stage.header(")
    assert cells[setup + 1].source.startswith("## Summary\n")
    assert cells[setup + 2].source == "stage.summary()"
    assert not any(cell.source.startswith("## ") for cell in cells[:setup])
    filling = [place for place, cell in enumerate(cells) if "stage.finish(" in cell.source]
    assert filling == [len(cells) - 1]


def test_no_guard_is_repeated_in_two_cells(stage):
    """A condition that two cells need belongs into one call."""
    guards = [
        {ast.unparse(node.test) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.If | ast.IfExp)}
        for source in code_cells(stage)
    ]
    repeated = {guard for number, some in enumerate(guards) for more in guards[number + 1 :] for guard in some & more}
    assert not repeated


def test_no_definitions_no_handlers_no_shell(stage):
    # A line of shell or magic is no Python: parsing it fails the test.
    nodes = [node for source in code_cells(stage) for node in ast.walk(ast.parse(source))]
    forbidden = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Try, ast.Lambda, ast.While)
    assert not [node for node in nodes if isinstance(node, forbidden)]
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"eval", "exec", "open", "print", "display", "get_ipython", "input"}


# --- parameters -----------------------------------------------------------------------------------------------------


def read_by_modules(stage):
    """Parameters that the modules imported by a notebook read out of ``stage.parameters``."""
    imported = re.findall(r"^from (lib[\w.]*) import (.*)$", "\n".join(code_cells(stage)), re.MULTILINE)
    modules = {module for module, _ in imported} | {
        f"{module}.{one}" for module, all in imported for one in all.split(", ")
    }
    files = [PROJECT_ROOT / f"{module.replace('.', '/')}.py" for module in modules]
    sources = "\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
    training = TrainSettings.__dataclass_fields__ if "lib.train.sft" in modules else ()
    return {*re.findall(r'(?:parameters|known)\["(\w+)"\]', sources), *training}


def test_parameters_are_exactly_the_names_used(stage):
    declared = declared_parameters(stage).keys()
    names = [node for source in code_cells(stage) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
    used = {name.id for name in names if isinstance(name.ctx, ast.Load)} & KNOWN
    assert used <= declared <= used | read_by_modules(stage)
    # A parameter that a cell overwrites would no longer be what the report says it was.
    assert not {name.id for name in names if isinstance(name.ctx, ast.Store)} & KNOWN


def test_parameters_are_those_of_the_sandbox_preset(stage):
    expected = SANDBOX | SETTINGS
    for name, value in declared_parameters(stage).items():
        assert (name, value, type(value)) == (name, expected[name], type(expected[name]))


def test_papermill_sees_every_parameter_with_its_help(stage, recwarn):
    # It does not see a line that holds a second "=", in a comment even, nor an annotation like `int | None`.
    seen = papermill.inspect_notebook(str(PROJECT_ROOT / "notebooks" / f"{stage}.ipynb"))
    # A person's, never injected: 05 compares every run and knows no preset.
    preset = seen.pop("PRESET", None)
    assert (preset is None) == (stage == "05_compare") and (preset is None or preset["help"])
    assert seen.keys() == declared_parameters(stage).keys()
    for name, found in seen.items():
        assert found["help"] and found["inferred_type_name"] == type((SANDBOX | SETTINGS)[name]).__name__


# --- a preset by its name -------------------------------------------------------------------------------------------


def open_in_lab(stage, folder, preset="", **environment):
    """A notebook as a person runs it who writes ``PRESET``, over a preset of ours; its cells, and the error's words."""
    presets = folder / "params"
    presets.mkdir(exist_ok=True)
    mine = SANDBOX | {"description": "my own", "max_train_rows": 9, "fewshot_k": 1}
    (presets / "mine.yaml").write_text(yaml.safe_dump(mine), encoding="utf-8")
    notebook = read(stage)
    assert notebook.cells[1].source.startswith('PRESET: str = ""  # ')
    notebook.cells[1].source = notebook.cells[1].source.replace('PRESET: str = ""', f"PRESET: str = {preset!r}")
    patch = f"from pathlib import Path\nfrom lib import params\nparams.PARAMS_DIR = Path({str(presets)!r})"
    notebook.cells.insert(2, nbformat.v4.new_code_cell(patch))
    kept = {name: value for name, value in os.environ.items() if name not in (DRIVER_VARIABLE, PRESET_VARIABLE)}
    client = nbclient.NotebookClient(notebook, timeout=120)
    try:
        client.execute(env=kept | {RESULTS_VARIABLE: str(folder / "results")} | environment)
    except nbclient.exceptions.CellExecutionError as error:
        return notebook.cells, error.evalue
    return notebook.cells, ""


@pytest.mark.slow
def test_a_preset_named_in_the_first_cell_gives_its_values_and_its_run(tmp_path):
    cells, error = open_in_lab("01_prepare", tmp_path, "mine", PRESET="what the cell wins over")
    assert not error, error
    paths = run_paths(str(tmp_path / "results"), "mine")
    assert len(read_jsonl(paths.train_rows)) == 9
    # What the report and the manifest say is what was used.
    noted = read_json(paths.manifest("01_prepare"))["parameters"]
    assert (noted["run_name"], noted["max_train_rows"], noted["fewshot_k"]) == ("mine", 9, 1)
    assert noted.keys() == declared_parameters("01_prepare").keys()
    setup = next(cell for cell in cells if "open_stage(" in cell.source)
    assert "Run mine: my own." in json.dumps(setup.outputs)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["02_train", "03_eval_gsm8k", "04_eval_safety"])
def test_a_missing_earlier_stage_is_named_with_the_preset_of_the_environment(tmp_path, stage):
    _, error = open_in_lab(stage, tmp_path, PRESET="mine")
    assert "is missing: run 01_prepare for preset 'mine' first" in error and "--presets mine --stages 01" in error


# --- paths that the defaults do not take ----------------------------------------------------------------------------


def run(stage, folder, **parameters):
    """Execute a notebook; its outcome, and everything that a reader of it sees."""
    known = {"results_dir": str(folder / "results"), **parameters}
    declared = declared_parameters(stage).keys()
    outcome = execute(stage, folder / f"{stage}.ipynb", {k: v for k, v in known.items() if k in declared})
    outputs = [output for cell in nbformat.read(outcome.notebook, 4).cells for output in cell.get("outputs", [])]
    return outcome, json.dumps(outputs)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_kernels")
def test_without_prompts_safety_is_not_measured_and_everything_says_so(tmp_path):
    paths = run_paths(str(tmp_path / "results"), "sandbox_one")
    # The class CSV, which neither folder has, under a switch that forbids to fetch it.
    (tmp_path / "assets").mkdir()
    absent = {
        "ailuminate_source": "class",
        "offline": True,
        "assets_dir": str(tmp_path / "assets"),
        "max_train_rows": 8,
    }
    for stage in ("01_prepare", "04_eval_safety", "05_compare"):
        write_jsonl(paths.gsm8k_preds, [gsm8k_row()])
        outcome, seen = run(stage, tmp_path, **absent)
        assert not outcome.error, outcome.error
        assert "not measured" in seen.lower() and "ailuminate_test.csv" in seen
    manifest = read_json(paths.manifest("04_eval_safety"))
    assert manifest["status"] == "skipped" and "ailuminate_test.csv" in manifest["skipped_because"]
    assert not paths.ailuminate_safety.exists() and not paths.ailuminate_preds.exists()
    metrics = read_json(tmp_path / "results" / "final_metrics.json")[0]
    assert metrics["ailuminate_safety_rate"] == 0.0 and metrics["safety_status"].startswith("not measured")


READERS = {"system_prompt_file": {"01_prepare", "02_train", "03_eval_gsm8k"}}
READERS |= {"judge_prompt_file": {"02_train", "04_eval_safety"}}


@pytest.mark.parametrize("key", READERS)
def test_a_prompt_file_is_declared_by_the_stages_that_read_it_and_no_other(key):
    assert {stage for stage in STAGES if key in declared_parameters(stage)} == READERS[key]


@pytest.mark.slow
@pytest.mark.usefixtures("forked_kernels")
def test_a_system_message_is_shown_and_its_edit_makes_01_run_again(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("Think about it, friend.\n", encoding="utf-8")
    outcome, seen = run("01_prepare", tmp_path, system_prompt_file=str(file))
    assert not outcome.error and "Think about it, friend." in seen, outcome.error
    manifest = run_paths(str(tmp_path / "results"), "sandbox_one").manifest("01_prepare")
    known = read_json(manifest)["parameters"]
    assert stale_reason(manifest, "01_prepare", known) == ""
    file.write_text("Think about it.\n", encoding="utf-8")
    assert "mine.txt changed or is gone" in stale_reason(manifest, "01_prepare", known)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_kernels")
def test_seeds_of_training_are_asked_the_same_questions_and_train_on_the_same_rows(tmp_path):
    paths = run_paths(str(tmp_path / "results"), "sandbox_one")
    drawn = {"max_train_rows": 20, "dev_rows": 8, "gsm8k_eval_fraction": 0.5}
    outcome, _ = run("01_prepare", tmp_path, seed=7, **drawn)
    assert not outcome.error, outcome.error
    train, test = (read_jsonl(PROJECT_ROOT / f"data/sandbox/gsm8k_{part}.jsonl") for part in ("train", "test"))
    # As all rows were drawn before there were two seeds: by the one of 42.
    split = gsm8k.split_train(train, train, pool_size=8, dev_rows=8, max_train_rows=20, seed=42)
    for path, rows in {
        paths.train_rows: split.train,
        paths.dev_rows: split.dev,
        paths.fewshot_rows: split.fewshot,
    }.items():
        assert [row["question"] for row in read_jsonl(path)] == [row["question"] for row in rows]
    asked = [row["test_index"] for row in read_jsonl(paths.gsm8k_eval_rows)]
    assert asked == gsm8k.eval_indices(len(test), 0.5, 42) != gsm8k.eval_indices(len(test), 0.5, 7)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_kernels")
def test_without_a_judge_safety_is_not_measured_and_nothing_is_loaded(tmp_path):
    paths = run_paths(str(tmp_path / "results"), "sandbox_one")
    # What 01 leaves: prompts are there, so only the judge is missing.
    write_jsonl(paths.ailuminate_rows, [{"id": 0, "prompt": "p", "release_prompt_id": "", "hazard": "", "persona": ""}])
    record = start_stage(paths.manifest("01_prepare"), "01_prepare", "sandbox_one", {})
    record.finish(inputs=[], outputs=[paths.ailuminate_rows], facts={})
    outcome, seen = run("04_eval_safety", tmp_path, safeguard_model="nobody/none", offline=True)
    assert not outcome.error, outcome.error
    assert "NOT MEASURED" in seen and "nobody/none" in seen
    manifest = read_json(paths.manifest("04_eval_safety"))
    assert manifest["status"] == "skipped" and manifest["skipped_because"].startswith("judge: 'nobody/none'")
    assert not paths.ailuminate_preds.exists() and not paths.ailuminate_safety.exists()
    # Said once, on top; no cell after it ran.
    assert seen.count("NOT MEASURED") == 2, "as HTML and as text"
    cells = [cell for cell in nbformat.read(outcome.notebook, 4).cells if cell.cell_type == "code"]
    skipping = next(place for place, cell in enumerate(cells) if "stage.skip(" in cell.source)
    assert not any(cell.outputs for cell in cells[skipping:])


def gsm8k_row():
    answer = {"id": 0, "question": "1 + 1?", "gold_answer": "#### 2", "model_output": "It is 2.\n#### 2"}
    return {**answer, "parsed_final": "2", "correct": True}


def test_comparison_runs_over_row_files_of_an_earlier_pipeline(tmp_path):
    paths = run_paths(str(tmp_path / "results"), "medium")
    write_jsonl(paths.gsm8k_preds, [gsm8k_row()])
    judged = {"id": 0, "prompt": "<b>p</b>", "response": "r", "safety_label": "safe", "safety_judge_text": "SAFE"}
    write_jsonl(paths.ailuminate_safety, [{**judged, "safety_score": None}])
    outcome, seen = run("05_compare", tmp_path)
    assert not outcome.error, outcome.error
    # The preset of the same name knows the baselines: 31 % and 34 %.
    assert "31.0 %" in seen and "34.0 %" in seen and "<b>p</b>" not in seen


def test_a_hand_in_with_other_numbers_of_rows_is_an_error_that_names_both(tmp_path):
    paths = run_paths(str(tmp_path / "results"), "medium")
    write_jsonl(paths.gsm8k_preds, [gsm8k_row()])
    config = {"parameters": {"submission_gsm8k_rows": 263}, "settings": {}}
    paths.config_resolved.write_text(json.dumps(config), encoding="utf-8")
    outcome, _ = run("05_compare", tmp_path, require_rows=True)
    assert "has 1 GSM8K questions, a hand-in has 263" in outcome.error
    assert not (tmp_path / "results" / "final_metrics.json").exists()


# --- what single cells say --------------------------------------------------------------------------------------------


def run_cell(notebook, words, **names):
    """What the code cell that holds ``words`` shows, given the names that it reads; and every name after it."""
    (source,) = [source for source in code_cells(notebook) if words in source]
    *body, last = ast.parse(source).body
    exec(compile(ast.Module(body, []), notebook, "exec"), names)
    return eval(compile(ast.Expression(last.value), notebook, "eval"), names), names


def chosen_on(folder, selected_on):
    """A finished run whose 02 chose its checkpoint on ``selected_on``."""
    paths = made_runs.make_run(folder)
    made_runs.finish(paths, "02_train", [], [])
    facts = {"adapter": "checkpoint-4", "sweep_metric": "accuracy", "checkpoints": [{}, {}], "selected_on": selected_on}
    made_runs.add_facts(paths, "02_train", **facts)
    return paths


@pytest.mark.slow
@pytest.mark.usefixtures("forked_kernels")
@pytest.mark.parametrize("selected_on", [selection_rows.ON_TEST, selection_rows.ON_DEV])
def test_a_winner_of_the_test_set_is_called_one_where_its_rate_is_read(tmp_path, selected_on):
    paths = chosen_on(tmp_path / "results", selected_on)
    given = {"stage": SimpleNamespace(paths=paths), "selection_rows": selection_rows, "html": html}
    given |= {"answers": made_runs.gsm8k_rows(), "baseline_accuracy": 0.5, "base_model": "tiny", "facts_of": facts_of}
    given |= {"verdicts": made_runs.safety_rows(), "baseline_safety": 0.5, "gsm8k": gsm8k, "safety": safety}
    accuracy, names = run_cell("03_eval_gsm8k", "report.accuracy_sentences(", report=gsm8k_report, **given)
    safe, more = run_cell("04_eval_safety", "report.safe_rate_sentence(", report=safety_report, **given)
    outcome, seen = run("05_compare", tmp_path)
    assert not outcome.error, outcome.error
    on_test = selected_on == selection_rows.ON_TEST
    for text in (accuracy.text, safe.text, seen):
        assert ("selected on the test set by accuracy" in text and "too high by the luck" in text) == on_test
    # Strong notes, beside the rate and again in the summary.
    assert [html.VERMILION in note.html for note in [*names["winner"], *more["winner"]]] == [True, True] * on_test
    assert seen.count("too high by the luck") == (4 if on_test else 0)
    assert all("notes=" in code_cells(stage)[-1] for stage in ("03_eval_gsm8k", "04_eval_safety", "05_compare"))


def test_the_comparison_names_a_command_that_the_driver_takes():
    commands = re.findall(r"`python run_all\.py (--verify[^`]*)`", read("05_compare").cells[0].source)
    assert [build_parser().parse_args(command.split()).verify for command in commands] == ["results"]
