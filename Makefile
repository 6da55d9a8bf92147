# Every recipe sets up what it needs with python3 and pip alone; installed once, none needs a network.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Real clients want other versions of our libraries, and of each other's: an environment for each.
# They come uncompiled: most of their modules are never imported, and installing takes half as long.
APART := -m pip install --quiet --no-compile
CLIENTS := .venv-clients
CLIENTS_INSTALLED := $(patsubst %,$(CLIENTS)/%/.installed,tritonclient kserve mlflow schemathesis)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-clients test-services check format docs bench stubs clean

help:  ## list the recipes
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

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
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not alone"; others=$$?; \
	  $(BIN)/python -m pytest -m alone && exit $$others
endif

test-clients: $(INSTALLED) $(CLIENTS_INSTALLED) perf-analyzer  ## real clients of other servers (ARGS=kserve for one)
	$(BIN)/python -m tests.clients $(ARGS)

$(CLIENTS)/%/.installed: tests/clients/requirements-%.txt
	@mkdir -p $(CLIENTS) && echo '*' > $(CLIENTS)/.gitignore
	$(PYTHON) -m venv --clear $(CLIENTS)/$*
	$(CLIENTS)/$*/bin/python $(APART) --no-deps --requirement $<
	@touch $@

# A program that runs on few machines: where it cannot be had, its part of test-clients is skipped.
.PHONY: perf-analyzer
perf-analyzer:
	@$(MAKE) --silent $(CLIENTS)/perf_analyzer/.installed || echo "perf_analyzer cannot be installed here"

$(CLIENTS)/perf_analyzer/.installed: tests/clients/requirements-perf_analyzer.txt
	@mkdir -p $(CLIENTS) && echo '*' > $(CLIENTS)/.gitignore
	$(PYTHON) -m venv --clear $(CLIENTS)/perf_analyzer
	$(CLIENTS)/perf_analyzer/bin/python $(APART) --no-deps --requirement $<
	cd $(CLIENTS)/perf_analyzer && apt-get -o APT::Sandbox::User=root download -qq libb64-0d && dpkg -x libb64-0d_*.deb debian
	@touch $@

SERVICES := .venv-services

READERS := .venv-readers
.PHONY: readers

test-services: $(SERVICES)/.installed readers  ## real PostgreSQL, Prometheus and readers of Parquet (ARGS=postgres for one)
	$(SERVICES)/bin/python -m tests.services $(ARGS)

$(SERVICES)/.installed: pyproject.toml constraints.txt tests/services/requirements.txt
	@test -x $(SERVICES)/bin/python || $(PYTHON) -m venv $(SERVICES)
	@echo '*' > $(SERVICES)/.gitignore
	$(SERVICES)/bin/python $(APART) --constraint constraints.txt \
	  --editable '.[dev,postgres,parquet]' --requirement tests/services/requirements.txt
	@touch $@

# Gigabytes that only read what is exported: where they cannot be had, that part is skipped.
readers:
	@for name in evidently nannyml; do $(MAKE) --silent $(READERS)/$$name/.installed || echo "$$name cannot be installed here"; done

$(READERS)/%/.installed: tests/services/requirements-%.txt
	@mkdir -p $(READERS) && echo '*' > $(READERS)/.gitignore
	$(PYTHON) -m venv --clear $(READERS)/$*
	$(READERS)/$*/bin/python $(APART) --no-deps --requirement $<
	@touch $@

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

# grpcio-tools wants a protobuf of its own choice, so it has an environment of its own.
STUBS := gateway/protocol/stubs

.venv-stubs/bin/python:
	$(PYTHON) -m venv .venv-stubs && echo '*' > .venv-stubs/.gitignore
	.venv-stubs/bin/python -m pip install --quiet grpcio-tools==1.85.1

stubs: .venv-stubs/bin/python  ## generate the protobuf messages from inference.proto
	.venv-stubs/bin/python -m grpc_tools.protoc -I $(STUBS) --python_out=$(STUBS) --pyi_out=$(STUBS) inference.proto

clean:  ## remove what the recipes made
	rm -rf $(VENV) .venv-stubs $(CLIENTS) $(SERVICES) $(READERS) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache dist
