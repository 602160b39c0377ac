"""The exact matrix in other units, against `R S Sᵀ R` formed column by column."""

import pytest
import torch

from natgrad.linalg.block_diagonal import Block, BlockDiagonal
from natgrad.linalg.exact import ExactBlock
from natgrad.linalg.joint import Joint
from natgrad.linalg.layout import Layout
from natgrad.linalg.rescaled import Rescaled, RescaledInverse
from natgrad.linalg.space import Space
from oracles import close, f64, randn

N, K, DAMPING = 5, 2, 0.1
SHAPES = {"one position": (1, 3, 2), "few products of S": (3, 2, 2), "few pairs of positions": (2, 9, 8)}  # t, i, o


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def F(request):
    """Three layers: with a bias, with none, and a bias alone; one of them holds its weight transposed."""
    t, i, o = request.param
    first = ExactBlock(randn(N, t, i), randn(N, K, t, o, seed=1), bias=True, scale=0.5)
    second = ExactBlock(randn(N, 1, 2, seed=2), randn(N, K, 1, 3, seed=3), bias=False)
    third = ExactBlock(randn(N, t, 0), randn(N, K, t, 4, seed=4), bias=True)
    blocks = {
        "a": Block(first, ("a.weight", "a.bias")),
        "b": Block(second, ("b.weight",), Layout("transposed")),
        "c": Block(third, ("c.bias",)),
    }
    names = tuple(n for block in blocks.values() for n in block.names)
    return Joint(BlockDiagonal(blocks, Space(tuple(s for b in blocks.values() for s in b.shapes), names)))


@pytest.fixture
def R(F):
    """The matrix `R`, and its diagonal by parameter."""
    r = randn(F.space.size, seed=5).abs() + 0.1
    return r.diag(), F.space.unflatten(r)


def test_matrix_trace_and_diagonal(F, R):
    R, r = R
    G = Rescaled(F, r)
    expected = R @ F.to_dense() @ R
    close(G.to_dense(), expected, 1e-12)
    close(G.trace(), expected.trace(), 1e-12)
    close(F.space.flatten(G._diagonal()), expected.diagonal(), 1e-12)
    v = randn(F.space.size, seed=6)
    close(G @ v, expected @ v, 1e-12)


def test_gram(F, R):
    R, r = R
    S = F._columns([op.pieces for _, op in F._blocks])
    close(Rescaled(F, r).gram(), S.mT @ R @ R @ S, 1e-12)


@pytest.mark.parametrize("memory", [1 << 28, 400])
def test_a_few_columns_at_a_time(F, R, memory):
    R, r = R
    small = Joint(F.layers, memory)
    close(Rescaled(small, r).gram(), Rescaled(F, r).gram(), 1e-12)


@pytest.mark.parametrize("form", ["dual", "primal"])
def test_inverse(F, R, form):
    R, r = R
    inverse = RescaledInverse(Rescaled(F, r), DAMPING, form)
    M = F.to_dense() + DAMPING * torch.linalg.inv(R @ R)
    v = randn(F.space.size, seed=6)
    close(inverse @ v, torch.linalg.solve(M, v))
    S = F._columns([op.pieces for _, op in F._blocks])
    c = randn(S.shape[1], seed=7)
    close(F.space.flatten(inverse.solve_columns(c)), torch.linalg.solve(M, S @ c))


def test_the_cost_counts_columns_alone():
    """Pairs of positions, which are cheap here, do not give the Gram matrix of `R S`."""
    op = ExactBlock(torch.zeros(30, 1, 40, dtype=f64), torch.zeros(30, 1, 1, 40, dtype=f64), bias=False)
    F = Joint(BlockDiagonal({"a": Block(op, ("a",))}, Space(((40, 40),), ("a",))))
    G = Rescaled(F, (torch.ones(40, 40, dtype=f64),))
    assert G.cost("dual") > F.cost("dual")
    assert G.cost("primal") == F.cost("primal")
