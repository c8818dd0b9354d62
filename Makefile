# Every target sets itself up: Python 3.11 or 3.12, make and a package index are all it takes.
SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint bench bench-diffusion bench-gflownet bench-molecules bench-tokens bench-factors bench-digits bench-images bench-verdicts bench-pipelines bench-overhead docs clean

BIN := .venv/bin
READY := .venv/.installed

# Waiting threads sleep: spinning ones cost the others their cores.
export OMP_WAIT_POLICY := PASSIVE
# glibc gives large tensors back at once and asks for them again: keeping them saves a tenth of the time.
export MALLOC_MMAP_THRESHOLD_ := 1073741824
export MALLOC_TRIM_THRESHOLD_ := 2147483648
ifneq ($(wildcard ../shared/data),)
export SCULPT_DATA ?= $(abspath ../shared/data)
endif

help:  ## show this list
	@echo "make TARGET, where TARGET is"
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(READY)  ## molecules, digits, and exact answers in the plane, about two CPU minutes; then open demo/index.html
	@OMP_NUM_THREADS=1 $(BIN)/sculpt demo -o demo

test: $(READY)  ## the tests, without the slow ones
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow"

test-all: $(READY)  ## all the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

lint: $(READY)  ## ruff: rules and format
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: $(READY)  ## compositions with exact answers, rivals beside us, on one page in train_state/bench; hours, and goes on where it stopped; PARTS="logic" for some, QUICK=1 for a tiny one
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/bench/page.py $(PARTS) $(if $(QUICK),--quick) --device $(or $(DEVICE),cpu)

bench-diffusion: $(READY)  ## errors against exact targets and cost per step, diffusion
	@$(BIN)/python tests/bench/diffusion.py

bench-gflownet: $(READY)  ## errors against exact targets and cost, GFlowNets
	@$(BIN)/python tests/bench/gflownet.py

bench-molecules: $(READY)  ## quality and speed of the molecule policies and their compositions; PARTS="roads emd" for some
	@$(BIN)/python tests/bench/molecules.py $(PARTS)

bench-factors: $(READY)  ## factors against exact answers: the plane, grids, inpainting, molecules; PARTS="field" for some
	@OMP_NUM_THREADS=1 $(BIN)/python tests/bench/factors.py $(if $(PARTS),--parts $(PARTS))

bench-tokens: $(READY)  ## language models on every road against all sequences, beside generate, and molecules as texts; PARTS="roads" for some
	@OMP_NUM_THREADS=1 $(BIN)/python tests/bench/tokens.py $(if $(PARTS),--parts $(PARTS))

bench-digits: $(READY)  ## compositions of coloured digits by every road: proportions, Frechet distance and cost; hours, and goes on where it stopped
	@OMP_NUM_THREADS=1 $(BIN)/python tests/bench/digits.py

bench-images: $(READY)  ## images without training: fields whose answers are known, one large image, the referee, digits; hours, and goes on where it stopped
	@OMP_NUM_THREADS=1 $(BIN)/python tests/bench/images.py $(PARTS)

bench-pipelines: $(READY)  ## what becomes of every pipeline class of diffusers that can be built from tiny parts, a quarter of an hour; PARTS="FluxPipeline" for some
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/bench/pipelines.py $(PARTS)

bench-verdicts: $(READY)  ## whether error bars of log Z cover and verdicts tell good runs from bad ones; an hour, and goes on where it stopped
	@mkdir -p train_state/verdicts
	@OMP_NUM_THREADS=1 $(BIN)/python tests/bench/coverage.py --file train_state/verdicts/coverage.jsonl
	@OMP_NUM_THREADS=1 $(BIN)/python tests/bench/verdicts.py --runs train_state/verdicts/runs.jsonl

bench-overhead: $(READY)  ## the time outside networks of composed runs; DEVICE=cuda for one of the size of Stable Diffusion 3
	@OMP_NUM_THREADS=1 $(BIN)/python tests/bench/overhead.py --device $(or $(DEVICE),cpu)

docs: $(READY)  ## the site: guides, notebooks as they ran, reference; into docs-html/
	@$(BIN)/python -c 'import furo, importlib, myst_parser; importlib.import_module("sphinx-mathjax-offline")' 2>/dev/null || \
	    $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[docs]'
	@$(BIN)/python -m sphinx -q -W --keep-going -d docs-html/.doctrees .docs docs-html
	@$(BIN)/python .docs/check.py docs-html
	@echo "docs-html/index.html"

clean:  ## remove the environment and everything made by the other targets
	rm -rf .venv build demo docs-html .docs/api .docs/gallery *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pyproject.toml and constraints.txt decide what is installed; an installation that was cut short is done again.
$(READY): pyproject.toml constraints.txt
	@python=$$(for p in $(PYTHON) python3 python3.11 python3.12 python; do \
	    $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done); \
	if [ -z "$$python" ]; then \
	    echo "sculpt needs Python 3.11 or 3.12; found $$(python3 --version 2>&1 || echo none)." >&2; \
	    echo "Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; fi; \
	if ! $(BIN)/python -c 'import sys, pip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then \
	    echo "[1/2] making .venv with $$python"; \
	    $$python -m venv --clear .venv || { echo "Could not make .venv; on Debian and Ubuntu: apt install python3-venv." >&2; exit 1; }; fi
	@echo "[2/2] installing sculpt and what it needs into .venv: minutes the first time, mostly for torch"
	@set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[test]' \
	    | awk '/^Collecting/ {printf "%s ", $$2; fflush()} /^Installing collected/ {print "... unpacking"}'
	@touch $@
