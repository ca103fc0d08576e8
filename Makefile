# `make demo` draws a picture, `make test` runs the tests. Everything is installed into $(VENV), once;
# a stamp in it is redone when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
PROMPT := a large red circle above a small blue square on a white background

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format bench bench-all clean
.DELETE_ON_ERROR:

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-9s  %s\n", $$1, $$2}'

install: $(VENV)/.floyd  ## the package and its command, into $(VENV)

demo: $(VENV)/.floyd  ## draw demo.png with the built-in checkpoint, offline
	HF_HUB_OFFLINE=1 $(VENV)/bin/floyd generate "$(PROMPT)" -o demo.png --seed 0

test: $(VENV)/.test  ## the fast tests (PYTEST_ARGS="-m slow" for the others)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) $(PYTEST_ARGS)

lint: $(VENV)/.lint  ## ruff and mypy, changing nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.lint  ## ruff, mending what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# What fills the CPU's tables of docs/speed.md, in less than 20 minutes on two cores; the others take hours or a GPU.
SPEED := cpu cascade batches start parity command
bench: $(VENV)/.test  ## floyd's speed on the CPU beside the incumbent's, into benchmarks/results/
	@set -e; for name in $(SPEED); do echo "== bench_$$name"; $(PY) benchmarks/bench_$$name.py; done
	$(PY) benchmarks/ladder.py
	$(PY) benchmarks/tables.py

BENCHMARKS := $(sort $(wildcard benchmarks/bench_*.py))
bench-all: $(VENV)/.test  ## every benchmarks/bench_*.py, in hours
	@set -e; for script in $(filter-out %gpu.py %gpu_memory.py,$(BENCHMARKS)); do echo "== $$script"; $(PY) $$script; done

clean:  ## remove the environment and everything made
	rm -rf $(VENV) build dist demo.png .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "floyd needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# torch alone and first, with its pin: a range resolved among the other packages may fetch another, far larger build.
$(VENV)/.torch: constraints.txt | $(PY)
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.floyd: pyproject.toml constraints.txt $(VENV)/.torch
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.test $(VENV)/.lint: $(VENV)/.%: pyproject.toml constraints.txt $(VENV)/.torch
	$(INSTALL) --editable ".[$*]"
	@touch $@
