# `make` lists what there is. Everything runs in .venv, made on first use from exact pins.

ifneq ($(filter command% environment%,$(origin PYTHON)),)
named_python := --this-python
endif
PYTHON ?= python3
OUT ?= runs/quickstart
PORT ?= 5000
SERVE_PORT ?= 8000
ifneq ($(filter-out 0 1,$(CUDA)),)
$(error CUDA=$(CUDA) is neither 1 (the CUDA builds) nor 0 (the CPU builds))
endif
kind := $(if $(CUDA),--kind $(if $(filter 1,$(CUDA)),cuda,cpu))
py := .venv/bin/python

export MLFLOW_DISABLE_TELEMETRY := true
export RAY_USAGE_STATS_ENABLED := 0

.DEFAULT_GOAL := help
.PHONY: help install demo serve test lint format mlflow clean

help:  ## list the targets
	@echo "make demo [DATA=path] [OUT=$(OUT)]   logs to trained, evaluated, tracked, served models (simulated logs without DATA)"
	@echo "                           TUNE=20 searches the ranking model's settings first, in so many trials"
	@echo "make serve [OUT=$(OUT)]    recommendations over HTTP from a demo's models, on port SERVE_PORT=$(SERVE_PORT)"
	@echo "make test                  all tests and linters"
	@echo "make lint                  ruff and mypy only"
	@echo "make format                let ruff format the code"
	@echo "make mlflow [OUT=$(OUT)]   the MLflow page of a demo's runs, on port PORT=$(PORT) of this machine only"
	@echo "make install               only set up .venv"
	@echo "make clean [RUNS=1]        remove .venv and caches; runs/ too only with RUNS=1"
	@echo "Options: CUDA=1 installs the CUDA builds (CUDA=0 goes back); PYTHON=python3.12 names the Python (3.11 to 3.13)"

install:
	@for p in "$(PYTHON)" $(if $(named_python),,python3.11 python3.12 python3.13); do \
	  if command -v "$$p" >/dev/null 2>&1; then exec "$$p" requirements/install.py $(kind) $(named_python); fi; \
	done; \
	echo "error: no $(PYTHON) here; install Python 3.11, 3.12 or 3.13, or name it: make PYTHON=/path/to/python3.11"; exit 1

demo: install
	$(py) -m jobs.quickstart --out "$(OUT)" $(if $(DATA),--data "$(DATA)") $(if $(TUNE),--tune "$(TUNE)")

serve: install
	$(py) -m jobs.serve --out "$(OUT)" --port $(SERVE_PORT)

test: lint
	$(py) -m pytest

lint: install
	$(py) -m ruff check
	$(py) -m ruff format --check
	$(py) -m mypy

format: install
	$(py) -m ruff format
	$(py) -m ruff check --fix

mlflow: install
	@test -f "$(OUT)/mlflow.db" || { echo "error: no $(OUT)/mlflow.db; run 'make demo OUT=$(OUT)' first"; exit 1; }
	@echo "MLflow: http://127.0.0.1:$(PORT)  (Ctrl-C ends it)"
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false \
	  $(py) -m mlflow server --host 127.0.0.1 --port $(PORT) --workers 1 \
	  --allowed-hosts "127.0.0.1,127.0.0.1:$(PORT),localhost,localhost:$(PORT)" \
	  --backend-store-uri "sqlite:///$(OUT)/mlflow.db" --artifacts-destination "$(OUT)/mlartifacts"

clean:
	rm -rf .venv .venv.lock build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find recsys_dist jobs tests requirements -name __pycache__ -type d -prune -exec rm -rf {} +
ifeq ($(RUNS),1)
	@if [ -d runs ]; then echo "removing all results:"; du -sh runs; rm -rf runs; fi
else
	@if [ -d runs ]; then echo "kept all results in runs/ ($$(du -sh runs | cut -f1)); RUNS=1 removes them"; fi
endif
