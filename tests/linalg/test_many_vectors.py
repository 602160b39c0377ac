"""Products with many vectors at once take memory for what comes out, not for a copy of the vectors per example."""

import torch

from natgrad.linalg import ExactBlock
from oracles import close, f64, randn


def test_inner_products_with_many_vectors_hold_no_copy_of_them_per_example():
    n, d_in, many = 2_000, 2_000, 500  # a copy of every W for every example would take 8 TB
    block = ExactBlock(torch.ones(n, 1, d_in), torch.ones(n, 1, 1, 1), bias=True)
    W, b = torch.ones(many, 1, d_in), torch.ones(many, 1)
    found = block._inner((W, b))
    assert found.shape == (many, n)
    assert (found == d_in + 1).all()


def test_several_positions_and_leading_axes():
    h, g = randn(6, 3, 4), randn(6, 2, 3, 5, seed=1)
    W, b = randn(2, 7, 5, 4, seed=2), randn(2, 7, 5, seed=3)
    found = ExactBlock(h, g, bias=True)._inner((W, b))
    a = torch.einsum("nti,qroi->qrnto", h, W) + b[:, :, None, None]
    close(found, torch.einsum("qrnto,nkto->qrnk", a, g).flatten(-2).to(f64))
