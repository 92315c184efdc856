# Thin names for the commands in the README. PYTHON chooses the interpreter that makes the virtual environment.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test lint clean

train: .venv/run.stamp
	$(BIN)/python run_training.py --dataset synthetic --n_epochs 15 --batch_size 64 --lr 0.003 --warm_up_len 2 --ramp_down_start 5 --ramp_down_len 9 --eval_every 5

test: .venv/dev.stamp lint
	$(BIN)/python -m pytest

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv

.venv/run.stamp: .venv/bin/python requirements.txt $(wildcard setup/torchaudio_cpu/*)
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

.venv/dev.stamp: .venv/bin/python requirements.txt requirements-dev.txt $(wildcard setup/torchaudio_cpu/*)
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@ .venv/run.stamp

clean:
	rm -rf .venv .pytest_cache .ruff_cache
