"""Marquardt's damping of the exact matrix: each parameter has its own unit."""

from __future__ import annotations

from torch import Tensor

from natgrad.linalg.joint import Joint
from natgrad.linalg.operator import Operator
from natgrad.linalg.rescaled import Rescaled, RescaledInverse
from natgrad.linalg.space import Parts
from natgrad.optim.vectors import Vector, gram

EXPONENT = 0.5
"""The exponent by default, where it is affordable."""
AFFORDABLE = 1.5
"""By default the damping is scaled if the matrix then takes at most this many times the multiplications."""
SMALLEST = 1e-6
"""Entries of the diagonal below this, in units of their mean, count as this."""


def exponent_for(F: Joint, solver: str | None) -> float:
    """`EXPONENT` if an inverse with a scaled damping costs at most `AFFORDABLE` times one without, else 0."""
    scaled, plain = (F.cost(solver or F.cheaper_form(by_columns=c), by_columns=c) for c in (True, False))
    return EXPONENT if scaled <= AFFORDABLE * plain else 0.0


class ScaledDamping:
    """The damping `λ M` with the diagonal matrix `M = (diag F / mean(diag F))^p`.

    With `p = 0` it is Levenberg's damping `λ I`. With `p = 1` it is Marquardt's: the units of the parameters change
    only the value of `λ`.

    Args:
        F: the exact matrix of all parameters.
        exponent: `p`.
        solver: `"dual"`, `"primal"` or None, as for `NaturalGradient`.

    Reference: Levenberg (1944); Marquardt (1963), "An Algorithm for Least-Squares Estimation of Nonlinear Parameters".
    """

    def __init__(self, F: Joint, exponent: float, solver: str | None):
        self.F, self.exponent = F, exponent
        self.form = solver or F.cheaper_form(by_columns=True)
        if self.form == "primal":
            F.formed()  # its diagonal then costs nothing
        d = F.space.flatten(F._diagonal())
        mean = d.mean()
        self.M = (d / mean).clamp_min(SMALLEST) ** exponent if float(mean) > 0 else d + 1
        self._rescaled: Rescaled | None = None

    def inverse(self, damping: float, eta: float) -> Operator:
        """`(F + λ M + η I)⁻¹`. Without weight decay, the matrices of all `λ` come from one Gram matrix."""
        if damping == 0:
            return self.F.inverse(eta, form=self.form)
        if eta != 0:
            return RescaledInverse(self._with(self.M + eta / damping), damping, self.form)
        if self._rescaled is None:
            self._rescaled = self._with(self.M)
        return RescaledInverse(self._rescaled, damping, self.form)

    def _with(self, diagonal: Tensor) -> Rescaled:
        return Rescaled(self.F, self._parts(diagonal.rsqrt()))

    def _parts(self, flat: Tensor) -> Parts:
        return self.F.space.unflatten(flat)

    def times(self, v: Vector) -> Vector:
        """`M v`."""
        own = dict(zip(self.F.space.names or (), self._parts(self.M), strict=True))
        return {n: (own[n] * t).to(t.dtype) for n, t in v.items()}

    def gram(self, directions: list[Vector]) -> Tensor:
        """`d_iᵀ M d_j`."""
        roots = dict(zip(self.F.space.names or (), self._parts(self.M.sqrt()), strict=True))
        return gram([{n: roots[n] * t for n, t in d.items()} for d in directions])
