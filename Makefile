# `make demo` runs the main job, `make test` passes the tests, `make test-all` also the long ones; each makes its own
# environment in .venv first.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: demo test test-all test-minimal lint check docs peers dist clean

demo: .venv/.installed
	$(BIN)/natgrad demo

test: .venv/.installed
	$(BIN)/pytest -n auto

# Those, and the longer ones of the same kinds; every call of the library is held to its annotations, shapes included,
# which takes about twice the time.
test-all: .venv/.installed
	$(BIN)/pytest -n auto -m "not slow" --jaxtyping-packages=natgrad,beartype.beartype

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test docs

# The site, in site/: open site/index.html, no server is needed.
docs: .venv/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What does not need other models or data, with the oldest versions that are admitted.
test-minimal: .venv-minimal/.installed
	.venv-minimal/bin/pytest -n auto tests/losses tests/capture tests/curvature tests/linalg tests/optim \
	  tests/errors tests/cli

# The wheel and the source distribution in dist/, built, looked into, installed and used.
dist: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[release]'
	$(BIN)/pytest -m slow tests/release
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# torch comes first and pinned, so that nothing else decides which build of it is taken.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Libraries that docs/coming-from.md compares with. They ask for torchvision, which they do not need for it.
PEERS := curvlinops-for-pytorch nngeometry backpack-for-pytorch einconv einops linear_operator opt_einsum unfoldNd
peers: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt $(PEERS)

.venv-minimal/.installed: pyproject.toml constraints-minimal.txt
	$(PYTHON) -m venv .venv-minimal
	.venv-minimal/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-minimal.txt torch
	.venv-minimal/bin/python -m pip install --quiet --disable-pip-version-check -r constraints-minimal.txt -e .
	touch $@

clean:
	rm -rf .venv .venv-minimal build dist *.egg-info src/*.egg-info natgrad-demo site
