# Every target does its own set-up: nothing but Python 3.11+ with venv, git and make need be there.

# The Python that .venv is made with; found by tools/find-python where none is named.
PYTHON ?=
export PYTHON
# For `fleet demo`: make demo ARGS=--keep
ARGS ?=
# For pytest: make test PYTEST_ARGS="-k lease -n 2"
PYTEST_ARGS ?=

BIN := .venv/bin
SETUP := pyproject.toml constraints.txt tools/set-up tools/find-python

.PHONY: help demo test check lint types layers tests bench format pins clean
# Steps print one after the other, and share one environment.
.NOTPARALLEL:

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*  ## /\1\t/p' Makefile

demo: .venv/.ready-run  ## the whole thing on this machine: Redis, hosts over SSH, workers, jobs
	@$(BIN)/fleet demo $(ARGS)

test: .venv/.ready-test  ## everything CI runs: lint, types, layers, all tests
	@sh tools/test-prerequisites
	@$(MAKE) --no-print-directory lint types layers tests

check: lint types layers  ## the quick part of `make test`

lint: .venv/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.ready-test
	$(BIN)/mypy
	$(BIN)/mypy tools/*.py tests/conftest.py

layers: .venv/.ready-test
	$(BIN)/lint-imports --no-logo

# Last, so that the closing line is pytest's own count.
tests: .venv/.ready-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: .venv/.ready-test  ## figures beside the peers'; not tests
	$(BIN)/python -m benchmarks.commands

format: .venv/.ready-test  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pins: .venv/.ready-run  ## write constraints.txt anew: make pins PYTHONS="python3.11 python3.13"
	$(BIN)/python tools/pin.py $(PYTHONS)

clean:  ## remove the environment and every cache
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

.venv/.ready-run: $(SETUP)
	@sh tools/set-up run

.venv/.ready-test: $(SETUP)
	@sh tools/set-up test
