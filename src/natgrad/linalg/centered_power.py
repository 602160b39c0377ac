"""A centered block with plain damping, and its powers, row by row in the basis of the outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg import factor
from natgrad.linalg.arguments import check_damping, check_exponent
from natgrad.linalg.eigen import positive
from natgrad.linalg.fitting import check_axes, check_tensors
from natgrad.linalg.fractional import Term, negative_power
from natgrad.linalg.operator import Operator
from natgrad.linalg.space import Parts, Space


@dataclass(frozen=True)
class CenteredRows:
    """A centered block in the bases of its inputs and outputs, where the rows of `(W, b)` are independent.

    Row `j` has the matrix `M_j = diag(d_j, 0) + β_j z zᵀ` on its weights and its bias, with `z = [m; 1]`.

    Args:
        U_A: the basis of the inputs; None for the identity.
        U_B: the basis of the outputs.
        d: the eigenvalues of the weight's block.
        beta: the eigenvalues of the bias's block.
        m: the mean of the inputs, in their basis.
    """

    U_A: Float[Tensor, "i i"] | None
    U_B: Float[Tensor, "o o"] | None
    d: Float[Tensor, "o i"]
    beta: Float[Tensor, " o"]
    m: Float[Tensor, " i"]

    def __post_init__(self) -> None:
        check_axes("centered rows", "d", self.d, (2,))
        o, i = self.d.shape
        tensors: dict[str, Any] = {"d": (self.d, (o, i)), "beta": (self.beta, (o,)), "m": (self.m, (i,))}
        for name, U, n in (("U_A", self.U_A, i), ("U_B", self.U_B, o)):
            tensors |= {} if U is None else {name: (U, (n, n))}
        check_tensors("centered rows", tensors)

    def rotated(self, parts: Parts) -> Parts:
        """A vector `(W, b)` in these bases."""
        W, b = parts
        return factor.rotate(W, self.U_B, self.U_A), b if self.U_B is None else b @ self.U_B

    def rotated_back(self, parts: Parts) -> Parts:
        W, b = parts
        return factor.rotate(W, self.U_B, self.U_A, back=True), b if self.U_B is None else b @ self.U_B.mT

    def product(self, parts: Parts, damping: float) -> Parts:
        """`(M + λI) v`."""
        W, b = parts
        c = self.beta * (b + W @ self.m)
        return (self.d + damping) * W + c.unsqueeze(-1) * self.m, c + damping * b

    def resolvent(self, damping: float, scale: float = 1.0) -> Resolvent:
        """`(scale M + λI)⁻¹`."""
        return Resolvent(self.d, self.beta, self.m, damping, scale)


class Diagonals(NamedTuple):
    """The row-wise quantities that give the diagonal of a matrix. Each row has the matrix `diag(values) + weight k kᵀ`
    for its weights, and `bias` for its bias."""

    values: Float[Tensor, "o i"]
    weight: Float[Tensor, " o"]
    k: Float[Tensor, "o i"]
    bias: Float[Tensor, " o"]

    def traces(self) -> Float[Tensor, " o"]:
        """The trace of each row's matrix."""
        return self.values.sum(-1) + self.weight * self.k.square().sum(-1) + self.bias

    def in_parameters(self, rows: CenteredRows) -> Parts:
        """The diagonal, in the order of the parameters."""
        U_A, U_B = (None if U is None else U.square() for U in (rows.U_A, rows.U_B))
        W = factor.rotate(self.values, None, U_A, back=True)
        W = W + self.weight.unsqueeze(-1) * factor.rotate(self.k, None, rows.U_A, back=True).square()
        b = self.bias if U_B is None else U_B @ self.bias
        return factor.rotate(W, U_B, None, back=True), b


class Resolvent:
    """`(a M + τI)⁻¹` row by row. With `ρ = aβ/(aβ + τ)` and `γ = τρ`,

        a M + τI = T_ρᵀ blockdiag(diag(a d + τ) + γ m mᵀ, aβ + τ) T_ρ,      T_ρ: (W, b) ↦ (W, b + ρ W m)

    This is centering with a smaller mean: `ρ = 1` without damping. All terms are positive, so nothing cancels.
    """

    def __init__(self, d: Tensor, beta: Tensor, m: Tensor, tau: float, a: float = 1.0):
        self.d, self.beta, self.m, self.tau = d, beta, m, tau
        self.E = 1 / (a * d + tau)
        self.q = 1 / (a * beta + tau)
        self.rho = a * beta * self.q
        self.k = self.E * m
        self.mu = self.k @ m
        self.gamma = tau * self.rho
        self.change = 1 + self.gamma * self.mu
        """`det(diag + γ m mᵀ) / det(diag)`."""

    def solve(self, parts: Parts) -> Parts:
        W, b = parts
        W = W - (self.rho * b).unsqueeze(-1) * self.m
        along = (W * self.k).sum(-1) * (self.gamma / self.change)
        W = self.E * W - along.unsqueeze(-1) * self.k
        return W, self.q * b - self.rho * (W @ self.m)

    def factor(self, parts: Parts) -> Parts:
        """`L v` with `L Lᵀ` the resolvent, by `(I + γ y yᵀ)^-½ = I − γ / (s + √s) y yᵀ`, `s = 1 + γ ‖y‖²`."""
        W, b = parts
        root = self.E.sqrt()
        y = root * self.m
        along = (W * y).sum(-1) * self.gamma / (self.change + self.change.sqrt())
        W = root * (W - along.unsqueeze(-1) * y)
        return W, self.q.sqrt() * b - self.rho * (W @ self.m)

    def inverse_factor(self, parts: Parts) -> Parts:
        """`L v` with `L Lᵀ = a M + τI`, by `(I + γ y yᵀ)^½ = I + γ / (1 + √s) y yᵀ`."""
        W, b = parts
        root = self.E.sqrt()
        y = root * self.m
        along = (W * y).sum(-1) * self.gamma / (1 + self.change.sqrt())
        W, b = (W + along.unsqueeze(-1) * y) / root, b * self.q.rsqrt()
        return W + (self.rho * b).unsqueeze(-1) * self.m, b

    def logdet(self) -> Tensor:
        return self.E.log().sum() + self.q.log().sum() - self.change.log().sum()

    def diagonals(self) -> Diagonals:
        return Diagonals(self.E, -self.gamma / self.change, self.k, self.q + self.rho.square() * self.mu / self.change)

    def diagonals_of_product(self) -> Diagonals:
        """The same for `M (a M + τI)⁻¹`."""
        bias = self.beta * self.q / self.change
        return Diagonals(self.d * self.E, self.tau**2 * bias, self.k, bias)

    def norm(self) -> Tensor:
        kk, weight = self.k.square().sum(-1), self.gamma / self.change
        squares = self.E.square().sum(-1) - 2 * weight * (self.E * self.k.square()).sum(-1) + (weight * kk).square()
        across = (self.rho / self.change).square() * kk
        bias = self.q + self.rho.square() * self.mu / self.change
        return (squares + 2 * across + bias.square()).sum().sqrt()


class CenteredPower(Operator):
    """`(M + λI)^p` for a centered block `M`, with plain damping: the inverse, the damped matrix, its roots.

    For a fractional exponent, the power is a sum of damped inverses, with a relative error at rounding level.

    Args:
        rows: `M`, in its bases.
        exponent: `p`.
        damping: `λ`.

    Raises:
        ValueError: if the damped matrix is not positive definite.
    """

    def __init__(self, rows: CenteredRows, exponent: float, damping: float):
        check_exponent(exponent)
        check_damping(damping)
        self.rows, self.exponent, self.damping = rows, float(exponent), float(damping)
        o, i = rows.d.shape
        self.space = Space(((o, i), (o,)))
        self.dtype, self.device = rows.d.dtype, rows.d.device
        positive(rows.d + damping, "the weight's part of a centered block", damping)
        positive(rows.beta + damping, "the bias's part of a centered block", damping)
        self._resolvent = rows.resolvent(self.damping)
        positive(self._resolvent.change, "a centered block", damping)
        self._whole = math.ceil(self.exponent)
        self._terms = self._fraction(self._whole - self.exponent)

    def describe(self) -> str:
        return "centered, plain damping"

    def _fraction(self, s: float) -> list[Term]:
        """Terms of `x^-s` on the interval that contains the spectrum, bounded by the rows' traces."""
        if not s:
            return []
        low = 1 / float(self._resolvent.diagonals().traces().max())
        d, beta, m = self.rows.d, self.rows.beta, self.rows.m
        traces = d.sum(-1) + beta * (1 + m @ m) + self.damping * (len(m) + 1)
        return negative_power(s, low, max(low, float(traces.max())), torch.finfo(self.dtype).eps)

    def _at(self, term: Term) -> Resolvent:
        return self.rows.resolvent(term.a * self.damping + term.b, term.a)

    def _matmul(self, parts: Parts) -> Parts:
        v = self.rows.rotated(parts)
        for _ in range(self._whole):
            v = self.rows.product(v, self.damping)
        for _ in range(-self._whole):
            v = self._resolvent.solve(v)
        if self._terms:
            total = [torch.zeros_like(p) for p in v]
            for term in self._terms:
                for sum_, part in zip(total, self._at(term).solve(v), strict=True):
                    sum_.add_(part, alpha=term.weight)
            v = total[0], total[1]
        return self.rows.rotated_back(v)

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> CenteredPower:
        check_damping(damping, damping_style)
        if damping != 0:
            raise self._cannot("damped inverse")
        return CenteredPower(self.rows, -self.exponent, self.damping)

    def power(self, exponent: float, damping: float = 0.0) -> CenteredPower:
        check_damping(damping)
        if damping != 0:
            raise self._cannot("damped power")
        return CenteredPower(self.rows, exponent * self.exponent, self.damping)

    def logdet(self, damping: float = 0.0) -> Tensor:
        check_damping(damping)
        if damping != 0:
            raise self._cannot("damped logdet")
        return -self.exponent * self._resolvent.logdet()

    def trace(self) -> Tensor:
        total = torch.tensor(self._identity * self.space.size, dtype=self.dtype, device=self.device)
        for weight, its in self._diagonals("trace"):
            total = total + weight * its.traces().sum()
        return total

    def _diagonal(self) -> Parts:
        W, b = (torch.full(s, self._identity, dtype=self.dtype, device=self.device) for s in self.space.shapes)
        for weight, its in self._diagonals("diagonal"):
            more = its.in_parameters(self.rows)
            W, b = W + weight * more[0], b + weight * more[1]
        return W, b

    @property
    def _identity(self) -> float:
        """The multiple of the identity in the matrix: from the damping, or all of it for the power zero."""
        return {1.0: self.damping, 0.0: 1.0}.get(self.exponent, 0.0)

    def _diagonals(self, what: str) -> list[tuple[float, Diagonals]]:
        """The terms of the diagonal, apart from the identity's share."""
        if self.exponent == 0:
            return []
        if self.exponent == -1:
            return [(1.0, self._resolvent.diagonals())]
        if self.exponent == 1:
            d, beta, m = self.rows.d, self.rows.beta, self.rows.m
            return [(1.0, Diagonals(d, beta, m.expand_as(d), beta))]
        if self._whole == 0 and self._terms:
            return [(term.weight, self._at(term).diagonals()) for term in self._terms]
        if self._whole == 1:
            found = []
            for term in self._terms:
                resolvent = self._at(term)
                found += [(term.weight, resolvent.diagonals_of_product())]
                found += [(term.weight * self.damping, resolvent.diagonals())] if self.damping else []
            return found
        raise self._cannot(what)

    def _norm(self) -> Tensor:
        """`‖M^p‖² = tr M^2p`."""
        if self.exponent == -1:
            return self._resolvent.norm()
        if self.exponent == 1:
            d, beta, m = self.rows.d, self.rows.beta, self.rows.m
            damped, scale = d + self.damping, 1 + m @ m
            squares = damped.square().sum() + 2 * (beta * (damped @ m.square())).sum()
            squares = squares + (beta * scale).square().sum()
            return (squares + (2 * self.damping * beta + self.damping**2).sum()).sqrt()
        return self.power(2.0).trace().sqrt()

    def _inverse_factor(self, parts: Parts, damping: float) -> Parts:
        if damping != 0:
            raise self._cannot("damped sample")
        if abs(self.exponent) != 1:
            return self.power(-0.5)._matmul(parts)
        v = self.rows.rotated(parts)
        v = self._resolvent.factor(v) if self.exponent == 1 else self._resolvent.inverse_factor(v)
        return self.rows.rotated_back(v)

    def _scaled(self, scale: float) -> Operator:
        """`(f (M + λI))^p` with `f = scale^(1/p)`."""
        if scale <= 0 or self.exponent == 0:
            return super()._scaled(scale)
        f = scale ** (1 / self.exponent)
        rows = CenteredRows(self.rows.U_A, self.rows.U_B, f * self.rows.d, f * self.rows.beta, self.rows.m)
        return CenteredPower(rows, self.exponent, f * self.damping)
