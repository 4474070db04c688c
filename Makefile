# Every target works on a fresh machine: it makes its virtual environment first.
#
#   PYTHON   the interpreter to make it with (3.11 or newer)
#   VENV     where it lies
#   TORCH    which torch goes into it, for instance TORCH=torch==2.14.1 where a GPU wants another one

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all test-fake lint types fmt golden bench wheel check clean

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check --no-input
STAMP   := $(VENV)/.installed
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
WORKERS := -n logical --maxprocesses 4
GOLDENS  = tests/test_readme.py $(shell grep -rlE 'check_golden|UPDATE_GOLDEN' tests --include='test_*.py')

help:                ## show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

venv: $(STAMP)       ## make .venv with the package and everything its tests need

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"$(PYTHON) is Python {v[0]}.{v[1]}; 3.11 or newer is needed: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) ($(TORCH) first; some minutes the first time)"
	@# a torch with CUDA brings its own Triton
	@{ echo "$(TORCH)"; grep -v -e '^torch==' -e '^triton==' constraints.txt; } > $(VENV)/constraints.txt
	@$(PIP) install -qq --progress-bar off -c $(VENV)/constraints.txt "$(TORCH)"
	@$(PIP) install -qq --progress-bar off -c $(VENV)/constraints.txt -e '.[dev,demo]'
	@touch $@

demo: $(STAMP)       ## quantize a real model, load the result, compare perplexities (minutes)
	@$(BIN)/python scripts/demo.py

test: $(STAMP)       ## the tests
	@$(PYTEST) $(WORKERS) -m 'not slow and not gpu and not network'

test-all: $(STAMP)   ## the tests, slow ones included
	@$(PYTEST) $(WORKERS) -m 'not gpu and not network'

test-fake: $(STAMP)  ## the accelerator tests on a make-believe CUDA, built with g++ in seconds
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.fakecuda $(WORKERS)

lint: $(STAMP)       ## ruff: rules, floors, format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(STAMP)      ## mypy --strict on the package
	@$(BIN)/mypy

fmt: $(STAMP)        ## let ruff put the format right, and what rules it can
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

golden: $(STAMP)     ## write the golden files and the generated parts of the docs anew; review the diff
	@UPDATE_GOLDEN=1 $(PYTEST) -q -m 'not slow and not gpu and not network' $(GOLDENS)
	@git status --short tests/golden README.md docs

bench: $(STAMP)      ## time `gptq quantize` on the demo model; the last line is JSON
	@$(BIN)/python scripts/bench_quantize.py

wheel: $(STAMP)      ## build dist/*.whl and dist/*.tar.gz
	@$(BIN)/python -m build --no-isolation

check:               ## what CI runs: lint, types, tests, make-believe CUDA, in an environment of its own
	@rm -rf .venv-check
	@$(MAKE) VENV=.venv-check lint
	@$(MAKE) VENV=.venv-check types
	@$(MAKE) VENV=.venv-check test
	@$(MAKE) VENV=.venv-check test-fake

clean:               ## remove caches, environments and what the demo wrote
	@rm -rf .venv .venv-* demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .fakecuda_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
