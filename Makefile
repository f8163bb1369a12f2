# The whole set-up on a fresh machine is one command: `make demo` or `make test`. Each builds what it needs.
PLATFORM ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
LOCK := deploy/requirements/$(PLATFORM).lock
STAMP := .venv/installed-$(PLATFORM)
BIN := .venv/bin

# One process a core: two libraries that each start a thread per core starve each other.
export OMP_NUM_THREADS ?= 1

.PHONY: help setup up demo trials test test-models test-topology browser operations bench-serve bench-feedback bench-train lint format lock clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP) ## build .venv from the lock
$(STAMP): $(LOCK) deploy/requirements/torch.txt deploy/requirements/install.sh pyproject.toml
	deploy/requirements/install.sh $(PLATFORM)
	@touch $@

up: setup ## Redis, server and training worker on this machine; Ctrl-C stops them
	$(BIN)/python -m deploy up

SEED ?= 0
demo: setup ## one whole improvement cycle with simulated labelers; SEED=n for another world
	$(BIN)/python -m train.tinyworld.demo --seed $(SEED)

trials: setup ## bad versions from a finished demo's first policy, and what stops each; about 30 minutes
	$(BIN)/python -m train.tinyworld.trials --json state/trials.json

test: lint browser operations ## all that CI runs, in two processes
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-models: setup ## every family of models compiled, and served by vLLM; about 5 minutes
	$(BIN)/python -m pytest -m models

test-topology: setup operations ## servers, worker, Redis and Prometheus as processes; an alert fires and resolves; about 2 minutes
	$(BIN)/python -m pytest -m topology

browser: setup
	deploy/requirements/browser.sh

operations: setup
	deploy/requirements/operations.sh

bench-serve: setup ## our server against vLLM's own, about 11 minutes of an idle machine; ARGS="--quick --json FILE"
	PYTHONPATH=.:tests $(BIN)/python tests/bench/bench_serve.py $(ARGS)

bench-feedback: setup ## feedback under load and with a long log, about 5 minutes of an idle machine; ARGS="--quick --records 1000000"
	PYTHONPATH=.:tests $(BIN)/python tests/bench/bench_feedback.py $(ARGS)

bench-train: setup ## training against TRL, about 15 minutes of an idle machine; ARGS="--quick --peers DIR --json FILE"
	PYTHONPATH=.:tests $(BIN)/python tests/bench/bench_train.py $(ARGS)

lint: setup ## style, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

UV_COMPILE = uv pip compile --quiet --python-version 3.11 --no-annotate --custom-compile-command "make lock" --extra train --extra test
lock: ## renew both locks from pyproject.toml (needs uv)
	$(UV_COMPILE) --extra cpu --override deploy/requirements/exclude-cpu.txt pyproject.toml deploy/requirements/torch-cpu.in -o deploy/requirements/cpu.lock
	$(UV_COMPILE) --extra gpu pyproject.toml -o deploy/requirements/gpu.lock

clean: ## remove what was built and cached; state/ stays
	rm -rf .venv *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
