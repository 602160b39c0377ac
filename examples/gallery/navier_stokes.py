"""The Navier-Stokes equations: the flow behind a grid of wires (Kovasznay, 1948), which has a formula to compare with.

    (u·∇) u = −∇p + Δu / Re        ∇·u = 0        Re = 40

One network gives both velocities and the pressure. Velocities are known on the boundary, and the pressure in one point.

    python examples/gallery/navier_stokes.py FOLDER
"""

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

import natgrad

FOLDER, STEPS, RE = Path(*sys.argv[1:]), 100, 40
FOLDER.mkdir(parents=True, exist_ok=True)
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
RATE = RE / 2 - math.sqrt(RE**2 / 4 + 4 * math.pi**2)
LOW, SIDES = torch.tensor([-0.5, -0.5]), torch.tensor([1.5, 2.0])


def solution(points):
    """Velocities and pressure."""
    x, y = points.unbind(1)
    fall, wave = (RATE * x).exp(), 2 * math.pi * y
    return torch.stack([1 - fall * wave.cos(), RATE / (2 * math.pi) * fall * wave.sin(), (1 - fall**2) / 2], 1)


class Flow(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        sizes = [(2, width), (width, width), (width, 3)]
        self.net = nn.Sequential(*[m for size in sizes for m in (nn.Linear(*size), nn.Tanh())][:-1])

    def forward(self, points, inside):
        if not inside:
            return self.net(points)
        out = natgrad.pde.derivatives(self.net, points)
        velocity, slopes = out.value[:, :2], out.gradient[:, :, :2]  # slopes[:, i, j] = ∂_i u_j
        momentum = torch.einsum("ni,nij->nj", velocity, slopes) + out.gradient[:, :, 2] - out.laplacian[:, :2] / RE
        return torch.cat([momentum, slopes[:, 0, :1] + slopes[:, 1, 1:]], 1)


inside = LOW + SIDES * natgrad.pde.uniform(500, 2)
edge = LOW + SIDES * natgrad.pde.on_faces(200, 2)
corner = LOW.unsqueeze(0)
model = Flow()
opt = natgrad.NaturalGradient(model, {"equations": nn.MSELoss(), "velocity": nn.MSELoss(), "pressure": nn.MSELoss()})
for _ in range(STEPS):
    loss = opt.loss["equations"](model(inside, inside=True), torch.zeros(500, 3))
    loss = loss + 10 * opt.loss["velocity"](model(edge, inside=False)[:, :2], solution(edge)[:, :2])
    loss = loss + opt.loss["pressure"](model(corner, inside=False)[:, 2:], solution(corner)[:, 2:])
    opt.zero_grad()
    loss.backward()
    opt.step()

x, y = torch.meshgrid(*(LOW[i] + SIDES[i] * torch.linspace(0, 1, 81) for i in (0, 1)), indexing="xy")
grid = torch.stack([x.flatten(), y.flatten()], 1)
found, exact = model.net(grid).detach(), solution(grid)
plt.style.use(Path(__file__).with_name("gallery.mplstyle"))
figure, panels = plt.subplots(1, 2, figsize=(8, 3.6))
speed, error = found[:, :2].norm(dim=1), (found - exact)[:, :2].norm(dim=1)
for axes, title, field in zip(panels, ("speed and streamlines", "error of the velocity"), (speed, error), strict=True):
    picture = axes.imshow(field.view(81, 81), origin="lower", extent=(-0.5, 1, -0.5, 1.5), cmap=None)
    axes.set(title=title, xlabel="x", ylabel="y")
    axes.grid(False)
    figure.colorbar(picture, ax=axes)
panels[0].streamplot(*(v.numpy() for v in (x, y, *found[:, :2].T.reshape(2, 81, 81))), color="white", linewidth=0.6)
figure.savefig(FOLDER / "navier_stokes.png")
ratio = [(found - exact)[:, part].norm() / exact[:, part].norm() for part in (slice(2), slice(2, 3))]
print(f"relative error after {STEPS} steps: velocity {ratio[0]:.1e}, pressure {ratio[1]:.1e}")
