"""A high frequency: Helmholtz' equation Δu + k² u = f on the unit square, with six half waves along each axis.

Gradient descent learns high frequencies last. Adam has the best of four learning rates and the same processor time.

    python examples/gallery/helmholtz.py FOLDER
"""

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from equal_time import draw, race
from torch import nn

import natgrad

FOLDER, SECONDS, WAVES, K = Path(*sys.argv[1:]), 20.0, 6, 3 * math.pi
FOLDER.mkdir(parents=True, exist_ok=True)
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
inside, edge = natgrad.pde.uniform(1600, 2), natgrad.pde.on_faces(240, 2)


def solution(points):
    return (WAVES * math.pi * points).sin().prod(1, keepdim=True)


source = (K**2 - 2 * (WAVES * math.pi) ** 2) * solution(inside)


class Helmholtz(nn.Module):
    def __init__(self):
        super().__init__()
        first = nn.Linear(2, 48)
        with torch.no_grad():
            first.weight *= 10  # steep enough for such short waves
            first.bias *= 10
        self.u = nn.Sequential(first, nn.Tanh(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, inside, edge):
        u = natgrad.pde.derivatives(self.u, inside)
        return {"inside": (u.laplacian + K**2 * u.value - source) / K**2, "edge": self.u(edge)}


terms = {"inside": nn.MSELoss(), "edge": nn.MSELoss()}


def objective(model, losses):
    out = model(inside, edge)
    return sum(losses[name](out[name], torch.zeros_like(out[name])) for name in out)


ours, adam = race(Helmholtz, terms, objective, SECONDS, natgrad.NaturalGradient)
grid = torch.cartesian_prod(*[torch.linspace(0, 1, 101)] * 2)
errors = {run: (run.model.u(grid) - solution(grid)).detach() for run in (ours, adam)}
ratios = [f"{e.norm() / solution(grid).norm():.1e}" for e in errors.values()]
figure, (axes, *panels) = plt.subplots(1, 3, figsize=(10, 3.2), width_ratios=(3, 2, 2))
draw(axes, ours, adam, "equation and edge")
axes.set(yscale="log")
for panel, title, values in zip(panels, ("u", "its error"), (ours.model.u(grid).detach(), errors[ours]), strict=True):
    picture = panel.imshow(values.view(101, 101).mT, origin="lower", extent=(0, 1, 0, 1), cmap=None)
    panel.set(title=title)
    panel.grid(False)
    figure.colorbar(picture, ax=panel, shrink=0.7)
figure.savefig(FOLDER / "helmholtz.png")
print(f"relative error after {SECONDS:g} s: NaturalGradient {ratios[0]}, Adam {ratios[1]}")
