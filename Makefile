# One way in, the same for people and for CI. Everything runs on CPU.
#   make demo     a web page and an API at http://127.0.0.1:8000, from nothing
#   make test     the whole test suite

PYTHON ?= python3
PORT ?= 8000
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo serve check test bench docs model clean

help:
	@sed -n 's/^#   //p' $(MAKEFILE_LIST); echo "also: setup serve check bench docs model clean"

KERNELS := setup.py $(wildcard src/gemel/ops/cpu/*.cpp src/gemel/ops/cpu/*.h)

# Stamp files make the second run free. Serving needs less than developing does, so the demo installs less.
$(VENV)/installed-serving: pyproject.toml constraints.txt $(KERNELS)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"gemel needs Python 3.11 or newer, {sys.executable} is {v.major}.{v.minor}: make PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), and compiling the CPU kernels (once)"
	@$(INSTALL) -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed-serving
	@echo "installing development tools into $(VENV) (once)"
	@$(INSTALL) -e '.[dev]'
	@touch $@

setup: $(VENV)/installed-dev

model: $(VENV)/installed-serving
	@$(BIN)/gemel pull

demo serve: model
	@$(BIN)/gemel serve --port $(PORT) $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/generate_docs --check

test: setup model
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

bench: model
	$(BIN)/gemel bench $(or $(ARGS),throughput)

docs: setup
	$(BIN)/python scripts/generate_docs

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist src/*.egg-info
