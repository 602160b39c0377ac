"""The figures of one layer that `natgrad.residual` gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Condition(NamedTuple):
    """Condition numbers of a layer's input factors: the largest over the smallest eigenvalue; infinite where the
    matrix is singular to rounding.

    Example:
        >>> from natgrad.report.layer_residual import Condition
        >>> Condition(A=25.0, C=4.0).C
        4.0
    """

    A: float | None
    """Of the second moment `E[x xᵀ]`; None for a layer without a weight."""
    C: float | None
    """Of the inputs' covariance; None for a layer without a weight or without a bias, which has no centering."""


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
    """`‖R‖ / ‖G‖`; NaN where `G` is zero."""
    norm: float
    """`‖R‖`."""
    block_norm: float
    """`‖G‖`."""
    input_norm: float
    """`‖A‖`."""
    output_norm: float
    """`‖B‖`."""
    input_spread: float
    """`E[‖x xᵀ − A‖²]^½`, zero where it is below rounding."""
    output_spread: float
    """`E[‖Y − B‖²]^½` of a case's output curvature `Y`, scaled so that `E[Y] = B`; zero where it is below rounding."""
    bound: float | None
    """`input_spread · output_spread`, at least `norm`; None where examples have several positions, whose cross terms
    the spreads do not see."""
    cka: float
    """Centered kernel alignment of `x xᵀ` and `Y`: 0 where they are uncorrelated, 1 where they vary as one; NaN where
    a spread is zero."""
    hsic_unbiased: float
    """An estimate of `‖R‖²` of the distribution that these cases are a sample of: unlike `norm²` it is not inflated by
    their number being finite, and may be negative. NaN for fewer than 4 cases."""
    p_value: float
    """Of the permutation test that `x xᵀ` and `Y` are independent; NaN without permutations."""
    condition: Condition
    """Condition numbers of `A` and of the inputs' covariance `C`."""
    cases: int
    """How many cases all this is over."""
    others: dict[str, float] = field(default_factory=dict)
    """`‖G − M‖ / ‖G‖` of other structures' blocks `M`, those asked for by `compare=`."""
