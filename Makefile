# Two commands: `make yournet` sets everything up and runs the main job, `make test` the tests.
# `make quick` is for contributors, before a commit. On Windows use the plain python and pip lines of the README.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/$(shell date +%Y%m%d-%H%M%S)

.PHONY: yournet test quick check numerics package docs docs-serve result clean

yournet: $(VENV)/.installed
	$(BIN)/python train_yournet.py --output $(RUN) $(FLAGS)
	$(BIN)/python test_yournet.py --best-checkpoint $(RUN)/best.pth

# All tests, and the examples in the docstrings.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

# The checks, and the tests that are marked quick: at most a minute on 2 cores.
quick: check
	$(BIN)/python -m pytest -m 'quick and not slow' tests

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The tests that rounding could decide, as older processors compute: other kernels, other rounding.
numerics: $(VENV)/.installed-dev
	ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest -m numerics tests
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest -m numerics tests

# The site of the documents, in site/; a broken link or reference is an error. `docs-serve` shows it at port 8000.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

docs-serve: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --watch pruning

# The source archive and the wheel, in dist/.
package: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet 'build>=1.2' 'twine>=6'
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

result: $(VENV)/.installed
	$(BIN)/python -m eval.result

$(VENV)/.installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

$(VENV)/.installed-docs: requirements-docs.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --requirement requirements-docs.txt
	touch $@

clean:
	rm -rf $(VENV) runs build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
