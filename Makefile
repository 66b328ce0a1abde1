# Everything lives in .venv; nothing is installed outside the checkout.
# The first that runs: pyenv's shims answer to every name, also to versions that are not there.
PYTHON ?= $(or $(shell for python in python3.13 python3.12 python3.11; do \
                         $$python -c '' 2>/dev/null && echo $$python && break; done),python3)
BIN    := .venv/bin
NATIVE := CMakeLists.txt pyproject.toml $(shell find cpp -type f)
CPP    := $(shell find cpp -name '*.cpp' -o -name '*.hpp')
PROMPT ?= Once upon a time

.PHONY: run test test-arm lint types format bench parity ray clean

run: .venv/run.stamp  ## build, then answer with the embedded model, every token marked with its bits
	@$(BIN)/taper run --policy progressive --show-bits --max-tokens 120 "$(PROMPT)"

test: .venv/dev.stamp  ## the whole test suite
	$(BIN)/python -m pytest

test-arm:  ## the NEON kernels, cross-compiled, against the reference under qemu; on a CPU without each set, too
	@command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null && command -v cmake >/dev/null \
	  || { echo "error: make test-arm needs aarch64-linux-gnu-g++, qemu-aarch64 and cmake"; \
	       echo "hint: sudo apt-get install g++-aarch64-linux-gnu qemu-user cmake"; exit 2; }
	cmake --preset arm
	cmake --build --preset arm --parallel 2
	qemu-aarch64 -cpu max build/arm/taper_kernels reference neon neon_i8mm
	qemu-aarch64 -cpu cortex-a76 build/arm/taper_kernels reference neon
	qemu-aarch64 -cpu cortex-a72 build/arm/taper_kernels reference

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)

types: .venv/dev.stamp
	$(BIN)/mypy

format: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: .venv/run.stamp  ## prefill and decode of the embedded model at several widths
	$(BIN)/taper bench --bits 6,4,3,2

parity: .venv/dev.stamp  ## float logits against transformers, live (installs torch)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --group parity
	$(BIN)/python -m pytest tests/parity -m parity

ray: .venv/dev.stamp  ## taper serve --ray on a local cluster, a replica killed under load (installs Ray)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --group ray
	$(BIN)/python -m pytest tests/ray

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/bin/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: Taper needs Python 3.11 or newer, found $$("$(PYTHON)" -V 2>&1)"; \
	       echo "hint: make PYTHON=/path/to/python3.11 run"; exit 2; }
	"$(PYTHON)" -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip

.venv/run.stamp: .venv/bin/python $(NATIVE)
	@echo "building Taper into .venv (about a minute)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/dev.stamp: .venv/run.stamp
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --group dev
	@touch $@
