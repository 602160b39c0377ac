"""A matrix with explicit entries, over vectors of any form."""

from __future__ import annotations

import torch
from torch import Tensor

from natgrad.checks.values import ByLayer
from natgrad.linalg.arguments import check_damping, check_exponent
from natgrad.linalg.eigen import eigh, inverse_from_cholesky, positive
from natgrad.linalg.fitting import check_axes, check_tensors
from natgrad.linalg.operator import Operator
from natgrad.linalg.space import Parts, Space


class Dense(Operator):
    """A symmetric matrix `(size, size)` in torch order. The reference for every other structure.

    Args:
        matrix: `(size, size)`, symmetric; not copied.
        space: the form of its vectors. None: tensors of shape `(size,)`.

    Raises:
        ValueError: by operations that need it, if the damped matrix is not positive definite.

    Example:
        >>> import torch
        >>> Dense(torch.diag(torch.tensor([1.0, 3.0]))).solve(torch.ones(2), damping=1.0)
        tensor([0.5000, 0.2500])
    """

    def __init__(self, matrix: Tensor, space: Space | None = None):
        check_axes("Dense", "matrix", matrix, (2,))
        if matrix.ndim != 2 or len(matrix) != matrix.shape[1]:
            raise ValueError(f"matrix has shape {tuple(matrix.shape)}; expected a square one")
        self.matrix = matrix
        check_tensors("Dense", {"matrix": (matrix, matrix.shape)})
        self.space = space or Space(((len(matrix),),))
        if self.space.size != len(matrix):
            raise ValueError(
                f"matrix has {len(matrix)} rows but space has {self.space.size} numbers; expected the same"
            )
        self.dtype, self.device = matrix.dtype, matrix.device
        self._eigh: tuple[Tensor, Tensor] | None = None

    def describe(self) -> str:
        return f"dense {len(self.matrix)}"

    def _matmul(self, parts: Parts) -> Parts:
        if len(parts) == 1 and parts[0].shape == self.matrix.shape[:1]:
            return (torch.mv(self.matrix.mT, parts[0]),)
        return self.space.unflatten(self.space.flatten(parts) @ self.matrix)

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> Dense:
        check_damping(damping, damping_style)  # without factors or centered coordinates, every style adds `damping I`
        damped = self.matrix + damping * torch.eye(len(self.matrix), dtype=self.dtype, device=self.device)
        return Dense(inverse_from_cholesky(damped, "the matrix", damping), self.space)

    def power(self, exponent: float, damping: float = 0.0) -> Dense:
        check_exponent(exponent)
        e, U = self._damped(damping)
        return Dense((U * e**exponent) @ U.mT, self.space)

    def logdet(self, damping: float = 0.0) -> Tensor:
        return self._damped(damping)[0].log().sum()

    def trace(self) -> Tensor:
        return self.matrix.trace()

    def _norm(self) -> Tensor:
        return torch.linalg.matrix_norm(self.matrix)

    def _diagonal(self) -> Parts:
        return self.space.unflatten(self.matrix.diagonal().clone())

    def _inverse_factor(self, parts: Parts, damping: float) -> Parts:
        return self.power(-0.5, damping)._matmul(parts)

    def _scaled(self, factor: float) -> Dense:
        return Dense(factor * self.matrix, self.space)

    def _plus(self, other: Operator) -> Operator | None:
        return Dense(self.matrix + other.matrix, self.space) if isinstance(other, Dense) else None

    def _dense(self) -> Tensor:
        return self.matrix.clone()

    @property
    def blocks(self) -> dict[str, Operator]:
        """Each layer's own block of the matrix, by the layer's name."""
        index = self.space.unflatten(torch.arange(self.space.size, device=self.device))
        named = dict(zip(self.space.names or (), zip(index, self.space.shapes, strict=True), strict=True))
        out = ByLayer()
        for group, names in self.space.groups().items():
            rows = torch.cat([named[n][0].flatten() for n in names])
            space = Space(tuple(named[n][1] for n in names))
            out[group] = Dense(self.matrix[rows[:, None], rows], space)
        return out

    def _damped(self, damping: float) -> tuple[Tensor, Tensor]:
        check_damping(damping)
        if self._eigh is None:
            self._eigh = eigh(self.matrix, "the matrix")
        e, U = self._eigh
        return positive(e + damping, "the matrix", damping), U
