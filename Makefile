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

PY := $(VENV)/bin/python
TYPES := build/types

.PHONY: setup test lint train clean

setup:
	@scripts/setup.sh $(VENV) constraints/torch-$(TORCH).txt

test: lint
	$(PY) -m pytest

# mypy does not know setup.cfg's package_dir: the links show it the packages as they are installed.
lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/convneur
	@ln -s $(CURDIR)/convneur/* $(CURDIR)/data $(CURDIR)/launch $(TYPES)/convneur/
	cd $(TYPES) && $(abspath $(PY)) -m mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p convneur

train: setup
	$(VENV)/bin/convneur prepare digits --out datasets/digits
	$(VENV)/bin/convneur train --config configs/digits.yaml --launch local --nproc 2 --resume auto

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
