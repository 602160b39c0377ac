"""Solving with a matrix that is known only through its products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natgrad.checks.values import check_count, check_within, described
from natgrad.linalg.arguments import check_damping
from natgrad.linalg.diagonal import Diagonal
from natgrad.linalg.later import later
from natgrad.linalg.operator import Operator, check_operator
from natgrad.linalg.space import Parts

Product = Callable[[Tensor], Tensor]


class NotDefiniteError(RuntimeError):
    """Conjugate gradients found a matrix, or a preconditioner, that is not positive definite."""


def check_curvature(curvature: Tensor) -> None:
    """Raises NotDefiniteError if the curvature along some direction, `pᵀ M p`, is not positive."""
    if not (curvature > 0).all():
        raise NotDefiniteError(
            f"conjugate gradients found a direction of curvature {float(curvature.min()):.3g}, so the matrix is not "
            "positive definite; pass a larger damping"
        )


class Solution(NamedTuple):
    """The result of conjugate gradients: `x`, its relative residual `‖M x − b‖ / ‖b‖`, the number of products."""

    x: Tensor
    residual: float
    products: int


def conjugate_gradient(
    product: Product,
    b: Tensor,
    *,
    tol: float,
    max_iter: int,
    precondition: Product | None = None,
    x0: Tensor | None = None,
) -> Solution:
    """`x` with `‖M x − b‖ ≤ tol ‖b‖`, or the result after `max_iter` products (Hestenes & Stiefel 1952).

    It starts from `x0`, or else from zero, and then `bᵀ x > 0` wherever it stops. `precondition` is the product with
    some `P ≈ M⁻¹`. The steps are then those of `P^½ M P^½`: the better `P`, the closer its eigenvalues are to one
    another.

    Raises:
        NotDefiniteError: if `M` or `P` is not positive definite.
    """
    bb = b @ b
    if x0 is None or not bb > 0:
        x, r, count = torch.zeros_like(b), b.clone(), 0
    else:
        x, r, count = x0.clone(), b - product(x0), 1
    residual = float((r @ r / bb).sqrt()) if bb > 0 else 0.0
    z = r if precondition is None else precondition(r)
    p, rz = z.clone(), r @ z
    while residual > tol and count < max_iter:
        if not rz > 0:
            raise NotDefiniteError(
                f"the preconditioner has rᵀ P r = {float(rz):.3g} for some r, so it is not positive definite; pass "
                "another one, or a larger damping"
            )
        Mp = product(p)
        curvature = p @ Mp
        check_curvature(curvature)
        step = rz / curvature
        x, r = x + step * p, r - step * Mp
        z = r if precondition is None else precondition(r)
        rz, previous = r @ z, rz
        p = z + (rz / previous) * p
        residual, count = float((r @ r / bb).sqrt()), count + 1
    return Solution(x, residual, count)


class IterativeInverse(Operator):
    """`(M + damping I)⁻¹` by conjugate gradients.

    `solutions` gives, for each vector of the last product, the residual and the number of products with `M`.

    Args:
        matrix: `M`.
        damping: `λ`.
        tol: the relative residual `‖(M + λI) x − b‖ / ‖b‖` at which to stop. None: `eps^¾`.
        max_iter: the maximum number of products with `M` for one vector. None: ten times the size.
        preconditioner: `P ≈ (M + λI)⁻¹`, positive definite: the inverse of a cheaper matrix, such as `K.inverse(λ)`.

    Raises:
        ValueError: if the preconditioner acts on other vectors, or a number is out of range.
        RuntimeError: by a product, if `max_iter` products do not reach `tol`, or a matrix is not positive definite.

    Example:
        >>> import torch
        >>> from natgrad.linalg import Dense, Diagonal, IterativeInverse
        >>> M = Dense(torch.tensor([[1000.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
        >>> jacobi = Diagonal((M.diagonal(),))
        >>> inverse = IterativeInverse(M, 0.0, preconditioner=jacobi.inverse())
        >>> (M @ (inverse @ torch.ones(2, dtype=torch.float64))).tolist()
        [1.0, 1.0]
        >>> inverse.solutions[0].products
        2
    """

    def __init__(
        self,
        matrix: Operator,
        damping: float,
        tol: float | None = None,
        max_iter: int | None = None,
        preconditioner: Operator | None = None,
    ):
        check_operator("IterativeInverse", "matrix", matrix)
        check_damping(damping)
        check_within("tol", tol, "(0, 1)", optional=True)
        if max_iter is not None:
            check_count("max_iter", max_iter, "products")
        if preconditioner is not None:
            check_preconditioner(matrix, preconditioner)
        self.matrix, self.damping, self.preconditioner = matrix, damping, preconditioner
        self.space, self.dtype, self.device = matrix.space, matrix.dtype, matrix.device
        self.tol = tol if tol is not None else torch.finfo(self.dtype).eps ** 0.75
        self.max_iter = max_iter or 10 * self.space.size
        self.solutions: list[Solution] = []

    def _matmul(self, parts: Parts) -> Parts:
        return self.solve_from(parts, None)

    def solve_from(self, parts: Parts, x0: Parts | None) -> Parts:
        """The solution for a vector, or for several along leading axes; the iterations start at `x0`."""
        b = self.space.flatten(parts)
        if not torch.isfinite(b).all():
            raise ValueError(
                f"{int((~torch.isfinite(b)).sum())} entries of v are not finite, so conjugate gradients cannot solve; "
                "look for NaN or inf in what v was computed from"
            )
        starts = None if x0 is None else self.space.flatten(x0).expand_as(b).reshape(-1, self.space.size)
        self.solutions = []
        for i, row in enumerate(b.reshape(-1, self.space.size)):
            solution = conjugate_gradient(
                self._product,
                row,
                tol=self.tol,
                max_iter=self.max_iter,
                precondition=None if self.preconditioner is None else self._precondition,
                x0=None if starts is None else starts[i],
            )
            if not solution.residual <= self.tol:
                raise RuntimeError(
                    f"conjugate gradients reached a relative residual of {solution.residual:.2g} in "
                    f"{solution.products} products, expected {self.tol:g}; pass a larger damping, a preconditioner or "
                    "a larger tol, or use structure='dense' or 'kfac'"
                )
            self.solutions.append(solution)
        if not self.solutions:
            return parts
        return self.space.unflatten(torch.stack([s.x for s in self.solutions]).reshape(b.shape))

    def _product(self, v: Tensor) -> Tensor:
        return self.space.flatten(self.matrix._matmul(self.space.unflatten(v))) + self.damping * v

    def _precondition(self, v: Tensor) -> Tensor:
        assert self.preconditioner is not None
        return self.space.flatten(self.preconditioner._matmul(self.space.unflatten(v)))

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> Operator:
        """The damped matrix itself."""
        check_damping(damping, damping_style)
        if damping != 0:
            raise self._cannot("damped inverse")
        if self.damping == 0:
            return self.matrix
        values = tuple(torch.full(s, self.damping, dtype=self.dtype, device=self.device) for s in self.space.shapes)
        return self.matrix + Diagonal(values, self.space)


def check_preconditioner(matrix: Operator, preconditioner: Any) -> None:
    """Raises TypeError or ValueError unless it is a matrix on the same vectors."""
    if not isinstance(preconditioner, Operator):
        raise TypeError(
            f"preconditioner is {described(preconditioner)}; expected a matrix of this library, such as "
            'natgrad.fisher(model, loss, data, structure="kfac")'
        )
    if preconditioner.space != matrix.space:
        raise ValueError(
            f"the preconditioner acts on {preconditioner.space.describe()}, but the matrix on "
            f"{matrix.space.describe()}; expected the same parameters: compute both from one model"
        )
    if (preconditioner.dtype, preconditioner.device) != (matrix.dtype, matrix.device):
        raise ValueError(
            f"the preconditioner is {preconditioner.dtype} on {preconditioner.device}, but the matrix is "
            f"{matrix.dtype} on {matrix.device}; expected the same: compute both with the same dtype="
        )


@later
def iterative_solve(
    matrix: Operator,
    parts: Parts,
    damping: float,
    *,
    preconditioner: Any,
    x0: Parts | None,
    tol: float | None,
    max_iter: int | None,
) -> Parts:
    """`(M + λI)⁻¹ v` by conjugate gradients, with `(K + λI)⁻¹` of the preconditioner `K`."""
    if preconditioner is not None:
        check_preconditioner(matrix, preconditioner)
        preconditioner = preconditioner.inverse(damping)
    return IterativeInverse(matrix, damping, tol, max_iter, preconditioner).solve_from(parts, x0)
