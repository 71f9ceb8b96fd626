# make demo   the first run: sets up, then `vitdistill demo`
# make check  sets up, then what a change has to pass while you work on it: under two minutes
# make test   sets up, then everything a change has to pass, with shapes checked at every call
# make docs   writes docs/methods.md from the table of methods and builds the site, build/site/index.html
# make dist   builds the wheel, and runs the demo from it in an empty environment
# make test-gpu   the tests of devices on a GPU: four minutes
# make bench-gpu  what a GPU does a second, beside timm: five minutes
# Set-up builds .venv with the exact versions and hashes of requirements/constraints.txt; it needs the network once.
# Variables: PYTHON=python3.12 (which interpreter), WORKERS=2 (test processes). With PYTHON the GPU targets take that interpreter as it
# is, without set-up; WHEELS=FOLDER gives it what it lacks, and DEVICE=cuda:1 picks a GPU.

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
READY := .venv/.ready

DEVICE ?= cuda
ifeq ($(origin PYTHON),command line)
GPU_READY := gpu-packages
GPU_PYTHON := PYTHONPATH=$(CURDIR)/.packages:$(CURDIR) $(PYTHON)
else
GPU_READY := setup
GPU_PYTHON := $(BIN)/python
endif

.PHONY: setup demo check units test docs dist lint lock clean gpu-packages test-gpu bench-gpu

setup: $(READY)

demo: setup
	$(BIN)/vitdistill demo

# Types take one core for a while, and tests leave a core idle at their end: so both at once.
check: setup
	@$(MAKE) --no-print-directory -j2 lint units

units: setup
	$(BIN)/python -m pytest tests vitdistill --doctest-modules -n $(WORKERS) -m "not whole" --timeout 60

test: lint
	$(BIN)/python -m pytest tests vitdistill --doctest-modules -n $(WORKERS) --jaxtyping-packages=vitdistill,beartype.beartype

# What an interpreter lacks, from a folder of wheels: nothing of its own is touched, and no network is needed.
gpu-packages:
	@if [ -n "$(WHEELS)" ]; then rm -rf .packages && \
	  $(PYTHON) -m pip install -q --no-index --no-deps --target .packages "$(WHEELS)"/*.whl; fi

test-gpu: $(GPU_READY)
	VITDISTILL_TEST_DEVICE=$(DEVICE) $(GPU_PYTHON) -m pytest tests/device tests/runs/test_waiting.py

bench-gpu: $(GPU_READY)
	$(GPU_PYTHON) benchmarks/gpu.py --device $(DEVICE) --write

docs: .venv/.docs
	$(BIN)/python docs/write_methods.py
	$(BIN)/python docs/build_site.py

# The site's tools come on top of what tests need.
.venv/.docs: requirements/docs.txt $(READY)
	@PYTHON='$(PYTHON)' requirements/setup.sh docs
	@touch $@

dist: setup
	requirements/dist.sh

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(READY): pyproject.toml requirements/constraints.txt requirements/setup.sh
	@rm -f $@
	@PYTHON='$(PYTHON)' requirements/setup.sh
	@touch $@

# New versions of everything, for every Python and system named in pyproject.toml's [tool.uv]. Needs uv and the network.
lock:
	uv pip compile pyproject.toml --extra dev --upgrade --universal --python-version 3.11 --generate-hashes \
	  --no-annotate --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock' \
	  --quiet --output-file requirements/constraints.txt
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' | \
	  uv pip compile - --constraint requirements/constraints.txt --upgrade --universal --python-version 3.11 --generate-hashes \
	  --no-annotate --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock' \
	  --quiet --output-file requirements/docs.txt

# Caches and builds. The environment stays: remove .venv by hand to start over.
clean:
	rm -rf build dist .packages *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
