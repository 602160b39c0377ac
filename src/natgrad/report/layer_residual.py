"""The figures of one layer in the result of `natgrad.residual`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Condition(NamedTuple):
    """Condition numbers of a layer's input factors: the largest divided by the smallest eigenvalue; infinite if the
    matrix is singular up to rounding.

    Example:
        >>> from natgrad.report.layer_residual import Condition
        >>> Condition(A=25.0, C=4.0).C
        4.0
    """

    A: float | None
    """That of the second moment `E[x xᵀ]`; None for a layer without a weight."""
    C: float | None
    """That of the inputs' covariance; None for a layer without a weight, or without a bias and so without centering."""


@dataclass(frozen=True)
class LayerResidual:
    """One layer's `R = G − A ⊗ B`. Norms are Frobenius norms, in units of the objective's curvature.

    Example:
        >>> import torch, natgrad
        >>> x, y = torch.randn(50, 3), torch.randn(50, 2)
        >>> r = natgrad.residual(torch.nn.Sequential(torch.nn.Linear(3, 2)), torch.nn.MSELoss(), (x, y))["0"]
        >>> r.cases, r.output_spread, r.relative < 1e-6  # a linear network with squared error: K-FAC is exact
        (50, 0.0, True)
    """

    relative: float
    """`‖R‖ / ‖G‖`; NaN if `G` is zero."""
    norm: float
    """`‖R‖`."""
    block_norm: float
    """`‖G‖`."""
    input_norm: float
    """`‖A‖`."""
    output_norm: float
    """`‖B‖`."""
    input_spread: float
    """`E[‖x xᵀ − A‖²]^½`; zero if it is below rounding."""
    output_spread: float
    """`E[‖Y − B‖²]^½` of a case's output curvature `Y`, scaled so that `E[Y] = B`; zero if it is below rounding."""
    bound: float | None
    """`input_spread · output_spread`, which is at least `norm`; None if examples have several positions, because the
    spreads do not contain the terms between positions."""
    cka: float
    """Centered kernel alignment of `x xᵀ` and `Y`: 0 if they are uncorrelated, 1 if their kernels are
    proportional; NaN if a spread is zero."""
    hsic_unbiased: float
    """An unbiased estimate of `‖R‖²` for the distribution that the cases were drawn from. Unlike `norm²`, it does not
    grow when there are few cases, and it may be negative. NaN for fewer than 4 cases."""
    p_value: float
    """The p-value of the permutation test of independence of `x xᵀ` and `Y`; NaN without permutations."""
    condition: Condition
    """Condition numbers of `A` and of the inputs' covariance `C`."""
    cases: int
    """The number of cases."""
    others: dict[str, float] = field(default_factory=dict)
    """`‖G − M‖ / ‖G‖` for the blocks `M` of the structures in `compare=`."""
