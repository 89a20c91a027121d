# Everything from a fresh machine with Python 3.11 alone; the virtual environment is made on the way.
#   make quickstart   train a teacher, dump it, train two students, print the table   (4 to 9 minutes on 2 cores)
#   make test         the fast tests
#   make test-cluster  real Ray on this machine, a real S3 server process, a disk that is full
#   make test-vllm    the real vLLM on the CPU, in an environment of its own, kept by the digest of constraints-vllm.txt
#   make check        ruff, pyright and the fast tests
#   make test-full    the long matrices as well
#   make pictures     those of the guides, from the quickstart's dataset and runs; needs Chromium
#   make docs         a page for every public function, in build/docs
#   make bench-codec  how small a dataset is and how fast; ARGS="--logits FILE.npz" for a real teacher's
#   make bench-dump   positions per second into a sealed dataset, by vLLM and transformers, beside the bare engines
#   make bench-loss   what the loss costs in time and memory beside rivals; ARGS="--shape N,D,V,dtype" for another size
#   make bench-kills ARGS="dump.yaml --folder NEW"   a dump killed at random ten times, beside the same dump left alone
#   make bench-loader  what the student's stream delivers, how well it mixes, how long a student waits for it
#   make bench-resume ARGS="train.yaml --folder NEW"   a training run stopped at random steps, beside one left alone
#   make bench-train  what a step with distillation costs beside one without
#   make bench-sampling  bytes and gradient noise of sampled teachers, beside RS-KD's
#   make bench-text   how fast text becomes rows; ARGS="--tokenizer FOLDER --files FILE…" for real ones
# Where PyPI's torch would bring CUDA along: make … PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
CACHE := $(or $(XDG_CACHE_HOME),$(if $(HOME),$(HOME),$(CURDIR))/.cache)/logitferry
VLLM_VENV := $(CACHE)/vllm-$(shell sha256sum constraints-vllm.txt | cut -c1-16)
VLLM_PYTHON := PYTHONPATH=$(CURDIR) $(VLLM_VENV)/bin/python

.PHONY: quickstart test test-cluster test-vllm bench-dump bench-kills check lint test-full bench-codec bench-loss bench-loader bench-resume bench-train bench-sampling bench-text docs pictures install clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS) -e '.[torch,dev]'
	touch $@

quickstart: install
	$(BIN)/python examples/quickstart/run.py

test: install
	$(BIN)/python -m pytest -n auto -m "not full and not vllm and not cluster"

test-full: install
	$(BIN)/python -m pytest -n auto -m "not vllm"

test-cluster: install
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "cluster and not full"

$(VLLM_VENV)/installed: constraints-vllm.txt
	rm -rf $(VLLM_VENV)
	mkdir -p $(CACHE)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(PIP_ARGS) -r constraints-vllm.txt
	touch $@

test-vllm: $(VLLM_VENV)/installed
	$(VLLM_PYTHON) -m pytest -m vllm tests/teacher_dump tests/student_train/rollout

pictures: install
	$(BIN)/python examples/pictures.py

bench-dump: install $(VLLM_VENV)/installed
	$(VLLM_PYTHON) -m tests.bench.dump $(ARGS)

bench-codec: install
	$(BIN)/python -m tests.bench.codec $(ARGS)

bench-loss: install
	$(BIN)/python -m tests.bench.loss $(ARGS)

bench-train: install
	$(BIN)/python -m tests.bench.train $(ARGS)

bench-loader: install
	$(BIN)/python -m tests.bench.loader $(ARGS)

bench-resume: install
	$(BIN)/python -m tests.bench.resume $(ARGS)

bench-kills: install
	$(BIN)/python -m tests.bench.kills $(ARGS)

bench-sampling: install
	$(BIN)/python -m tests.bench.sampling $(ARGS)

bench-text: install
	$(BIN)/python -m tests.bench.text $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pdoc shared student_train teacher_dump --output-directory build/docs --footer-text logitferry

check: lint test

clean:
	rm -rf build dist
