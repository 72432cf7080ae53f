# Two commands matter: `make demo` and `make test`. Both install what they need into .venv.
#
#   PYTHON             the interpreter that makes .venv (3.11 or newer)
#   TORCH_CONSTRAINTS  a constraints file that pins torch; the default is the CPU build of constraints.txt
#   PIP_ARGS           extra pip arguments, e.g. an index that serves the torch build you want

PYTHON ?= python3
TORCH_CONSTRAINTS ?= constraints.txt
PIP_ARGS ?=
PYTEST_ARGS ?=
PEERS_ARGS ?=
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install demo test test-postgres test-slow nightly benchmark-peers check format openapi clean

install: .venv/installed

.venv/installed: pyproject.toml $(TORCH_CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bitplan needs Python 3.11 or newer. Got %s. Run: make PYTHON=python3.11 ..." % sys.version.split()[0])'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(TORCH_CONSTRAINTS) $(PIP_ARGS) -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/python examples/demo.py

test: install
	$(BIN)/pytest -n 2 --dist loadfile -m "not postgres and not slow and not nightly" $(PYTEST_ARGS)

test-postgres: install
	$(BIN)/pytest -n 2 --dist loadfile -m "postgres and not nightly" $(PYTEST_ARGS)

test-slow: install
	$(BIN)/pytest -n 1 -m "slow and not postgres and not nightly" $(PYTEST_ARGS)

nightly: install
	$(BIN)/pytest -m nightly --timeout 7200 $(PYTEST_ARGS)

benchmark-peers: install
	$(BIN)/python benchmarks/peer_plans.py $(PEERS_ARGS)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

openapi: install
	$(BIN)/python -m service.api.openapi docs/openapi.json

clean:
	rm -rf .venv .demo build dist
