"""A high frequency: Helmholtz' equation Δu + k² u = f on the unit square, with six half waves along each axis.

The first layer's weights start ten times as large as torch makes them: about the slope of such short waves.

    python examples/gallery/helmholtz.py FOLDER
"""

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

import natgrad

FOLDER, STEPS, WAVES, K = Path(*sys.argv[1:]), 100, 6, 3 * math.pi
FOLDER.mkdir(parents=True, exist_ok=True)
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
inside, edge = natgrad.pde.uniform(1000, 2), natgrad.pde.on_faces(160, 2)


def solution(points):
    return (WAVES * math.pi * points).sin().prod(1, keepdim=True)


class Helmholtz(nn.Module):
    def __init__(self):
        super().__init__()
        first = nn.Linear(2, 40)
        with torch.no_grad():
            first.weight *= 10
            first.bias *= 10
        self.u = nn.Sequential(first, nn.Tanh(), nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 1))

    def forward(self, points, inside):
        if not inside:
            return self.u(points)
        u = natgrad.pde.derivatives(self.u, points)
        return u.laplacian / K**2 + u.value


source = (1 - 2 * (WAVES * math.pi / K) ** 2) * solution(inside)
model = Helmholtz()
opt = natgrad.NaturalGradient(model, nn.MSELoss())
losses, errors = [], []
grid = torch.cartesian_prod(*[torch.linspace(0, 1, 101)] * 2)
for _ in range(STEPS):
    with torch.no_grad():
        errors.append(((model.u(grid) - solution(grid)).norm() / solution(grid).norm()).item())
    loss = opt.loss(model(inside, inside=True), source) + opt.loss(model(edge, inside=False), torch.zeros(160, 1))
    opt.zero_grad()
    loss.backward()
    opt.step()
    losses.append(loss.item())

u = model.u(grid).detach()
plt.style.use(Path(__file__).with_name("gallery.mplstyle"))
figure, (axes, *panels) = plt.subplots(1, 3, figsize=(10, 3))
axes.semilogy(losses, color="C0", label="loss")
axes.semilogy(errors, color="C2", label="relative error")
axes.set(xlabel="steps")
axes.legend()
for panel, title, values in zip(panels, ("the network's u", "its error"), (u, u - solution(grid)), strict=True):
    picture = panel.imshow(values.view(101, 101).mT, origin="lower", extent=(0, 1, 0, 1), cmap=None)
    panel.set(title=title)
    panel.grid(False)
    figure.colorbar(picture, ax=panel, shrink=0.8)
figure.savefig(FOLDER / "helmholtz.png")
print(f"relative error after {STEPS} steps: {(u - solution(grid)).norm() / solution(grid).norm():.1e}")
