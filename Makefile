# Every target sets up .venv by itself: torch and the tools at the versions of constraints.txt, the package editable.
# Another Python: make PYTHON=/path/to/python3 test. Another torch: pip's own settings (PIP_FIND_LINKS, PIP_INDEX_URL).

.DEFAULT_GOAL := help
.PHONY: help demo test test-integrations thorough fuzz sanitize soak offline lint bench wheel gpu clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

ifeq ($(wildcard setup.py),)
$(error run make in the project's folder: make -C FOLDER TARGET)
endif

# Hundreds of short processes import torch: where bytecode is not kept, each compiles torch's anew, for seconds.
unexport PYTHONDONTWRITEBYTECODE

VENV ?= .venv
PYTEST_ARGS ?= -n auto --maxprocesses 8 --dist worksteal
PY := '$(VENV)/bin/python'
IN_VENV := PATH="$$(cd '$(VENV)/bin' && pwd):$$PATH"
# --no-compile: half of torch's modules are never imported, so bytecode is made by those that are
INSTALL := $(PY) -m pip install -qq --no-input --no-compile --constraint constraints.txt
# What the torch of most GPUs at present brings along; kernels are compiled with it as well as with the newest.
TRITON := build/triton-3.6
CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')
CXX_ALL := $(CXX_SOURCES) $(wildcard tests/sanitize/*.cpp tests/cuda_emulator/*)

help:  ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## /\1@/p' Makefile | awk -F@ '{printf "  make %-17s  %s\n", $$1, $$2}'

demo: $(VENV)/.with-examples $(VENV)/.extension  ## train on real image-text pairs: the fused loss against the dense one
	$(PY) examples/demo.py

test: $(VENV)/.with-dev $(VENV)/.extension $(TRITON)/.tried  ## tests and doctests; PYTEST_ARGS="-k name" for some of them
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest $(PYTEST_ARGS)

# Not in make test: the libraries are large, and change by themselves. Their own tests run too where PEERS has clones of them.
WITH_PEERS := $(if $(PEERS),$(VENV)/.with-peers)
test-integrations: $(VENV)/.with-test $(VENV)/.with-integrations $(WITH_PEERS) $(VENV)/.extension  ## losses of other libraries against these; PEERS=folder
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -p no:xdist -q tests/integrations/peers
	$(if $(PEERS),$(PY) tests/integrations/peers/own_tests.py '$(PEERS)' $(PEERS_ARGS))

# The long forms of what make test does in seconds. One process: several of them may run side by side.
LONG := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -p no:xdist -p no:cacheprovider -q -s

thorough: $(VENV)/.with-dev $(VENV)/.extension $(TRITON)/.tried  ## make test with the cases that it leaves out
	THOROUGH=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest $(PYTEST_ARGS)

fuzz: $(VENV)/.with-dev $(VENV)/.extension  ## random problems against the float64 definitions; FUZZ_SECONDS=3600
	FUZZ_SECONDS=$${FUZZ_SECONDS:-3600} $(LONG) tests/fuzz

sanitize: $(VENV)/.with-dev $(VENV)/.extension  ## AddressSanitizer, UBSan, ThreadSanitizer on the C++; SANITIZE_ROUNDS=5
	SANITIZE_ROUNDS=$${SANITIZE_ROUNDS:-5} $(LONG) tests/backends/test_sanitizers.py

soak: $(VENV)/.with-dev $(VENV)/.extension  ## many threads, 20,000 calls, deaths of processes; SOAK_CALLS=20000
	OMP_WAIT_POLICY=passive SOAK_CALLS=$${SOAK_CALLS:-20000} $(LONG) tests/soak tests/em/test_storage_deaths.py

offline: $(VENV)/.with-dev $(TRITON)/.tried  ## what compilers make of every Triton kernel for GPUs that are not here
	$(PY) tests/offline.py 80 90 100
	test ! -d '$(TRITON)/triton' || PYTHONPATH='$(TRITON)' $(PY) tests/offline.py 80 90

lint: $(VENV)/.with-dev  ## ruff, clang-format, mypy, zizmor
	@$(IN_VENV); bad=0; \
	run() { echo "$$1"; shift; "$$@" || bad=1; }; \
	run "ruff check" ruff check . ; \
	run "ruff format" ruff format --check . ; \
	run "clang-format, $(words $(CXX_ALL)) files" clang-format --dry-run -Werror $(CXX_ALL) ; \
	run "mypy" mypy ; \
	run "zizmor, workflows" zizmor --quiet --offline --strict-collection .github ; \
	exit $$bad

bench: $(VENV)/.with-bench $(VENV)/.extension  ## the microbenchmark; BENCH_ARGS="--help" for its options
	$(PY) -m bench $(BENCH_ARGS)

wheel: $(VENV)/.with-dev  ## sdist and wheel in dist/, tried in a fresh environment outside the checkout
	$(IN_VENV) scripts/wheel.sh

# Without .venv and without a network: the machine's own Python, with its torch.
GPU_PYTHON ?= python3
GPU_OUT ?= build/gpu
gpu:  ## on a GPU: build, test, measure, table; STAGE="test goals" for some of it, GPU_PYTHON, GPU_OUT
	'$(GPU_PYTHON)' scripts/gpu.py $(STAGE) --out '$(GPU_OUT)'

clean:  ## remove what builds and tests made (.venv stays)
	rm -rf build dist *.egg-info contrastive_kernels/_C*.so .pytest_cache .mypy_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f '$(VENV)/.extension'

# ---- set-up: stamps in .venv, remade when what they depend on changes ----

$(VENV)/.base: pyproject.toml setup.py constraints.txt
	@python=$$(scripts/find_python.sh) && \
	if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	    echo "set-up: $(VENV) with $$python"; rm -rf '$(VENV)'; "$$python" -m venv '$(VENV)'; fi
	@echo "set-up: $$(grep '^torch==' constraints.txt) (minutes, where it has to be downloaded)"
	@$(INSTALL) torch
	@$(INSTALL) setuptools wheel pybind11 ninja
	@touch $@

$(VENV)/.with-%: $(VENV)/.base
	@echo "set-up: contrastive_kernels, editable, with what '$*' needs"
	@$(INSTALL) --no-build-isolation --editable '.[$*]'
	@touch $@ '$(VENV)/.extension'

$(TRITON)/.tried: | $(VENV)/.base
	@echo "set-up: Triton 3.6 in $(TRITON)"
	@rm -rf '$(TRITON)' && mkdir -p '$(TRITON)'
	@$(PY) -m pip install -qq --no-input --no-compile --no-deps --target '$(TRITON)' triton==3.6.0 || \
	    echo "set-up: there is none for this machine; its tests are skipped"
	@touch $@

# The editable install above built the extension too; this is for later changes of the C++ sources.
$(VENV)/.extension: $(CXX_SOURCES) | $(VENV)/.base
	@echo "set-up: the C++ extension"
	@$(PY) setup.py --quiet build_ext --inplace
	@touch $@
