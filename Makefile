# make demo | test | test-full | lint | clean. The first use sets up .venv; SMOOTHK_BUILD=auto|cpu|cuda|none chooses what is compiled.
PYTHON ?= python3
SMOOTHK_BUILD ?= auto
PYTEST_ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
READY := .venv/ready-$(SMOOTHK_BUILD)
SOURCES := setup.py pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test test-full lint clean

demo: $(READY)
	$(BIN)/smoothk demo

test: $(READY)
	$(BIN)/python -m pytest -W error $(PYTEST_ARGS)

test-full: .venv/ready-full
	$(BIN)/python -m pytest -W error -m "" $(PYTEST_ARGS)

lint: .venv/ready-lint
	$(BIN)/ruff check .
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

.venv/ready-lint: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) ruff clang-format
	@touch $@
