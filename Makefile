# `make demo` and `make test` each work on a bare machine: scripts/bootstrap.py makes .venv, scripts/tasks.py runs the
# task in it. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
TASKS := demo test lint examples cpp test-triton-floor

.PHONY: help clean $(TASKS)

help:
	@echo "make demo               set up .venv and run examples/generate.py"
	@echo "make test               set up .venv and run the tests (GPU tests too where there is a CUDA GPU)"
	@echo "make lint               ruff check, ruff format --check, mypy"
	@echo "make examples           run every file in examples/ with small settings"
	@echo "make cpp                build the C++ library and the runner of packages into build/cpp"
	@echo "make test-triton-floor  run the compile and interpreter tests with the oldest supported Triton"
	@echo "make clean              remove .venv, caches and build results"
	@echo "Add PYTHON=python3.12 to choose the interpreter (3.10 or newer)."

$(TASKS):
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" 2>/dev/null || { echo "error: '$(PYTHON)' is not a working Python 3.10 or newer: install one, or name one: make $@ PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) scripts/bootstrap.py $@
	@.venv/bin/python scripts/tasks.py $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
