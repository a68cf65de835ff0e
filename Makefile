# Everything runs from .venv, which make creates and keeps in step with pyproject.toml and constraints.txt.

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install -qq --disable-pip-version-check --constraint constraints.txt
ARGS ?=

# The first Python that runs (a version manager's shim may not) and is fit. Another: make PYTHON=/path/to/python
FIT := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
	$$python -c '$(FIT)' >/dev/null 2>&1 && { echo $$python; break; }; done)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help train test check bench clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'

train: $(VENV)/.run  ## train the default model; other settings: make train ARGS="model=tiny_dense train.steps=100"
	@$(RUN) train.py $(ARGS)

test: $(VENV)/.dev  ## run all tests; some of them: make test ARGS="tests/spec -k pattern"
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile $(ARGS)

check: $(VENV)/.dev  ## lint, formatting, types and spelling
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy zoo train.py
	@$(VENV)/bin/codespell

bench: $(VENV)/.dev  ## measure the claims on this machine
	@$(RUN) -m benchmarks $(ARGS)

clean:  ## remove caches and build products; .venv and outputs stay
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# .run: what training needs. .dev: all of that, and what tests and checks need.
$(VENV)/.run: pyproject.toml setup.py constraints.txt $(VENV)/pyvenv.cfg
	$(call install,.)
	@touch $@

$(VENV)/.dev: pyproject.toml setup.py constraints.txt $(VENV)/pyvenv.cfg
	$(call install,.[dev$(COMMA)data])
	@touch $(VENV)/.run $@

$(VENV)/pyvenv.cfg:
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(FIT)' || { echo "zoo needs Python 3.11, 3.12 or 3.13 with venv and pip;" \
		"found: $(or $(PYTHON),none). Name one: make PYTHON=/path/to/python" >&2; exit 2; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)

# Torch goes first, alone, so that the later step finds it in place. Builds use the pinned setuptools of .venv, not an
# environment of their own, which would fetch whatever is newest.
COMMA := ,
define install
	@echo "Installing PyTorch into $(VENV), by far the largest part: 1 to 5 minutes the first time"
	@$(PIP) setuptools wheel "$$(grep '^torch==' constraints.txt)"
	@echo "Installing zoo and what it needs: 1 to 2 minutes the first time"
	@$(PIP) --no-build-isolation --editable "$(1)"
endef
