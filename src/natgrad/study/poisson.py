"""A physics-informed network for Poisson's equation.

−Δu = f  on the unit square,  u = 0 on its boundary,  u* = sin(πx) sin(πy)
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PoissonResidual(nn.Module):
    """A tanh network `u`, and its residuals: `Δu + f` inside the unit square, `weight · u` on its boundary."""

    def __init__(self, widths: tuple[int, ...] = (2, 30, 30, 1), weight: float = 100.0):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o, dtype=torch.float64) for i, o in pairwise(widths))
        self.weight = weight

    def forward(self, points: Tensor) -> Tensor:
        """Points `(N, 2)` to residuals `(N, 1)`."""
        u, laplacian = self.solution_and_laplacian(points)
        on_boundary = ((points == 0) | (points == 1)).any(1, keepdim=True)
        return torch.where(on_boundary, self.weight * u, laplacian + source(points))

    def solution_and_laplacian(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """`u` and `Δu`, each `(N, 1)`, by a forward pass of `(z, ∂z/∂x, ∂z/∂y, Δz)` through the layers.

        An affine map acts on the derivatives by its weight only. For `t = tanh(a)`, with `t' = 1 − t²`:
        `∂t = t' ∂a`, `Δt = t' Δa + t'' |∇a|²`, `t'' = −2 t t'`.
        """
        z = points
        gradient = torch.eye(2, dtype=points.dtype).expand(len(points), 2, 2)
        derivatives = torch.cat([gradient, torch.zeros_like(gradient[:, :1])], 1)  # ∂x, ∂y, Δ along axis 1
        for depth, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Linear)
            if depth > 0:
                z = z.tanh()
                slope = (1 - z.square()).unsqueeze(1)
                curvature = -2 * z * slope.squeeze(1) * derivatives[:, :2].square().sum(1)
                derivatives = slope * derivatives
                derivatives = torch.cat([derivatives[:, :2], derivatives[:, 2:] + curvature.unsqueeze(1)], 1)
            z = F.linear(z, layer.weight, layer.bias)
            derivatives = F.linear(derivatives, layer.weight)
        return z, derivatives[:, 2]


def solution(points: Tensor) -> Tensor:
    return (math.pi * points).sin().prod(1, keepdim=True)


def source(points: Tensor) -> Tensor:
    """`f = −Δu*`."""
    return 2 * math.pi**2 * solution(points)


def collocation_points(interior: int, boundary: int) -> Tensor:
    """A grid of `interior²` points inside the square, and `boundary` points on each side."""
    inside = (torch.arange(interior, dtype=torch.float64) + 0.5) / interior
    side = torch.linspace(0, 1, boundary, dtype=torch.float64)
    low, high = torch.zeros_like(side), torch.ones_like(side)
    edges = [(side, low), (side, high), (low, side), (high, side)]
    return torch.cat([torch.cartesian_prod(inside, inside), *(torch.stack(edge, 1) for edge in edges)])


@torch.no_grad()
def relative_error(model: PoissonResidual, side: int = 101) -> float:
    """`‖u − u*‖ / ‖u*‖` in L2, on a grid of `side²` points."""
    axis = torch.linspace(0, 1, side, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    exact = solution(points)
    return float((model.solution_and_laplacian(points)[0] - exact).norm() / exact.norm())
