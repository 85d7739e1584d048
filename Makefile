# Two commands do everything: `make demo` and `make test`. Each makes .venv first where it is missing or outdated.

# The demo's graphs come with grakel, which has no release for Python 3.13: 3.11 and 3.12 run everything.
PYTHON ?= $(shell for python in python3.11 python3.12 python3 python; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$python && break; done)

# A thread that waits lets others run: two busy cores else lose most of their time on small tensors.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test matrix speed tables docs linkcheck
.DELETE_ON_ERROR:

.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or 3.12 on the PATH; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "== .venv is missing or older than pyproject.toml: installing everything ($$($(PYTHON) --version), a few minutes, 7 GB)"
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

demo: .venv/installed
	@echo "== demo: three modalities, plain and with UnDiMix, in their own toolkits' training loops"
	.venv/bin/python examples/demo.py

test: .venv/installed
	@echo "== ruff: format and lint"
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	@echo "== mypy: strict, core and adapters"
	.venv/bin/mypy
	@echo "== pytest: unit tests and every toolkit's own training loop, a core each"
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

matrix: .venv/installed
	@echo "== matrix: every supported loss in everything around it, plain, with Uniform() and with UnDiMix(), into README.md"
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest integration_tests/matrix --matrix --numprocesses auto --maxprocesses 4

speed: .venv/installed
	@echo "== speed: the weighted losses against the hosts' plain ones, in one run"
	.venv/bin/python -m benchmarks.speed

tables: .venv/installed
	@echo "== tables: what benchmarks/results holds, into README.md, docs/results.md and docs/pictures"
	.venv/bin/python -m benchmarks.tables

docs: .venv/installed
	@echo "== docs: the manual, into docs/_build/html; a warning or a link that leads nowhere is an error"
	.venv/bin/python -m sphinx -b html -q -W --keep-going docs docs/_build/html

linkcheck: .venv/installed
	@echo "== linkcheck: the manual's links to other sites, which needs a network"
	.venv/bin/python -m sphinx -b linkcheck docs docs/_build/linkcheck
