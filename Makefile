# Start with `make demo` and `make test`. PYTHON names the interpreter that makes the virtual
# environment: make demo PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DATA := .maskray/demo
MINI := .maskray/mini

.PHONY: help install demo mini screenshots test test-all check format bench gpu-check secrets clean

help:
	@echo "make demo      install, make synthetic COCO data, run studies/demo.yaml, print its table"
	@echo "make mini      draw scenes, run studies/mini/align.yaml from nothing (docs/results.md)"
	@echo "make screenshots  draw the pictures of docs/ again, of the study that make demo ran"
	@echo "make test      install and run the test suite;  make test-all adds the slow tests"
	@echo "make check     formatter, linter, strict types"
	@echo "make bench     every program in benchmarks/ but chaos.py, which takes an hour, and the GPU's"
	@echo "make gpu-check what only a GPU shows, into gpu.json in under 9 minutes; with another"
	@echo "               interpreter that has torch: make gpu-check PYTHON=/usr/bin/python3"
	@echo "make secrets   the secrets of docker-compose.yml, as files that only you can read"
	@echo "make clean     end the local service and remove what the targets above made"

install: $(STAMP)

# A change of native.c installs again, because the installation compiles it.
$(STAMP): pyproject.toml setup.py constraints.txt model/cpu/native.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(BIN)/python -c 'from model.cpu import native; native.available() or print("note: not compiled: model/cpu/native.c (it takes gcc 12 or newer); training on a CPU is slower")'
	@touch $@

demo: $(STAMP)
	$(BIN)/maskray data synth $(DATA) --images 500 --size 128 --seed 0 --pack
	$(BIN)/maskray run studies/demo.yaml --data $(DATA)

# The study names its data and its start; it evaluates on the split `test`.
mini: $(STAMP)
	$(BIN)/maskray data synth $(MINI)/scenes --kind scenes --outlines 6 --images 2400 --test 1000 --pack
	$(BIN)/maskray data synth $(MINI)/start --kind scenes --images 2400 --seed 1
	test -s $(MINI)/start.safetensors || $(BIN)/python studies/mini/start.py $(MINI)/start $(MINI)/start.safetensors
	$(BIN)/maskray run studies/mini/align.yaml

# The demo takes minutes, so it is not run again for a picture.
screenshots: $(STAMP)
	@test -d .maskray/studies || { echo "error: there is no study here; run make demo first" >&2; exit 2; }
	$(BIN)/python docs/screenshots.py demo

# Files, not tests, are shared out: the tests of a file share its Ray head or its MLflow server.
test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile --no-loadscope-reorder

test-all: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# chaos.py is left out: it kills parts of real training for about an hour.
bench: $(STAMP)
	@for program in $(filter-out benchmarks/chaos.py benchmarks/gpu_%.py,$(wildcard benchmarks/*.py)); do echo "== $$program"; $(BIN)/python $$program --json || exit 1; done

# A machine with a GPU may have torch in an interpreter of its own, and no way to install more.
ifeq ($(origin PYTHON),command line)
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py
else
gpu-check: $(STAMP)
	$(BIN)/python benchmarks/gpu_check.py
endif

# The standard library is enough: a host that runs compose needs no virtual environment.
secrets:
	@$(PYTHON) deploy/compose/make_secrets.py

# `maskray down` first: the local service, its Ray head and MLflow have their files in .maskray.
clean:
	@if [ -x $(BIN)/maskray ]; then $(BIN)/maskray down; fi
	rm -f maskray_native*.so
	rm -rf .maskray $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
