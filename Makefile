# Everything a developer needs: `make help` lists it. All set-up happens in $(VENV), by itself.
#
#   PYTHON=python3.12       the interpreter to build for (another version makes the venv anew)
#   VENV=.venv-other        another place for the venv
#   ARGS="-k trees -x"      further arguments for pytest
#   MACHINES="6.1 6.12"     what `make kernels` boots, instead of all that it knows

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
MACHINES ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet

VERSION := $(shell $(PYTHON) -c 'import platform; print(platform.python_version())')

# Stamps. Their names hold what they were made with, so that a change of it makes them anew.
VENV_STAMP := $(VENV)/.stamp-venv-$(VERSION)
TOOLS_STAMP := $(VENV)/.stamp-tools
INSTALL_STAMP := $(VENV)/.stamp-install
BUILD_STAMP := $(VENV)/.stamp-build
DEV_STAMP := $(VENV)/.stamp-dev
# With the modules, which all venvs share.
SANITIZE_STAMP := build/sanitize/.stamp-$(VERSION)

SOURCES := $(wildcard $(foreach kind,pyx pxd h,ksmcore/*.$(kind) ksmcore/*/*.$(kind)))
# The build requirements of pyproject.toml, as arguments for pip.
BUILD_REQUIRES = $$(sed -n 's/^requires = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '",')
# Compiled modules that have a stub next to them.
STUBBED := $(subst /,.,$(filter $(basename $(SOURCES)),$(basename $(wildcard ksmcore/*.pyi ksmcore/*/*.pyi))))
# Only what really is a virtual environment, whatever VENV says.
REMOVE_VENV = if [ -e $(VENV)/pyvenv.cfg ]; then rm -rf $(VENV); \
    elif [ -e $(VENV) ]; then echo "$(VENV) is no virtual environment" >&2; exit 1; fi
LINTED := $(wildcard setup.py ksmcore ksmcore_pytest.py tests bench examples docs/tables.py)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv build dev demo test stress sanitize leaks neon kernels bench examples tables lint style types format sdist clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV_STAMP) ## Make the virtual environment, with the build tools in it
build: $(BUILD_STAMP) $(INSTALL_STAMP) ## Compile the present sources and install them into the venv
dev: $(DEV_STAMP) ## Install the linters and the sdist builder into the venv too

demo: build ## Run the demonstration
	$(PY) -m ksmcore demo

test: build ## Run the tests, the stress tests in short form
	$(PY) tests/side_by_side.py $(ARGS)

stress: build ## Run the long stress tests
	KSMCORE_STRESS=1 $(PY) -m pytest tests/stress tests/property tests/arrays/test_memory.py $(ARGS)

sanitize: $(SANITIZE_STAMP) $(INSTALL_STAMP) ## Run the tests with address and undefined-behaviour sanitizers
	$(PY) tests/native/check.py sanitize $(ARGS)

leaks: $(SANITIZE_STAMP) $(INSTALL_STAMP) ## Look for leaks of native memory, mappings and descriptors
	$(PY) tests/native/check.py leaks

neon: ## Check the checksum on an emulated aarch64 (gcc-aarch64-linux-gnu, libc6-dev-arm64-cross, qemu-user)
	@mkdir -p build
	aarch64-linux-gnu-gcc -O2 -Wall -Wno-unused-function -static -o build/kernels tests/native/kernels.c
	qemu-aarch64 build/kernels

kernels: build ## Run a part of the tests on emulated machines with Debian's kernels (needs qemu; hours)
	$(PY) tests/kernels/boot.py $(MACHINES) $(ARGS)

bench: build ## Run the benchmarks
	$(PY) -m pytest bench --benchmark-only --benchmark-columns=min,median,iqr,ops,rounds $(ARGS)

examples: build ## Run every example at full size (some minutes, 2 GB)
	@set -e; for file in $(filter-out examples/common.py,$(wildcard examples/*.py)); do \
	    echo "== $$file"; $(PY) "$$file"; done

tables: build ## Write the tables of docs/ that are made from the package
	$(PY) docs/tables.py

lint: style types ## Check style and types, and the stubs against the compiled modules

style: dev
	$(PY) -m ruff check $(LINTED)
	$(PY) -m ruff format --check $(LINTED)

types: dev build
	$(PY) -m mypy
	$(if $(STUBBED),$(PY) -m mypy.stubtest --mypy-config-file pyproject.toml --ignore-disjoint-bases $(STUBBED))

format: dev ## Rewrite the Python files in the project's style
	$(PY) -m ruff check --fix $(LINTED)
	$(PY) -m ruff format $(LINTED)

sdist: dev ## Build the source distribution into dist/
	$(PY) -m build --sdist

clean: ## Remove all that was built, the virtual environment included
	$(REMOVE_VENV)
	rm -rf build dist *.egg-info ksmcore/*.so ksmcore/*/*.so
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian's python3 has venv but, without the package python3-venv, not the ensurepip it needs.
$(VENV_STAMP):
	@$(REMOVE_VENV)
	@if [ -z "$(VERSION)" ]; then \
	    echo "There is no working '$(PYTHON)'; name another with make PYTHON=..." >&2; exit 1; fi
	@echo "Making $(VENV) for Python $(VERSION)"
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 \
	    || { rm -rf $(VENV); $(PYTHON) -m virtualenv --quiet $(VENV) >/dev/null 2>&1; } \
	    || { rm -rf $(VENV); \
	         echo "$(PYTHON) can make no virtual environment: install the Debian package python3-venv." >&2; \
	         exit 1; }
	@touch $@

$(TOOLS_STAMP): $(VENV_STAMP) pyproject.toml
	@echo "Installing the build tools into $(VENV)"
	$(PIP) install $(BUILD_REQUIRES)
	@touch $@

# Compiles only the modules that changed. Not through pip, which buries the compiler's messages.
$(BUILD_STAMP): $(TOOLS_STAMP) $(SOURCES) setup.py ksmcore/_platform.py
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@

# A whole package of its own beside the sources, so that `build` and `test` never meet it. Its Python
# files are removed first, or one that is gone from the sources would live on here.
$(SANITIZE_STAMP): $(TOOLS_STAMP) $(SOURCES) $(wildcard ksmcore/*.py ksmcore/*/*.py) setup.py
	@mkdir -p $(@D)
	@rm -f build/sanitize/lib/ksmcore/*.py build/sanitize/lib/ksmcore/*/*.py
	KSMCORE_SANITIZE=1 $(PY) setup.py --quiet build --build-base build/sanitize --build-lib build/sanitize/lib
	@touch $@

# Editable, so that Python files are always the present ones; without build isolation, so that the
# modules just compiled are not compiled again.
$(INSTALL_STAMP): pyproject.toml setup.py $(TOOLS_STAMP) | $(BUILD_STAMP)
	@echo "Installing ksmcore, the test tools and what the examples need into $(VENV)"
	$(PIP) install --no-build-isolation --editable '.[test,examples]'
	@touch $@

$(DEV_STAMP): $(INSTALL_STAMP)
	@echo "Installing the development tools into $(VENV)"
	$(PIP) install --no-build-isolation --editable '.[dev]'
	@touch $@
