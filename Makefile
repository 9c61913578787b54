# Every target makes what it needs in .venv; nothing is written outside this folder.
#
#   make demo       set up, ask the bundled model about real proteins, then train small ones and evaluate them
#   make test       set up, run the tests (a pairwise cover of the big grids)
#   make test-all   every cell of every grid, and the slow tests
#   make check      lint, formatting, types, direction of imports
#   make docs       the documentation, into site/
#   make clean      remove what the other targets made, .venv included

PYTHON ?= python3
# Torch comes first and pinned: an unpinned torch fetches gigabytes of CUDA libraries on a machine without a GPU.
# For the CPU build elsewhere:  make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# The tests run in parallel processes; more threads in each would only take turns. Each process begins with a stretch of
# neighbouring tests, so that what they share is made once, and takes from another when it has none left.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

.PHONY: demo test test-all check docs clean
.DELETE_ON_ERROR:

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(PIP) --editable '.[tools]'
	touch $@

.venv/ready-test: .venv/ready
	$(PIP) --editable '.[test,check,docs]'
	touch $@

demo: .venv/ready
	$(BIN)/python examples/demo.py

test: .venv/ready-test
	$(PYTEST) -m "not slow"

test-all: .venv/ready-test
	$(PYTEST)

check: .venv/ready-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/pyright
	$(BIN)/pyright --project pyright-strict.json

docs: .venv/ready-test
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv build dist site demo runs .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
