# One command each; `make help` lists them. Everything runs in .venv, which the first command makes.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# PYTHON=/path/to/python3.11 chooses the interpreter; by default tools/setup_env.sh finds one.
export PYTHON

.PHONY: help setup quickstart sft-quickstart rl-quickstart rl-evidence test test-all lint clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name text; do \
		printf '  make %-14s %s\n' "$$name" "$$text"; done

setup: $(STAMP) ## make .venv: CPU torch, or CUDA torch where nvidia-smi finds a GPU
	@:

$(STAMP): setup.py pyproject.toml constraints-cpu.txt tools/setup_env.sh
	@tools/setup_env.sh $(VENV)
	@touch $@

quickstart: $(STAMP) ## draw images, train the tiny model on 4 CPU ranks, score it (about 7 minutes)
	@$(PY) examples/quickstart/quickstart.py $(ARGS)

sft-quickstart: $(STAMP) ## fine-tune the quickstart's model in two stages on 4 CPU ranks, score it again
	@$(PY) examples/sft/quickstart/sft_quickstart.py $(ARGS)

rl-quickstart: $(STAMP) ## reinforce the quickstart's model by verified rewards (PPO with a critic) on 2 CPU ranks
	@$(PY) examples/rl/rl_quickstart.py $(ARGS)

rl-evidence: $(STAMP) ## the same on three seeds and with shuffled rewards; rewrites the table in docs/rl.md
	@$(PY) examples/rl/rl_evidence.py $(ARGS)

test: $(STAMP) ## the tests of every change: no GPU, nothing slow
	@$(PY) -m pytest -m 'not gpu and not slow' -rs --durations=15 $(ARGS)

test-all: $(STAMP) ## also the slow ones: every parallel layout; and the GPU ones where there is a GPU
	@$(PY) -m pytest -rs --durations=15 $(ARGS)

lint: $(STAMP) ## ruff, if installed: .venv/bin/pip install ruff
	@$(PY) -m ruff check .

clean: ## remove .venv, caches and the quickstarts' runs
	rm -rf $(VENV) runs/quickstart runs/sft_quickstart runs/rl_quickstart build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
