# make demo | test | test-full | coverage | sanitize | mutants | faults | lint | clean. The first use sets up .venv; SMOOTHK_BUILD=auto|cpu|cuda|none chooses what is compiled.
PYTHON ?= python3
SMOOTHK_BUILD ?= auto
PYTEST_ARGS ?=
KILLS ?= 200
FILES ?= 10000

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
READY := .venv/ready-$(SMOOTHK_BUILD)
SOURCES := setup.py pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test test-full coverage sanitize mutants faults lint clean

demo: $(READY)
	$(BIN)/smoothk demo

test: $(READY)
	$(BIN)/python -m pytest -W error $(PYTEST_ARGS)

test-full: .venv/ready-full .venv/ready-tools
	$(BIN)/python -m pytest -W error -m "" $(PYTEST_ARGS)

coverage: $(READY) .venv/ready-tools
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -W error $(PYTEST_ARGS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

sanitize: $(READY) .venv/ready-tools
	$(BIN)/python tests/sanitize.py

mutants: $(READY) .venv/ready-tools
	$(BIN)/python tests/mutants.py

faults: $(READY)
	$(BIN)/python -m pytest -W error -m "" tests/test_faults.py
	PYTHONPATH=. $(BIN)/python tests/kill_training.py $(KILLS)
	PYTHONPATH=. $(BIN)/python tests/fuzz_files.py $(FILES)

# mypy reads the types of torch and of what else the package imports.
lint: $(READY) .venv/ready-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --exclude '*.md' .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(filter %.h %.cpp %.cu %.cuh,$(SOURCES) $(wildcard tests/*/*))

clean:
	rm -rf .venv build dist *.egg-info smoothk/_C*.so smoothk/_build.json

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("smoothk needs Python 3.10 or newer; $(PYTHON) is " + sys.version.split()[0] + ". Pass another: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

# torch comes first: the extension is compiled against the torch that it finds.
$(READY): $(SOURCES) | .venv/bin/python
	@rm -f .venv/ready-auto .venv/ready-cpu .venv/ready-cuda .venv/ready-none
	$(PIP) torch numpy
	SMOOTHK_BUILD=$(SMOOTHK_BUILD) $(PIP) --editable '.[test]'
	@$(BIN)/python -c 'import smoothk; print(smoothk.info())'
	@touch $@

# The models and tools of others that `test-full` runs on; the constraints keep the torch that is there.
.venv/ready-full: $(READY)
	SMOOTHK_BUILD=$(SMOOTHK_BUILD) $(PIP) --editable '.[full]'
	@touch $@

.venv/ready-tools: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) coverage pybind11 cmake ninja
	@touch $@

.venv/ready-lint: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) ruff mypy clang-format
	@touch $@
