# make demo: set up, run the quickstart suite, show its board.   make test: set up, lint, type-check, test.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
TORCH := torch==2.13.0
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
INPUTS := pyproject.toml constraints.txt

.PHONY: demo test lint install clean

demo: $(STAMP)
	$(RUN)/python -m bench -m experiment=quickstart

# pytest stands last, so that its summary is the last line.
test: $(TEST_STAMP) lint
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -q -n 2

lint: $(TEST_STAMP)
	$(RUN)/ruff check .
	$(RUN)/mypy --strict bench
	$(RUN)/lint-imports --no-logo

install: $(STAMP)

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'bench needs Python 3.11 or newer')"
	$(PYTHON) -m venv $(VENV)

# torch first and alone: where a build for CPUs is on offer, pip then takes it and its CUDA packages stay away.
$(STAMP): $(INPUTS) | $(VENV)/bin/python
	$(RUN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(TEST_STAMP): $(STAMP)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
