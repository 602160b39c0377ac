"""Both ways to a Gram matrix, and the primal matrix, against columns formed one by one."""

import pytest
import torch

from natgrad.linalg import ColumnBlock, ExactBlock, gram
from natgrad.linalg.block_diagonal import Block, BlockDiagonal
from natgrad.linalg.joint import Joint
from natgrad.linalg.pieces import Piece
from natgrad.linalg.space import Space
from oracles import close, f64, randn

BATCHES = {  # n, k, t of each
    "one": [(5, 1, 1)],
    "positions": [(7, 1, 4)],
    "columns and positions": [(4, 3, 2)],
    "several": [(5, 1, 4), (6, 1, 1), (3, 2, 2)],
}


def pieces_of(batches, i, o, seed=0):
    return [
        Piece(randn(n, t, i, seed=seed + 2 * b), randn(n, k, t, o, seed=seed + 2 * b + 1))
        for b, (n, k, t) in enumerate(batches)
    ]


def columns(pieces, bias, scale=1.0):
    """`s_ik = scale^½ (Σ_t vec(g hᵀ); Σ_t g)`, by loops."""
    out = []
    for h, g in pieces:
        for n in range(len(h)):
            for k in range(g.shape[1]):
                W = sum(torch.outer(g[n, k, t], h[n, t]) for t in range(h.shape[1]))
                out.append(torch.cat([W.flatten(), *([g[n, k].sum(0)] if bias else [])]))
    return scale**0.5 * torch.stack(out, 1)


@pytest.fixture
def small(monkeypatch):
    """Tiles, chunks and blocks of a few rows, so that a small matrix takes several."""
    for name, value in {"ROWS": 4, "WIDTH": 7, "TILE": 5}.items():
        monkeypatch.setattr(gram, name, value)


@pytest.mark.parametrize("memory", [1 << 28, 1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", ["add_by_pairs", "add_by_columns"])
@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES)
def test_both_ways_add_to_the_lower_triangle(batches, way, bias, memory, small):
    pieces = pieces_of(batches, 3, 4)
    S = columns(pieces, bias, 0.3)
    before = randn(S.shape[1], S.shape[1], seed=9)
    G = before.clone()
    getattr(gram, way)(G, pieces, bias, 0.3, memory)
    close(G.tril(), (before + S.mT @ S).tril(), 1e-12)


@pytest.mark.parametrize("way", ["add_by_pairs", "add_by_columns"])
def test_a_lone_bias(way, small):
    pieces = pieces_of(BATCHES["several"], 0, 3)
    S = torch.cat([p.g.sum(2).flatten(0, 1) for p in pieces])
    G = torch.zeros(len(S), len(S), dtype=f64)
    getattr(gram, way)(G, pieces, True, 2.0)
    close(gram.mirrored(G), 2 * S @ S.mT, 1e-12)


@pytest.mark.parametrize(
    ("n", "t", "i", "o", "way"),
    [
        (1020, 4, 256, 256, "pairs"),  # wide layers: x o parameters are never written out
        (1020, 4, 2, 64, "columns"),
        (10, 1000, 64, 64, "columns"),  # many positions: no (n t)² numbers
        (50, 1, 64, 64, "pairs"),  # one position: S is never written out
    ],
)
def test_the_way_follows_from_the_sizes(n, t, i, o, way):
    h, g = torch.empty(n, t, i, device="meta"), torch.empty(n, 1, t, o, device="meta")
    assert gram.cheaper_way([Piece(h, g)], True) == way


class TestSeveralBatches:
    """Blocks whose batches have numbers of positions and columns of their own."""

    @pytest.fixture
    def both(self):
        first = pieces_of(BATCHES["several"], 3, 4)
        second = [
            Piece(p.h[..., :2].sum(1, keepdim=True), p.g.sum(2, keepdim=True))
            for p in pieces_of(BATCHES["several"], 3, 4, 50)
        ]
        written = [randn(n, k, 6, seed=90 + k) for n, k, _ in BATCHES["several"]]
        blocks = {
            "a": Block(ExactBlock.of(first, bias=True, scale=0.5), ("a.weight", "a.bias")),
            "b": Block(ExactBlock.of(second, bias=False, scale=2.0), ("b.weight",)),
            "c": Block(ColumnBlock.of_batches(written, ((2, 3),), scale=3.0), ("c.weight",)),
        }
        space = Space(
            tuple(s for b in blocks.values() for s in b.shapes), tuple(n for b in blocks.values() for n in b.names)
        )
        S = torch.cat(
            [
                columns(first, True, 0.5),
                columns(second, False, 2.0),
                3**0.5 * torch.cat([c.flatten(0, 1) for c in written]).mT,
            ]
        )
        return BlockDiagonal(blocks, space), S

    def test_each_block(self, both):
        layers, S = both
        start = 0
        for block in layers.layers.values():
            op = block.operator
            own = S[start : start + op.space.size]
            start += op.space.size
            v, c = randn(2, op.space.size, seed=4), randn(2, S.shape[1], seed=5)
            close(op.columns(), own, 1e-12)
            close(op.gram(), own.mT @ own, 1e-12)
            close(op.to_dense(), own @ own.mT, 1e-12)
            close(op.trace(), own.square().sum(), 1e-12)
            close(op.space.flatten(op._diagonal()), own.square().sum(1), 1e-12)
            close(op.scale**0.5 * op._inner(op.space.unflatten(v)), v @ own, 1e-12)
            close(op.scale**0.5 * op.space.flatten(op._outer(c)), c @ own.mT, 1e-12)
            damped = own @ own.mT + 0.1 * torch.eye(len(own), dtype=f64)
            close(op.inverse(0.1).to_dense(), torch.linalg.inv(damped), 1e-9)
            close((2.0 * op).to_dense(), 2 * own @ own.mT, 1e-12)

    @pytest.mark.parametrize("memory", [1 << 28, 1])
    def test_all_of_them_together(self, both, memory):
        layers, S = both
        F = Joint(layers, memory)
        v = randn(len(S), seed=4)
        close(F.gram(), S.mT @ S, 1e-12)
        close(F.formed(), S @ S.mT, 1e-12)
        close(F @ v, S @ (S.mT @ v), 1e-12)
        expected = torch.linalg.solve(S @ S.mT + 0.1 * torch.eye(len(S), dtype=f64), v)
        for form in ("dual", "primal"):
            close(F.inverse(0.1, form=form) @ v, expected, 1e-9)

    def test_what_is_saved_is_filled_up_with_zeros(self, both):
        layers, _ = both
        block = layers.layers["a"].operator
        assert block.h.shape == (14, 4, 3)
        close(ExactBlock(block.h, block.g, bias=True, scale=0.5).to_dense(), block.to_dense(), 1e-12)


def test_the_cheaper_form_follows_from_the_sizes():
    def joint(n, t, i, o):
        h, g = torch.empty(n, t, i, device="meta"), torch.empty(n, 1, t, o, device="meta")
        blocks = {"a": Block(ExactBlock(h, g, bias=False), ("a",))}
        return Joint(BlockDiagonal(blocks, Space(((o, i),), ("a",))))

    assert joint(1020, 4, 64, 4).cheaper_form() == "primal"
    assert joint(1020, 4, 64, 64).cheaper_form() == "dual"
