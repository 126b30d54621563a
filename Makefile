# Two commands do all the set-up themselves: `make quickstart` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG ?=
# idle worker threads sleep instead of spinning: on few cores they only steal time
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: quickstart test slow lint clean

quickstart: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/deepspeed smpo_fast/train.py --ds_config configs/ds_zero2.json

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest

slow: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/mypy

$(VENV)/.installed: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed setup.py
	$(BIN)/pip install -q -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
