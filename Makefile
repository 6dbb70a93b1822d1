# make demo      set up and train the mixed fleet of examples/mixed_fleet.yaml
# make test      set up and run the default tests (under five minutes)
# make test-all  also the long ones
# make install   only set up: .venv with a working .venv/bin/hybrid
# make lint      ruff and mypy
#
# A second call that has nothing to do does nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS ?= dev

# The CPU build of torch unless there is an NVIDIA GPU; both meet pyproject's range. Where the default index
# serves a CUDA build only, give the address of PyTorch's CPU index: make install TORCH_INDEX=…
TORCH ?= torch>=2.13,<2.14
TORCH_INDEX ?=
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
TORCH_FLAGS := $(if $(HAS_GPU),,$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)))

.PHONY: install demo test test-all lint format golden clean

install: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH_FLAGS) '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	$(BIN)/hybrid --help >/dev/null
	touch $(STAMP)

demo: install
	$(BIN)/hybrid train examples/mixed_fleet.yaml

# A file's tests stay on one process, so that Ray is started by one test at a time.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test: install
	$(PYTEST) -m 'not slow'

test-all: install
	$(PYTEST)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

golden: install
	$(BIN)/python scripts/golden.py --update

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache
