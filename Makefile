# make notebooks | make test | make lab. Everything lives in .venv, made on the first call.

PYTHON ?= python3
# auto (by the hardware) or the name of a preset.
NF_PRESET ?= auto

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Unit tests and notebooks run in parallel processes of one thread each. Few tests are handed to a process
# at a time, so that none waits at the end for another with a row of long ones.
PARALLEL := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --maxschedchunk 1
# Jupyter refuses root unless told; a container's only user often is root.
ALLOW_ROOT := $(shell [ "$$(id -u)" = 0 ] && echo --allow-root)
# A file that is uploaded to a widget travels as one message; Jupyter drops those over 10 MiB without a word.
SERVER_CONFIG := $(VENV)/etc/jupyter
UPLOADS := {"ServerApp": {"tornado_settings": {"websocket_max_message_size": 1073741824}}}
# JupyterLab asks nobody whether to show its news.
LAB_SETTINGS := $(VENV)/share/jupyter/lab/settings
NEWS := {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}
# Jupyter's own files stay in the environment; a kernel of the same name elsewhere is not used.
export JUPYTER_PREFER_ENV_PATH := 1

.DELETE_ON_ERROR:
.PHONY: help install notebooks outputs test lab doctor clean

help:
	@echo "make notebooks   install, then run the notebooks into build/notebooks (.ipynb and .html)"
	@echo "make test        install, then lint, kernels, notebooks (smoke), unit tests and the browser test"
	@echo "make lab         install, then open JupyterLab"
	@echo "make doctor      install, then print versions, devices and scan backends"
	@echo "make outputs     copy the last run's notebooks and figures into notebooks/ and figures/ (maintainers)"
	@echo "make clean       remove .venv and build/; runs/, what was trained, stays"
	@echo
	@echo "NF_PRESET=smoke|demo|gpu|full   size of the notebooks (default: gpu on a GPU of 8 GB, else demo)"
	@echo "PYTHON=python3.12               the interpreter that makes .venv (3.11 or newer)"

install: $(STAMP)
	@mkdir -p $(SERVER_CONFIG) $(LAB_SETTINGS)
	@echo '$(UPLOADS)' > $(SERVER_CONFIG)/jupyter_server_config.json
	@echo '$(NEWS)' > $(LAB_SETTINGS)/overrides.json

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 4))' || { \
	    echo "nfhelpers needs Python 3.11.4 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
	    echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@# Python compiles a file when it is first imported; of 15,000 files most never are.
	$(BIN)/python -m pip install --no-compile --constraint constraints.txt --editable ".[notebooks,dev]"
	@touch $@
	@echo "installed in $(VENV): run commands as $(BIN)/python -m nfhelpers train | evaluate | doctor,"
	@echo "or as python -m nfhelpers after: source $(BIN)/activate"

notebooks: install
	NF_PRESET=$(NF_PRESET) $(BIN)/python notebooks/run_all.py

outputs: install
	$(BIN)/python notebooks/run_all.py --promote

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# Triton's interpreter is chosen at import, so its tests need a process of their own.
	TRITON_INTERPRET=1 $(PARALLEL) -p no:nbmake tests/test_triton.py
	@# A smoke run trains into a new folder in runs/<notebook>/smoke; those of earlier tests are worth nothing.
	rm -rf runs/[0-9]*_*/smoke
	@# Those that test_browser.py runs in a browser; the other notebooks run in test_notebooks.py.
	NF_PRESET=smoke $(PARALLEL) --nbmake --nbmake-kernel=python3 --nbmake-timeout=300 \
	    notebooks/0[46]_*.ipynb notebooks/solutions tests

lab: install
	NF_PRESET=$(NF_PRESET) $(BIN)/python -m jupyterlab --LabApp.default_url=/lab/tree/notebooks $(ALLOW_ROOT)

doctor: install
	$(BIN)/python -m nfhelpers doctor

clean:
	rm -rf $(VENV) build
