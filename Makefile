PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LINT_STAMP := $(VENV)/.installed-dev
# Every test runs on one thread, so there is room for as many of them as cores.
WORKERS := --numprocesses auto --maxprocesses 4 --dist worksteal
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

.PHONY: env
env: $(STAMP) ## Make the environment in .venv

# torch first, and pinned: a free choice fetches gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

.PHONY: demo
demo: env ## Train a small translation model with FNGD (a few minutes on 2 cores)
	$(BIN)/python scripts/run_translation.py scripts/demo.json

.PHONY: test
test: env ## Run all tests
	$(BIN)/python -m pytest $(WORKERS)

.PHONY: test-fast
test-fast: env ## Run the tests that take no more than seconds each
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

$(LINT_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: lint
lint: $(LINT_STAMP) ## Check format, style, docstrings and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.PHONY: bench
bench: env ## Measure step time and memory against AdamW (about an hour, on a quiet machine)
	$(BIN)/python scripts/bench/all_shapes.py --output scripts/bench/results/step_time
	$(BIN)/python scripts/bench/gram.py --samples 64 --positions 20 --widths 256 --expansion 4 --blocks 1 4 8 16 64 256 --repeats 21 --output scripts/bench/results/gram_routes.json

.PHONY: clean
clean: ## Remove the environment and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
