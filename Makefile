# Every recipe sets up what it needs with python3 and pip alone; installed once, none needs a network.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test check format docs bench clean

help:  ## list the recipes
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "driftgate needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..."; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(INSTALLED)  ## create .venv and install

demo: $(INSTALLED)  ## replay a year of real flights and watch the drift (ARGS=--exit to end by itself)
	$(BIN)/driftgate demo $(ARGS)

test: $(INSTALLED)  ## all tests that need pip only (ARGS=tests/monitors for a part)
	$(BIN)/python -m pytest $(ARGS)

check: $(INSTALLED)  ## format, lint, types, import contract
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)  ## format and mend what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(INSTALLED)  ## run every command and code block of README and docs
	$(BIN)/python -m pytest tests/test_docs.py

bench: $(INSTALLED)  ## answer the benchmarks' questions (NAME=psi for one)
	$(BIN)/python -m bench $(NAME)

clean:  ## remove what the recipes made
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache dist
