# `make` alone lists the targets.
#
# The torch that a new environment gets. Where no NVIDIA GPU is found, its CPU build (+cpu) is
# tried first: it is far smaller. Another one: make test TORCH=torch==2.12.0
TORCH  ?= torch==2.13.0
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2

BIN := $(VENV)/bin
HAS_GPU = nvidia-smi -L 2>/dev/null | grep -q GPU

.DEFAULT_GOAL := help
.PHONY: help setup test demo bench gpu lint format types wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.installed ## make .venv with torch, fastlora and every tool (the others do it when needed)

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	@if $(HAS_GPU); then \
		echo "NVIDIA GPU found: installing $(TORCH)"; \
		$(BIN)/pip install -q "$(TORCH)"; \
	elif echo "no NVIDIA GPU found: installing $(TORCH)+cpu" && $(BIN)/pip install -q "$(TORCH)+cpu" 2>/dev/null; then :; \
	else \
		echo "pip finds no $(TORCH)+cpu: installing plain $(TORCH), which may bring CUDA libraries"; \
		$(BIN)/pip install -q "$(TORCH)"; \
	fi
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py
	$(BIN)/pip install -q -e ".[test,demo,bench]"
	@touch $@

# One thread a worker, or they fight over the cores.
test: setup ## run the whole test-suite, packaging included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile $(ARGS)

demo: setup ## see LoRA at work (MODEL=path and DATA=file: on your own model and text)
	$(BIN)/python -m fastlora demo $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)") $(ARGS)

bench: setup ## measure on the CPU
	$(BIN)/python -m benchmarks --device cpu $(ARGS)

# From a bare checkout: no .venv, nothing installed, no network. Both parts run whatever the first says.
gpu: ## verify and measure on a GPU with python3's own torch, triton, numpy, pytest, safetensors
	@tests=0; bench=0; \
	$(PYTHON) -m pytest -q -m cuda tests || tests=$$?; \
	$(PYTHON) -m benchmarks --device cuda $(ARGS) || bench=$$?; \
	echo "gpu: tests exited with $$tests, benchmarks with $$bench"; \
	[ $$tests -eq 0 ] && [ $$bench -eq 0 ]

lint: setup ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup ## fix what can be fixed of both
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup ## check the types
	$(BIN)/basedpyright --pythonpath $(BIN)/python

wheel: setup ## build wheel and sdist, install them in every way and try each
	$(BIN)/python -m pytest -q -m packaging $(ARGS)

clean: ## remove everything that make made
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
