"""The figures of docs/findings.md are those of the committed results."""

import json
import re
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
def test_results_are_of_the_spec_that_is_shipped_on_some_of_its_seeds(path: Path):
    results = json.loads(path.read_text(encoding="utf-8"))
    texts = [re.sub(r"(?m)^seeds = .*", "", text) for text in (results["spec"], find_spec(path.stem)[2])]
    assert texts[0] == texts[1]
    assert len(results["seeds"]) >= 3
    assert not results["interrupted"]
    assert results["machines"]
