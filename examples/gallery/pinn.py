"""Solve a differential equation, −Δu = f on the unit square with u = 0 on its boundary, by a network for u.

The model's output is the equation's residual at each point; the loss is its square. The exact natural gradient over all
parameters is the Gauss-Newton step for this loss. Its damping is adapted to the measured loss.

    python examples/gallery/pinn.py FOLDER
"""

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

import natgrad


class Poisson(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, width), nn.Linear(width, width), nn.Linear(width, 1)])

    def u_and_laplacian(self, points):
        """The derivatives ∂x, ∂y, Δ go through the layers beside z: t = tanh(a) has t' = 1 − t², t'' = −2 t t'."""
        z, d = points, torch.cat([torch.eye(2), torch.zeros(1, 2)]).expand(len(points), 3, 2)
        for layer in self.layers:
            if layer is not self.layers[0]:
                z = z.tanh()
                bend = torch.zeros_like(d).index_fill(1, torch.tensor(2), 1) * d[:, :2].square().sum(1, keepdim=True)
                d = (1 - z * z).unsqueeze(1) * (d - 2 * z.unsqueeze(1) * bend)
            z, d = layer(z), nn.functional.linear(d, layer.weight)
        return z, d[:, 2]

    def forward(self, points):
        u, laplacian = self.u_and_laplacian(points)
        on_boundary = ((points == 0) | (points == 1)).any(1, keepdim=True)
        return torch.where(on_boundary, 100 * u, laplacian + 2 * math.pi**2 * solution(points))


def solution(points):
    return (math.pi * points).sin().prod(1, keepdim=True)


torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
coarse, fine = (torch.cartesian_prod(*[torch.linspace(0, 1, side)] * 2) for side in (13, 101))
model = Poisson()
opt = natgrad.NaturalGradient(model, nn.MSELoss())
for _ in range(100):
    loss = opt.loss(model(coarse), torch.zeros(len(coarse), 1))
    opt.zero_grad()
    loss.backward()
    opt.step()

u = model.u_and_laplacian(fine)[0].detach()
error = u - solution(fine)
plt.style.use(Path(__file__).with_name("gallery.mplstyle"))
figure, panels = plt.subplots(1, 2, figsize=(7.5, 3.2))
for axes, title, values in zip(panels, ("the network's u", "its error"), (u, error), strict=True):
    picture = axes.imshow(values.view(101, 101).mT, origin="lower", extent=(0, 1, 0, 1), cmap=None)
    axes.set(title=title, xlabel="x", ylabel="y")
    axes.grid(False)
    figure.colorbar(picture, ax=axes)
folder = Path(*sys.argv[1:])
folder.mkdir(parents=True, exist_ok=True)
figure.savefig(folder / "pinn.png")
print(f"relative error after 100 steps: {error.norm() / solution(fine).norm():.1e}")
