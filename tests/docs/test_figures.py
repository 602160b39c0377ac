"""Figures on the pages that follow from runs which are kept in the repository."""

from pathlib import Path

import pytest

from benchmarks.pinns import is_ahead, is_ahead_by_then, row, runs_of

ROOT = Path(__file__).parents[2]
RUNS = runs_of([ROOT / "docs/curves/pinns.json"], "NaturalGradient")
PAGE, README = (" ".join((ROOT / n).read_text(encoding="utf-8").split()) for n in ("docs/pinns.md", "README.md"))
WORDS = {9: "nine", 10: "ten", 11: "eleven", 12: "twelve", 13: "thirteen", 14: "fourteen"}


@pytest.mark.parametrize("name", RUNS)
def test_the_table_of_physics_informed_networks_is_that_of_the_runs(name):
    assert row(name, RUNS[name]) in PAGE


def test_on_how_many_problems_it_is_ahead():
    ahead, by_then = (sum(test(n, runs) for n, runs in RUNS.items()) for test in (is_ahead, is_ahead_by_then))
    assert f"On {WORDS[ahead]} of the {len(RUNS)} problems it is ahead, with every seed" in PAGE
    assert f"ahead on {by_then} of the {len(RUNS)} problems" in PAGE
    assert f"on {WORDS[by_then]} of {WORDS[len(RUNS)]} public problems" in README
    assert f"on {WORDS[ahead]} of them, with every seed" in README
