"""Solving with a matrix that is only known by its products."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from natgrad.checks.values import check_count, check_number
from natgrad.linalg.diagonal import Diagonal
from natgrad.linalg.operator import Operator, check_damping, check_operator
from natgrad.linalg.space import Parts

Product = Callable[[Tensor], Tensor]


class Solution(NamedTuple):
    """Where conjugate gradients have come to: `x`, its relative residual `‖M x − b‖ / ‖b‖`, the products it took."""

    x: Tensor
    residual: float
    products: int


def conjugate_gradient(product: Product, b: Tensor, *, tol: float, max_iter: int) -> Solution:
    """`x` with `‖M x − b‖ ≤ tol ‖b‖`, or what `max_iter` products give (Hestenes & Stiefel 1952).

    From zero, so that `bᵀ x > 0` wherever it stops.

    Raises:
        RuntimeError: if `M` is not positive definite.
    """
    x, r = torch.zeros_like(b), b.clone()
    p, rr, bb = r.clone(), r @ r, b @ b
    residual, count = float(bb > 0), 0
    while residual > tol and count < max_iter:
        Mp = product(p)
        curvature = p @ Mp
        if not curvature > 0:
            raise RuntimeError(
                f"conjugate gradients met a direction of curvature {float(curvature):.3g}: the matrix is not "
                "positive definite; pass a larger damping"
            )
        step = rr / curvature
        x, r = x + step * p, r - step * Mp
        rr, previous = r @ r, rr
        p = r + (rr / previous) * p
        residual, count = float((rr / bb).sqrt()), count + 1
    return Solution(x, residual, count)


class IterativeInverse(Operator):
    """`(M + damping I)⁻¹` by conjugate gradients, to a relative residual of `tol` (default: `eps^¾`)."""

    def __init__(self, matrix: Operator, damping: float, tol: float | None = None, max_iter: int | None = None):
        check_operator("IterativeInverse", "matrix", matrix)
        check_damping(damping)
        check_number("tol", tol, optional=True)
        if max_iter is not None:
            check_count("max_iter", max_iter, "products")
        self.matrix, self.damping = matrix, damping
        self.space, self.dtype, self.device = matrix.space, matrix.dtype, matrix.device
        self.tol = tol if tol is not None else torch.finfo(self.dtype).eps ** 0.75
        self.max_iter = max_iter or 10 * self.space.size

    def _matmul(self, parts: Parts) -> Parts:
        b = self.space.flatten(parts)
        if not torch.isfinite(b).all():
            raise ValueError(
                f"{int((~torch.isfinite(b)).sum())} entries of v are not finite, and conjugate gradients cannot solve "
                "for them; look for NaN or inf in what v was computed from"
            )

        def product(v: Tensor) -> Tensor:
            return self.space.flatten(self.matrix._matmul(self.space.unflatten(v))) + self.damping * v

        rows = []
        for row in b.reshape(-1, self.space.size):
            solution = conjugate_gradient(product, row, tol=self.tol, max_iter=self.max_iter)
            if not solution.residual <= self.tol:
                raise RuntimeError(
                    f"conjugate gradients reached a relative residual of {solution.residual:.2g} in "
                    f"{solution.products} products, expected {self.tol:g}; pass a larger damping, or use "
                    "structure='dense' or 'kfac'"
                )
            rows.append(solution.x)
        return self.space.unflatten(torch.stack(rows).reshape(b.shape))

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> Operator:
        """The damped matrix itself."""
        check_damping(damping, damping_style)
        if damping != 0:
            raise self._cannot("damped inverse")
        if self.damping == 0:
            return self.matrix
        values = tuple(torch.full(s, self.damping, dtype=self.dtype, device=self.device) for s in self.space.shapes)
        return self.matrix + Diagonal(values, self.space)
