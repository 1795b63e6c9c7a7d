# Every target sets up .venv by itself when it is missing or older than the lock.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test lint format bench clean

demo: $(STAMP)  ## audit a small hub of real finetunes; the report is out/demo/report.html
	$(BIN)/ray-auditor demo

test: $(STAMP)  ## every test that needs no GPU
	$(BIN)/python -m pytest

lint: $(STAMP)  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## every benchmark that runs on this machine; results go to benchmarks/results
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

$(STAMP): requirements-cpu.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ray-auditor needs Python 3.11 or later; set PYTHON=python3.11")'
	@echo "setting up $(VENV): about 4.6 GB, a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-deps -r requirements-cpu.lock
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

clean:
	rm -rf $(VENV) out
