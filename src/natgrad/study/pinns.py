"""The physics-informed problems of a public benchmark, as tasks of a study.

Dangel, Müller & Zeinhofer (2024), "Kronecker-Factored Approximate Curvature for Physics-Informed Neural Networks",
arXiv:2405.15603, is the source of the equations, networks, numbers of points, and how often new points are drawn. The
objective is `½ mean r² + ½ mean (u − u*)²`, over interior points and over points with conditions. The figure is the
root mean square of `u − u*` on ten times as many points as there are interior points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise, repeat
from typing import Any

import torch
from torch import Generator, Tensor, nn

from natgrad.pde import derivatives
from natgrad.study.equations import (
    F64,
    CosineSum,
    Equation,
    Harmonic,
    HeatSineProduct,
    HeatSineSum,
    LogFokkerPlanck,
    SineProduct,
    SquareNorm,
)
from natgrad.study.task import Task

Batch = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Interior points and points with conditions; zero residuals and the values of the conditions."""
POINTS_SEED, EVALUATION_SEED = 1000, 5


@dataclass(frozen=True)
class Setting:
    """A problem of the table: an equation in `d` dimensions, the hidden widths, the points of a step, and the number of
    steps until new points are drawn (0: never). `key` is its name in the published data."""

    equation: Callable[[int], Equation]
    d: int
    widths: tuple[int, ...]
    interior: int
    conditions: int
    every: int
    key: str


SMALL, MEDIUM, LARGE = (64,), (64, 64, 48, 48), (256, 256, 128, 128)
SETTINGS = {
    "poisson2d-257": Setting(SineProduct, 2, SMALL, 900, 120, 0, "exp09_reproduce_poisson2d"),
    "poisson2d-9873": Setting(SineProduct, 2, MEDIUM, 900, 120, 0, "exp15_poisson2d_deepwide"),
    "poisson2d-116097": Setting(SineProduct, 2, LARGE, 900, 120, 0, "exp20_poisson2d_mlp_tanh_256"),
    "heat1d-257": Setting(HeatSineProduct, 1, SMALL, 900, 120, 0, "exp13_reproduce_heat1d"),
    "heat1d-9873": Setting(HeatSineProduct, 1, MEDIUM, 900, 120, 0, "exp22_heat1d_mlp_tanh_64"),
    "heat1d-116097": Setting(HeatSineProduct, 1, LARGE, 900, 120, 0, "exp23_heat1d_mlp_tanh_256"),
    "poisson5d-449": Setting(CosineSum, 5, SMALL, 3000, 500, 1, "exp10_reproduce_poisson5d"),
    "poisson5d-116865": Setting(CosineSum, 5, LARGE, 3000, 500, 1, "exp19_poisson5d_mlp_tanh_256"),
    "heat4d-449": Setting(HeatSineSum, 4, SMALL, 3000, 500, 100, "exp27_heat4d_small"),
    "heat4d-10065": Setting(HeatSineSum, 4, MEDIUM, 3000, 500, 100, "exp28_heat4d_medium"),
    "heat4d-116865": Setting(HeatSineSum, 4, LARGE, 3000, 500, 1, "exp29_heat4d_big"),
    "poisson10d-118145": Setting(Harmonic, 10, LARGE, 3000, 1000, 1, "exp21_poisson_10d"),
    "poisson100d-1325057": Setting(SquareNorm, 100, (768, 768, 512, 512), 124, 2332, 322, "exp14_poisson_100d_weinan"),
    "fokker-planck9d-118145": Setting(
        LogFokkerPlanck, 9, LARGE, 3000, 1000, 1, "exp43_log_fokker_planck9d_isotropic_gaussian_random"
    ),
}


class Pinn(nn.Module):
    """A tanh network `u`. `model(x)` is `u`; `model(x, residual=True)` is the equation's residual."""

    def __init__(self, equation: Equation, widths: tuple[int, ...]):
        super().__init__()
        layers: list[nn.Module] = []
        for i, o in pairwise((equation.inputs, *widths)):
            layers += [nn.Linear(i, o, dtype=F64), nn.Tanh()]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], 1, dtype=F64))
        self.equation = equation

    def forward(self, x: Tensor, residual: bool = False) -> Tensor:
        """Points `(n, inputs)` to `(n, 1)`."""
        if not residual:
            return self.net(x)
        return self.equation.residual(derivatives(self.net, x, self.equation.over), x)


def objective(loss: Callable[[Tensor, Tensor], Tensor], model: nn.Module, x: Any, y: Any) -> Tensor:
    """`½ loss of the interior + ½ loss of the conditions`. For an optimizer that needs losses, each is a separate
    batch."""
    (inside, conditions), (zero, values) = x, y
    return 0.5 * loss(model(inside, residual=True), zero) + 0.5 * loss(model(conditions), values)


def batches(setting: Setting, seed: int, size: int | None = None) -> Iterator[Batch]:
    """The points of every step, forever.

    Args:
        setting: the problem.
        seed: for the points.
        size: how many interior points of a set a step takes, with the same share of the conditions. A set is repeated
            in random order. None: all points.

    Raises:
        ValueError: if the size is not between 1 and the number of interior points.
    """
    size = setting.interior if size is None else size
    if not 1 <= size <= setting.interior:
        raise ValueError(f"batch={size}; expected a number of interior points, from 1 to {setting.interior}")
    counts = size, max(1, round(size / setting.interior * setting.conditions))
    equation, generator = setting.equation(setting.d), Generator().manual_seed(POINTS_SEED + seed)
    while True:
        inside = equation.interior(setting.interior, generator)
        conditions = equation.conditions(setting.conditions, generator)
        rounds = _rounds(inside, conditions, counts, generator)
        for x, y in rounds if setting.every == 0 else islice(rounds, setting.every):
            yield (x, y), (torch.zeros_like(x[:, :1]), equation.solution(y))


def _rounds(
    inside: Tensor, conditions: Tensor, counts: tuple[int, int], generator: Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """`counts` points of each kind at a time, forever, each pass in a new order; all points unchanged if that is
    all."""
    if counts == (len(inside), len(conditions)):
        yield from repeat((inside, conditions))
    while True:
        orders = (torch.randperm(len(points), generator=generator) for points in (inside, conditions))
        parts = [points[order].split(n) for points, order, n in zip((inside, conditions), orders, counts, strict=True)]
        for x, y in zip(*parts, strict=False):
            if len(x) == counts[0]:  # skips the incomplete rest
                yield x, y


def pinn(name: str) -> Task:
    """The task for the problem with this name."""
    setting = SETTINGS[name]
    equation = setting.equation(setting.d)
    points = equation.interior(10 * setting.interior, Generator().manual_seed(EVALUATION_SEED))
    solution = equation.solution(points)

    def make_model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Pinn(equation, setting.widths)

    @torch.no_grad()
    def evaluate(model: nn.Module) -> dict[str, float]:
        error = torch.cat([model(x) for x in points.split(3000)]) - solution
        return {"error": error.square().mean().sqrt().item()}

    def sample(count: int) -> Any:
        (inside, conditions), (zero, values) = next(batches(setting, 0))
        return (inside[:count], conditions[:count]), (zero[:count], values[:count])

    return Task(
        name,
        "error",
        setting.interior,
        nn.MSELoss(),
        make_model,
        lambda seed, size: batches(setting, seed, size),
        evaluate,
        sample,
        objective=objective,
    )
