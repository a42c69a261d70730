# Two commands do everything: make demo, make test. Both make .venv first where it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# A CPU build of torch, if one is wanted: make test TORCH=torch==2.13.0
TORCH ?= torch==2.13.0
SOURCES = setup.py pyproject.toml $(wildcard csrc/*/*)

.PHONY: demo test lint types bench clean

demo: $(VENV)/.demo
	$(BIN)/python examples/multi_mnist.py

test: $(VENV)/.test
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

bench: $(VENV)/.test
	$(BIN)/python -m pytest benchmarks -s

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

$(VENV)/.demo $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: $(VENV)/.python $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	$(BIN)/python -m dbmtl_kernels --no-check
	touch $@

clean:
	rm -rf $(VENV) build dist out python/*.egg-info python/dbmtl_kernels/lib/*.so python/dbmtl_kernels/lib/*.dylib
