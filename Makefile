# Each target makes its own virtual environment in .venv first: python3 (3.11 or newer) and make are enough.
# Another interpreter: make demo PYTHON=/path/to/python. More pytest arguments: make test ARGS="-k sampler".
.PHONY: demo test test-long lint format proto clean help
PYTHON ?=
ARGS ?=
# Processes that share out the test files; 0: none, for pytest -s, --pdb and the like
WORKERS ?= 2
PY = .venv/bin/python
VENV = PYTHON="$(PYTHON)" sh deploy/venv.sh

help:
	@echo "make demo       three nodes on this machine, one streamed answer, and what each node loaded"
	@echo "make test       the tests"
	@echo "make test-long  the tests that take minutes"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff format the code"
	@echo "make proto      generate proto/*_pb2* from proto/*.proto"
	@echo "make clean      remove .venv and all caches"

demo:
	@$(VENV)
	@$(PY) -m deploy.demo.run $(ARGS)

test:
	@$(VENV) dev
	@$(PY) -m pytest -m "not long" -n $(WORKERS) --dist loadfile $(ARGS)

test-long:
	@$(VENV) dev,long
	@$(PY) -m pytest -m long $(ARGS)

lint:
	@$(VENV) dev
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format:
	@$(VENV) dev
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

proto:
	@$(VENV) dev
	@$(PY) -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. proto/ring.proto proto/control.proto proto/head.proto proto/trace.proto

clean:
	rm -rf .venv build dist macrame.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
