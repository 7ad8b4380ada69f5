# `make help` lists what there is. Everything is installed into .venv, from PyPI or what pip is set up to use.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# More arguments for pytest: make test ARGS='-k bundle'
ARGS ?=

CHECKPOINT := meta_deploy/assets/meta-nano-mask-rcnn.pth
PICTURE := meta_deploy/assets/images/fluorescence-1.png

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL: # one pip at a time in one environment
.PHONY: help demo test lint format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.export ## export the demo checkpoint and find the nuclei in a picture with it
	$(BIN)/meta-export --ckpt $(CHECKPOINT) --out build/demo
	$(BIN)/meta-infer $(PICTURE) --model build/demo --out build/overlays
	@echo "The overlay: $(CURDIR)/build/overlays/$(basename $(notdir $(PICTURE)))-overlay.png"

test: lint ## ruff, mypy and all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## rewrite the sources as ruff wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what was built, and caches; the environment stays
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The environment. A stamp says for which pyproject.toml it was last brought up to date.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed, \
	this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv --clear $(VENV)

$(VENV)/.export: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --editable '.[export]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --editable '.[dev]'
	@touch $@ $(VENV)/.export # which is part of it
