# `make ladder` and `make test` need only make and Python >= 3.11; the rest is set up on first use.

PYTHON ?= python3.13 python3.12 python3.11 python3
VENV   := .venv
STAMP  := $(VENV)/.installed
BIN    := $(VENV)/bin
TYPES  := build/types
PARTS  := quant models pipeline flows

export PREFECT_SERVER_ANALYTICS_ENABLED = false
export DO_NOT_TRACK = 1

.DEFAULT_GOAL := help
.PHONY: help setup ladder test lint style typecheck docs site clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

setup: $(STAMP)  ## make .venv with everything in it (the other targets do so by themselves)

ladder: $(STAMP)  ## run the embedded ladder, FP32 -> 8 -> 4 -> 2 -> 1 bit, and show its table
	@$(BIN)/bitladder run digits

# Two processes of one thread each: most tests are too small for more, and take turns in a file.
# In the order of the files, which has the long ones first.
test: $(STAMP)  ## run the tests; ARGS="-k lsq" chooses
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: style typecheck  ## check style, format and types

style: $(STAMP)  ## check style and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# The folders import as bitladder.*, so mypy reads them through a tree of links of that shape.
typecheck: $(STAMP)  ## check types
	@mkdir -p $(TYPES)/bitladder
	@for part in $(PARTS); do ln -sfn ../../../$$part $(TYPES)/bitladder/$$part; done
	@MYPYPATH=$(TYPES) $(BIN)/mypy $(PARTS:%=-p bitladder.%)

docs: $(STAMP)  ## write docs/quantizers.md and docs/reference anew from the code
	@mkdir -p docs build
	@$(BIN)/bitladder components quantizers --format markdown > build/quantizers.md
	@mv build/quantizers.md docs/quantizers.md
	@$(BIN)/python docs/make_reference.py

site: $(STAMP)  ## make a site of docs in build/site, with Sphinx; any warning fails
	@$(BIN)/sphinx-build --version > /dev/null 2>&1 || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	@$(BIN)/sphinx-build -q -W --keep-going -b html docs build/site
	@echo build/site/index.html

clean:  ## remove caches and build files; .venv and artifacts stay
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find $(PARTS) tests benchmarks -name __pycache__ -type d -exec rm -rf {} +

# Prefect's database takes 15 s to make, so it is made here, not in the first ladder.
# The stamp is written last: an installation that broke off is taken up again, a finished one kept.
$(STAMP): pyproject.toml
	@$(BIN)/python -c pass 2>/dev/null || { \
	  for python in $(PYTHON); do \
	    "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	      2>/dev/null && break; \
	    python=; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "bitladder needs Python 3.11 or newer with its venv module; tried: $(PYTHON)" >&2; \
	    echo "python3 is: $$(python3 --version 2>&1 || true)" >&2; \
	    echo "On Debian and Ubuntu: apt install python3 python3-venv." >&2; \
	    echo "If it stands elsewhere: make PYTHON=/path/to/python3.12" >&2; \
	    exit 1; \
	  fi; \
	  "$$python" -m venv --clear $(VENV); \
	}
	@echo "installing into $(VENV), about 6 GB, once"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@$(BIN)/python -m bitladder.flows.prefect_server prepare
	@touch $(STAMP)
