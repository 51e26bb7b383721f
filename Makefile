# Two commands to begin with: `make demo` and `make test`. They need Python 3.11 to 3.13 and make;
# all else goes into .venv, which the first of them sets up.
#
#   make PYTHON=/path/to/python3.12    chooses the Python that .venv is made from
#   make TORCH_INDEX=URL               a package index with PyTorch's CPU builds, for a Linux machine
#                                      without NVIDIA GPU (PyTorch's install page names one)
#   make test ARGS="-k attention"      hands pytest more arguments
#   make chaos MINUTES=30              disturbs trainings for so long

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c '$(SUPPORTED)' 2>/dev/null && echo $$python && break; done)
PIP := .venv/bin/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_INDEX ?=
MINUTES ?= 30

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-fast test-all chaos check fix clean .venv

help: ## say what there is to make
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: .venv ## train a small Transformer on the spot and translate with it, in some minutes
	@demo/run.sh

test: .venv ## run the tests: a few cases of each promise
	.venv/bin/python -m pytest -m "not exhaustive" $(ARGS)

test-fast: .venv ## run the tests that take seconds
	.venv/bin/python -m pytest -m "not slow and not gpu and not exhaustive" $(ARGS)

test-all: .venv ## run all tests, every case of each promise
	.venv/bin/python -m pytest $(ARGS)

chaos: .venv ## disturb trainings at random, for half an hour; all must end as if left alone
	.venv/bin/python tests/chaos.py --minutes $(MINUTES)

check: .venv ## look for what the formatter, the linters and the type checker would change
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	@PATH="$(CURDIR)/.venv/bin:$$PATH"; if command -v shellcheck >/dev/null; then \
		echo shellcheck && shellcheck -x .ci/run demo/run.sh launch/* tests/slurm/install \
			benchmarks/peers/install; \
	else echo "shellcheck is not installed: the shell scripts were not checked"; fi

fix: .venv ## let the formatter and the linter change what they can
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean: ## remove .venv and all caches; data, prepared tokens and runs stay
	rm -rf .venv benchmarks/peers/*/.venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv: .venv/dtrain.stamp ## install dtrain and its tools

.venv/dtrain.stamp: pyproject.toml constraints.txt .venv/torch.stamp
	@echo "Installing dtrain with its other packages: about 190 MB to download, 0.8 GB on disk."
	$(PIP) install --editable '.[dev]' --constraint constraints.txt
	@touch $@

# PyTorch comes first, by itself: on Linux pip would else take the build for NVIDIA GPUs everywhere.
# CPU builds carry the version's suffix +cpu, and stand on PyTorch's own index or a local mirror.
.venv/torch.stamp: constraints.txt | .venv/bin/python
	@index='$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))'; build=$(TORCH); \
	if $(PIP) list 2>/dev/null | grep -Eq '^torch +$(TORCH)(\+|$$)'; then \
		echo "PyTorch $(TORCH) is there."; \
	elif nvidia-smi -L >/dev/null 2>&1; then \
		echo "Installing PyTorch $(TORCH) for NVIDIA GPUs: 2.7 GB to download, 5 GB on disk."; \
	elif [ "$$(uname)" != Linux ]; then \
		echo "Installing PyTorch $(TORCH): about 100 MB to download, 0.5 GB on disk."; \
	elif $(PIP) install -q --dry-run --no-deps $$index torch==$(TORCH)+cpu 2>/dev/null; then \
		build=$(TORCH)+cpu; \
		echo "Installing PyTorch $(TORCH) for CPUs: 200 MB to download, 0.8 GB on disk."; \
	else \
		echo "There is no NVIDIA GPU here, but pip finds no CPU build of PyTorch $(TORCH) either."; \
		echo "Installing the build for NVIDIA GPUs, which runs on CPUs too: 2.7 GB to download,"; \
		echo "5 GB on disk. To get the small one: Ctrl-C, then make TORCH_INDEX=URL (see Makefile)."; \
		sleep 5; \
	fi; \
	$(PIP) install $$index torch==$$build
	@touch $@

.venv/bin/python:
	@test -n "$(PYTHON)" || { \
		echo "dtrain needs Python 3.11, 3.12 or 3.13, and finds none of them. Install one," >&2; \
		echo "or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { \
		echo "dtrain needs Python 3.11, 3.12 or 3.13, which $(PYTHON) is not:" >&2; \
		$(PYTHON) --version; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
		package=$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
		echo "$(PYTHON) lacks its venv module. On Debian and Ubuntu: sudo apt install $$package" >&2; \
		echo "(elsewhere the package that brings ensurepip), then the same make command again." >&2; \
		exit 1; }
	@echo "Making .venv with $$($(PYTHON) --version), $(PYTHON)."
	@$(PYTHON) -m venv .venv
