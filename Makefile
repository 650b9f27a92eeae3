# On a fresh machine with Python 3.11 or newer: `make demo`, `make test`.
PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.installed

.PHONY: demo test check bench paper clean

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fedtrain needs Python 3.11 or newer; name one with: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	@echo "Installing into .venv; this takes a few minutes, once."
	@$(PYTHON) -m venv .venv
	@$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)  ## A federated model learns on real data; ends with the path of its report.
	.venv/bin/fedtrain simulate examples/demo.toml --out runs/demo

test: $(STAMP)
	$(PY) -m pytest -q -n 2 --dist worksteal

check: $(STAMP)  ## Format, lint, strict types, import direction.
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

bench: $(STAMP)  ## fedtrain against its rivals; prints ratios. Minutes.
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,bench]'
	$(PY) benchmarks/partition.py
	$(PY) benchmarks/registered_clients.py
	$(PY) benchmarks/simulate.py
	$(PY) benchmarks/aggregate.py
	$(PY) benchmarks/gate.py
	$(PY) benchmarks/dp.py
	$(PY) benchmarks/encode.py
	$(PY) benchmarks/clock.py
	$(PY) benchmarks/rounds.py

paper: $(STAMP)  ## Published results beside measured ones. Needs FEDTRAIN_DATA; about an hour.
	$(PY) benchmarks/paper.py

clean:
	rm -rf .venv runs/demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
