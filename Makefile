# Two commands do all the set-up themselves: `make quickstart` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
# make slow MINUTES=30: tests that would start later are skipped, and counted
MINUTES ?=
# idle worker threads sleep instead of spinning: on few cores they only steal time
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: quickstart test slow lint clean

quickstart: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/deepspeed smpo_fast/train.py --ds_config configs/ds_zero2.json

# One thread a process and a process a core; a file's tests stay together because they share what its fixtures make.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile

test: $(VENV)/.installed-dev
	$(PYTEST)

slow: $(VENV)/.installed-dev
	$(PYTEST) -m slow $(if $(MINUTES),--minutes $(MINUTES))

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
