# make setup   .venv with everything in it, at pinned versions (every other target does this first)
# make test    the whole test suite: lint, types, tests
# make train   trains on the embedded handwritten digits in two processes; continues where it stopped
# make lint    ruff and mypy only
# make clean   removes what was built; keeps .venv, datasets/ and runs/
#
# TORCH=2.11 takes the older torch stack (constraints/), VENV=path another environment, PYTHON=python3.12 another Python.
TORCH ?= 2.15
VENV ?= .venv
export PYTHON ?= python3

TYPES := build/types
# Commands run as in an activated environment.
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: setup test lint train clean

setup:
	@scripts/setup.sh $(VENV) constraints/torch-$(TORCH).txt

# Files of tests side by side, on a thread each: many of them start processes of their own.
test: lint
	@scripts/test_packages.sh
	OMP_NUM_THREADS=1 python -m pytest -n auto --maxprocesses 4 --dist loadfile

# mypy does not know setup.cfg's package_dir: the links show it the packages as they are installed.
lint: setup
	ruff check .
	ruff format --check .
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/convneur
	@ln -s $(CURDIR)/convneur/* $(CURDIR)/data $(CURDIR)/launch $(TYPES)/convneur/
	cd $(TYPES) && mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p convneur

train: setup
	convneur prepare digits --out datasets/digits
	convneur train --config configs/digits.yaml --launch local --nproc 2 --resume auto

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -prune -exec rm -rf {} +
