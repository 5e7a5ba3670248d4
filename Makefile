# One command each for people and CI. `make` lists them.
PYTHON ?= python3
BIN := .venv/bin
# What torch's CUDA build brings along. The CPU build has none, and it is too large to install for everyone.
TRITON := triton==3.7.1

.PHONY: help setup demo serve-demo test check kernels unit format proto bench bench-peers rehearsal docs clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv with the right torch build (quick when nothing changed)
	@$(PYTHON) deploy/set_up.py

demo: setup ## three nodes on this machine, one model, one answer
	@$(BIN)/potluck demo

serve-demo: setup ## the same, left running on port 8000 until Ctrl-C
	@$(BIN)/potluck demo --keep --port 8000

test: export OMP_NUM_THREADS = 1
test: setup ## every test (minutes)
	@$(BIN)/python -m pytest --durations=10

check: setup ## format, lint, types, import contracts, proto drift, unit tests (under a minute)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python deploy/proto_drift.py
	@$(BIN)/python -m pytest tests/unit -q

kernels: export OMP_NUM_THREADS = 1
kernels: export PYTHONPATH = build/triton
kernels: export TRITON_CACHE_DIR = build/triton-cache
kernels: setup ## the GPU kernels by Triton's interpreter and compiler, no GPU needed (Linux; 690 MB on first use)
	@test -d build/triton || $(BIN)/python -m pip install --quiet --target build/triton --no-deps $(TRITON)
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/oracle/test_ragged.py
	@$(BIN)/python -m pytest -q tests/oracle/test_ragged_compiled.py

unit: setup ## the unit tests alone (seconds)
	@$(BIN)/python -m pytest tests/unit -q

format: setup ## format and fix what can be fixed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

proto: setup ## generate cluster/wire/ from proto/
	@$(BIN)/python deploy/proto_drift.py --write

bench: export OMP_NUM_THREADS = 1
bench: setup ## measure the targets on this machine and write docs/benchmarks.md (over an hour; BENCH=--quick: fewer)
	@$(BIN)/python -m tests.bench $(BENCH)

bench-peers: export OMP_NUM_THREADS = 1
bench-peers: setup ## the same with llama.cpp beside it, which is built first, once
	@$(BIN)/python -m tests.bench --peers $(BENCH)

rehearsal: export OMP_NUM_THREADS = 1
rehearsal: setup ## 8 billion parameters over nodes of 7 GiB (as root), then 200 plans at the edge of their memory (an hour)
	@$(BIN)/python -m tests.integration.size_rehearsal
	@$(BIN)/python -m tests.oracle.memory_edges 200

docs: export OMP_NUM_THREADS = 1
docs: setup ## run the oracle tests and write what they show to docs/models.md (minutes)
	@rm -f docs/models.json
	@$(BIN)/python -m pytest tests/oracle -q -p tests.oracle.recording --shown docs/models.json
	@$(BIN)/python deploy/models_page.py --write

clean: ## remove the environment and caches
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
