"""Pairs of a scale and a shift where the shift has no gradient but for rounding: a quotient of rounding errors is no
mean, and the matrix is what it is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from natgrad.linalg import CoordinateBlocks
from oracles import close, f64, randn

EPS = torch.finfo(f64).eps
seeds = st.integers(0, 10_000)
# How large the shift's gradients are beside the scale's: rounding, on both sides of the floor, and as usual.
sizes = st.sampled_from([0.0, EPS, 1e3 * EPS, 1e-9, 0.9 * EPS**0.25, 1.1 * EPS**0.25, 1e-2, 1.0, 1e4])


def products(size, seed, d=4, n=7):
    w, c = randn(n, d, seed=seed), size * randn(n, d, seed=seed + 1)
    return w.square().mean(0), (w * c).mean(0), c.square().mean(0)


def dense_of(ww, wc, cc):
    return torch.cat([torch.cat([ww.diag(), wc.diag()], 1), torch.cat([wc.diag(), cc.diag()], 1)])


@given(size=sizes, seed=seeds, damping=st.sampled_from([1e-6, 0.1, 10.0]))
def test_the_matrix_and_its_damped_inverses_are_exact_whatever_the_shifts_gradient(size, seed, damping):
    its = products(size, seed)
    M, dense = CoordinateBlocks.of_products(*its), dense_of(*its)
    close(M.to_dense(), dense, 1e-13)
    close(M.trace(), dense.trace(), 1e-13)
    close(M.norm(), torch.linalg.matrix_norm(dense), 1e-13)
    damped = dense + damping * torch.eye(8, dtype=f64)
    # At the mean's size rounding is that of m², which centered damping has for a scale.
    close(damping * M.inverse(damping).to_dense(), damping * torch.linalg.inv(damped), 1e-8)
    close(M.logdet(damping), torch.logdet(damped), 1e-9)
    T = torch.eye(8, dtype=f64)
    T[4:, :4] = M.m.diag()
    centered = dense + damping * T.mT @ T
    back = torch.linalg.inv(T)
    close(M.trace_in_coordinates(), (back.mT @ dense @ back).trace(), 1e-8)
    inverse = M.inverse(damping, damping_style="centered")
    scale = damping / (1 + M.m.square().max())
    close(scale * inverse.to_dense(), scale * torch.linalg.inv(centered), 1e-8)
    close(scale * inverse.diagonal()[1], scale * torch.linalg.inv(centered).diagonal()[4:], 1e-8)
    close(inverse.inverse().to_dense() / centered.norm(), centered / centered.norm(), 1e-7)
    close(inverse.logdet(), -torch.logdet(centered), 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
@pytest.mark.parametrize("digits", [0.1, 1.0, 30.0, 1000.0])
@given(seed=seeds)
def test_rounding_is_no_mean(seed, digits, dtype):
    its = (p.to(dtype) for p in products(digits * torch.finfo(dtype).eps, seed))
    M = CoordinateBlocks.of_products(*its)
    assert M.m.abs().max() == 0
    for style in ("exact", "centered"):
        assert M.inverse(0.1, damping_style=style).to_dense().norm(p=2) < 10.1 * 8**0.5


@given(seed=seeds, mean=st.sampled_from([0.0, 1.0, 30.0]))
def test_a_mean_that_is_known_stays(seed, mean):
    """Of `y = w z + c`, with `z` about the mean."""
    z, g = randn(50, 3, seed=seed) + mean, randn(50, 3, seed=seed + 1)
    M = CoordinateBlocks.of_products((g * z).square().mean(0), (g.square() * z).mean(0), g.square().mean(0))
    close(M.m, (g.square() * z).sum(0) / g.square().sum(0), 1e-12)
    assert M.r.abs().max() == 0
