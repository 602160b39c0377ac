"""Pairs of a scale and a shift: one block of two rows for each coordinate."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg.arguments import check_damping, check_exponent
from natgrad.linalg.eigen import positive
from natgrad.linalg.fitting import check_axes, check_tensors
from natgrad.linalg.operator import Operator
from natgrad.linalg.space import Parts, Space

WHAT = "a block of scale and shift"


class CoordinateBlocks(Operator):
    """`[[E[g_w²], E[g_w g_c]], [E[g_w g_c], E[g_c²]]]` for each coordinate of `(w, c)`; zero between coordinates.

    Held as `Tᵀ [[v, r], [r, s]] T` with `T: (w, c) ↦ (w, c + m w)`, `s = E[g_c²]`, `m = E[g_w g_c]/s`, `r = 0` and
    `v = E[g_w²] − m² s`. For `y = w z + c` with one position per example, `m` is the mean of `z` weighted by `g²`. Then
    `damping_style="centered"`, which damps these coordinates, does not depend on a shift of `z`.

    The gradient of a shift may be zero up to rounding, for example before another normalization. A quotient of rounding
    errors is not a mean: there `m = 0` and `r = E[g_w g_c]`, which represents the same matrix.

    Args:
        scale: `v`, `(d,)`.
        mean: `m`, `(d,)`.
        shift: `s`, `(d,)`.
        cross: `r`, `(d,)`; None for zeros.

    Example:
        >>> import torch
        >>> from natgrad.linalg import CoordinateBlocks
        >>> M = CoordinateBlocks.of_products(torch.tensor([5.0]), torch.tensor([2.0]), torch.tensor([1.0]))
        >>> M.to_dense().tolist()
        [[5.0, 2.0], [2.0, 1.0]]
    """

    has_coordinates = True

    def __init__(
        self,
        scale: Float[Tensor, " d"],
        mean: Float[Tensor, " d"],
        shift: Float[Tensor, " d"],
        cross: Float[Tensor, " d"] | None = None,
    ):
        self.v, self.m, self.s, self.r = _fitting(scale, mean, shift, cross)
        self.space = Space((tuple(scale.shape), tuple(shift.shape)))
        self.dtype, self.device = scale.dtype, scale.device

    @classmethod
    def of_products(cls, ww: Tensor, wc: Tensor, cc: Tensor) -> CoordinateBlocks:
        """From `E[g_w²]`, `E[g_w g_c]` and `E[g_c²]`, each `(d,)`."""
        has_mean = cc > torch.finfo(cc.dtype).eps ** 0.5 * ww
        m = torch.where(has_mean, wc / cc, 0.0)
        # Negative only by rounding, by the Cauchy-Schwarz inequality.
        return cls((ww - m * wc).clamp_min(0), m, cc, torch.where(has_mean, 0.0, wc))

    def describe(self) -> str:
        return "2 x 2 for each coordinate, centered"

    def _matmul(self, parts: Parts) -> Parts:
        w, c = self.coordinates(parts)
        w, c = self.v * w + self.r * c, self.s * c + self.r * w
        return w + self.m * c, c

    def coordinates(self, parts: Parts) -> Parts:
        """`(w, c + m w)`."""
        w, c = parts
        return w, c + self.m * w

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> CoordinateBlocks | CoordinateInverse:
        """`(M + λ I)⁻¹`, coordinate by coordinate. With `damping_style="centered"`, and also `"factored"` because there
        are no factors to damp: `T⁻¹ [[v + λ, r], [r, s + λ]]⁻¹ T⁻ᵀ`."""
        check_damping(damping, damping_style)
        if damping and damping_style == "exact":
            return self.power(-1.0, damping)
        v, s = (positive(x + damping, WHAT, damping) for x in (self.v, self.s))
        # The Schur complement of each; the entry itself if r = 0.
        v_alone, s_alone = (positive(x, WHAT, damping) for x in (v - self.r.square() / s, s - self.r.square() / v))
        return CoordinateInverse(1 / v_alone, self.m, 1 / s_alone, -self.r / (v_alone * s))

    def power(self, exponent: float, damping: float = 0.0) -> CoordinateBlocks:
        """`(M + λ I)^p = ½ (e₁^p + e₂^p) I + ½ (e₁^p − e₂^p) [[cos φ, sin φ], [sin φ, −cos φ]]` for each coordinate,
        with the eigenvalues `e` of its block and the angle of its first axis, `φ/2`."""
        check_exponent(exponent)
        check_damping(damping)
        block = _Pairs(self, damping)
        first, second = block.large**exponent, block.small**exponent
        mean, half = (first + second) / 2, (first - second) / 2
        return CoordinateBlocks.of_products(mean + half * block.cos, half * block.sin, mean - half * block.cos)

    def logdet(self, damping: float = 0.0) -> Tensor:
        check_damping(damping)
        block = _Pairs(self, damping)
        return block.large.log().sum() + block.small.log().sum()

    def trace(self) -> Tensor:
        return (self.v + (1 + self.m.square()) * self.s).sum()

    def trace_in_coordinates(self) -> Tensor:
        return self.v.sum() + self.s.sum()

    def _norm(self) -> Tensor:
        ww, wc, cc = self.products()
        return (ww.square() + 2 * wc.square() + cc.square()).sum().sqrt()

    def products(self) -> tuple[Tensor, Tensor, Tensor]:
        """`E[g_w²]`, `E[g_w g_c]` and `E[g_c²]`."""
        return self.v + 2 * self.m * self.r + self.m.square() * self.s, self.m * self.s + self.r, self.s

    def determinants(self) -> Tensor:
        """Of each coordinate's block. Only a block without a mean needs a difference of products."""
        vs = self.v * self.s
        return torch.where(self.r == 0, vs, (vs - self.r.square()).clamp_min(0))

    def _diagonal(self) -> Parts:
        ww, _, cc = self.products()
        return ww, cc

    def _inverse_factor(self, parts: Parts, damping: float) -> Parts:
        """`L z` with `L Lᵀ = (M + λI)⁻¹`: the shift given the scale."""
        block = _Pairs(self, damping)
        w = parts[0] * (block.cc / block.det).sqrt()
        return w, parts[1] * block.cc.rsqrt() - block.wc / block.cc * w

    def _scaled(self, factor: float) -> CoordinateBlocks:
        return CoordinateBlocks(factor * self.v, self.m, factor * self.s, factor * self.r)


def _fitting(scale: Tensor, mean: Tensor, shift: Tensor, cross: Tensor | None) -> tuple[Tensor, ...]:
    check_axes(WHAT, "scale", scale, (1,))
    cross = torch.zeros_like(scale) if cross is None else cross
    given = {"scale": scale, "mean": mean, "shift": shift, "cross": cross}
    check_tensors(WHAT, {name: (t, scale.shape) for name, t in given.items()})
    return scale, mean, shift, cross


class _Pairs:
    """`M + λI` coordinate by coordinate: its entries, determinant, eigenvalues and the angle of its axes."""

    def __init__(self, matrix: CoordinateBlocks, damping: float):
        check_damping(damping)
        ww, wc, cc = matrix.products()
        self.ww, self.wc, self.cc = ww + damping, wc, cc + damping
        self.det = matrix.determinants() + damping * (ww + cc) + damping**2
        half, apart = (self.ww + self.cc) / 2, (self.ww - self.cc) / 2
        radius = torch.hypot(apart, wc)
        self.large = positive(half + radius, WHAT, damping)
        self.small = self.det / self.large
        positive(torch.cat([self.large, self.small]), WHAT, damping)
        self.cos = torch.where(radius > 0, apart / radius, 1.0)
        self.sin = torch.where(radius > 0, wc / radius, 0.0)


class CoordinateInverse(Operator):
    """`T⁻¹ [[v, r], [r, s]] T⁻ᵀ`: `Δw = v (∇_w − m ∇_c) + r ∇_c`, `Δc = s ∇_c + r (∇_w − m ∇_c) − m Δw`."""

    has_coordinates = True

    def __init__(self, scale: Tensor, mean: Tensor, shift: Tensor, cross: Tensor | None = None):
        self.v, self.m, self.s, self.r = _fitting(scale, mean, shift, cross)
        self.space = Space((tuple(scale.shape), tuple(shift.shape)))
        self.dtype, self.device = scale.dtype, scale.device

    def _matmul(self, parts: Parts) -> Parts:
        return self.from_coordinates(self.apart(parts))

    def apart(self, parts: Parts) -> Parts:
        """`Δw` and `Δc + m Δw`, the change of the mean output."""
        w, c = parts
        w = w - self.m * c
        return self.v * w + self.r * c, self.s * c + self.r * w

    def coordinates(self, parts: Parts) -> Parts:
        """`(w, c + m w)`."""
        w, c = parts
        return w, c + self.m * w

    def from_coordinates(self, parts: Parts) -> Parts:
        w, c = parts
        return w, c - self.m * w

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> CoordinateBlocks:
        check_damping(damping, damping_style)
        if damping != 0:
            raise self._cannot("damped inverse")
        v, s = 1 / (self.v - self.r.square() / self.s), 1 / (self.s - self.r.square() / self.v)
        return CoordinateBlocks(v, self.m, s, -self.r * v / self.s)

    def logdet(self, damping: float = 0.0) -> Tensor:
        if damping != 0:
            raise self._cannot("damped logdet")
        return (self.v - self.r.square() / self.s).log().sum() + self.s.log().sum()

    def trace(self) -> Tensor:
        return torch.cat(self._diagonal()).sum()

    def _diagonal(self) -> Parts:
        return self.v, self.s - 2 * self.m * self.r + self.m.square() * self.v

    def _scaled(self, factor: float) -> CoordinateInverse:
        return CoordinateInverse(factor * self.v, self.m, factor * self.s, factor * self.r)
