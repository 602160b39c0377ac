"""Pairs of a scale and a shift, coordinate by coordinate: blocks of two rows."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg.eigen import positive
from natgrad.linalg.operator import Operator, check_damping
from natgrad.linalg.space import Parts, Space


class CoordinateBlocks(Operator):
    """`[[E[g_w²], E[g_w g_c]], [E[g_w g_c], E[g_c²]]]` for each coordinate of `(w, c)`, nothing between coordinates.

    Held as `Tᵀ diag(v, s) T` with `T: (w, c) ↦ (w, c + m w)`, `s = E[g_c²]`, `m = E[g_w g_c]/s` and
    `v = E[g_w²] − m² s`. With `y = w z + c` and one place per example `m` is the mean of `z`, weighted by `g²`, and
    damping in these coordinates does not depend on a shift of `z`.

    Args:
        scale: `v`, `(d,)`.
        mean: `m`, `(d,)`.
        shift: `s`, `(d,)`.

    Example:
        >>> import torch
        >>> from natgrad.linalg import CoordinateBlocks
        >>> M = CoordinateBlocks.of_products(torch.tensor([5.0]), torch.tensor([2.0]), torch.tensor([1.0]))
        >>> M.to_dense().tolist()
        [[5.0, 2.0], [2.0, 1.0]]
    """

    damps_parameters = False

    def __init__(self, scale: Float[Tensor, " d"], mean: Float[Tensor, " d"], shift: Float[Tensor, " d"]):
        self.v, self.m, self.s = scale, mean, shift
        self.space = Space((tuple(scale.shape), tuple(shift.shape)))
        self.dtype, self.device = scale.dtype, scale.device

    @classmethod
    def of_products(cls, ww: Tensor, wc: Tensor, cc: Tensor) -> CoordinateBlocks:
        """From `E[g_w²]`, `E[g_w g_c]` and `E[g_c²]`, each `(d,)`."""
        m = torch.where(cc > 0, wc / cc, 0.0)
        # Not below zero but for rounding, by Cauchy and Schwarz.
        return cls((ww - m * wc).clamp_min(0), m, cc)

    def describe(self) -> str:
        return "2 x 2 for each coordinate, centered"

    def _matmul(self, parts: Parts) -> Parts:
        w, c = self.coordinates(parts)
        c = self.s * c
        return self.v * w + self.m * c, c

    def coordinates(self, parts: Parts) -> Parts:
        """`(w, c + m w)`."""
        w, c = parts
        return w, c + self.m * w

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> CoordinateInverse:
        """`T⁻¹ diag(v + λ, s + λ)⁻¹ T⁻ᵀ`."""
        check_damping(damping, damping_style)
        return CoordinateInverse(1 / self._damped(self.v, damping), self.m, 1 / self._damped(self.s, damping))

    def power(self, exponent: float, damping: float = 0.0) -> Operator:
        """The exponent −1 alone: the factors of other powers are not `T`'s."""
        if exponent == -1:
            return self.inverse(damping)
        raise self._cannot(f"power {exponent}")

    def logdet(self, damping: float = 0.0) -> Tensor:
        check_damping(damping)
        return self._damped(self.v, damping).log().sum() + self._damped(self.s, damping).log().sum()

    def trace(self) -> Tensor:
        return (self.v + (1 + self.m.square()) * self.s).sum()

    def trace_in_coordinates(self) -> Tensor:
        return self.v.sum() + self.s.sum()

    def _norm(self) -> Tensor:
        ww, wc = self.v + self.m.square() * self.s, self.m * self.s
        return (ww.square() + 2 * wc.square() + self.s.square()).sum().sqrt()

    def _diagonal(self) -> Parts:
        return self.v + self.m.square() * self.s, self.s

    def _inverse_factor(self, parts: Parts, damping: float) -> Parts:
        w = parts[0] * self._damped(self.v, damping).rsqrt()
        return w, parts[1] * self._damped(self.s, damping).rsqrt() - self.m * w

    def _scaled(self, factor: float) -> CoordinateBlocks:
        return CoordinateBlocks(factor * self.v, self.m, factor * self.s)

    def _damped(self, values: Tensor, damping: float) -> Tensor:
        return positive(values + damping, "a block of scale and shift", damping)


class CoordinateInverse(Operator):
    """`T⁻¹ diag(v, s) T⁻ᵀ`: `Δw = v (∇_w − m ∇_c)`, `Δc = s ∇_c − m Δw`."""

    damps_parameters = False

    def __init__(self, scale: Tensor, mean: Tensor, shift: Tensor):
        self.v, self.m, self.s = scale, mean, shift
        self.space = Space((tuple(scale.shape), tuple(shift.shape)))
        self.dtype, self.device = scale.dtype, scale.device

    def _matmul(self, parts: Parts) -> Parts:
        return self.from_coordinates(self.apart(parts))

    def apart(self, parts: Parts) -> Parts:
        """`Δw` and the change `Δc + m Δw` of the mean output, without the last step."""
        w, c = parts
        return self.v * (w - self.m * c), self.s * c

    def coordinates(self, parts: Parts) -> Parts:
        """`(w, c + m w)`."""
        w, c = parts
        return w, c + self.m * w

    def from_coordinates(self, parts: Parts) -> Parts:
        w, c = parts
        return w, c - self.m * w

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> CoordinateBlocks:
        if damping != 0:
            raise self._cannot("damped inverse")
        return CoordinateBlocks(1 / self.v, self.m, 1 / self.s)

    def logdet(self, damping: float = 0.0) -> Tensor:
        if damping != 0:
            raise self._cannot("damped logdet")
        return self.v.log().sum() + self.s.log().sum()

    def trace(self) -> Tensor:
        return torch.cat(self._diagonal()).sum()

    def _diagonal(self) -> Parts:
        return self.v, self.s + self.m.square() * self.v

    def _scaled(self, factor: float) -> CoordinateInverse:
        return CoordinateInverse(factor * self.v, self.m, factor * self.s)
