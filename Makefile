# `make demo` and `make test` work from a fresh clone with Python >= 3.10, pip, venv and make, and nothing else.
PYTHON ?= python3
BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint format wheel clean

# The demo needs no test tools, and most of what is installed is never imported: byte code is made when it is.
demo: .venv/demo
	$(BIN)/sophon-hf demo --output_dir demo-output

test: .venv/installed
	$(BIN)/python -m pytest -n auto

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The wheel holds all that the package needs: templates, sweeps, configurations.
wheel: .venv/installed
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w dist .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target dist/site dist/*.whl
	cd dist && PYTHONPATH=site ../$(BIN)/python -c "import sophon_hf, sophon_hf.attacks.sweeps as s; \
	assert 'site' in sophon_hf.__file__ and s.load_sweep('strong')"

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --no-compile -e .
	touch $@

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -e ".[test]"
	touch $@ .venv/demo

clean:
	rm -rf .venv demo-output build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
