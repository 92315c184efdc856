# Thin names for the commands in the README. PYTHON chooses the interpreter that makes the virtual environment.
PYTHON ?= python3
BIN := .venv/bin

# Runs of `make pipeline`: a folder for each time it is called.
PIPELINE := pipeline/$(shell date +%Y%m%d-%H%M%S)
SMALL := --dataset synthetic --project_name $(PIPELINE)

.PHONY: train pipeline test test-fast lint clean

train: .venv/run.stamp
	$(BIN)/python run_training.py --dataset synthetic --n_epochs 15 --batch_size 64 --lr 0.003 --warm_up_len 2 --ramp_down_start 5 --ramp_down_len 9 --eval_every 5

# A teacher, its logits, a student that learns from them, the student in 8 bits, and its files with a parity report.
pipeline: .venv/run.stamp
	$(BIN)/python run_training.py --config recipes/cp_resnet.yaml $(SMALL) --run_id teacher --logger none --cropped --n_epochs 60 --batch_size 64 --lr 0.003 --warm_up_len 4 --ramp_down_start 20 --ramp_down_len 38 --eval_every 20
	$(BIN)/python run_teacher_logits.py $(SMALL) --teachers teacher --output $(PIPELINE)/teacher_logits.pt
	$(BIN)/python run_training.py $(SMALL) --run_id student --logger none --teacher_logits $(PIPELINE)/teacher_logits.pt --base_channels 16 --channels_multiplier 1.5 --expansion_rate 1.8 --n_epochs 30 --batch_size 64 --lr 0.003 --warm_up_len 3 --ramp_down_start 10 --ramp_down_len 19 --eval_every 10
	$(BIN)/python run_qat.py $(SMALL) --run_id int8 --logger none --wandb_id student --teacher_logits $(PIPELINE)/teacher_logits.pt --n_epochs 5 --freeze_params_epochs 2 --batch_size 64 --lr 1e-4 --ramp_down_len 4 --eval_every 5
	$(BIN)/python run_export.py $(SMALL) --wandb_id int8 --enforce_limits

test: .venv/dev.stamp lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# What one core does while one works: all but scripts run end to end, files written and processes started.
test-fast: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 -q -m "not slow"

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
