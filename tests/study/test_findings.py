"""The figures of docs/findings.md are those of the committed results."""

import json
import runpy
from pathlib import Path

import pytest

from natgrad.study.spec import find_spec

DOCS = Path(__file__).parents[2] / "docs"
tables = runpy.run_path(str(DOCS.parent / "benchmarks" / "findings.py"))["tables"]


@pytest.mark.parametrize("name", ["centering", "residual"])
def test_tables_are_those_of_the_results(name):
    page = (DOCS / "findings.md").read_text(encoding="utf-8")
    rows = [row for row in tables(name) if row in page]
    missing = [row for row in tables(name) if row not in page]
    assert len(rows) > 10
    assert not missing


@pytest.mark.parametrize("path", sorted((DOCS / "studies").glob("*.json")), ids=lambda path: path.stem)
def test_results_are_of_the_spec_that_is_shipped(path: Path):
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["spec"] == find_spec(path.stem)[2]
    assert not results["interrupted"]
    assert results["machines"]
