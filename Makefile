# `make demo` and `make test` work from a fresh clone with Python >= 3.10, pip, venv and make, and nothing else.
PYTHON ?= python3
BIN := .venv/bin
# Most of what is installed is never imported, and Python compiles what is: --no-compile halves the set-up time.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

.PHONY: demo test lint format wheel docs clean

demo: .venv/demo
	$(BIN)/sophon-hf demo --output_dir demo-output

# One process runs all tests of a file, which share what is costly to set up; tests/conftest.py orders the files.
test: .venv/installed
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/python docs/make_configuration.py --check

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python docs/make_configuration.py

# The wheel holds all that the package needs: templates, sweeps, configurations.
wheel: .venv/demo
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w dist .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target dist/site dist/*.whl
	cd dist && PYTHONPATH=site ../$(BIN)/python -c "import sophon_hf, sophon_hf.attacks.sweeps as s; \
	assert 'site' in sophon_hf.__file__ and s.load_sweep('strong')"
	cd dist && PYTHONPATH=site ../$(BIN)/python site/bin/sophon-hf --version

# The site in site/: the pages of docs/, and an API reference from the docstrings.
docs: .venv/docs
	$(BIN)/mkdocs build

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -e .
	touch $@

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -e ".[test]"
	touch $@ .venv/demo

.venv/docs: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -e ".[docs]"
	touch $@

clean:
	rm -rf .venv demo-output build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
