# make demo: a generated requirement in one command | make test: what CI runs | make check: lint and types
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench clean

demo: $(VENV)/.demo
	$(BIN)/minigpt generate

test: check
	$(BIN)/python -m pytest
	MINIGPT_BACKEND=numpy $(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python -m pytest benchmarks --benchmark-only

# pyproject.toml is the only input: editing the code needs no new installation
$(VENV)/.demo: pyproject.toml | $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.demo

$(VENV):
	$(PYTHON) -m venv $@

clean:
	rm -rf $(VENV) build dist *.egg-info
