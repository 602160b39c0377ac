"""The moments of a layer against loops over its cases, whole, merged from parts and weighted."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from natgrad.capture.layer import Layer
from natgrad.capture.layers import Rows
from natgrad.curvature.moments import AffineMoments, KnownSums, merge
from oracles import close, f64, randn

D_IN, D_OUT = 3, 2
FIELDS = [f.name for f in dataclasses.fields(AffineMoments)]
parts_of_cases = st.lists(st.integers(1, 6), min_size=1, max_size=5)
seeds = st.integers(0, 10_000)


def data(n, seed=0, shift=3.0):
    return randn(n, D_IN, seed=seed) + shift, randn(n, D_OUT, seed=seed + 1)


def of_inputs(h, d_out, mass):
    m = AffineMoments.empty(h.shape[1], d_out, mass)
    m.add_inputs(Rows(h.unsqueeze(1)))
    return m


def moments(h, g, mass=None):
    mass = torch.as_tensor(float(len(h)) if mass is None else mass, dtype=h.dtype)
    m = of_inputs(h, g.shape[1], mass)
    m.add_gradients(g.unsqueeze(1))
    return m


def parts(sizes, seed=0, shift=3.0):
    h, g = data(sum(sizes), seed, shift)
    split = zip(h.split(sizes), g.split(sizes), sizes, strict=True)
    return moments(h, g, 2.0 * len(h)), [moments(a, b, 2.0 * n) for a, b, n in split]


def total(items):
    first, *rest = items
    for m in rest:
        first = first + m
    return first


def same(a, b, tol=1e-11):
    for name in FIELDS:
        close(getattr(a, name), getattr(b, name), tol)


def weighted_covariance(h, w):
    """`Σ_i w_i (h_i − m)(h_i − m)ᵀ / Σ w` and `m`, case by case."""
    m = sum(wi * hi for wi, hi in zip(w, h, strict=True)) / sum(w)
    return sum(wi * torch.outer(hi - m, hi - m) for wi, hi in zip(w, h, strict=True)) / sum(w), m


@given(sizes=parts_of_cases, seed=seeds)
def test_the_moments_of_the_parts_merge_to_those_of_the_whole(sizes, seed):
    whole, pieces = parts(sizes, seed)
    same(total(pieces), whole)


@given(sizes=parts_of_cases, seed=seeds, data=st.data())
def test_the_order_of_merging_is_irrelevant(sizes, seed, data):
    whole, pieces = parts(sizes, seed)
    same(total(data.draw(st.permutations(pieces))), whole)


@given(sizes=st.tuples(*[st.integers(1, 6)] * 4), seed=seeds)
def test_merging_is_associative(sizes, seed):
    _, (a, b, c, d) = parts(list(sizes), seed)
    same((a + b) + (c + d), a + (b + (c + d)))


@given(sizes=parts_of_cases, seed=seeds)
def test_merging_leaves_its_parts_alone(sizes, seed):
    _, pieces = parts(sizes, seed)
    before = [dataclasses.replace(m, **{n: getattr(m, n).clone() for n in FIELDS}) for m in pieces]
    total(pieces)
    for m, b in zip(pieces, before, strict=True):
        same(m, b, 0)


def test_merge_keeps_layers_apart():
    layers = Layer("1.weight", "1.bias"), Layer("2.weight", None)
    _, (a, b, c) = parts([2, 3, 4])
    merged = merge([{layers[0]: a}, {layers[1]: b}, {layers[0]: c}])
    same(merged[layers[0]], a + c, 0)
    same(merged[layers[1]], b, 0)
    assert merge([]) == {}


@given(n=st.integers(1, 8), seed=seeds, factor=st.floats(0.01, 10))
def test_a_factor_changes_the_weight_and_no_average(n, seed, factor):
    h, g = data(n, seed)
    m = moments(h, g)
    scaled = factor * m
    close(scaled.count, factor * m.count)
    close(scaled.mass, factor * m.mass)
    for average in ("mean", "C", "A"):
        close(getattr(scaled, average), getattr(m, average), 1e-11)
    close(scaled.B(is_mean=True), m.B(is_mean=True), 1e-11)
    close(scaled.B(is_mean=False), factor * m.B(is_mean=False), 1e-11)


@given(sizes=parts_of_cases, seed=seeds, factors=st.lists(st.floats(0.01, 10), min_size=5, max_size=5))
def test_factors_weight_the_cases_of_their_part(sizes, seed, factors):
    h, g = data(sum(sizes), seed)
    _, pieces = parts(sizes, seed)
    m = total([f * p for f, p in zip(factors, pieces, strict=False)])
    w = [f for f, size in zip(factors, sizes, strict=False) for _ in range(size)]
    C, mean = weighted_covariance(h, w)
    close(m.mean, mean, 1e-10)
    close(m.C, C, 1e-10)
    output = sum(wi * torch.outer(gi, gi) for wi, gi in zip(w, g, strict=True))
    close(m.B(is_mean=True), output / (2 * sum(w)), 1e-10)


@given(steps=st.integers(1, 5), seed=seeds, decay=st.floats(0.0, 0.99))
def test_decay_is_an_exponential_average_that_starts_at_the_first_batch(steps, seed, decay):
    h, g = data(4 * steps, seed)
    running = None
    for a, b in zip(h.split(4), g.split(4), strict=True):
        new = moments(a, b)
        running = new if running is None else decay * running + new
    w = [decay ** (steps - 1 - i // 4) for i in range(4 * steps)]
    C, mean = weighted_covariance(h, w)
    close(running.mean, mean, 1e-10)
    close(running.C, C, 1e-10)
    B = sum(wi * torch.outer(gi, gi) for wi, gi in zip(w, g, strict=True)) / sum(w)
    close(running.B(is_mean=True), B, 1e-10)


def test_nothing_merges_with_something_of_weight_zero():
    _, (a, b) = parts([3, 4])
    same(0.0 * a + b, b)
    same(b + 0.0 * a, b)
    empty = 0.0 * a + 0.0 * b
    assert empty.is_finite()
    same(empty + b, b)


@given(sizes=parts_of_cases, seed=seeds)
def test_C_is_the_covariance_of_the_cases(sizes, seed):
    h, _ = data(sum(sizes), seed)
    _, pieces = parts(sizes, seed)
    m = total(pieces)
    C, mean = weighted_covariance(h, [1.0] * len(h))
    close(m.mean, mean, 1e-11)
    close(m.C, C, 1e-11)
    close(m.C, torch.cov(h.mT, correction=0).reshape(D_IN, D_IN), 1e-11)
    close(m.C, m.C.mT, 1e-12)
    assert torch.linalg.eigvalsh(m.C)[0] >= -1e-12


def test_the_covariance_of_a_single_case_is_zero():
    m = moments(*data(1))
    assert (m.C == 0).all()
    assert m.is_finite()


@given(sizes=parts_of_cases, seed=seeds)
def test_A_is_the_second_moment(sizes, seed):
    h, _ = data(sum(sizes), seed)
    _, pieces = parts(sizes, seed)
    m = total(pieces)
    close(m.A, sum(torch.outer(x, x) for x in h) / len(h), 1e-11)
    close(m.A, m.C + torch.outer(m.mean, m.mean), 1e-12)


@given(columns=st.integers(1, 4), seed=seeds, mass=st.floats(0.5, 20))
def test_B_sums_over_cases_and_columns_and_the_mean_divides_by_the_mass(columns, seed, mass):
    h, g = randn(5, D_IN, seed=seed), randn(columns, 5, D_OUT, seed=seed)
    m = of_inputs(h, D_OUT, torch.tensor(mass, dtype=f64))
    for column in g:
        m.add_gradients(column.unsqueeze(1))
    output = sum(torch.outer(gi, gi) for column in g for gi in column)
    close(m.B(is_mean=False), output, 1e-11)
    close(m.B(is_mean=True), output / mass, 1e-11)


@pytest.mark.parametrize("shift", [1e3, -1e3])
@pytest.mark.parametrize("sizes", [[300], [100, 200], [1, 2, 97, 150, 50]])
def test_float32_keeps_the_covariance_of_inputs_far_from_zero(shift, sizes):
    h, g = data(sum(sizes), shift=shift)
    h, g = h.float(), g.float()
    m = total([moments(a, b) for a, b in zip(h.split(sizes), g.split(sizes), strict=True)])
    assert m.C.dtype == torch.float32
    close(m.C.double(), weighted_covariance(h.double(), [1.0] * len(h))[0], 1e-5)
    naive = h.mT @ h / len(h) - torch.outer(h.mean(0), h.mean(0))
    assert (naive.double() - m.C.double()).abs().max() > 1e-3, "the shift is too small to tell the two apart"


def test_float32_keeps_the_covariance_through_a_long_moving_average():
    h, g = data(200 * 16, shift=1e3)
    running, w = None, []
    for a, b in zip(h.float().split(16), g.float().split(16), strict=True):
        new = moments(a, b)
        running = new if running is None else 0.95 * running + new
        w = [0.95 * x for x in w] + [1.0] * 16
    close(running.C.double(), weighted_covariance(h.float().double(), w)[0], 1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("field", ["mean", "scatter", "output", "mass"])
def test_is_finite_sees_one_bad_entry(field, bad):
    m = moments(*data(4))
    assert m.is_finite()
    getattr(m, field).view(-1)[-1] = bad
    assert not m.is_finite()


def test_is_finite_sees_opposite_infinities():
    m = moments(*data(4))
    m.output[0, 0], m.output[1, 1] = float("inf"), -float("inf")
    assert not m.is_finite()


@pytest.mark.parametrize("where", ["inputs", "gradients"])
def test_a_nan_among_the_cases_survives_merging(where):
    h, g = data(4)
    (h if where == "inputs" else g)[2, 1] = float("nan")
    good = moments(*data(3))
    assert not (moments(h, g) + good).is_finite()
    assert not (0.5 * good + moments(h, g)).is_finite()


def test_inputs_that_layers_share_are_summed_once_in_another_precision_too(monkeypatch):
    x = randn(3, 4, 2).bfloat16()
    calls = []
    sums = Rows.sums
    monkeypatch.setattr(Rows, "sums", lambda *arguments: calls.append(1) or sums(*arguments))
    known = KnownSums()
    first, again = known.of(Rows(x).to(f64), False), known.of(Rows(x).to(f64), False)
    assert len(calls) == 1
    assert first is again
    assert first.scatter.dtype == f64
