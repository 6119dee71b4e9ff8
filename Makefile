# make demo draws samples of a shipped model, make test runs the whole suite. Both make .venv first.
# Another PyTorch, such as a CUDA build: make clean, then make test TORCH=torch

TORCH ?= torch==2.13.0
GRID := samples.png
PIP := .venv/bin/python -m pip install --disable-pip-version-check

.PHONY: demo test lint bench smoke environment clean
.NOTPARALLEL:

demo: .venv/installed
	.venv/bin/sagan sample sagan_32_avatars --label all --seeds 0-7 --grid $(GRID)

test: environment
	.venv/bin/python -m pytest

lint: environment
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m ruff check .
	.venv/bin/python -m mypy
	.venv/bin/lint-imports

bench: environment
	.venv/bin/python -m pytest benchmarks --benchmark-only --benchmark-json=bench.json

# every benchmark once, at tiny shapes: results are compared, times are not
smoke: environment
	.venv/bin/python -m pytest benchmarks -k smoke

environment: .venv/installed-dev

# naming torch in the same command keeps pip from fetching another build of it
.venv/installed: .venv/bin/pip pyproject.toml sagan_kernels/__init__.py
	$(PIP) "$(TORCH)" --editable .
	@touch $@

.venv/installed-dev: .venv/bin/pip pyproject.toml sagan_kernels/__init__.py
	$(PIP) "$(TORCH)" --editable ".[dev]"
	@touch .venv/installed $@

.venv/bin/pip:
	@for python in python3 python3.11 python3.12 python3.13; do \
		if $$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "$$python -m venv .venv" && exec $$python -m venv .venv; \
		fi; \
	done; \
	echo "make: needs Python 3.11 or newer with its venv module, got none on PATH; install it and try again" >&2; \
	exit 1

clean:
	rm -rf .venv .benchmarks .import_linter_cache .mypy_cache .pytest_cache .ruff_cache $(GRID) bench.json
