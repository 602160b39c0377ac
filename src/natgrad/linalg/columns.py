"""A layer's exact block from its columns themselves, where a layer is no plain affine map of its inputs."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from natgrad.linalg.dense import Dense
from natgrad.linalg.exact import CrossBlock, ExactBlock
from natgrad.linalg.operator import Operator
from natgrad.linalg.space import Parts, Space


class ColumnBlock(ExactBlock):
    """`G = S Sᵀ` with the columns of `S` written out: `√scale` times the gradient of every example and column of `D`.

    Args:
        columns: `(examples n, k, size)`, in torch order.
        shapes: those of the parts of a vector.
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
        super().__init__(columns.new_empty(len(columns), 1, 0), columns.unsqueeze(2), bias=True, scale=scale)
        self.shapes, self.space = shapes, Space(shapes)

    @property
    def S(self) -> Float[Tensor, "n k p"]:
        """The columns as they were given, without the scale."""
        return self.g[:, :, 0]

    def _split(self, parts: Parts) -> tuple[Tensor | None, Tensor | None]:
        return None, self.space.flatten(parts)

    def _join(self, W: Tensor, b: Tensor) -> Parts:
        return self.space.unflatten(b)

    def part(self, examples: slice) -> ColumnBlock:
        return ColumnBlock(self.S[examples], self.shapes, scale=self.scale)

    def _diagonal(self) -> Parts:
        return self.space.unflatten(self.scale * self.S.square().sum((0, 1)))

    def _scaled(self, factor: float) -> Operator:
        return super()._scaled(factor) if factor <= 0 else ColumnBlock(self.S, self.shapes, scale=factor * self.scale)

    @property
    def WW(self) -> ExactBlock:
        W = self.space.unflatten(self.S)[0].flatten(2)
        return ColumnBlock(W, self.shapes[:1], scale=self.scale)

    @property
    def bb(self) -> Dense:
        if len(self.shapes) < 2:
            raise ValueError(f"this block is of one parameter, of shape {self.shapes[0]}, and has no bb; expected two")
        b = self.space.unflatten(self.S)[-1].flatten(0, 1).flatten(1)
        return Dense(self.scale * b.mT @ b)

    @property
    def Wb(self) -> CrossBlock:
        raise self._cannot("block between weight and bias by itself")

    @property
    def bW(self) -> CrossBlock:
        raise self._cannot("block between weight and bias by itself")
