"""The exact matrix of one step's batches, known only through matrix-vector products."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from natgrad.linalg import Operator, Space
from natgrad.linalg.arguments import check_damping
from natgrad.linalg.krylov import NotDefiniteError, Solution, conjugate_gradient
from natgrad.linalg.space import Parts
from natgrad.optim.objective import Objective


class ByProducts(Operator):
    """`F`, where each product takes a forward-mode and a reverse-mode pass over the pending batches.

    The inverse uses conjugate gradients, until the relative residual is `tolerance`, or for at most `max_iterations`
    products.
    """

    def __init__(self, objective: Objective, parameters: Mapping[str, Tensor], tolerance: float, max_iterations: int):
        self.space = Space(tuple(tuple(p.shape) for p in parameters.values()), tuple(parameters))
        first = next(iter(parameters.values()))
        self.dtype, self.device = first.dtype, first.device
        self.tolerance, self.max_iterations = tolerance, max_iterations
        self._names = tuple(parameters)
        self._product = objective.product(self._names)

    def _matmul(self, parts: Parts) -> Parts:
        product = self._product(dict(zip(self._names, parts, strict=True)))
        return tuple(product[n] for n in self._names)

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> TruncatedInverse:
        check_damping(damping, damping_style)
        return TruncatedInverse(self, damping)


class TruncatedInverse(Operator):
    """`(F + λI)⁻¹`, approximated by a limited number of conjugate gradient iterations. `solution` describes the last
    solve."""

    solution: Solution

    def __init__(self, matrix: ByProducts, damping: float):
        self.matrix, self.damping = matrix, damping
        self.space, self.dtype, self.device = matrix.space, matrix.dtype, matrix.device

    def _matmul(self, parts: Parts) -> Parts:
        def product(v: Tensor) -> Tensor:
            return self.space.flatten(self.matrix._matmul(self.space.unflatten(v))) + self.damping * v

        tolerance, most = self.matrix.tolerance, self.matrix.max_iterations
        try:
            self.solution = conjugate_gradient(product, self.space.flatten(parts), tol=tolerance, max_iter=most)
        except NotDefiniteError as error:
            raise ValueError(str(error)) from error
        return self.space.unflatten(self.solution.x)
