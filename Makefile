# Two commands: `make yournet` sets everything up and runs the main job, `make test` the tests.
# On Windows use the plain python and pip lines of the README.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/$(shell date +%Y%m%d-%H%M%S)

.PHONY: yournet test check result clean

yournet: $(VENV)/.installed
	$(BIN)/python train_yournet.py --output $(RUN) $(FLAGS)
	$(BIN)/python test_yournet.py --best-checkpoint $(RUN)/best.pth

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

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

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .ruff_cache .mypy_cache
