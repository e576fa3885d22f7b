# Imprint: `make serve` starts the server, `make test` checks everything. Each target makes the
# .venv it needs; nothing is written outside this folder.

PYTHON ?= python3
# Where torch comes from: the small CPU build, or PyPI's CUDA build where there is an NVIDIA driver.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),https://pypi.org/simple,https://download.pytorch.org/whl/cpu)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-cache-dir --quiet
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help serve test coverage lint docs bench soak rehearsal model clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

serve: $(READY) ## start the server on the bundled model (settings: IMPRINT_* or `imprint serve --help`)
	$(BIN)/imprint serve

# Two test processes with one thread each: more threads than cores make small matrices slower. Files go
# out in their order, in which the long ones are in the middle; by number of tests they would come last.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: lint ## lint, types and the whole test suite
	$(PYTEST)

coverage: $(READY) ## the suite again, counting lines and branches in every process, which takes half as long again
	$(PYTEST) --cov --cov-report=term

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY) ## write docs/reference from the code
	$(BIN)/python -m imprint.server.reference docs/reference

bench: $(READY) ## the measurements of BENCHMARKS.md, as JSON lines
	$(BIN)/imprint bench step --json
	$(BIN)/imprint bench answer --json
	$(BIN)/imprint bench kernels --json

soak: $(READY) ## half an hour of mixed load with a crash every minute (SECONDS=1800)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py --seconds $(or $(SECONDS),1800)

rehearsal: $(READY) ## the commands of the Dockerfile in a clean root, without a container engine (as root)
	$(BIN)/python deploy/rehearse_image.py

# The parts of the bundled model's training, each from where the one before it ended.
PARTS := imprint-tiny imprint-tiny-longer imprint-tiny-lists imprint-tiny-deeper imprint-tiny-wordings imprint-tiny-retention imprint-tiny-sentences

model: $(READY) ## train the bundled model from nothing: hours; goes on where it stopped (CORPUS=folder QUESTIONS=file RUNS=folder)
	@$(if $(and $(CORPUS),$(QUESTIONS),$(RUNS)),:,$(error give CORPUS=folder QUESTIONS=file RUNS=folder))
	set -e; init=; for part in $(PARTS); do \
	  $(BIN)/imprint train pretrain --config adapters/training/$$part.toml --corpus $(CORPUS) \
	    --questions $(QUESTIONS) $$init --out $(RUNS)/$$part; \
	  init="--init $(RUNS)/$$part/final"; done

clean: ## remove the environment and every cache
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that only torch is looked up on its index; the build tools go in
# pinned, so that nothing outside constraints.txt runs.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Imprint needs Python 3.11 or newer; name one with: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make environments; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt hatchling editables
	$(PIP) install --constraint constraints.txt --no-deps --retries 2 --extra-index-url $(TORCH_INDEX) torch
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@
