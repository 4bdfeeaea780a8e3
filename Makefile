# `make` lists the targets. Values may hold spaces: make prep DATA="my documents"
#
# Recipes read the variables from their environment ("$$DATA"), where make puts them, so nothing needs quoting twice;
# only ARGS is pasted as it is, for it holds several arguments.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:
.SUFFIXES:
.PHONY: help quickstart test prep train submit preflight generate evaluate report bench lint format docs clean needs-data needs-run

NUM_GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')

# On a machine without a GPU, the release that is tested there, so that pip does not look for a newer CUDA build.
ifeq ($(NUM_GPUS),0)
TORCH ?= torch==2.13.0
DS_ACCELERATOR ?= cpu
export DS_ACCELERATOR
endif
TORCH ?= torch>=2.11
PYTHON ?= python3

PYTEST_ARGS ?= -m 'not slow'
SPEC ?= quickstart
DS_CONFIG ?= ds_configs/zero3_experts.json
RANKS ?= $(if $(filter-out 0,$(NUM_GPUS)),$(NUM_GPUS),2)
export TORCH PYTHON DATA OUT VOCAB FORMAT WORKERS SPEC DS_CONFIG RANKS NODES GPUS OUTPUT RUN

BIN := .venv/bin
READY := .venv/.ready
# What the environment was made with; another requirement, or a moved checkout, makes it again.
MADE_WITH := $(TORCH) in $(CURDIR)
export MADE_WITH
ifneq ($(shell cat $(READY) 2>/dev/null),$(MADE_WITH))
.PHONY: $(READY)
endif

# A free port, so that several runs can share a machine.
define LAUNCH
port="$${MASTER_PORT:-$$($(BIN)/python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}"
$(BIN)/python -m deepspeed.launcher.runner --quiet --num_gpus "$$RANKS" --master_port "$$port"
endef

help:  ## list the targets
	@echo "usage: make TARGET [NAME=VALUE ...]"
	echo
	sed -nE 's/^([a-z]+):.*  ## (.*)/  \1\t\2/p' Makefile | expand -t 14
	echo
	echo "  TORCH=REQUIREMENT, PYTHON=INTERPRETER   what .venv is made with; now $$TORCH, $$PYTHON"

quickstart: $(READY)  ## from nothing to generated text: data, training on two ranks, generation, report
	@if [[ -e data/quickstart ]]; then
	    echo "--- 1/4 data: data/quickstart exists"
	else
	    echo "--- 1/4 data: Python's standard library, as a code repository"
	    $(BIN)/python -m data_prep build "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')" \
	        --out data/quickstart --format code --vocab 4096 --exclude test --exclude tests --exclude idlelib \
	        --exclude lib2to3 --exclude 'config-*' --exclude lib-dynload --exclude ensurepip --exclude pydoc_data \
	        --exclude encodings --exclude turtledemo
	fi
	echo "--- 2/4 training: $$RANKS ranks, ZeRO-3, experts spread over the ranks"
	$(LAUNCH) launcher/run.py --ds_config ds_configs/zero3_experts.json --spec launcher/specs/quickstart.toml \
	    --data data/quickstart --output runs/quickstart
	echo "--- 3/4 generation: three texts from nothing (the model is tiny: expect the look of code, not code)"
	$(BIN)/mdseq generate runs/quickstart --num 3 --length 96
	echo "--- 4/4 report"
	$(BIN)/mdseq report runs/quickstart
	echo "next: make generate RUN=runs/quickstart ARGS=\"--source 'import os' --num 2\""
	echo "      make prep DATA=PATH_TO_YOUR_DOCUMENTS"
	echo "      make train DATA=data/NAME SPEC=quickstart OUTPUT=runs/NAME"

test: $(READY)  ## what this machine can test in minutes [PYTEST_ARGS="-m slow" for the rest, "tests/data -x" for a part]
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

prep: needs-data $(READY)  ## text to a dataset: DATA=PATH [OUT=DIR] [VOCAB=N] [FORMAT=auto|text|...] [WORKERS=N] [ARGS=...]
	@if [[ -d "$$DATA" ]]; then
	    name="$$(basename -- "$$(cd -- "$$DATA" && pwd)")"
	else
	    name="$$(basename -- "$$DATA")"; name="$${name%.gz}"; name="$${name%.zst}"; name="$${name%.bz2}"; name="$${name%.xz}"
	    name="$${name%.*}"
	fi
	$(BIN)/python -m data_prep build "$$DATA" --out "$${OUT:-data/$$name}" $${FORMAT:+--format "$$FORMAT"} \
	    $${VOCAB:+--vocab "$$VOCAB"} $${WORKERS:+--workers "$$WORKERS"} $(ARGS)

train: $(READY)  ## DATA=DIR [SPEC=quickstart] [DS_CONFIG=JSON] [RANKS=2] [OUTPUT=DIR] [ARGS="section.key=value ..."]
	@$(LAUNCH) launcher/run.py --ds_config "$$DS_CONFIG" --spec "$$SPEC" $${DATA:+--data "$$DATA"} $${OUTPUT:+--output "$$OUTPUT"} $(ARGS)

preflight: $(READY)  ## check every rank before training: [RANKS=2] [DATA=DIR] [OUTPUT=DIR] [ARGS="--json FILE ..."]
	@$(LAUNCH) launcher/preflight.py $${DATA:+--data "$$DATA"} $${OUTPUT:+--output "$$OUTPUT"} $(ARGS)

submit: $(READY)  ## the same as a job of Slurm: NODES=N [GPUS=N of a node], and as train; [ARGS="--print"] shows the script
	@$(BIN)/python -m launcher.slurm --ds_config "$$DS_CONFIG" --spec "$$SPEC" $${NODES:+--nodes "$$NODES"} \
	    $${GPUS:+--gpus "$$GPUS"} $${DATA:+--data "$$DATA"} $${OUTPUT:+--output "$$OUTPUT"} $(ARGS)

generate: needs-run $(READY)  ## text from a trained run: RUN=DIR [ARGS="--source TEXT --num 3 --length 256 --steps 20"]
	@$(BIN)/mdseq generate "$$RUN" $(ARGS)

evaluate: needs-run $(READY)  ## how likely a run finds held-out data: RUN=DIR DATA=DIR [ARGS="--split test --documents 200"]
	@$(BIN)/mdseq evaluate likelihood "$$RUN" $${DATA:+--data "$$DATA"} $(ARGS)

report: needs-run $(READY)  ## summary of a run and a PNG of its curves: RUN=DIR
	@$(BIN)/mdseq report "$$RUN"

bench: $(READY)  ## data, attention, logits, checkpoints, long texts, quality against denoiser calls
	@$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.vocabulary
	$(BIN)/python -m benchmarks.checkpoints
	$(BIN)/python -m benchmarks.generation
	$(BIN)/python -m benchmarks.sampling

lint: $(READY)  ## ruff and mypy
	@$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY)  ## let ruff lay out the code
	@$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(READY)  ## write docs/run_spec.md and docs/prep_spec.md from the specs
	@$(BIN)/python docs/generate_specs.py

clean:  ## remove .venv and caches; data/ and runs/ stay
	@rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find mdseq data_prep launcher tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

needs-data:
	@[[ -n "$$DATA" ]] || { echo 'give DATA=PATH, a file or a folder of text: make prep DATA="my documents"' >&2; exit 2; }

needs-run:
	@[[ -n "$$RUN" ]] || { echo "give RUN=DIR, a run folder: RUN=runs/quickstart" >&2; exit 2; }

# Made from nothing unless it was once made whole: an installation that was interrupted is not repaired in place.
$(READY): pyproject.toml
	@command -v "$$PYTHON" >/dev/null || { echo "no $$PYTHON here; give an interpreter: make ... PYTHON=python3.12" >&2; exit 2; }
	"$$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
	    echo "$$("$$PYTHON" --version) is too old, mdseq needs 3.11 or newer: make ... PYTHON=python3.12" >&2; exit 2; }
	if [[ "$$(cat $(READY) 2>/dev/null || true)" != "$$MADE_WITH" ]]; then
	    echo "making .venv with $$("$$PYTHON" --version)"
	    rm -rf .venv
	    "$$PYTHON" -m venv .venv
	fi
	rm -f $(READY)
	echo "installing $$TORCH"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$TORCH"
	echo "installing mdseq and what it needs, with the tools for its tests (about a minute)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	printf '%s\n' "$$MADE_WITH" > $(READY)
