"""Which parametrizations of a test run always.

Of tests marked `pairs` enough that every two values of two parameters meet once: most faults take one option, or two
together, and a test of four parameters then has a tenth of the runs. Of tests that compute something, at most `MOST`,
spread evenly over the list. Those that are left out are marked `long`: `make test-all` runs them, and so does
`pytest -k name`.
"""

from itertools import combinations

MOST = 8
WHOLE = ("docs", "errors", "release")
"""Folders whose tests read texts: thousands in seconds."""


def enough(rows):
    """Indices of a subset of `rows`, which are dicts of a parameter's value by its name. Each time that row is taken
    that has the most pairs which are not yet met; the first of equals."""
    left = [{frozenset(pair) for pair in combinations(row.items(), 2)} or {frozenset(row.items())} for row in rows]
    wanted, chosen = set().union(*left), []
    while wanted:
        best = max(range(len(rows)), key=lambda i: len(left[i] & wanted))
        chosen.append(best)
        wanted -= left[best]
    return sorted(chosen)


def mark_the_rest(items, mark):
    """Adds `mark` to the items of tests marked `pairs` that are not needed."""
    functions = {}
    for item in items:
        if item.get_closest_marker("pairs") and not item.get_closest_marker("slow"):
            functions.setdefault((item.path, item.originalname, item.cls), []).append(item)
    for its in functions.values():
        kept = set(enough([{name: repr(value) for name, value in item.callspec.params.items()} for item in its]))
        for i, item in enumerate(its):
            if i not in kept:
                item.add_marker(mark)


def mark_all_but_some(items, mark, root):
    """Adds `mark` to the items of tests with more than `MOST` parametrizations, but for so many of them."""
    functions = {}
    for item in items:
        if any(item.get_closest_marker(name) for name in ("slow", "long", "pairs")) or not hasattr(item, "callspec"):
            continue
        if item.path.is_relative_to(root) and item.path.relative_to(root).parts[0] not in WHOLE:
            functions.setdefault((item.path, item.originalname, item.cls), []).append(item)
    for its in functions.values():
        kept = {round(i * (len(its) - 1) / (MOST - 1)) for i in range(MOST)}
        for i, item in enumerate(its):
            if i not in kept and len(its) > MOST:
                item.add_marker(mark)
