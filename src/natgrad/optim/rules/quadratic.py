"""The local quadratic model of the objective: step size and momentum from its minimum."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PARALLEL = 1e-6
"""Directions count as parallel if the matrix of their cosines, in the metric of the curvature, has a smaller
eigenvalue."""


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
    rows: list[list[float]] = Q.tolist()  # a few numbers, for which Python is faster than torch
    g: list[float] = slope.tolist()
    c = [fixed.get(i, 0.0) for i in range(len(g))]
    free = [i for i in range(len(g)) if i not in fixed]
    if free:
        if not all(math.isfinite(rows[i][j]) for i in free for j in free) or not all(rows[i][i] > 0 for i in free):
            return None
        # In units of each direction's curvature, a nearly parallel pair gives a small eigenvalue.
        unit = [math.sqrt(rows[i][i]) for i in free]
        rhs = [-(g[i] + _dot(rows[i], c)) / u for i, u in zip(free, unit, strict=True)]
        correlation = [
            [rows[i][j] / (u * v) for j, v in zip(free, unit, strict=True)] for i, u in zip(free, unit, strict=True)
        ]
        found = _solved(correlation, rhs)
        if found is None:  # parallel: use only the first direction
            found = [rhs[0]]
        for i, u, value in zip(free, unit, found, strict=False):
            c[i] = value / u
    minimum = Minimum(c, _dot(g, c), 0.5 * _dot(c, [_dot(row, c) for row in rows]))
    return minimum if all(map(math.isfinite, c)) and math.isfinite(minimum.change) else None


def _dot(u: list[float], v: list[float]) -> float:
    return sum(a * b for a, b in zip(u, v, strict=True))


def _solved(correlation: list[list[float]], rhs: list[float]) -> list[float] | None:
    """The solution of a system of unit diagonal; None if its smallest eigenvalue is below `PARALLEL`."""
    if len(rhs) == 1:
        return rhs
    if len(rhs) == 2:
        r = correlation[0][1]
        if 1 - abs(r) < PARALLEL:
            return None
        return [(rhs[0] - r * rhs[1]) / (1 - r * r), (rhs[1] - r * rhs[0]) / (1 - r * r)]
    H = torch.tensor(correlation, dtype=torch.float64)
    if not torch.isfinite(H).all() or torch.linalg.eigvalsh(H)[0] < PARALLEL:
        return None
    solved: list[float] = torch.linalg.solve(H, torch.tensor(rhs, dtype=torch.float64)).tolist()
    return solved
