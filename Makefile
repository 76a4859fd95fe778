# Two commands to know: `make demo` and `make test`. Both build .venv first when it is missing or out of date.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed
CLUSTERLESS := $(patsubst %,tests/%.py,$(addprefix integration/test_,drift label_queue redis registry service \
	tracking_servers update_cycle) e2e/test_wheel)

# Without .pyc files every Ray worker would compile torch and ray again at start.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test test-clusters test-others test-full lint bench gpu sanitize clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

install: $(STAMP) ## build .venv with everything pinned

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11: run make PYTHON=/path/to/python3.11 again" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m compileall -q -q -j 0 .venv/lib deepseek_ray || true # some packages ship templates that do not compile
	@touch $(STAMP)

demo: $(STAMP) ## run the card-fraud loop from events to an updated live model
	$(BIN)/python -m pipelines.risk.demo $(ARGS)

test: $(STAMP) ## all tests but the slow ones; those with clusters beside the others
	$(MAKE) --jobs=2 test-clusters test-others

test-clusters: $(STAMP) # one after the other: Ray takes the newest cluster of a machine for its own
	$(BIN)/python -m pytest -m 'not slow and not gpu' tests/integration tests/e2e $(CLUSTERLESS:%=--ignore=%) $(ARGS)

test-others: $(STAMP)
	$(BIN)/python -m pytest -m 'not slow and not gpu' tests/unit tests/kernels tests/distributed $(CLUSTERLESS) $(ARGS)

test-full: $(STAMP) ## all tests of this machine, a file at a time; again: what has not passed yet
	$(BIN)/python -m tests.full $(ARGS)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP) ## measure; prints a table for each benchmark
	@for file in tests/bench/bench_*.py; do \
		echo "$$file"; $(BIN)/python -m tests.bench.$$(basename $$file .py) $(ARGS) || exit 1; \
	done

gpu: $(STAMP) ## on a GPU: check the kernels, then measure them, into OUT (runs/gpu)
	PYTHON=$(abspath $(BIN))/python bash tests/bench/gpu.sh $(or $(OUT),runs/gpu)

sanitize: $(STAMP) ## on a GPU: the kernels under compute-sanitizer
	PYTHON=$(abspath $(BIN))/python bash tests/gpu/sanitize.sh

clean: ## remove .venv, caches and build output; runs/ holds your results and stays
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
