# Each target sets up what it needs. The first one run makes .venv (a minute and a network); later ones need neither.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# Debian packages that tests need beside Python; installed by root only, and only when missing.
DEBIAN_PACKAGES := acl btrfs-progs debootstrap e2fsprogs fuse3 mount openssl strace systemd systemd-container xfsprogs
# For one run: make test PYTEST_ARGS="-x tests/test_blobs.py"
PYTEST_ARGS ?=
# Most tests wait for processes and disks more than they compute: more of them at a time than a small machine has cores. A file's tests
# stay together: they share servers. Their folders have short names, for a socket's path has to be short, and stay when a test fails.
WORKERS ?= 3
# $(call pytest,OPTIONS)
pytest = folder=$$(mktemp -d -t mc-XXXXXX); $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --basetemp=$$folder $(1) $(PYTEST_ARGS) && rm -rf $$folder
export PYTHON

.PHONY: help demo test check bench soak lowest packages clean

help: ## this list
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 16

$(INSTALLED): pyproject.toml .ci/venv
	@.ci/venv $(VENV) daemon,cli,test
	@touch $@

# A distribution's own dependencies only: the checkout is installed already.
$(VENV)/trainers: $(INSTALLED)
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["trainers"], sep="\n")' > $@.txt
	@$(BIN)/python -m pip install --quiet --requirement $@.txt
	@touch $@

packages:
	@.ci/apt $(DEBIAN_PACKAGES)

demo: $(INSTALLED) ## eight tasks, one repo, one download: see it work in two minutes
	@$(BIN)/python -m examples.demo

check: $(INSTALLED) ## ruff, mypy, Python 3.9 in the SDK, the layers
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/vermin --quiet --no-tips --target=3.9- --violations sdk
	$(BIN)/python -m pytest -q -p no:cacheprovider --no-header tests/test_layers.py tests/test_style.py

test: $(INSTALLED) packages ## everything but the soak tests
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/vermin --quiet --no-tips --target=3.9- --violations sdk
	$(call pytest,)

# pytest's exit status 5 is "no tests": there may be none of that kind yet.
soak: $(VENV)/trainers packages ## the tests that take minutes
	$(call pytest,-m soak --timeout 900 -o faulthandler_timeout=600) || [ $$? = 5 ]

# Root also measures reflinks, on a filesystem that it makes and mounts.
bench: $(VENV)/bench packages ## ours against the peers, side by side
	$(BIN)/python -m benchmarks.run

$(VENV)/bench: $(INSTALLED)
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["bench"], sep="\n")' > $@.txt
	@$(BIN)/python -m pip install --quiet --requirement $@.txt
	@touch $@

lowest: $(VENV)-lowest/installed packages ## the quick tests, and flows, with the lowest versions that pyproject.toml allows
	$(VENV)-lowest/bin/python -m pytest -m "not slow and not soak" $(PYTEST_ARGS)
	$(VENV)-lowest/bin/python -m pytest -m "slow and not soak" tests/test_metaflow_cards.py tests/test_metaflow_keeping.py $(PYTEST_ARGS)

$(VENV)-lowest/installed: $(INSTALLED) .ci/lowest
	@$(BIN)/python .ci/lowest > $(VENV)/lowest.txt
	@.ci/venv $(@D) daemon,cli,test $(VENV)/lowest.txt
	@touch $@

clean: ## removes what the other targets made
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-peer build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
	find . -name '*.egg-info' -prune -exec rm -rf {} +
