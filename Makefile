# make demo    set up and run the main job           make test    set up and run all tests
# make setup   everything for development            make lint    ruff, mypy, import contracts
# make format  let ruff mend what it can             make bench   measure again what docs/benchmarks shows
# make smoke   every shipped recipe on made-up data, some minutes
# make clean   remove what was built and cached here

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
CORES  := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
DEMO   := runs/quickstart

# One thread per test process: many small networks run faster side by side than wide.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help setup demo test smoke lint format bench clean

help:
	@sed -n 's/^# //p' Makefile | head -5

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Slimkit needs Python 3.11 or newer; say which one with: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# The two stamps make a second set-up immediate, and repeat it when pyproject.toml changed.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "Installing Slimkit into $(VENV) (about a minute) …"
	@$(PIP) install --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	@echo "Installing Slimkit and its development tools into $(VENV) (a minute or two) …"
	@$(PIP) install --editable '.[dev]'
	@touch $(VENV)/.installed $@

setup: $(VENV)/.installed-dev

demo: $(VENV)/.installed
	@$(BIN)/slimkit run recipes/quickstart.yaml --out $(DEMO)
	@echo "Open $(DEMO)/report.html in a browser."

test: $(VENV)/.installed-dev
	@$(ONE_THREAD) $(BIN)/python -m pytest -n $(CORES) $(ARGS)

smoke: $(VENV)/.installed
	@for recipe in $$(find recipes -name '*.yaml'); do echo "$$recipe --smoke"; \
	  $(BIN)/slimkit run $$recipe --smoke --quiet --out runs/smoke || exit 1; done

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev
ifdef NAME
	$(BIN)/python -m benchmarks.$(NAME) $(ARGS)
else
	@echo "One at a time, with: make bench NAME=… ARGS=…; each writes its table to docs/benchmarks."
	@for file in $(filter-out $(patsubst %,benchmarks/%.py,arms mobilenet tables networks efficientnet_lite0 quantize_peers knowledge_hostile tcp_proxy),$(wildcard benchmarks/[a-z]*.py)); do sed -n '1s/^"""/  /p' $$file | sed "s|^|$$(basename $$file .py):|"; done
endif

clean:
	rm -rf build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
