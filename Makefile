# `make demo` runs the main job, `make test` passes the tests; each makes its own environment in .venv first.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: demo test lint check docs peers clean

demo: .venv/.installed
	$(BIN)/natgrad demo

test: .venv/.installed
	$(BIN)/pytest -n auto

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test docs

# The site, in site/: open site/index.html, no server is needed.
docs: .venv/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

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

clean:
	rm -rf .venv build *.egg-info src/*.egg-info natgrad-demo site
