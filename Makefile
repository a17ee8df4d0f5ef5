# `make` lists the targets. Everything runs in .venv, which `make install` creates.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# Device: CUDA=0 or CUDA=1 if set, else the installed one, else cpu.
$(if $(filter-out 0 1,$(CUDA)),$(error CUDA=$(CUDA): must be 1 (machine with CUDA) or 0))
DEVICE_0 := cpu
DEVICE_1 := cuda
INSTALLED := $(patsubst .venv/.installed-%,%,$(wildcard .venv/.installed-*))
DEVICE := $(or $(DEVICE_$(CUDA)),$(firstword $(INSTALLED)),cpu)
STAMP := .venv/.installed-$(DEVICE)

# The first interpreter that runs and has a supported version is used; PYTHON=… names the only candidate.
PYTHON ?= python3 python3.13 python3.12 python3.11
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))

BIN := .venv/bin
OUT := quickstart
TORCHX := $(BIN)/torchx --log_level WARNING

.PHONY: help install quickstart demo test pytest test-fast test-all lint types format docs benchmarks results clean distclean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | awk -F'|' '{ printf "%-17s  %s\n", $$1, $$2 }'

install: $(STAMP)  ## install into .venv; CUDA=1 on a machine with CUDA

$(STAMP): pyproject.toml requirements/$(DEVICE).txt $(wildcard packaging/*/pyproject.toml)
	@for other in $(filter-out $(DEVICE),$(INSTALLED)); do \
	  echo ".venv was installed for $$other; reinstalling for $(DEVICE)"; rm -rf .venv; \
	done
	@if [[ ! -x $(BIN)/python ]]; then \
	  for python in $(PYTHON); do \
	    if "$$python" -c '$(SUPPORTED)' 2>/dev/null; then selected="$$python"; break; fi; \
	  done; \
	  if [[ -z "$${selected:-}" ]]; then \
	    echo "None of $(PYTHON) is Python 3.11, 3.12 or 3.13; run: make install PYTHON=/path/to/python3.11" >&2; exit 1; \
	  fi; \
	  "$$selected" -m venv .venv; \
	fi
	@echo "Installing into .venv for $(DEVICE); the first time takes a few minutes"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/$(DEVICE).txt
	@$(BIN)/python -m pip --disable-pip-version-check check
	@touch $@

quickstart: export OMP_NUM_THREADS := 1
quickstart: $(STAMP)  ## simulate, train on 2 ranks, train an ensemble, evaluate and rank in ./quickstart
	@rm -rf $(OUT)
	$(BIN)/a2gen simulate --out $(OUT)/log --users 1500 --items 800 --impressions-per-user 100
	$(BIN)/a2gen prepare simulated --raw $(OUT)/log --out $(OUT)/data
	$(TORCHX) run -s local_cwd torchx_apps/train.py:train \
	  --config configs/quickstart.yaml --ranks 2 --data $(OUT)/data --run $(OUT)/run
	$(BIN)/a2gen ensemble train --run $(OUT)/run --epochs 6 --formula-trials 50
	$(BIN)/a2gen evaluate --run $(OUT)/run --split test --json $(OUT)/evaluation.json
	$(BIN)/a2gen rank --run $(OUT)/run --user 7 --explain --k 5
	@echo "The run is in $(CURDIR)/$(OUT)/run, its results in $(CURDIR)/$(OUT)/evaluation.json"

demo: export OMP_NUM_THREADS := 1
demo: $(STAMP) $(OUT)/model/manifest.json  ## serve the quickstart's model with its users' histories; PORT=N
	$(BIN)/a2gen backfill simulated --raw $(OUT)/log --model $(OUT)/model --event-store $(OUT)/events.db
	$(BIN)/a2gen serve --model $(OUT)/model --event-store $(OUT)/events.db $(if $(PORT),--port $(PORT))

$(OUT)/model/manifest.json: $(OUT)/evaluation.json
	@rm -rf $(OUT)/model
	$(BIN)/a2gen export --run $(OUT)/run --out $(OUT)/model

$(OUT)/evaluation.json:  # written last by the quickstart
	@$(MAKE) quickstart

# A file's tests stay on one process, which builds their datasets and runs once. Files start in the order of conftest.py.
# One process more than cores, because tests wait for processes, browsers and timeouts.
PYTEST := $(BIN)/python -m pytest --numprocesses $(or $(JOBS),3) --dist loadfile --no-loadscope-reorder

# Tests start about a hundred interpreters: bytecode is cached, even if the environment forbids it.
pytest test-fast test-all: export PYTHONDONTWRITEBYTECODE :=
test: lint  ## lint, check types and run the tests in JOBS processes (3)
	@$(MAKE) --jobs=2 types pytest

pytest: export OMP_NUM_THREADS := 1
pytest: $(STAMP)
	$(PYTEST) -m "not thorough"

test-fast: export OMP_NUM_THREADS := 1
test-fast: $(STAMP)  ## run the tests without processes, training or browser, in about a minute
	$(PYTEST) -m "not processes and not training and not browser and not thorough"

test-all: export OMP_NUM_THREADS := 1
test-all: lint types  ## all tests with coverage, in all combinations and with many more examples per property
	$(PYTEST) --timeout=1800 --cov --cov-report=term:skip-covered --hypothesis-profile=thorough

lint: $(STAMP)  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

types: $(STAMP)  ## check types
	$(BIN)/mypy

format: $(STAMP)  ## format the code and apply automatic fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: $(STAMP)  ## run all benchmarks in full and write benchmarks/RESULTS.md
	$(BIN)/a2gen benchmark all --out benchmarks/results
	mv benchmarks/results/RESULTS.md benchmarks/RESULTS.md

docs: $(STAMP)  ## regenerate references and build the documentation into ./site
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "The documentation is in $(CURDIR)/site/index.html"

results: OUT := experiments/main
results: $(STAMP)  ## run the main experiment on the raw logs in RAW and write docs/results/experiments.md; takes hours
	@$(if $(RAW),,echo "RAW=DIR is required: the directory of the raw logs listed in configs/experiments/main.yaml" >&2; exit 1)
	$(BIN)/a2gen experiment --suite configs/experiments/main.yaml --raw $(RAW) --out $(OUT) --jobs $(or $(JOBS),2)
	$(BIN)/a2gen report experiment $(OUT) --markdown docs/results/experiments.md

clean:  ## delete caches, build outputs and the quickstart's files
	rm -rf $(OUT) build dist site packaging/*/build *.egg-info packaging/*/*.egg-info .coverage htmlcov
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean  ## also delete .venv
	rm -rf .venv
