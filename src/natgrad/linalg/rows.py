"""One weight whose rows belong to several layers: packed projections of attention, or the groups of a convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from natgrad.linalg.operator import Operator, check_operator
from natgrad.linalg.space import Parts, Space


class Rows(Operator):
    """Independent operators on the rows of `(W, b)`, of `W` alone or of `b` alone, stacked.

    This is the matrix of a weight that holds several layers: packed projections, the groups of a convolution.

    Args:
        parts: the operators. Their vectors have the same form, but may differ in the number of rows, which add up.

    Example:
        >>> import torch
        >>> from natgrad.linalg import Kronecker, Rows
        >>> M = Rows([Kronecker(torch.eye(2), torch.eye(1)), Kronecker(3 * torch.eye(2), torch.eye(1))])
        >>> (M @ torch.ones(2, 2)).tolist()
        [[1.0, 1.0], [3.0, 3.0]]
    """

    def __init__(self, parts: Sequence[Operator]):
        self.parts = list(parts)
        if not self.parts:
            raise ValueError("parts is empty; expected at least one operator")
        first = self.parts[0]
        for i, op in enumerate(self.parts):
            check_operator("Rows", f"parts[{i}]", op)
            if [shape[1:] for shape in op.space.shapes] != [shape[1:] for shape in first.space.shapes]:
                raise ValueError(
                    f"parts[{i}] acts on {op.space.describe()}; expected the form of parts[0], {first.space.describe()}"
                )
        count = [op.space.shapes[0][0] for op in self.parts]
        self._sizes = count
        self.space = Space(tuple((sum(count), *shape[1:]) for shape in first.space.shapes))
        self.dtype, self.device = first.dtype, first.device
        self.has_coordinates = any(op.has_coordinates for op in self.parts)

    def describe(self) -> str:
        kinds = dict.fromkeys(op.describe() for op in self.parts)
        return f"{len(self.parts)} x ({'; '.join(kinds)})"

    def _matmul(self, parts: Parts) -> Parts:
        return self._each(lambda op, p: op._matmul(p), parts)

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> Rows:
        return Rows([op.inverse(damping, damping_style=damping_style) for op in self.parts])

    def power(self, exponent: float, damping: float = 0.0) -> Rows:
        return Rows([op.power(exponent, damping) for op in self.parts])

    def logdet(self, damping: float = 0.0) -> Tensor:
        return torch.stack([op.logdet(damping) for op in self.parts]).sum()

    def trace(self) -> Tensor:
        return torch.stack([op.trace() for op in self.parts]).sum()

    def trace_in_coordinates(self) -> Tensor:
        return torch.stack([op.trace_in_coordinates() for op in self.parts]).sum()

    def _norm(self) -> Tensor:
        return torch.stack([op.norm() for op in self.parts]).norm()

    def _diagonal(self) -> Parts:
        return self._joined([op._diagonal() for op in self.parts])

    def _inverse_factor(self, parts: Parts, damping: float) -> Parts:
        return self._each(lambda op, p: op._inverse_factor(p, damping), parts)

    def _scaled(self, factor: float) -> Rows:
        return Rows([op._scaled(factor) for op in self.parts])

    def apart(self, parts: Parts) -> Parts:
        return self._each(lambda op, p: op.apart(p), parts)

    def coordinates(self, parts: Parts) -> Parts:
        return self._each(lambda op, p: op.coordinates(p), parts)

    def from_coordinates(self, parts: Parts) -> Parts:
        return self._each(lambda op, p: op.from_coordinates(p), parts)

    def _each(self, apply: Callable[[Operator, Parts], Parts], parts: Parts) -> Parts:
        axes = [len(shape) for shape in self.space.shapes]
        pieces = [p.split(self._sizes, p.ndim - n) for p, n in zip(parts, axes, strict=True)]
        return self._joined([apply(op, p) for op, p in zip(self.parts, zip(*pieces, strict=True), strict=True)])

    def _joined(self, pieces: Sequence[Parts]) -> Parts:
        axes = [-len(shape) for shape in self.space.shapes]
        return tuple(torch.cat(column, axis) for column, axis in zip(zip(*pieces, strict=True), axes, strict=True))
