# `make demo` and `make test` do all the set-up. PYTHON is any Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
STARTED := $(shell date +%s)

# A private Slurm of NODES virtual nodes; ACCOUNTING=1 adds slurmdbd, so that sacct answers.
NODES ?= 4
DEVCLUSTER := $(PYTHON) slurm/devcluster/devcluster.py

.PHONY: demo test lint bench clean cluster-up cluster-down

demo: $(VENV)/.demo
	$(BIN)/crystal demo $(if $(FRESH),--fresh)
	@echo "make demo took $$(( $$(date +%s) - $(STARTED) )) s"

# Two processes: one half of the tests mostly waits for Slurm (tests/conftest.py says which stay together). pytest's
# summary must be the last thing printed: the time stands before it (--durations) and in the summary itself.
test: $(VENV)/.test lint
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadgroup --no-loadscope-reorder --durations=10

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/step_overhead.py
	$(BIN)/python benchmarks/tokenize.py
	$(BIN)/python benchmarks/read.py
	$(BIN)/python benchmarks/slurm.py
	$(BIN)/python benchmarks/stage.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/convert.py

cluster-up:
	@$(DEVCLUSTER) up --nodes $(NODES) $(if $(ACCOUNTING),--accounting)

cluster-down:
	@$(DEVCLUSTER) down

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/.venv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "crystal_hpc needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.venv setup.cfg constraints.txt
	@echo "installing crystal_hpc into $(VENV) (torch is large; this takes a minute or two)"
	$(PIP) --editable .
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) --editable '.[test]'
	touch $@
