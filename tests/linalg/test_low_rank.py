"""Low rank plus diagonal of exact blocks: equal eigenvalues, many rows, none at all."""

import pytest
import torch

from natgrad.linalg import DiagonalPlusLowRank, ExactBlock, Space, diagonal_plus
from natgrad.linalg.diagonal_plus import nearest_low_rank
from oracles import close, f64, randn


def formed(G, rank):
    e, U = torch.linalg.eigh(G)
    top = (U[:, -rank:] * e[-rank:]) @ U[:, -rank:].mT
    return top + (G - top).diagonal().diag()


@pytest.mark.parametrize("n", [3, 40])  # by the Gram matrix, and by the block itself
@pytest.mark.parametrize("small", [True, False])  # False: by products alone
def test_the_largest_eigenvalues_and_the_diagonal_are_the_blocks(n, small, monkeypatch):
    if not small:
        monkeypatch.setattr(diagonal_plus, "FORMED", 1)
    block = ExactBlock(randn(n, 2, 4), randn(n, 3, 2, 5, seed=1), bias=True, scale=1 / n)
    M = nearest_low_rank(block, 3)
    close(M.to_dense(), formed(block.to_dense(), 3), 1e-6 if not small else 1e-10)
    close(M.diagonal()[0], block.diagonal()[0])
    close(M.norm(2), block.norm(2), 0.5)
    assert M.d.min() >= 0
    assert len(M.values) == 3


def test_equal_eigenvalues_stay_together():
    h = randn(20, 1, 4)
    g = torch.eye(3, dtype=f64)[None, :, None].expand(20, 3, 1, 3)  # A ⊗ I: every eigenvalue three times
    block = ExactBlock(h, g, bias=False)
    M = nearest_low_rank(block, 2)
    assert len(M.values) == 3
    close(M.to_dense(), formed(block.to_dense(), 3))


@pytest.mark.parametrize("n", [0, 5, 20])
def test_a_block_of_zeros_is_a_diagonal_of_zeros(n):
    M = nearest_low_rank(ExactBlock(torch.zeros(n, 1, 4), torch.ones(n, 1, 1, 2), bias=False), 3)
    assert not M.to_dense().any()
    close(M.solve(torch.ones(8), damping=0.5), 2 * torch.ones(8), 1e-6)
    assert M.logdet(1.0) == M.norm() == 0
    with pytest.raises(ValueError, match="singular or indefinite"):
        M.solve(torch.ones(8))


def test_powers_of_many_rows_are_refused_and_shapes_are_checked(monkeypatch):
    M = DiagonalPlusLowRank(torch.ones(4), torch.ones(4, 1), torch.ones(1))
    monkeypatch.setattr(diagonal_plus, "FORMED", 3)
    close(M.power(-1.0) @ torch.ones(4), torch.full((4,), 0.2), 1e-6)
    with pytest.raises(TypeError, match=r"has no power -0.5 of its own, and with 4 rows it is too large"):
        M.power(-0.5)
    with pytest.raises(ValueError, match=r"U \(4, 2\) and values \(2,\); expected \(3,\), \(3, rank\) and \(rank,\)"):
        DiagonalPlusLowRank(torch.ones(4), torch.ones(4, 2), torch.ones(2), Space(((3,),)))
    with pytest.raises(ValueError, match="singular or indefinite"):
        DiagonalPlusLowRank(torch.ones(2), torch.eye(2), torch.tensor([-2.0, 1.0])).logdet(0.5)
