# `make help` lists the targets. Each makes .venv first if it is missing or older than pyproject.toml.

# Python 3.11 and 3.12 run everything. On 3.13 the tests leave out MUTAG: it comes with grakel, which has no release for
# 3.13. The documentation's tools need 3.11.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$python && break; done)
# The oldest torch has no release for 3.13.
OLD_PYTHON ?= $(shell for python in python3.10 python3.11 python3.12 python3 python; do \
	$$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$python && break; done)

# A waiting thread lets others run. Otherwise two busy cores lose most of their time on small tensors.
export OMP_WAIT_POLICY ?= PASSIVE
PYTEST = -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-oldest test-middle wheel matrix speed tables docs linkcheck
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11, 3.12 or 3.13 on the PATH; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "== .venv is missing or older than pyproject.toml: installing everything ($$($(PYTHON) --version), a few minutes, 7 GB)"
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

demo: .venv/installed ## train three modalities, plain and with UnDiMix: a table and a picture (2 to 4 minutes)
	@echo "== demo: three modalities, plain and with UnDiMix, in their own toolkits' training loops"
	.venv/bin/python examples/demo.py

test: .venv/installed ## run ruff, mypy and all tests; every change must pass
	@echo "== ruff: format and lint"
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	@echo "== mypy: strict, core and adapters"
	.venv/bin/mypy
	@echo "== pytest: unit tests and every toolkit's own training loop, one process per core"
	OMP_NUM_THREADS=1 .venv/bin/python $(PYTEST)

.venv-%/installed: pyproject.toml constraints/%.txt
	@test -n "$(OLD_PYTHON)" || { echo "make: no Python 3.10, 3.11 or 3.12 on the PATH; name one: make OLD_PYTHON=/path/to/python3.10" >&2; exit 1; }
	@echo "== .venv-$* is missing or out of date: installing constraints/$*.txt ($$($(OLD_PYTHON) --version), several minutes, 7 GB)"
	$(OLD_PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints/$*.txt --editable ".[test]"
	@touch $@

test-oldest: .venv-oldest/installed ## run all tests with the oldest releases of torch and the toolkits (constraints/oldest.txt)
test-middle: .venv-middle/installed ## run all tests with releases in between (constraints/middle.txt)
test-oldest test-middle: test-%:
	@echo "== pytest: all tests, with constraints/$*.txt"
	OMP_NUM_THREADS=1 .venv-$*/bin/python $(PYTEST)

wheel: .venv/installed ## build the release, install it in an empty venv and train there (CONSTRAINT=FILE: with its versions)
	@echo "== wheel: build and check"
	rm -rf dist
	.venv/bin/python -m build --outdir dist
	.venv/bin/python -m twine check --strict dist/*
	@echo "== wheel: install it in an empty venv, run the README's Python and a weighted step in each toolkit (several minutes)"
	.venv/bin/python integration_tests/installed_wheel.py dist $(if $(RELEASE),--release "$(RELEASE)") $(if $(CONSTRAINT),--constraint "$(CONSTRAINT)")

matrix: .venv/installed ## run every loss with every part of its training loop, and write docs/support.md's table (half an hour)
	@echo "== matrix: each supported loss with each part of its training loop: plain, Uniform() and UnDiMix(), into docs/support.md"
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest integration_tests/matrix --matrix --numprocesses auto --maxprocesses 4

speed: .venv/installed ## measure weighted losses against plain ones, in one run
	@echo "== speed: the weighted losses against the toolkits' plain ones, in one run"
	.venv/bin/python -m benchmarks.cost.speed

tables: .venv/installed ## write the tables and plots of benchmarks/results into the manual
	@echo "== tables: the results in benchmarks/results, into docs/results.md and docs/pictures"
	.venv/bin/python -m benchmarks.embeddings.tables

docs: .venv/installed ## build the manual into docs/_build/html, with warnings as errors
	@echo "== docs: the manual, into docs/_build/html; a warning or a broken link within the manual is an error"
	.venv/bin/python -m sphinx -b html -q -W --keep-going docs docs/_build/html

linkcheck: .venv/installed ## check the manual's links to other sites (needs network access)
	@echo "== linkcheck: the manual's links to other sites"
	.venv/bin/python -m sphinx -b linkcheck docs docs/_build/linkcheck
