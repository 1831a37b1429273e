# make demo  installs and pretrains a tiny model on sample photographs, a few minutes on a CPU
# make demo-detect  the same for a detector, on generated scenes
# make demo-segment  the same for a segmenter
# make test  installs and runs linters and tests
# make test-lowest  the same, but for types, with the lowest versions of all dependencies that pyproject.toml admits
# make bench times a training step against the published formulation

PYTHON ?= python3
BIN := .venv/bin

NOW := $(shell date +%Y%m%d-%H%M%S)
DEMO = runs/$@-$(NOW)

# Extras that the tests need.
EXTRAS := demo,shards,hub,tfds,parquet,export,bands,wandb,detection,test,lint

.PHONY: demo demo-detect demo-segment types test test-lowest bench clean

demo: .venv/installed
	$(BIN)/convmae pretrain --config demo --output runs/demo-$$(date +%Y%m%d-%H%M%S)

demo-detect: .venv/installed
	$(BIN)/convmae scenes --output $(DEMO)/scenes
	$(BIN)/convmae pretrain --config demo --data $(DEMO)/scenes/train2017 --epochs 10 --optimizer.warmup-epochs 2 \
		--output $(DEMO)/pretrained
	$(BIN)/convmae detect train --config detect_demo --data $(DEMO)/scenes --weights $(DEMO)/pretrained \
		--output $(DEMO)/detector
	$(BIN)/convmae detect predict --images $(DEMO)/scenes/val2017 --weights $(DEMO)/detector --draw 10 \
		--output $(DEMO)/predictions

demo-segment: .venv/installed
	$(BIN)/convmae scenes --layout ade20k --output $(DEMO)/scenes
	$(BIN)/convmae pretrain --config demo --data $(DEMO)/scenes/images/training --epochs 10 --optimizer.warmup-epochs 2 \
		--output $(DEMO)/pretrained
	$(BIN)/convmae segment train --config segment_demo --data $(DEMO)/scenes --weights $(DEMO)/pretrained \
		--output $(DEMO)/segmenter
	$(BIN)/convmae segment predict --images $(DEMO)/scenes/images/validation --weights $(DEMO)/segmenter --draw 10 \
		--output $(DEMO)/predictions

test-lowest: BIN := .venv-lowest/bin
test-lowest: .venv-lowest/installed-for-tests
# Types are checked with the newest versions only: older releases declare fewer, and others.
types: .venv/installed-for-tests
	$(BIN)/mypy

test: .venv/installed-for-tests types
test test-lowest:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

bench: .venv/installed
	$(BIN)/convmae bench

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[demo,detection]'
	touch $@

.venv/installed-for-tests: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@ .venv/installed

.venv-lowest/installed-for-tests: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --upgrade pip
	.venv-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf .venv .venv-lowest build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
