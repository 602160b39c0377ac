"""An inverse problem: where does heat flow well? −∇·(a ∇u) = f, u measured with noise, a unknown.

Two networks, for u and for log a, are trained together: on the equation, on u = 0 at the edge, and on 400 measurements
of u with a noise of one percent.

    python examples/gallery/inverse.py FOLDER
"""

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

import natgrad

FOLDER, STEPS, NOISE = Path(*sys.argv[1:]), 100, 0.01
FOLDER.mkdir(parents=True, exist_ok=True)
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)


def solution(x):
    return (math.pi * x).sin().prod(1, keepdim=True)


def conductivity(x):
    """A spot that conducts three times as well as the rest."""
    return 1 + 2 * (-20 * (x - torch.tensor([0.35, 0.6])).square().sum(1, keepdim=True)).exp()


def source(x):
    """f = −∇·(a ∇u), by autograd."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(solution(x).sum(), x, create_graph=True)
    flow = conductivity(x) * slope
    parts = [torch.autograd.grad(flow[:, i].sum(), x, retain_graph=True)[0][:, i : i + 1] for i in (0, 1)]
    return -(parts[0] + parts[1])


class Inverse(nn.Module):
    def __init__(self, width=20):
        super().__init__()
        sizes = [(2, width), (width, width), (width, 1)]
        self.u, self.log_a = (
            nn.Sequential(*[m for size in sizes for m in (nn.Linear(*size), nn.Tanh())][:-1]) for _ in range(2)
        )

    def forward(self, inside, measured):
        u, log_a = natgrad.pde.derivatives(self.u, inside), natgrad.pde.derivatives(self.log_a, inside)
        flow = u.laplacian + (log_a.gradient * u.gradient).sum(1)  # ∇·(a ∇u) / a
        return {"equation": log_a.value.exp() * flow, "measured": self.u(measured)}


inside, edge, places = natgrad.pde.uniform(900, 2), natgrad.pde.on_faces(200, 2), natgrad.pde.uniform(400, 2)
known = torch.cat([edge, places])
values = torch.cat([torch.zeros(200, 1), solution(places) + NOISE * torch.randn(400, 1)])
minus_f = -source(inside)
model = Inverse()
opt = natgrad.NaturalGradient(model, {"equation": nn.MSELoss(), "measured": nn.MSELoss()}, weight_decay=1e-6)
for _ in range(STEPS):
    out = model(inside, known)
    loss = 0.01 * opt.loss["equation"](out["equation"], minus_f) + opt.loss["measured"](out["measured"], values)
    opt.zero_grad()
    loss.backward()
    opt.step()

grid = torch.cartesian_prod(*[torch.linspace(0, 1, 81)] * 2)
a, exact, u = model.log_a(grid).exp().detach(), conductivity(grid), model.u(grid).detach()
plt.style.use(Path(__file__).with_name("gallery.mplstyle"))
figure, panels = plt.subplots(1, 3, figsize=(9.5, 2.9))
for axes, title, field in zip(panels, ("a", "the network's a", "its error"), (exact, a, a - exact), strict=True):
    picture = axes.imshow(field.view(81, 81).mT, origin="lower", extent=(0, 1, 0, 1), cmap=None)
    axes.set(title=title)
    axes.grid(False)
    figure.colorbar(picture, ax=axes, shrink=0.8)
panels[0].plot(*places.T, ".", color="white", markersize=1.5)
figure.savefig(FOLDER / "inverse.png")
ratio = [(v - e).norm() / e.norm() for v, e in ((a, exact), (u, solution(grid)))]
print(f"relative error after {STEPS} steps: coefficient {ratio[0]:.1e}, u {ratio[1]:.1e}")
