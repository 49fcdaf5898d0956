# Two commands: `make demo` and `make test`. Each sets up what it needs, once.
# Another Python 3.11 than python3.11: make demo PYTHON=/path/to/python

PYTHON ?= python3.11
IMAGE ?= fivefold:latest
BASE_IMAGE ?= python:3.11-slim
UV := uv==0.13.9
AUDITOR := pip-audit==2.10.1
BENCH ?= loader pairs=3 results=build/benchmarks/results
PYTEST_ARGS ?= -m "not slow and not docker and not gpu"

# Bytecode is kept, also where the environment says otherwise: most tests start processes, which would compile all anew.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
BIN := $(VENV)/bin
# A file of tests a core: most wait for processes, and networks this small do not keep two threads busy.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --durations=20 --durations-min=5
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
REVISION = $(shell git rev-parse HEAD 2>/dev/null || echo unknown)$(shell git diff --quiet HEAD 2>/dev/null || echo -dirty)
content = $(shell cat pyproject.toml $(1) | cksum | cut -d' ' -f1)
# Set-up leaves a stamp named after the files that it followed: a changed pin sets up again.
FOR_RUNS := $(VENV)/.set-up-runs-$(call content,docker/requirements.txt)
FOR_ALL := $(VENV)/.set-up-all-$(call content,requirements.txt requirements-dev.txt)

.DEFAULT_GOAL := help
.PHONY: help demo systems bench test test-slow test-docker test-lowest image manifests docs check lock audit clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(FOR_RUNS) ## split, train, ensemble, evaluate and distil real images; DEMO_ARGS="train.epochs=3"
	@$(BIN)/python -m jobs demo $(DEMO_ARGS)

systems: $(FOR_RUNS) ## the five reference systems end to end, made small, on drawn images; SYSTEMS="mask_profile"
	@$(BIN)/python tests/systems $(SYSTEMS)

bench: $(FOR_RUNS) ## how fast it is on this machine, a few minutes; BENCH="train step", BENCH=all (hours)
	@$(BIN)/python -m benchmarks $(BENCH)

test: check ## ruff, the import rules, and the tests; PYTEST_ARGS="tests/data -x"
	@$(PYTEST) $(PYTEST_ARGS)

test-slow: $(FOR_ALL) ## the tests that take minutes
	@$(PYTEST) -m "slow and not docker and not gpu"

test-docker: $(FOR_ALL) ## the image on a Docker engine; after `make image`
	@FIVEFOLD_IMAGE=$(IMAGE) BASE_IMAGE=$(BASE_IMAGE) $(BIN)/python -m pytest -m docker

test-lowest: $(FOR_RUNS) ## the demo with the lowest versions that pyproject.toml allows, in build/lowest
	@$(BIN)/uv venv --quiet --clear --python $(PYTHON) build/lowest
	@$(BIN)/uv pip install --quiet --python build/lowest/bin/python --resolution lowest-direct .
	@cd build/lowest && bin/fivefold demo train.epochs=1

image: ## the one image of all stages; IMAGE=fivefold:latest BASE_IMAGE=python:3.11-slim@sha256:…
	docker build -f docker/Dockerfile -t $(IMAGE) --build-arg BASE_IMAGE=$(BASE_IMAGE) \
		--build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) .

manifests: $(FOR_RUNS) ## render k8s/ from the plan
	@$(BIN)/python -m fivefold.launchers.manifests k8s

docs: $(FOR_RUNS) ## write docs/settings.md from the settings
	@$(BIN)/python -m fivefold.settings >build/settings.md && mv build/settings.md docs/settings.md

check: $(FOR_ALL) ## ruff and the import rules alone
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

lock: ## compile pyproject.toml into the three requirements files, each pin as it is where it may be; UPGRADE=1: the newest
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check -q $(UV)
	@mkdir -p build/lock && cat requirements.txt requirements-dev.txt | grep -v '^-r' >build/lock/all.txt
	@$(call compile,build/lock/all.txt,--all-extras $(if $(UPGRADE),--upgrade))
	@$(call compile,requirements.txt,--extra launch --constraint build/lock/all.txt)
	@$(call compile,docker/requirements.txt,--constraint build/lock/all.txt)
	@$(call compile,requirements-dev.txt,--all-extras --constraint build/lock/all.txt \
		$$(sed -n 's/==.*//p' requirements.txt | sed 's/^/--no-emit-package /'))
	@{ echo "-r requirements.txt"; cat requirements-dev.txt; } >build/lock/dev.txt && mv build/lock/dev.txt requirements-dev.txt

audit: ## whether a pinned version has a known vulnerability; asks PyPI, which is on the network
	@test -x build/audit/bin/pip || $(PYTHON) -m venv build/audit
	@build/audit/bin/python -m pip install --disable-pip-version-check -q $(AUDITOR)
	@build/audit/bin/pip-audit --require-hashes --disable-pip -r requirements.txt

clean: ## remove .venv, the demo's images and run, and caches; other runs stay
	rm -rf $(VENV) data/demo runs/demo .hypothesis .pytest_cache .ruff_cache .import_linter_cache build dist src/*.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(FOR_RUNS):
	@echo "setting up $(VENV) for runs: PyTorch and what it needs, about 3 minutes on a fast line"
	@$(call install,docker/requirements.txt)
	@rm -f $(VENV)/.set-up-runs-* && touch $@

$(FOR_ALL): $(FOR_RUNS)
	@echo "setting up $(VENV) for tests: the test tools and the SageMaker SDK, about a minute more"
	@$(call install,requirements-dev.txt)
	@rm -f $(VENV)/.set-up-all-* && touch $@

# A half-made .venv is completed. uv takes a third of pip's time. The package goes in with the pinned setuptools, so that
# nothing unpinned is fetched.
define install
{ command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON): install Python 3.11, or make PYTHON=/path/to/python3.11"; exit 66; }; } && \
{ test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV); } && \
$(BIN)/python -m pip install --disable-pip-version-check -q $(UV) && \
$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --require-hashes -r $(1) && \
$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
endef

# A lock for every platform, with the digests of the files on PyPI; packages for later Pythons alone are dropped.
define compile
{ test ! -e $(1) || grep -v '^-r' $(1) >build/lock/new.txt; } && \
$(BIN)/uv pip compile pyproject.toml $(2) --universal --python-version 3.11 --generate-hashes --quiet \
	--no-annotate --custom-compile-command "make lock" --output-file build/lock/new.txt && \
awk '/^[^ ]/ { later = /; python_full_version >= \0473\.12\047/ } !later' build/lock/new.txt | \
sed -e "s/ ; python_full_version < '3.1[0-9]'\( \\\\\)*$$/\1/" -e "s/python_full_version < '3.1[0-9]' and //" >$(1) && \
rm build/lock/new.txt
endef
