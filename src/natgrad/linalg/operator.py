"""The contract that every matrix of this library keeps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from natgrad.linalg.space import Parts, Space, check_order

DAMPING_STYLES = ("exact", "factored")


class Operator(ABC):
    """A symmetric matrix known by what it does to a vector.

    A subclass gives `space`, `_matmul`, and as many of the other underscored methods as it can do exactly;
    the rest raise and name a structure that can.
    """

    space: Space
    dtype: torch.dtype
    device: torch.device

    # What a subclass supplies --------------------------------------------------------------------------

    @abstractmethod
    def _matmul(self, parts: Parts) -> Parts:
        """The product with a vector given by its parts, each with any leading batch axes."""

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> Operator:
        """The operator `(M + damping I)⁻¹`. Raises ValueError where the damped matrix is not invertible."""
        raise self._cannot("inverse")

    def power(self, exponent: float, damping: float = 0.0) -> Operator:
        """The operator `(M + damping I)^exponent`, for a positive definite damped matrix."""
        raise self._cannot("power")

    def logdet(self, damping: float = 0.0) -> Tensor:
        """`log det (M + damping I)`."""
        raise self._cannot("logdet")

    def trace(self) -> Tensor:
        """The sum of the diagonal."""
        raise self._cannot("trace")

    def norm(self) -> Tensor:
        """The Frobenius norm."""
        raise self._cannot("norm")

    def _diagonal(self) -> Parts:
        raise self._cannot("diagonal")

    def _inverse_factor(self, parts: Parts, damping: float) -> Parts:
        """`L z` for standard normal `z`, where `L Lᵀ = (M + damping I)⁻¹`."""
        raise self._cannot("sample")

    # What follows from it ------------------------------------------------------------------------------

    def __matmul__(self, v: Any) -> Any:
        """`M v`, in the form that `v` came in."""
        parts, join = self.space.split(v, f"{self._label()} @ v")
        return join(self._matmul(parts))

    def quadratic(self, v: Any) -> Tensor:
        """The scalar `vᵀ M v`."""
        parts, _ = self.space.split(v, f"{self._label()}.quadratic(v)")
        return torch.stack([(a * b).sum() for a, b in zip(parts, self._matmul(parts), strict=True)]).sum()

    def solve(self, v: Any, damping: float = 0.0, *, damping_style: str = "exact") -> Any:
        """`(M + damping I)⁻¹ v`, in the form that `v` came in. To solve often, keep `inverse(damping)`."""
        self.space.split(v, f"{self._label()}.solve(v)")
        return self.inverse(damping, damping_style=damping_style) @ v

    def diagonal(self) -> Any:
        """The diagonal, as a vector: a tensor, a tuple or a dict, as the operator's vectors are."""
        return self._form(self._diagonal())

    def sample(self, n: int, damping: float = 0.0, generator: torch.Generator | None = None) -> Any:
        """`n` draws of `N(0, (M + damping I)⁻¹)`, along a leading axis of n."""
        z = tuple(
            torch.randn(n, *s, dtype=self.dtype, device=self.device, generator=generator) for s in self.space.shapes
        )
        return self._form(self._inverse_factor(z, damping))

    def to_dense(self, order: str = "torch") -> Tensor:
        """The matrix itself, `(size, size)`: rows of each parameter stacked (`"torch"`) or its columns (`"vec"`)."""
        check_order(order)
        eye = torch.eye(self.space.size, dtype=self.dtype, device=self.device)
        return self.space.flatten(self._matmul(self.space.unflatten(eye, order)), order).mT

    def _form(self, parts: Parts) -> Any:
        if self.space.names is not None:
            return dict(zip(self.space.names, parts, strict=True))
        return parts[0] if len(parts) == 1 else parts

    def _label(self) -> str:
        return type(self).__name__

    def _cannot(self, operation: str) -> TypeError:
        return TypeError(
            f"{self._label()} has no exact {operation}; use structure='dense' for a small model, or 'kfac'"
        )

    def __repr__(self) -> str:
        return f"{self._label()}(size={self.space.size}, dtype={self.dtype})"


def check_damping(damping: float, style: str = "exact") -> None:
    """Raises ValueError unless damping is finite and not negative, and its style is known."""
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping={damping} is not usable: expected a finite number >= 0")
    if style not in DAMPING_STYLES:
        raise ValueError(f"damping_style={style!r} is unknown: expected one of {DAMPING_STYLES}")


def singular(what: str, damping: float, smallest: float) -> ValueError:
    return ValueError(
        f"{what} with damping={damping:g} is singular or indefinite (smallest eigenvalue {smallest:.3g}); "
        "pass a larger damping"
    )
