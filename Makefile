# The two commands are `make demo` and `make test`; each sets up what it needs in .venv first.
# PYTHON=/path/to/python3.13 picks an interpreter; by default the first of 3.11 or later is taken.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
PYTEST := $(BIN)/python -m pytest
JOBS ?= 2

.PHONY: help demo test lint docs proof fuzz bench clean

help:
	@echo 'make demo    watch the detached-header hotplug sequence run against a live daemon'
	@echo 'make test    the whole gate: style, types, layers, schema, docs, tests'
	@echo 'make lint    the first part of the gate: style and types'
	@echo 'make docs    write docs/qmp-reference.md, man pages and completions anew'
	@echo 'make proof   the long checks at their full count (SEED=N to repeat them); writes proof/NAME.json'
	@echo 'make fuzz    LUKS headers under atheris, for SECONDS=600'
	@echo 'make bench   speed beside QEMU and nbdkit (QUICK=1, ROWS=regex, SECONDS=0.4, ROUNDS=7); writes bench/results'
	@echo 'make clean   remove what the others made'

$(STAMP): requirements-dev.txt pyproject.toml setup.py $(wildcard qmpd/*/_*_build.py)
	@python=$$(tests/support/find-python $(PYTHON)); \
	echo "Setting up $(VENV) with $$($$python --version)"; \
	[ -x $(BIN)/python ] || $$python -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps \
	    --config-settings editable_mode=compat -e .
	@touch $@

demo: $(STAMP)
	@$(BIN)/qmpd-ctl demo

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m qmpd.qapi.doc --check
	$(BIN)/python -m qmpd.manual --check
	$(PYTEST) -n $(JOBS) --dist worksteal -q

docs: $(STAMP)
	$(BIN)/python -m qmpd.qapi.doc
	$(BIN)/python -m qmpd.manual

proof: $(STAMP)
	QMPD_PROOF=full $(PYTEST) -m proof -n $(JOBS) --dist worksteal -q --timeout 3600 \
	    --hypothesis-seed=$(or $(SEED),$(shell date +%s))

fuzz: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check atheris==3.0.0
	$(BIN)/python -m tests.fuzz.guided_luks -max_total_time=$(or $(SECONDS),600)

bench: $(STAMP)
	$(BIN)/python -m bench $(if $(QUICK),--quick) $(if $(ROWS),--rows '$(ROWS)') \
	    $(if $(SECONDS),--seconds $(SECONDS)) $(if $(ROUNDS),--rounds $(ROUNDS))

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis qmpd/*/_*.so
