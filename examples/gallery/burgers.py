"""A differential equation by plain autograd: Burgers' equation, u_t + u u_x = ν u_xx, which makes a steep front.

The model's forward pass computes the derivatives with `torch.autograd.grad`. The objective has two terms: the equation
inside, and the known values at the start and at both ends. The exact natural gradient is the Gauss-Newton step here.

    python examples/gallery/burgers.py FOLDER
"""

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from equal_time import draw, race
from torch import nn

import natgrad

FOLDER, SECONDS, NU = Path(*sys.argv[1:]), 5.0, 0.05
FOLDER.mkdir(parents=True, exist_ok=True)
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
inside = torch.rand(400, 2) * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.0])  # (x, t)
start = torch.stack([torch.linspace(-1, 1, 60), torch.zeros(60)], 1)
ends = torch.cat([torch.stack([torch.full((30,), x), torch.linspace(0, 1, 30)], 1) for x in (-1.0, 1.0)])
known, values = torch.cat([start, ends]), torch.cat([-(math.pi * start[:, 0]).sin(), torch.zeros(60)])


class Burgers(nn.Module):
    def __init__(self):
        super().__init__()
        self.u = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))

    def forward(self, inside, known):
        points = inside.clone().requires_grad_()
        u = self.u(points)
        (du,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        (du_x,) = torch.autograd.grad(du[:, 0].sum(), points, create_graph=True)
        residual = du[:, 1] + u[:, 0] * du[:, 0] - NU * du_x[:, 0]
        return {"equation": residual, "known": self.u(known)[:, 0]}


terms = {"equation": nn.MSELoss(), "known": nn.MSELoss()}


def objective(model, losses):
    out = model(inside, known)
    return losses["equation"](out["equation"], torch.zeros(400)) + 10 * losses["known"](out["known"], values)


def solution(x, t):
    """By the Cole-Hopf transform: a ratio of integrals over a heat kernel."""
    shift = torch.linspace(-8, 8, 2001) * (2 * NU * t).sqrt().unsqueeze(-1)
    y = math.pi * (x.unsqueeze(-1) - shift)
    weight = (-shift.square() / (4 * NU * t.unsqueeze(-1)) - y.cos() / (2 * math.pi * NU)).softmax(-1)
    return -(y.sin() * weight).sum(-1)


ours, adam = race(Burgers, terms, objective, SECONDS, natgrad.NaturalGradient)
x, t = torch.meshgrid(torch.linspace(-1, 1, 101), torch.linspace(0.02, 1, 50), indexing="ij")
u = ours.model.u(torch.stack([x, t], -1)).detach()[..., 0]
figure, (axes, picture) = plt.subplots(1, 2, figsize=(8, 3.4), width_ratios=(3, 2))
result = draw(axes, ours, adam, "equation, start and ends")
axes.set(yscale="log")
picture.imshow(u, origin="lower", extent=(0, 1, -1, 1), aspect="auto", cmap=None)
picture.set(title="the network's u", xlabel="t", ylabel="x")
picture.grid(False)
figure.savefig(FOLDER / "burgers.png")
error = (u - solution(x, t)).norm() / solution(x, t).norm()
print(f"loss after {SECONDS:g} s: NaturalGradient {result}; relative error of NaturalGradient's u: {error:.1e}")
