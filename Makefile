# Everything happens in a virtual environment of the project's own; `make study` and `make test` make it when it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: study test test-slow test-long lint setup bench clean

study: $(READY)
	$(BIN)/grscale run

# Three files at a time, of one thread each: most of their time processes start, wait or are killed.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n 3 --dist loadfile

test-slow: $(READY)
	$(BIN)/pytest -m "slow and not long"

test-long: $(READY)
	$(BIN)/pytest -m long

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	for file in tests/benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("grscale needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs
