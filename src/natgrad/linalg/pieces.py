"""The cases of one layer, batch by batch: its inputs, and the gradients of the columns at its output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg.space import Parts


class Piece(NamedTuple):
    """Examples of one batch, all with the same number of positions `t` and columns `k`.

    A column of the layer's `S` is `s_ik = Σ_t g_ikt ⊗ x_it`, with `x = [h; 1]` if the layer has a bias. Inputs of width
    zero belong to a bias alone.
    """

    h: Float[Tensor, "n t i"]
    g: Float[Tensor, "n k t o"]

    @property
    def columns(self) -> int:
        """The number of columns: `n k`."""
        return self.g.shape[0] * self.g.shape[1]

    def inner(self, W: Tensor | None, b: Tensor | None) -> Float[Tensor, "*batch nk"]:
        """`Sᵀ (W, b)`."""
        if W is None:
            assert b is not None
            return b @ self.g.sum(2).flatten(0, 1).mT
        # Two axes for the inputs: with three, a product with many vectors would copy W for every example.
        a = (self.h.flatten(0, 1) @ W.mT).unflatten(-2, self.h.shape[:2])
        if b is not None:
            a = a + b[..., None, None, :]
        return torch.einsum("...nto,nkto->...nk", a, self.g).flatten(-2)

    def outer(self, c: Float[Tensor, "*batch nk"]) -> tuple[Tensor, Tensor]:
        """`S c`, for weight and bias."""
        c = c.unflatten(-1, self.g.shape[:2])
        e = torch.einsum("...nk,nkto->...nto", c, self.g)
        return e.flatten(-3, -2).mT @ self.h.flatten(0, 1), e.sum((-3, -2))

    def norms(self, bias: bool) -> Float[Tensor, " nk"]:
        """`‖s_ik‖²`, from pairs of positions."""
        inputs = self.h @ self.h.mT + float(bias)
        return torch.einsum("nts,nkts->nk", inputs, self.g @ self.g.mT).flatten()

    def written(self, outputs: slice, bias: bool, out: Tensor | None = None) -> Float[Tensor, "nk size"]:
        """Explicit rows of `Sᵀ`, for some of the outputs: `(output, input)`, the bias as the last input."""
        x = with_one(self.h) if bias else self.h
        g = self.g[..., outputs]
        n, k, t, o = g.shape
        if out is not None:
            out = out.view(n, k * o, x.shape[2])
        if t == 1:
            product = torch.mul(g.reshape(n, k * o, 1), x, out=out)
        else:
            product = torch.bmm(g.mT.reshape(n, k * o, t), x, out=out)
        return product.view(n * k, o * x.shape[2])

    def part(self, examples: slice) -> Piece:
        """Some of the examples."""
        return Piece(self.h[examples], self.g[examples])


def with_one(h: Float[Tensor, "*n i"]) -> Float[Tensor, "*n x"]:
    """`x = [h; 1]`."""
    return torch.cat([h, h.new_ones(*h.shape[:-1], 1)], -1)


def chunks(pieces: Sequence[Piece], columns: int) -> Iterator[list[Piece]]:
    """Chunks of examples: each has at most `columns` columns, or one example."""
    for piece in pieces:
        step = max(1, columns // max(1, piece.g.shape[1]))
        for start in range(0, len(piece.g), step):
            yield [piece.part(slice(start, start + step))]


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Concatenates tensors along axis 0. Shorter tensors are padded along the other axes with zeros, which add nothing
    to a matrix."""
    if len(parts) == 1:
        return parts[0]
    sizes = [max(sizes) for sizes in zip(*(p.shape[1:] for p in parts), strict=True)]
    padded = []
    for p in parts:
        filled = p.new_zeros(len(p), *sizes)
        filled[tuple(slice(n) for n in p.shape)] = p
        padded.append(p if p.shape == filled.shape else filled)
    return torch.cat(padded)


def squares(h: Float[Tensor, "n t i"], g: Float[Tensor, "n k t o"], *, bias: bool, budget: int = 1 << 25) -> Parts:
    """`Σ_ik (Σ_t g_ikt x_it)²` for every entry of `(W, b)`: the diagonal of the block, without the scale.

    With several positions, about `budget` numbers are held at a time.
    """
    _, k, t, o = g.shape
    W = h.new_zeros(o, h.shape[-1])
    if t == 1:
        W = torch.einsum("nko,ni->oi", g[:, :, 0].square(), h[:, 0].square())
    else:
        step = max(1, budget // max(1, k * o * h.shape[-1]))
        for part, its_g in zip(h.split(step), g.split(step), strict=True):
            W += torch.einsum("nkto,nti->nkoi", its_g, part).square().sum((0, 1))
    b = g.sum(2).square().sum((0, 1))
    return (*([W] if h.shape[-1] else []), *([b] if bias else []))


def summed(parts: Iterable[Parts]) -> Parts:
    """The sum of several vectors."""
    first, *rest = parts
    for other in rest:
        first = tuple(a + b for a, b in zip(first, other, strict=True))
    return first
