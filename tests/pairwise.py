"""Selects the parametrizations that `make test` runs.

- For a test marked `pairs`: enough rows that every two values of two parameters occur together. Most faults need one
  option, or two together, and a test of four parameters then has a tenth of the runs.
- For any other test that computes something: at most `MOST` rows, in cheap folders `MORE`, spread evenly over the list.
  The name of the test decides where they start, so that the tests of one table of rows cover different rows of it.

All other rows are marked `long`: `make test-all` runs them, and so does `pytest -k name`.
"""

from itertools import combinations
from zlib import crc32

MOST, MORE = 5, 8
CHEAP = ("linalg",)
"""Folders that take little time for what they find."""
WHOLE = ("docs", "errors", "release")
"""Folders whose tests only read texts, thousands in seconds: all their rows run."""


def enough(rows):
    """Indices of a subset of `rows`, which are dicts of parameter values by name. It repeatedly takes the row with the
    most pairs that have not occurred yet; of equal rows, the first."""
    left = [{frozenset(pair) for pair in combinations(row.items(), 2)} or {frozenset(row.items())} for row in rows]
    wanted, chosen = set().union(*left), []
    while wanted:
        best = max(range(len(rows)), key=lambda i: len(left[i] & wanted))
        chosen.append(best)
        wanted -= left[best]
    return sorted(chosen)


def mark_the_rest(items, mark):
    """Adds `mark` to the items of tests marked `pairs` that `enough` leaves out."""
    functions = {}
    for item in items:
        if item.get_closest_marker("pairs") and not item.get_closest_marker("slow"):
            functions.setdefault((item.path, item.originalname, item.cls), []).append(item)
    for its in functions.values():
        kept = set(enough([{name: repr(value) for name, value in item.callspec.params.items()} for item in its]))
        for i, item in enumerate(its):
            if i not in kept:
                item.add_marker(mark)


def spread(name, count, most=MOST):
    """Indices of at most `most` of `count` rows, at even distances; `name` decides where they start."""
    start = crc32(name.encode())
    return {(start + round(i * count / most)) % count for i in range(most)}


def mark_all_but_some(items, mark, root):
    """Adds `mark` to the items of tests with more than `MOST` parametrizations, except those of `spread`."""
    functions = {}
    for item in items:
        if any(item.get_closest_marker(name) for name in ("slow", "long", "pairs")) or not hasattr(item, "callspec"):
            continue
        if item.path.is_relative_to(root) and item.path.relative_to(root).parts[0] not in WHOLE:
            functions.setdefault((item.path, item.originalname, item.cls), []).append(item)
    for (path, name, _), its in functions.items():
        cheap = path.relative_to(root).parts[0] in CHEAP
        kept = spread(name, len(its), MORE if cheap else MOST)
        for i, item in enumerate(its):
            if i not in kept:
                item.add_marker(mark)
