# Two commands do everything: `make quickstart` and `make test`. Both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PYTHONSAFEPATH := 1
# DeepSpeed builds an extension on first use; its folder belongs to the environment that built it.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions

OLDEST := .venv-oldest
# what depends on the versions of torch, triton, transformers and deepspeed, and one file each of those that read others
OLDEST_TESTS := tests/fused_loss $(addprefix tests/engine/test_, isolation.py model.py body.py deepspeed_backend.py step.py \
    checkpoint.py safe_loading.py optimizer.py) tests/config/test_load.py tests/data/test_readers.py \
    tests/report/test_report.py

.PHONY: help quickstart test test-oldest mutants lint audit clean

help:
	@echo "make quickstart   install, then train a tiny model on six domains and write its report"
	@echo "make test         install with the test extra, then run the whole suite (CPU only)"
	@echo "make test-oldest  the tests that touch torch, triton, transformers and deepspeed, with the oldest declared versions"
	@echo "make mutants      planted faults that tests must see; ONLY=\"WORD ...\" for those with a word in their name"
	@echo "make lint         ruff and mypy"
	@echo "make audit        known vulnerabilities of the installed packages"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py constraints.txt versatune_ds/__init__.py | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

quickstart: $(VENV)/.installed
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/quickstart.sh

# three workers keep two cores busy while one of them waits for a timeout
test: $(VENV)/.installed-test
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# torch from PyPI is a CUDA build: it runs on CPUs, and pip fetches about 2.9 GB
$(OLDEST)/.installed: setup.py constraints-oldest.txt versatune_ds/__init__.py
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q -c constraints-oldest.txt -e ".[adapter]" triton pytest pytest-timeout pytest-xdist hypothesis
	@touch $@

test-oldest: $(OLDEST)/.installed
	PATH="$(CURDIR)/$(OLDEST)/bin:$$PATH" TORCH_EXTENSIONS_DIR="$(CURDIR)/$(OLDEST)/torch_extensions" OMP_NUM_THREADS=1 \
	    $(OLDEST)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(OLDEST_TESTS)

mutants: $(VENV)/.installed-test
	@PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH=tests/mutants OMP_NUM_THREADS=1 $(BIN)/python tests/mutants/run_mutants.py $(ONLY)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

audit: $(VENV)/.installed
	@$(BIN)/python -m pip install -q -c constraints.txt -e ".[audit]" || true
	@PATH="$(CURDIR)/$(BIN):$$PATH" .ci/audit

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info
