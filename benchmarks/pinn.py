"""A physics-informed network for Poisson's equation, trained by the exact natural gradient.

    −Δu = f  on the unit square,  u = 0 on its boundary,  u* = sin(πx) sin(πy)

python benchmarks/pinn.py
python benchmarks/pinn.py --compare      # and Adam and L-BFGS, for as long as the natural gradient took
"""

import argparse
import math
import platform
import time
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import natgrad

ROW = "{:>7} {:>9.2f} {:>11.3e} {:>12.3e} {:>11}"


class PoissonResidual(nn.Module):
    """A tanh network `u`, and its residuals: `Δu + f` inside of the unit square, `weight · u` on its boundary."""

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

        An affine map acts on the derivatives by its weight alone. For `t = tanh(a)`, with `t' = 1 − t²`:
        `∂t = t' ∂a`, `Δt = t' Δa + t'' |∇a|²`, `t'' = −2 t t'`.
        """
        z = points
        gradient = torch.eye(2, dtype=points.dtype).expand(len(points), 2, 2)
        derivatives = torch.cat([gradient, torch.zeros_like(gradient[:, :1])], 1)  # ∂x, ∂y, Δ along axis 1
        for depth, layer in enumerate(self.layers):
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
    """A grid of `interior²` points inside of the square and `boundary` points on each side."""
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


def train(
    name: str, model: PoissonResidual, step: Callable[[], tuple[float, str]], stop: Callable[[int, float, float], bool]
) -> float:
    """Takes steps until `stop(steps, seconds, error)`, prints the way there, returns the seconds of the steps."""
    print(f"\n{name}\n{'step':>7} {'seconds':>9} {'loss':>11} {'relative L2':>12} {'damping':>11}")
    steps, seconds, next_print = 0, 0.0, 1
    while True:
        start = time.perf_counter()
        loss, damping = step()
        seconds += time.perf_counter() - start
        steps += 1
        if steps % 5 and steps < next_print:
            continue
        error = relative_error(model)
        done = stop(steps, seconds, error)
        if done or steps >= next_print:
            print(ROW.format(steps, seconds, loss, error, damping), flush=True)
            next_print = math.ceil(1.5 * steps)
        if done:
            return seconds


def natural_gradient(model: PoissonResidual, points: Tensor) -> Callable[[], tuple[float, str]]:
    opt = natgrad.NaturalGradient(model, nn.MSELoss())
    target = torch.zeros(len(points), 1, dtype=points.dtype)

    def step() -> tuple[float, str]:
        loss = opt.loss(model(points), target)
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss.item(), f"{opt.diagnostics['damping']:.2e}"

    return step


def by_closure(opt: torch.optim.Optimizer, model: PoissonResidual, points: Tensor) -> Callable[[], tuple[float, str]]:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = model(points).square().mean()
        loss.backward()
        return loss

    return lambda: (opt.step(closure).item(), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", type=float, default=1e-5, help="relative L2 error to stop at")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds to stop at")
    parser.add_argument("--interior", type=int, default=20, help="points inside, along each axis")
    parser.add_argument("--boundary", type=int, default=20, help="points on each side")
    parser.add_argument("--compare", action="store_true")
    options = parser.parse_args()

    def fresh() -> PoissonResidual:
        torch.manual_seed(options.seed)
        return PoissonResidual()

    points = collocation_points(options.interior, options.boundary)
    model = fresh()
    print(
        f"{sum(p.numel() for p in model.parameters())} parameters, {len(points)} points, float64, seed {options.seed}; "
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    seconds = train(
        "NaturalGradient",
        model,
        natural_gradient(model, points),
        lambda _, seconds, error: error < options.target or seconds > options.limit,
    )
    if options.compare:
        for name, make in (
            ("Adam, lr 1e-3", lambda p: torch.optim.Adam(p, lr=1e-3)),
            ("L-BFGS, strong Wolfe", lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe", history_size=50)),
        ):
            model = fresh()
            train(name, model, by_closure(make(model.parameters()), model, points), lambda _, s, __: s > seconds)


if __name__ == "__main__":
    main()
