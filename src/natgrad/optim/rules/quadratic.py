"""The local quadratic model of the objective: step size and momentum from its minimum."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Minimum:
    """Coefficients of the directions, and the two parts of the model's change: the slope along the step, and half its
    curvature."""

    coefficients: list[float]
    slope: float
    curvature: float

    @property
    def change(self) -> float:
        """The change of the objective that the model predicts; a decrease is negative."""
        return self.slope + self.curvature

    def share_that_promises(self, most: float) -> float:
        """The share of the step at which the predicted decrease is `most`; 1 if the whole step predicts less."""
        if not -self.change > most:
            return 1.0
        return 2 * most / (-self.slope + math.sqrt(max(0.0, self.slope**2 - 4 * self.curvature * most)))

    def shortened(self, share: float) -> Minimum:
        """The minimum, shortened to a share of its length."""
        return Minimum([share * c for c in self.coefficients], share * self.slope, share**2 * self.curvature)


def minimize(Q: Tensor, slope: Tensor, fixed: dict[int, float]) -> Minimum | None:
    """The minimum over `c` of `½ cᵀ Q c + slopeᵀ c`, with some coefficients held at given values.

    Args:
        Q: `d_iᵀ (F + λ I) d_j`, float64.
        slope: `gᵀ d_i`, float64.
        fixed: coefficients that are not free, by index.

    Returns:
        The minimum, or None where it is not finite or the model has no minimum.

    Reference: Martens & Grosse (2015), section 7.
    """
    c = torch.zeros_like(slope)
    for i, value in fixed.items():
        c[i] = value
    free = [i for i in range(len(slope)) if i not in fixed]
    if free:
        H = Q[free][:, free]
        # In units of each direction's curvature, a nearly parallel pair gives a small eigenvalue.
        unit = H.diagonal().sqrt()
        if not (torch.isfinite(H).all() and (unit > 0).all()):
            return None
        correlation = H / torch.outer(unit, unit)
        rhs = -(slope[free] + Q[free] @ c) / unit
        if torch.linalg.eigvalsh(correlation)[0] < 1e-6:  # parallel: use only the first direction
            c[free[0]] = rhs[0] / unit[0]
        else:
            c[free] = torch.linalg.solve(correlation, rhs) / unit
    found = Minimum(c.tolist(), float(slope @ c), float(0.5 * c @ Q @ c))
    return found if torch.isfinite(c).all() and math.isfinite(found.change) else None
