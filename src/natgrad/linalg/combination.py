"""Sums and multiples of operators for which no structure is kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from natgrad.linalg.arguments import check_damping, check_plain
from natgrad.linalg.krylov import IterativeInverse
from natgrad.linalg.later import later
from natgrad.linalg.operator import Operator, check_operator
from natgrad.linalg.space import Parts


@later
class Scaled(Operator):
    """`factor M`, for an `M` whose structure cannot be scaled. Operations are those of `M`, with `damping / factor`.

    Args:
        operator: `M`.
        factor: a finite number. If it is not above zero, only products, trace, norm and diagonal are available.

    Raises:
        ValueError: by `inverse`, `power`, `logdet` and `sample`, if the factor is not above zero.

    Example:
        >>> import torch
        >>> from natgrad.linalg import Dense, Scaled
        >>> Scaled(Dense(torch.eye(2)), 4.0).solve(torch.ones(2), damping=1.0)
        tensor([0.2000, 0.2000])
    """

    def __init__(self, operator: Operator, factor: float):
        check_operator("Scaled", "operator", operator)
        if not (isinstance(factor, (int, float)) and math.isfinite(factor)):
            raise ValueError(f"factor is {factor!r}; expected a finite number")
        self.operator, self.factor = operator, factor
        self.space, self.dtype, self.device = operator.space, operator.dtype, operator.device

    def _matmul(self, parts: Parts) -> Parts:
        return tuple(self.factor * p for p in self.operator._matmul(parts))

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> Operator:
        check_damping(damping, damping_style)
        inner = self._positive("inverse").inverse(damping / self.factor, damping_style=damping_style)
        return (1 / self.factor) * inner

    def power(self, exponent: float, damping: float = 0.0) -> Operator:
        check_damping(damping)
        operator = self._positive("power")
        return self.factor**exponent * operator.power(exponent, damping / self.factor)

    def logdet(self, damping: float = 0.0) -> Tensor:
        check_damping(damping)
        inner = self._positive("logdet").logdet(damping / self.factor)
        return inner + self.space.size * torch.log(inner.new_tensor(self.factor))

    def trace(self) -> Tensor:
        return self.factor * self.operator.trace()

    def _norm(self) -> Tensor:
        return abs(self.factor) * self.operator.norm()

    def _diagonal(self) -> Parts:
        return tuple(self.factor * p for p in self.operator._diagonal())

    def _inverse_factor(self, parts: Parts, damping: float) -> Parts:
        check_damping(damping)
        inner = self._positive("sample")._inverse_factor(parts, damping / self.factor)
        return tuple(self.factor**-0.5 * p for p in inner)

    def _scaled(self, factor: float) -> Operator:
        return Scaled(self.operator, factor * self.factor)

    def _positive(self, operation: str) -> Operator:
        if not self.factor > 0:
            raise ValueError(
                f"a matrix scaled by {self.factor:g} is not positive definite: no {operation}; "
                "scale by a number above zero"
            )
        return self.operator

    def _label(self) -> str:
        return f"{self.factor:g} * {self.operator._label()}"


@later
class Sum(Operator):
    """`M₁ + M₂ + ...`. `damping` is added in the parameters' own coordinates, for any terms.

    Products, trace and diagonal are exact. `solve` and `inverse` use conjugate gradients. For a power, a
    log-determinant or samples, use `Dense(F.to_dense(), F.space)`.

    Args:
        terms: operators on the same vectors, at least one; sums among them are split into their terms.

    Example:
        >>> import torch
        >>> from natgrad.linalg import Dense, Diagonal, Sum
        >>> M = Sum([Dense(torch.ones(2, 2)), Diagonal((torch.tensor([1.0, 2.0]),))])
        >>> (M @ torch.tensor([1.0, 0.0])).tolist(), M.trace().item()
        ([2.0, 1.0], 5.0)
    """

    def __init__(self, terms: list[Operator]):
        self.terms: list[Operator] = [t for term in terms for t in (term.terms if isinstance(term, Sum) else [term])]
        if not self.terms:
            raise ValueError("terms is empty; expected at least one operator")
        first = self.terms[0]
        for i, term in enumerate(self.terms):
            check_operator("Sum", f"terms[{i}]", term)
            if term.space != first.space:
                raise ValueError(
                    f"terms[{i}] acts on {term.space.describe()}; expected the vectors of terms[0], "
                    f"{first.space.describe()}"
                )
        self.space, self.dtype, self.device = first.space, first.dtype, first.device

    def _matmul(self, parts: Parts) -> Parts:
        return self._total([t._matmul(parts) for t in self.terms])

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> Operator:
        check_damping(damping, damping_style)
        check_plain("a sum", damping_style)
        return IterativeInverse(self, damping)

    def trace(self) -> Tensor:
        return torch.stack([t.trace() for t in self.terms]).sum()

    def _diagonal(self) -> Parts:
        return self._total([t._diagonal() for t in self.terms])

    def _scaled(self, factor: float) -> Operator:
        return Sum([t._scaled(factor) for t in self.terms])

    @staticmethod
    def _total(terms: list[Parts]) -> Parts:
        return tuple(torch.stack(parts).sum(0) for parts in zip(*terms, strict=True))
