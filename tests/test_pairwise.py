"""The subset of parametrizations that `make test` runs."""

from itertools import combinations, pairwise, product

from pairwise import MOST, enough, spread


def met(rows):
    return {frozenset(pair) for row in rows for pair in combinations(row.items(), 2)}


def test_every_pair_of_values_is_met():
    rows = [dict(zip("abcd", values, strict=True)) for values in product(range(4), range(4), range(5), range(2))]
    chosen = [rows[i] for i in enough(rows)]
    assert met(chosen) == met(rows)
    assert len(chosen) <= 25  # of 160; 20 are needed for the two longest


def test_every_value_of_a_single_parameter_is_met():
    assert enough([{"a": i} for i in range(3)]) == [0, 1, 2]
    assert enough([]) == []


def test_combinations_that_do_not_exist_are_not_asked_for():
    rows = [{"a": 0, "b": 0, "c": 0}, {"a": 0, "b": 1, "c": 1}, {"a": 1, "b": 1, "c": 0}]
    assert met(rows[i] for i in enough(rows)) == met(rows)


def test_the_rows_of_a_long_list_are_spread_and_depend_on_the_test():
    for count in range(1, 3 * MOST):
        assert len(spread("test_power", count)) == min(count, MOST)
    names = [f"test_{letter}" for letter in "abcdefghijklmnop"]
    assert len({frozenset(spread(name, 13)) for name in names}) > 2
    assert set().union(*(spread(name, 13) for name in names)) == set(range(13))
    assert all(b - a in (2, 3) for a, b in pairwise(sorted(spread("test_a", 13))))
