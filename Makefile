# The front door. `make demo` and `make test` do all the set-up on a fresh machine with Python 3 and make.
#
#   PYTHON=python3.12 make test          another interpreter
#   TORCH="torch" make demo              another torch: on a CUDA machine this takes the CUDA build

PYTHON ?= python3
VENV   ?= .venv
# Without CUDA a named version takes the small CPU build where one is on offer; with CUDA the newest is fine.
TORCH  ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo torch || echo torch==2.13.0)

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo demo-full test slow lint docs clean help

help:            ## list the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/: [^#]*## /\t/' | expand -t 14

demo: $(STAMP)   ## base -> excessive SFT -> rejuvenation -> RL on the retail desk: a table, a picture, TensorBoard
	$(BIN)/python -m examples.sft_to_rl.demo $(ARGS)

demo-full: $(STAMP)  ## both tasks, five seeds
	$(BIN)/python -m examples.sft_to_rl.demo --full $(ARGS)

test: $(STAMP) lint  ## the quick tests, doctests, types and style
	$(BIN)/python -m pytest $(ARGS)

slow: $(STAMP)   ## the tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(STAMP)   ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)   ## build the documentation into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html"

clean:           ## remove what was built, but not runs/
	rm -rf $(VENV) site build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@
