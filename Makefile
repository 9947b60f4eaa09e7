# Every target does its own set-up: nothing but Python 3.11+ with venv, git and make need be there.

# The Python that .venv is made with; found by tools/find-python where none is named.
PYTHON ?=
export PYTHON
# For `fleet demo`: make demo ARGS=--keep
ARGS ?=
# For pytest: make test PYTEST_ARGS="-k lease"; -n 0 runs them one after the other
PYTEST_ARGS ?=

# For the benchmarks: make bench BENCH_ARGS="noops --peers huey,saq", or BENCH_ARGS=--quick
BENCH_ARGS ?=

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
	$(BIN)/mypy tools/*.py tests/conftest.py benchmarks

layers: .venv/.ready-test
	$(BIN)/lint-imports --no-logo

# Last, so that the closing line is pytest's own count. Twice as many processes as cores: most tests wait for most of
# their time, for processes, leases and hosts.
tests: .venv/.ready-test
	$(BIN)/python -m pytest -n $$((2 * $$(getconf _NPROCESSORS_ONLN))) --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)

bench: .venv-bench/.ready-bench  ## figures beside the peers', some 15 minutes; not tests
	.venv-bench/bin/python -m benchmarks $(BENCH_ARGS)

format: .venv/.ready-test  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pins: .venv/.ready-run  ## write both constraints.txt anew: make pins PYTHONS="python3.11 python3.13"
	$(BIN)/python tools/pin.py $(PYTHONS)

clean:  ## remove the environment and every cache
	rm -rf .venv .venv-bench build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

.venv/.ready-run: $(SETUP)
	@sh tools/set-up run

.venv/.ready-test: $(SETUP)
	@sh tools/set-up test

.venv-bench/.ready-bench: $(SETUP) benchmarks/constraints.txt
	@sh tools/set-up bench
