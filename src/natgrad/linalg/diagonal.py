"""A diagonal matrix, over vectors of any form."""

from __future__ import annotations

import torch
from torch import Tensor

from natgrad.checks.values import described
from natgrad.linalg.arguments import check_damping, check_exponent
from natgrad.linalg.eigen import positive
from natgrad.linalg.fitting import check_tensors
from natgrad.linalg.operator import Operator
from natgrad.linalg.space import Parts, Space


class Diagonal(Operator):
    """`diag(values)`: products, inverses and powers entry by entry.

    Args:
        values: the diagonal, as the parts of a vector: one tensor for each shape of the space.
        space: the form of its vectors. None: tensors with the shapes of the values.

    Raises:
        ValueError: by operations that need it, if an entry of the damped diagonal is not positive.

    Example:
        >>> import torch
        >>> D = Diagonal((torch.tensor([1.0, 3.0]),))
        >>> D.solve(torch.ones(2), damping=1.0), D.trace().item()
        (tensor([0.5000, 0.2500]), 4.0)
    """

    def __init__(self, values: Parts, space: Space | None = None):
        if isinstance(values, Tensor):
            raise TypeError(f"values is {described(values)}; expected a tuple with a tensor for each part: (values,)")
        self.values = tuple(values)
        self.space = space or Space(tuple(tuple(v.shape) for v in self.values))
        labels = self.space.labels()
        if not self.values or len(labels) != len(self.values):
            raise ValueError(
                f"values has {len(self.values)} tensors but space has {len(labels)} parts; expected the same"
            )
        fitting = zip(labels, zip(self.values, self.space.shapes, strict=True), strict=True)
        check_tensors("Diagonal", dict(fitting))
        self.dtype, self.device = self.values[0].dtype, self.values[0].device

    def describe(self) -> str:
        return "diagonal"

    def _matmul(self, parts: Parts) -> Parts:
        return tuple(v * p for v, p in zip(self.values, parts, strict=True))

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> Diagonal:
        check_damping(damping, damping_style)  # without factors or centered coordinates, every style adds `damping I`
        return self.power(-1.0, damping)

    def power(self, exponent: float, damping: float = 0.0) -> Diagonal:
        check_exponent(exponent)
        return Diagonal(tuple(v**exponent for v in self._damped(damping)), self.space)

    def logdet(self, damping: float = 0.0) -> Tensor:
        return torch.stack([v.log().sum() for v in self._damped(damping)]).sum()

    def trace(self) -> Tensor:
        return torch.stack([v.sum() for v in self.values]).sum()

    def _norm(self) -> Tensor:
        return torch.stack([v.norm() for v in self.values]).norm()

    def _diagonal(self) -> Parts:
        return tuple(v.clone() for v in self.values)

    def _inverse_factor(self, parts: Parts, damping: float) -> Parts:
        return self.power(-0.5, damping)._matmul(parts)

    def _scaled(self, factor: float) -> Diagonal:
        return Diagonal(tuple(factor * v for v in self.values), self.space)

    def _plus(self, other: Operator) -> Operator | None:
        if not isinstance(other, Diagonal):
            return None
        return Diagonal(tuple(a + b for a, b in zip(self.values, other.values, strict=True)), self.space)

    def _damped(self, damping: float) -> Parts:
        check_damping(damping)
        flat = self.space.flatten(self.values) + damping
        return self.space.unflatten(positive(flat, "the diagonal", damping))
