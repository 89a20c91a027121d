# Everything from a fresh machine with Python 3.11 alone; the virtual environment is made on the way.
#   make quickstart   train a teacher, dump it, train two students, print the table   (about 8 minutes on 2 cores)
#   make test         the fast tests
#   make check        ruff, pyright and the fast tests
#   make test-full    the long matrices as well
#   make bench-codec  how small a dataset is and how fast; ARGS="--logits FILE.npz" for a real teacher's
#   make bench-loss   what the loss costs in time and memory beside rivals; ARGS="--shape N,D,V,dtype" for another size
#   make bench-train  what a step with distillation costs beside one without
#   make bench-sampling  bytes and gradient noise of sampled teachers, beside RS-KD's
#   make bench-text   how fast text becomes rows; ARGS="--tokenizer FOLDER --files FILE…" for real ones
# Where PyPI's torch would bring CUDA along: make … PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test check lint test-full bench-codec bench-loss bench-train bench-sampling bench-text install clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS) -e '.[torch,dev]'
	touch $@

quickstart: install
	$(BIN)/python examples/quickstart/run.py

test: install
	$(BIN)/python -m pytest -n auto -m "not full"

test-full: install
	$(BIN)/python -m pytest -n auto

bench-codec: install
	$(BIN)/python -m tests.bench.codec $(ARGS)

bench-loss: install
	$(BIN)/python -m tests.bench.loss $(ARGS)

bench-train: install
	$(BIN)/python -m tests.bench.train $(ARGS)

bench-sampling: install
	$(BIN)/python -m tests.bench.sampling $(ARGS)

bench-text: install
	$(BIN)/python -m tests.bench.text $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

check: lint test

clean:
	rm -rf build dist
