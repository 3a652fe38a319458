# `make` lists the targets. Needed: Python 3.11 or newer with venv, git, make. No GPU, no hub, no account.

PYTHON ?= python3
VENV ?= .venv
# An additional package index to look for torch in. On a machine without a GPU the official CPU build saves gigabytes:
#   make demo TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
TORCH_INDEX_URL ?=
SEEDS ?= 0 1 2 3 4
# More words for pytest, such as PYTEST_ARGS="-k dpo -x".
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# One empty file per finished installation step: while pyproject.toml and constraints.txt stay as they are, no step runs
# twice. They lie inside the environment and go when it goes.
STAMPS := $(VENV)/.stamps

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-fast lint format seeds bench bench-rl bench-ppo bench-vlm closed-form torture bugzoo clean

help:  ## list the targets
	@echo "make <target>, where target is one of"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-12s%s\n", $$1, $$2 }'
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH_INDEX_URL=$(TORCH_INDEX_URL) SEEDS=\"$(SEEDS)\""

demo: $(STAMPS)/base  ## install, then train a tiny model with DPO and show what it learned
	$(PY) run.py --module dpo --toy

test: $(STAMPS)/test  ## run all tests
	$(PY) -m pytest -q $(PYTEST_ARGS)

test-fast: $(STAMPS)/test  ## run the tests that train nothing
	$(PY) -m pytest -q -m "not slow" $(PYTEST_ARGS)

lint: $(STAMPS)/dev  ## check style, formatting and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMPS)/dev  ## rewrite the code in the house format
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

seeds: $(STAMPS)/base  ## run the toy recipes with several seeds (SEEDS="0 1 2 3 4")
	$(PY) benchmarks/seeds.py --seeds $(SEEDS)

bench: $(STAMPS)/base  ## compare with plain TRL: training time and losses, and preparing a million rows
	$(PY) benchmarks/wrapper_overhead.py
	$(PY) benchmarks/data_scale.py

bench-rl: $(STAMPS)/base  ## compare the RL lessons with quantecon, torchrl and d3rlpy
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(PY) benchmarks/rl.py

bench-ppo: $(STAMPS)/base  ## compare PPOTrainer with TRL 1.12's: speed, reward, memory
	$(PY) benchmarks/ppo.py

bench-vlm: $(STAMPS)/base  ## time the vision modules against plain loops; what BLIP-2's first stage buys
	OMP_NUM_THREADS=1 $(PY) benchmarks/vlm.py

bugzoo: $(STAMPS)/base  ## run every bug of the bug zoo and see that its marks tell it from a healthy run
	$(PY) benchmarks/bugzoo.py --seeds $(SEEDS)

closed-form: $(STAMPS)/base  ## train PPO, GRPO and DPO on a problem whose optimum is known exactly
	OMP_NUM_THREADS=1 $(PY) benchmarks/closed_form.py --seeds $(SEEDS)

torture: $(STAMPS)/base  ## kill runs at random moments, resume them, compare with uninterrupted ones
	$(PY) benchmarks/kill_resume.py

clean:  ## remove builds and caches; keep the environment and output/
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path './.?*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@command -v "$(PYTHON)" >/dev/null || { echo "make: '$(PYTHON)' not found: install Python 3.11 or newer, or name yours: make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: LLM-Core needs Python 3.11 or newer, but '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1); name another one: make PYTHON=python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' || { echo "make: '$(PYTHON)' lacks the venv module: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	"$(PYTHON)" -m venv "$(VENV)"

# torch first and by itself, pinned: asked for as `torch==2.13.0`, pip takes the CPU wheel wherever one is on offer.
$(STAMPS)/torch: constraints.txt | $(PY)
	$(PIP) install -c constraints.txt $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) torch
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/base: $(STAMPS)/torch pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(STAMPS)/test: $(STAMPS)/torch pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e ".[test]"
	@touch $(STAMPS)/base $@

$(STAMPS)/dev: $(STAMPS)/torch pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $(STAMPS)/base $(STAMPS)/test $@
