# Two commands on a fresh machine: `make demo` and `make test`. Both need only Python >= 3.10 and make.

PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
DEMO := runs/demo

.PHONY: demo test

.venv/run: requirements.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed"'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

.venv/test: .venv/run requirements-test.txt
	$(BIN)/pip install -q -r requirements-test.txt
	touch $@

test: .venv/test
	$(BIN)/python -m pytest -q -n 2 tests
