"""Which parametrizations of a test run always: enough that every two values of two parameters meet once.

Most faults take one option, or two together. A test of four parameters then has a tenth of the runs. Those that are
left out are marked `long`: `make test-all` runs them.
"""

from itertools import combinations


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
