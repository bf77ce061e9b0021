# Every task of the project. Nothing here needs an activated environment: all of it runs in .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# The first Python that is new enough and can make a virtual environment; override with make PYTHON=...
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
WORKERS ?= 2
TORCH ?= 2.13.0
# An environment knows its own path, so a copied or moved checkout gets its installation repaired.
STAMP := .venv/.installed-$(shell pwd | cksum | cut -d ' ' -f 1)

.PHONY: help venv test fuzz browser registry object-store lint format docs cli-docs demo lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

define MAKE_VENV
{ test -n "$(PYTHON)" || { echo "no Python 3.11 or newer with its venv module was found (on Debian, install python3-venv);" \
	"name one with make PYTHON=..."; exit 1; } && $(PYTHON) -m venv --clear .venv; }
endef

venv: $(STAMP)  ## create .venv from the lock files and install neurograft into it

# The stamp is written last: after an interruption the next run finds none and repairs what is there.
$(STAMP): $(BIN)/python requirements.lock requirements-demo.lock pyproject.toml
	@$(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || $(MAKE_VENV)
	@rm -f .venv/.installed-*
	$(PIP) install --quiet --requirement requirements.lock
	$(PIP) install --quiet --no-deps --requirement requirements-demo.lock
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(BIN)/python:
	@$(MAKE_VENV)

test: lint  ## lint, then the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

browser:  ## install Debian's chromium, in which `make test` then looks at reports (needs apt and its rights)
	@command -v chromium >/dev/null || { apt-get update -q && apt-get install -y -q --no-install-recommends chromium; }

registry:  ## install Debian's docker-registry, against which `make test` then runs banks (needs apt and its rights)
	@command -v docker-registry >/dev/null || { apt-get update -q && apt-get install -y -q --no-install-recommends docker-registry; }

# s3fs and fsspec come in pairs.
object-store: venv  ## install moto and s3fs, against which `make test` then runs banks in S3
	$(PIP) install --quiet 'moto[server]==5.2.5' "s3fs==$$($(BIN)/python -c 'import fsspec; print(fsspec.__version__)')"

fuzz: venv  ## alter a hundred thousand files for every reader, then let atheris look for more, half a minute for each
	$(PIP) install --quiet atheris==3.0.0
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzzing.py --guided 30

lint: venv  ## style, formatting and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: venv  ## rewrite the code in the project's format
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

docs: venv  ## build the documentation into site/
	$(BIN)/python -m mkdocs build --strict

cli-docs: venv  ## rewrite docs/verbs.md from the commands' own --help
	$(BIN)/python scripts/render_cli_help.py

demo: venv  ## the whole story on a real model, in under 10 minutes
	$(BIN)/neurograft demo

# Pins that are still allowed stay; make lock UPGRADE=--upgrade takes the newest of everything but torch.
# Index addresses stay out of the lock. A local version (torch's +cpu) and the CUDA libraries that a build of torch
# brings along do too, so that the same lock takes the CPU build where one is offered and PyPI's build elsewhere.
lock:  ## pin what pyproject.toml needs in requirements.lock
	@$(BIN)/python -c 'import piptools' 2>/dev/null || $(MAKE) venv
	$(BIN)/python -m piptools compile --quiet $(UPGRADE) --upgrade-package torch==$(TORCH) --extra dev --extra docs --extra compare --extra oci --extra trust --extra redact --extra gates --extra dp \
		--strip-extras --allow-unsafe --annotation-style line --no-header \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --output-file requirements.lock pyproject.toml
	@{ echo "# Every package, pinned. Made by: make lock"; sed -E \
		's/^([a-z0-9._-]+==[^+ ]+)\+[a-z0-9.]+/\1/; /^(nvidia-|cuda-|triton==|#|$$)/d' requirements.lock; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock

clean:  ## remove the environment, caches and everything built
	rm -rf .venv site dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
