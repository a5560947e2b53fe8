# `make demo` and `make test` set up .venv when it is missing; after that they need no network.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench-live demo-model clean

demo: .venv/installed
	$(BIN)/lmprobe-tl demo

test: .venv/installed-dev
	$(BIN)/python -m pytest

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What live scoring costs, against bare steps; half an hour on two cores. Leave the machine alone meanwhile.
bench-live: .venv/installed
	$(BIN)/python -m benchmarks.bench_live

# Trains the embedded model anew: about an hour on two cores.
demo-model: .venv/installed
	$(BIN)/python -m lmprobe_tl.demo.train_model --out lmprobe_tl/demo/stdlib-llama-3m --work build/demo-model

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lmprobe-tl needs Python 3.11 or later; '$(PYTHON)' is older. Run: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	@touch $@

.venv/installed: .venv/created pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean:
	rm -rf .venv build lmprobe-demo
