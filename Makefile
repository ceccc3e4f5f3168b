# make demo, make test: everything from nothing. make bench, make lint; make clean takes it all away.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/isa/*.cpp) setup.py pyproject.toml

.PHONY: demo test bench lint format clean
demo: $(VENV)/.built
	$(BIN)/vgkern demo

# Two processes of one thread each: threads that outnumber the cores spin. What needs threads sets their number itself.
test: $(VENV)/.built
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests

bench: $(VENV)/.built
	$(BIN)/python -m benchmarks micro standard --dtype float32 bfloat16 --layout contiguous channels_last

lint: $(VENV)/.linters
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp csrc/isa/*.cpp
	$(BIN)/mypy

format: $(VENV)/.linters
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i csrc/*.h csrc/*.cpp csrc/isa/*.cpp

clean:
	rm -rf $(VENV) build dist *.egg-info vgkern/*.so

# torch first: a range asked for by another package would take the newest build, with its GPU libraries.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)" "setuptools>=77" wheel "pybind11>=2.13"
	touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[test]"
	touch $@

$(VENV)/.linters: $(VENV)/.built
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[test,lint]"
	touch $@
