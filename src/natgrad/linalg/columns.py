"""A layer's exact block from its columns, for layers that are not a plain affine map of their inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg.dense import Dense
from natgrad.linalg.exact import CrossBlock, ExactBlock
from natgrad.linalg.operator import Operator
from natgrad.linalg.pieces import Piece, stacked
from natgrad.linalg.space import Parts, Space


class ColumnBlock(ExactBlock):
    """`G = S Sᵀ` with explicit columns of `S`: `√scale` times the gradient for every example and column of `D`.

    Args:
        columns: `(examples n, k, size)`, in torch order.
        shapes: of the parts of a vector.
        scale: `1/N` for the mean over cases.

    Example:
        >>> import torch
        >>> from natgrad.linalg import ColumnBlock
        >>> G = ColumnBlock(torch.tensor([[[1.0, 2.0]]]), ((2,),))  # one example, one column
        >>> G.to_dense().tolist()
        [[1.0, 2.0], [2.0, 4.0]]
    """

    def __init__(
        self, columns: Float[Tensor, "n k p"], shapes: tuple[tuple[int, ...], ...], *, scale: float | Tensor = 1.0
    ):
        self._hold([written(columns)], True, scale)
        self.shapes, self.space = shapes, Space(shapes)

    @classmethod
    def of_batches(
        cls,
        columns: Sequence[Float[Tensor, "_n _k p"]],
        shapes: tuple[tuple[int, ...], ...],
        *,
        scale: float | Tensor = 1.0,
    ) -> ColumnBlock:
        """The block of several batches, each with its own number of columns."""
        return cls._of([written(S) for S in columns], shapes, scale)

    @classmethod
    def _of(cls, pieces: Sequence[Piece], shapes: tuple[tuple[int, ...], ...], scale: float | Tensor) -> ColumnBlock:
        block = cls.__new__(cls)
        block._hold(pieces, True, scale)
        block.shapes, block.space = shapes, Space(shapes)
        return block

    @property
    def S(self) -> Float[Tensor, "n k p"]:
        """The given columns, without the scale; with several batches, padded with zeros."""
        return stacked([p.g[:, :, 0] for p in self.pieces])

    def _split(self, parts: Parts) -> tuple[Tensor | None, Tensor | None]:
        return None, self.space.flatten(parts)

    def _join(self, W: Tensor, b: Tensor) -> Parts:
        return self.space.unflatten(b)

    def with_pieces(self, pieces: Sequence[Piece]) -> ColumnBlock:
        return self._of(pieces, self.shapes, self.scale)

    def columns(self) -> Float[Tensor, "size nk"]:
        return self.scale**0.5 * torch.cat([p.g.flatten(0, 2) for p in self.pieces]).mT

    def _diagonal(self) -> Parts:
        return self.space.unflatten(self.scale * torch.stack([p.g.square().sum((0, 1, 2)) for p in self.pieces]).sum(0))

    def _scaled(self, factor: float) -> Operator:
        return super()._scaled(factor) if factor <= 0 else self._of(self.pieces, self.shapes, factor * self.scale)

    @property
    def WW(self) -> ExactBlock:
        W = self.space.unflatten(self.S)[0].flatten(2)
        return ColumnBlock(W, self.shapes[:1], scale=self.scale)

    @property
    def bb(self) -> Dense:
        if len(self.shapes) < 2:
            raise ValueError(
                f"this block has one parameter, of shape {self.shapes[0]}, so it has no bb; expected two parameters"
            )
        b = self.space.unflatten(self.S)[-1].flatten(0, 1).flatten(1)
        return Dense(self.scale * b.mT @ b)

    @property
    def Wb(self) -> CrossBlock:
        raise self._cannot("block between weight and bias by itself")

    @property
    def bW(self) -> CrossBlock:
        raise self._cannot("block between weight and bias by itself")


def written(columns: Float[Tensor, "n k p"]) -> Piece:
    """Explicit columns, represented as the cases of a bias with as many entries."""
    return Piece(columns.new_empty(len(columns), 1, 0), columns.unsqueeze(2))
