"""The Gram matrix `SᵀS` of a layer's columns, computed in the cheaper of two ways.

With `s_ik = Σ_t g_ikt ⊗ x_it`, the entry for two columns can be computed:

- **by columns**: form `S`, some outputs at a time, and multiply: `(nk)² x o` multiplications.
- **by pairs** of positions: `Σ_ts (x_it·x_js)(g_ikt·g_jqs)`, in tiles: `(nt)² x + (nkt)² o` multiplications, and a
  pass over the `(nkt)²` numbers. The `x o` parameters are never formed.

Both fill only the lower triangle, block row by block row, like BLAS's `syrk`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg.pieces import Piece, with_one

MEMORY = 1 << 28
"""The number of bytes that may be held at a time."""
ROWS = 256
"""Rows of a block of the Gram matrix."""
WIDTH = 2048
"""Parameters in a chunk of `S`: larger chunks need fewer passes over the Gram matrix."""
TILE = 512
"""Rows of a tile of pairs: a tile fits in a core's cache."""
PAIR = 128
"""The overhead of a pair of positions, in multiplications of a large matrix product."""


def add_gram(
    gram: Float[Tensor, "nk nk"], pieces: Sequence[Piece], bias: bool, scale: float, memory: int = MEMORY
) -> None:
    """Adds `scale SᵀS` of one layer to the lower triangle of `gram`."""
    if cheaper_way(pieces, bias) == "pairs":
        add_by_pairs(gram, pieces, bias, scale, memory)
    else:
        add_by_columns(gram, pieces, bias, scale, memory)


def cheaper_way(pieces: Sequence[Piece], bias: bool) -> str:
    """`"pairs"` or `"columns"`, whichever takes fewer multiplications."""
    pairs, columns = costs(pieces, bias)
    return "pairs" if pairs < columns else "columns"


def costs(pieces: Sequence[Piece], bias: bool) -> tuple[float, float]:
    """The number of multiplications by pairs and by columns, for one half of the Gram matrix."""
    inputs = sum(p.h.shape[0] * p.h.shape[1] for p in pieces)
    gradients = sum(p.g.shape[:3].numel() for p in pieces)
    columns = sum(p.columns for p in pieces)
    x, o = pieces[0].h.shape[2] + bias, pieces[0].g.shape[3]
    return (inputs**2 * x + gradients**2 * (o + PAIR)) / 2, columns**2 * x * o / 2 + gradients * x * o


def add_by_columns(
    gram: Float[Tensor, "nk nk"],
    pieces: Sequence[Piece],
    bias: bool,
    scale: float,
    memory: int = MEMORY,
    factors: Float[Tensor, " size"] | None = None,
) -> None:
    """From rows of `S`, for as many outputs at a time as fit.

    factors: the diagonal of a matrix `R`, in the order `(output, input)` with the bias as the last input. With them the
    rows are those of `R S`.
    """
    if not pieces[0].h.shape[2]:  # a bias alone, or explicit columns
        sums = [p.g.sum(2).flatten(0, 1) if p.g.shape[2] > 1 else p.g.reshape(p.columns, -1) for p in pieces]
        S = sums[0] if len(sums) == 1 else torch.cat(sums)
        add_square(gram, S if factors is None else S * factors, scale)
        return
    o, x, total = pieces[0].g.shape[3], pieces[0].h.shape[2] + bias, len(gram)
    width = min(WIDTH, memory // (total * gram.element_size()))
    step = min(o, max(1, width // x))
    buffer = gram.new_empty(total * step * x)
    for start in range(0, o, step):
        outputs = slice(start, min(o, start + step))
        own = (outputs.stop - start) * x
        S, row = buffer[: total * own].view(total, own), 0
        for p in pieces:
            p.written(outputs, bias, out=S[row : row + p.columns])
            row += p.columns
        if factors is not None:
            S *= factors[start * x : outputs.stop * x]
        add_square(gram, S, scale)


def add_by_pairs(
    gram: Float[Tensor, "nk nk"], pieces: Sequence[Piece], bias: bool, scale: float, memory: int = MEMORY
) -> None:
    """From the scalar products of all pairs of positions, a tile of examples at a time."""
    most = min(TILE, int((memory / (3 * gram.element_size())) ** 0.5))
    tiles = list(_tiles(pieces, bias, most))
    for a, (rows, x, g) in enumerate(tiles):
        for columns, its_x, its_g in tiles[: a + 1]:
            pairs = _pairs(g, its_g).mul_(_pairs(x, its_x))
            total = pairs.sum((2, 5)) if g.shape[2] * its_g.shape[2] != 1 else pairs
            gram[rows, columns].add_(total.reshape(rows.stop - rows.start, -1), alpha=scale)


def _tiles(pieces: Sequence[Piece], bias: bool, most: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each tile: its columns, inputs `(n, 1, t, x)` and gradients `(n, k, t, o)`, with at most `most` rows each."""
    row = 0
    for p in pieces:
        _, k, t, _ = p.g.shape
        x = (with_one(p.h) if bias else p.h).unsqueeze(1)
        step = max(1, most // max(1, k * t))
        for its_x, its_g in zip(x.split(step), p.g.split(step), strict=True):
            count = len(its_g) * k
            yield slice(row, row + count), its_x, its_g
            row += count


def _pairs(u: Float[Tensor, "n k t d"], v: Float[Tensor, "m q s d"]) -> Float[Tensor, "n k t m q s"]:
    """All scalar products of rows of `u` with rows of `v`."""
    return (u.flatten(0, 2) @ v.flatten(0, 2).mT).view(*u.shape[:3], *v.shape[:3])


def add_square(gram: Float[Tensor, "d d"], A: Float[Tensor, "d m"], scale: float = 1.0) -> None:
    """Adds `scale A Aᵀ` to the lower triangle of `gram`."""
    for start in range(0, len(A), ROWS):
        stop = min(len(A), start + ROWS)
        gram[start:stop, :stop].addmm_(A[start:stop], A[:stop].mT, alpha=scale)


def mirrored(gram: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The symmetric matrix with the given lower triangle, in place."""
    for start in range(0, len(gram), ROWS):
        stop = min(len(gram), start + ROWS)
        gram[:start, start:stop] = gram[start:stop, :start].mT
        square = gram[start:stop, start:stop]
        square.copy_(square.tril() + square.tril(-1).mT)
    return gram
