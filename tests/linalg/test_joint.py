"""The exact matrix of all layers together, against `S Sᵀ` formed column by column."""

import pytest
import torch

from natgrad.linalg.block_diagonal import Block, BlockDiagonal
from natgrad.linalg.exact import ExactBlock
from natgrad.linalg.joint import Joint
from natgrad.linalg.space import Space
from oracles import close, f64, randn

N, K = 5, 2
SHAPES = {"one position": (1, 3, 2), "few products of S": (3, 2, 2), "few pairs of positions": (2, 9, 8)}  # t, i, o


def layers(t, i, o, bias):
    first = ExactBlock(randn(N, t, i), randn(N, K, t, o, seed=1), bias=bias, scale=0.5)
    second = ExactBlock(randn(N, 1, 2, seed=2), randn(N, K, 1, 3, seed=3), bias=True)
    return first, second


def columns(h, g, bias, scale):
    """`s_ik = scale^½ (Σ_t vec(g hᵀ); Σ_t g)`, by loops."""
    out = []
    for n in range(N):
        for k in range(K):
            W = sum(torch.outer(g[n, k, t], h[n, t]) for t in range(h.shape[1]))
            out.append(torch.cat([W.flatten(), g[n, k].sum(0)]) if bias else W.flatten())
    return scale**0.5 * torch.stack(out, 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
class TestJoint:
    @pytest.fixture
    def pair(self, shape, bias):
        first, second = layers(*shape, bias)
        S = torch.cat([columns(first.h, first.g, bias, 0.5), columns(second.h, second.g, True, 1.0)])
        blocks = {
            "a": Block(first, ("a.weight", "a.bias")[: 1 + bias]),
            "b": Block(second, ("b.weight", "b.bias")),
        }
        names = tuple(n for block in blocks.values() for n in block.names)
        space = Space(first.space.shapes + second.space.shapes, names)
        return Joint(BlockDiagonal(blocks, space)), S

    def test_gram(self, pair):
        joint, S = pair
        close(joint.gram(), S.mT @ S, 1e-12)

    def test_dense_product_and_trace(self, pair):
        joint, S = pair
        v = randn(len(S), seed=4)
        close(joint.to_dense(), S @ S.mT, 1e-12)
        close(joint @ v, S @ (S.mT @ v), 1e-12)
        close(joint.trace(), S.square().sum(), 1e-12)

    @pytest.mark.parametrize("form", ["dual", "primal"])
    def test_inverse(self, pair, form):
        joint, S = pair
        v = randn(len(S), seed=4)
        expected = torch.linalg.solve(S @ S.mT + 0.1 * torch.eye(len(S), dtype=f64), v)
        close(joint.inverse(0.1, form=form) @ v, expected)
