"""Sums over the patches of a convolution, which are not written out, against those that are."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from natgrad.capture.layers import Rows
from natgrad.capture.layers.convolution import Convolution, Patches
from natgrad.capture.layers.inputs import Sparse
from oracles import close, f64, randn


def patches(h, kernel, stride, padding, dilation):
    sides = tuple((p, p + extra) for p, extra in padding)
    return Patches(h, Convolution(kernel, stride, sides, dilation, (0, h.shape[1]), (0, 1)))


small = st.integers(1, 3)
axis = st.tuples(small, small, st.tuples(st.integers(0, 2), st.integers(0, 1)), small, st.integers(3, 8))


@settings(max_examples=60)
@given(axes=st.lists(axis, min_size=1, max_size=2), channels=small, examples=small, seed=st.integers(0, 99))
def test_count_mean_and_scatter(axes, channels, examples, seed):
    kernel, stride, padding, dilation, size = zip(*axes, strict=True)
    for k, (p, extra), d, s in zip(kernel, padding, dilation, size, strict=True):
        assume(s + 2 * p + extra >= d * (k - 1) + 1)
    inputs = patches(randn(examples, channels, *size, seed=seed) + 3, kernel, stride, padding, dilation)
    assert inputs.dense().shape == inputs.shape
    own, expected = inputs.sums(), Rows(inputs.dense()).sums()
    assert own.count == expected.count
    close(own.mean, expected.mean, 1e-12)
    close(own.scatter, expected.scatter, 1e-11)
    close(inputs.averaged().x, inputs.dense().mean(1, keepdim=True), 1e-12)


def test_chunks_add_up(monkeypatch):
    inputs = patches(randn(7, 2, 6, 6), (3, 3), (1, 1), ((1, 0), (1, 0)), (1, 1))
    whole = inputs.sums()
    monkeypatch.setattr("natgrad.capture.layers.convolution.CHUNK", 100)
    close(inputs.sums().scatter, whole.scatter, 1e-12)
    close(inputs.sums().mean, whole.mean, 1e-12)


@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_float32_keeps_the_covariance_of_inputs_far_from_zero(shift):
    """Without padding, which is far from the inputs then, in truth."""
    h = randn(20, 2, 8, 8) + shift
    single = patches(h.float(), (3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1)).sums()
    double = patches(h.float().to(f64), (3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1)).sums()
    error = (single.scatter.double() - double.scatter).abs().max() / double.scatter.abs().max()
    assert error < 1e-4


def test_with_positions_left_out_they_are_those_that_are_kept():
    inputs = patches(randn(4, 2, 5), (3,), (1,), ((1, 0),), (1,))
    kept = torch.rand(4, 5) > 0.4
    own, expected = inputs.sums(kept), Rows(inputs.dense()[kept].unsqueeze(1)).sums()
    close(own.scatter, expected.scatter, 1e-12)
    close(own.mean, expected.mean, 1e-12)


@settings(max_examples=40)
@given(start=st.integers(0, 4), length=st.integers(1, 8), step=st.integers(1, 4), seed=st.integers(0, 99))
def test_parts_are_those_of_the_dense_inputs(start, length, step, seed):
    torch.manual_seed(seed)
    rows = Rows(randn(7, 3, 4, seed=seed))
    sparse = Sparse(torch.randint(0, 21, (9,)), torch.randint(0, 4, (9,)), randn(9, seed=seed), (7, 3, 4))
    images = patches(randn(7, 2, 5, seed=seed), (2,), (1,), ((0, 1),), (1,))
    for inputs in (rows, sparse, images):
        part = inputs.part(start, start + length, step)
        expected = inputs.dense()[start : start + length : step]
        assert part.shape == expected.shape
        close(part.dense(), expected)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("what", ["rows", "patches"])
def test_of_half_precision_the_sums_are_those_of_a_copy_in_full(what, kept):
    low = (randn(3, 2, 6, 5) + 3).bfloat16()
    if what == "rows":
        inputs, copy = Rows(low.flatten(2)), Rows(low.flatten(2).double())
    else:
        geometry = ((2, 3), (1, 2), ((1, 0), (0, 1)), (1, 1))
        inputs, copy = patches(low, *geometry), patches(low.double(), *geometry)
    which = torch.arange(copy.shape[0] * copy.shape[1]).view(copy.shape[:2]) % 3 > 0 if kept else None
    lazy = inputs.to(f64)
    for one in (lazy, lazy.part(0, 3)):
        found, expected = one.sums(which), copy.sums(which)
        close(found.mean, expected.mean, 1e-12)
        close(found.scatter, expected.scatter, 1e-12)
        close(one.averaged(which).dense(), copy.averaged(which).dense(), 1e-12)
        assert one.dense().dtype == f64
    assert torch.equal(lazy.dense(), copy.dense())
