# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo serve-demo test real test-quick docs fuzz check lint format clean
.DEFAULT_GOAL := help

help: ## show what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

# a stamp, so that the set-up runs again when what it depends on has changed
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "dartprune needs Python 3.10 or newer; name one with make PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(READY) ## decode texts that change their topic: dense, static, DART
	$(BIN)/dartprune demo --out out

serve-demo: $(READY) ## serve the model inside, stream a completion from it, and stop it again
	$(BIN)/python tools/serve_demo.py

# a process for each core, in which torch has one thread; whoever is done takes over from the others
PARALLEL := -n auto --dist worksteal

test: $(READY) lint ## check style and types, then run all tests
	$(BIN)/python -m pytest $(PARALLEL)

test-quick: $(READY) ## run the tests that take no second (tests/slow.txt names the others)
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

SECONDS := 180
SEED := 0

docs: $(READY) ## build the documentation's site into out/site; broken links are errors
	$(BIN)/mkdocs build --strict --quiet

fuzz: $(READY) ## try random pruners, families and calls against oracles (SEED=0 SECONDS=180)
	PYTHONPATH=tests $(BIN)/python tests/fuzz.py --seed $(SEED) --seconds $(SECONDS)

real: $(READY) ## the tests on a real pretrained model (100 MB are fetched), and the demo on it
	$(BIN)/python -m pytest -m real
	$(BIN)/dartprune demo --model smollm2 --sparsity 0.5 --out out

check: lint ## the same as lint: no test is run

lint: $(READY) ## check style and types
	$(BIN)/ruff check src tests benchmarks tools
	$(BIN)/ruff format --check src tests benchmarks tools
	$(BIN)/mypy

format: $(READY) ## put the style right
	$(BIN)/ruff check --fix src tests benchmarks tools
	$(BIN)/ruff format src tests benchmarks tools

clean: ## remove what was made, the virtual environment too
	rm -rf $(VENV) out dist build .pytest_cache .mypy_cache .ruff_cache
