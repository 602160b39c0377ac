"""The minimum of the quadratic model over a few directions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from natgrad.optim.rules.quadratic import minimize
from oracles import close, f64, randn, spd

seeds = st.integers(0, 10_000)


def vector(*values):
    return torch.tensor(values, dtype=f64)


def value(Q, slope, c):
    return float(0.5 * c @ Q @ c + slope @ c)


@given(n=st.integers(1, 3), seed=seeds)
def test_the_minimum_solves_the_linear_system(n, seed):
    Q, slope = spd(n, seed), randn(n, seed=seed)
    minimum = minimize(Q, slope, {})
    expected = torch.linalg.solve(Q, -slope)
    close(vector(*minimum.coefficients), expected)
    assert minimum.change == pytest.approx(value(Q, slope, expected), abs=1e-12)
    assert minimum.change <= 0


@given(n=st.integers(1, 3), seed=seeds, most=st.floats(1e-6, 10.0))
def test_a_part_of_the_way_promises_no_more_than_there_is(n, seed, most):
    whole = minimize(spd(n, seed), randn(n, seed=seed), {})
    share = whole.share_that_promises(most)
    part = whole.shortened(share)
    assert 0 < share <= 1
    assert -part.change == pytest.approx(min(most, -whole.change), rel=1e-9)
    assert part.coefficients == pytest.approx([share * c for c in whole.coefficients])


@given(n=st.integers(2, 4), index=st.integers(0, 1), seed=seeds)
def test_held_coefficients_stay_and_the_others_minimize_what_is_left(n, index, seed):
    Q, slope, held = spd(n, seed), randn(n, seed=seed), -0.7
    c = vector(*minimize(Q, slope, {index: held}).coefficients)
    assert c[index] == held
    free = [i for i in range(n) if i != index]
    close((Q @ c + slope)[free], torch.zeros(n - 1, dtype=f64))


def test_with_every_coefficient_held_it_only_evaluates():
    Q, slope = spd(2, 0), randn(2)
    minimum = minimize(Q, slope, {0: -0.1, 1: 0.9})
    assert minimum.coefficients == [-0.1, 0.9]
    assert minimum.change == pytest.approx(value(Q, slope, vector(-0.1, 0.9)))
    # No curvature is needed then.
    assert minimize(torch.zeros(2, 2, dtype=f64), slope, {0: -0.1, 1: 0.9}).change == pytest.approx(
        float(slope @ vector(-0.1, 0.9))
    )


@given(scale=st.sampled_from([-3.0, 1e-8, 1.0, 1e8]), seed=seeds)
def test_of_parallel_directions_the_first_is_taken_alone(scale, seed):
    d = randn(4, seed=seed)
    D = torch.stack([d, scale * d])
    F, g = spd(4, seed), randn(4, seed=seed + 1)
    Q, slope = D @ F @ D.mT, D @ g
    minimum = minimize((Q + Q.mT) / 2, slope, {})
    alone = minimize(Q[:1, :1], slope[:1], {})
    assert minimum.coefficients == [pytest.approx(alone.coefficients[0]), 0.0]
    assert minimum.change == pytest.approx(alone.change)


@given(scale=st.sampled_from([1e-12, 1e-4, 1e4, 1e12]), seed=seeds)
def test_a_direction_may_be_of_any_length(scale, seed):
    Q, slope, units = spd(2, seed), randn(2, seed=seed), vector(1.0, scale)
    scaled = minimize(Q * torch.outer(units, units), slope * units, {})
    plain = minimize(Q, slope, {})
    close(vector(*scaled.coefficients) * units, vector(*plain.coefficients))
    assert scaled.change == pytest.approx(plain.change)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_none_where_something_is_not_finite(bad):
    Q, slope = spd(2, 0), randn(2)
    broken = Q.clone()
    broken[1, 1] = bad
    assert minimize(broken, slope, {}) is None
    assert minimize(broken, slope, {1: 0.5}) is None
    assert minimize(Q, slope.index_fill(0, torch.tensor(0), bad), {}) is None
    assert minimize(Q, slope, {0: bad}) is None


def test_none_where_there_is_no_minimum():
    slope = vector(1.0, 1.0)
    assert minimize(torch.diag(vector(1.0, -1.0)), slope, {}) is None
    assert minimize(torch.diag(vector(1.0, 0.0)), slope, {}) is None
    assert minimize(torch.zeros(1, 1, dtype=f64), vector(1.0), {}) is None


def test_an_indefinite_model_is_not_solved_at_its_saddle():
    Q, slope = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=f64), vector(1.0, -1.0)
    minimum = minimize(Q, slope, {})
    assert minimum is None or minimum.change <= 0
