# make demo   synthetic scenes -> tiles -> pre-training -> the table that says whether it learned, and a page of pictures
# make test   everything that CI checks
# Each of these first makes .venv (once) from constraints.txt; a fresh machine needs git, make and python3 >= 3.11.
# Another Python: make test PYTHON=python3.13

SHELL  := /bin/sh
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
CHECKS := clean export notebooks lint pytest wheel docs

export OMP_NUM_THREADS ?= 2
export MPLBACKEND ?= agg

.DEFAULT_GOAL := help
.PHONY: help env demo test docs readme lab bench constraints export clean clean-all $(CHECKS:%=check-%)

help:                   ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):[^#]*## */  make \1|/' | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'

$(STAMP): settings.ini setup.py constraints.txt scripts/make_env.py
	@$(PYTHON) scripts/make_env.py $(VENV)

env: $(STAMP)           ## make or refresh .venv

demo: $(STAMP)          ## the whole road on generated scenes: about 10 minutes on 2 cores
	$(BIN)/rs-selfsup demo

test: $(STAMP)          ## what CI runs: all the checks below
	@$(BIN)/python scripts/check.py $(CHECKS)

$(CHECKS:%=check-%): check-%: $(STAMP)
	@$(BIN)/python scripts/check.py $*

docs: $(STAMP)          ## build the documentation into _docs and check its links
	@$(BIN)/python scripts/check.py docs

readme: $(STAMP)        ## README.md from nbs/index.ipynb
	@$(BIN)/python scripts/readme.py

export: $(STAMP)        ## clean the notebooks, export the library, refresh README.md
	@$(BIN)/nbdev_clean
	@$(BIN)/nbdev_export
	@$(BIN)/python scripts/readme.py

lab: $(STAMP)           ## JupyterLab on the notebooks
	cd nbs && ../$(BIN)/jupyter lab

bench: $(STAMP)         ## the measurements
	$(BIN)/rs-selfsup bench

constraints: $(STAMP)   ## resolve constraints.txt again (keeps today's pins where they still fit; --upgrade in UVFLAGS renews)
	$(BIN)/uv pip compile setup.py --extra dev --extra all --python-version 3.11 --no-header --no-annotate \
	  --no-emit-index-url -q $(UVFLAGS) -o constraints.txt

clean:                  ## remove what was built, keep .venv
	rm -rf _proc _docs build dist runs demo_out *.egg-info .pytest_cache .ruff_cache .hypothesis
	find rs_selfsup tests scripts nbs -name __pycache__ -type d -prune -exec rm -rf {} +
	find nbs -name .ipynb_checkpoints -type d -prune -exec rm -rf {} +

clean-all: clean        ## remove .venv too
	rm -rf $(VENV) .venv-wheel
