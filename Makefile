# Two commands: `make book` and `make test`. Each first makes, or brings up to date, a virtual environment in .venv.
#
#   make book PROFILE=smoke      smoke (minutes), laptop (the default) or paper (a data-centre GPU)
#   make test PYTHON=python3.12  the Python that a new environment is made from

PYTHON ?= python3
PROFILE ?= laptop
BIN := .venv/bin
READY := .venv/.ready
SCALE := .venv/.scale

# Threads that wait must not spin: they would take a core from those that work.
export OMP_WAIT_POLICY := PASSIVE

ifeq ($(filter $(PROFILE),smoke laptop paper),)
$(error unknown PROFILE '$(PROFILE)'; choose one of: smoke, laptop, paper)
endif

.PHONY: help book test parity lab clean

help:
	@echo "make book [PROFILE=smoke|laptop|paper]  run every chapter and build the book in _build/html"
	@echo "make test                               lint, then every test, the smoke book among them"
	@echo "make parity                             compare the scan and the block with mamba-ssm itself (Linux)"
	@echo "make lab                                open the chapters in JupyterLab"
	@echo "make clean                              remove the built book and caches; runs/ and .venv stay"

book: $(READY)
	@$(BIN)/python -m adbook book --profile $(PROFILE)

test: $(SCALE)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/python -m pytest

parity: .parity/.ready
	@PYTHONPATH=.parity $(BIN)/python -m pytest tests/parity_mamba_ssm.py

lab: $(READY)
	@$(BIN)/jupyter lab notebooks

clean:
	rm -rf _build .parity .pytest_cache .ruff_cache .hypothesis

# Anew when the pins or the package's own metadata change; the sources are used in place. PyTorch goes first, alone and
# pinned, so that pip takes a CPU build where one is offered.
$(READY): requirements.txt pyproject.toml | $(BIN)/python
	@echo "Installing PyTorch into .venv (once; minutes)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	@echo "Installing the rest of requirements.txt"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -e .
	@touch $@

# `--clear` matters after the Python that an environment was made from has gone.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "adbook needs Python 3.11 or later, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 | head -n 1)" >&2; \
	  echo "Install one, and name it: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear .venv || { rm -f $@; exit 1; }

$(SCALE): requirements-scale.txt $(READY)
	@echo "Installing EnvPool, Ray and Dask, for the tests of generating histories"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements-scale.txt
	@touch $@

# mamba-ssm builds against the PyTorch that is there, here without its CUDA kernels.
.parity/.ready: requirements-parity.txt $(READY)
	@echo "Installing mamba-ssm, without kernels, into .parity"
	@rm -rf .parity
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --target .parity packaging setuptools wheel
	@MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE PYTHONPATH=.parity $(BIN)/python -m pip install -qq \
	  --disable-pip-version-check --no-deps --no-build-isolation --target .parity -r requirements-parity.txt
	@touch $@
