"""A shock: Burgers' equation u_t + u u_x = ν u_xx with ν = 0.01/π, whose front is about 0.01 wide.

Points that are the same for all steps miss the front. Every 20 steps three quarters of them are drawn anew, from many
uniform ones, with probabilities in proportion to the size of the residual there.

    python examples/gallery/shock.py FOLDER
"""

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

import natgrad

FOLDER, STEPS, NU, EVERY, UNIFORM, DRAWN = Path(*sys.argv[1:]), 140, 0.01 / math.pi, 20, 400, 1200
FOLDER.mkdir(parents=True, exist_ok=True)
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)


class Burgers(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        sizes = [(2, width), (width, width), (width, width), (width, 1)]
        self.u = nn.Sequential(*[m for size in sizes for m in (nn.Linear(*size), nn.Tanh())][:-1])

    def forward(self, points, inside):
        if not inside:
            return self.u(points)
        u = natgrad.pde.derivatives(self.u, points, over=[0])  # (x, t): the second derivative in x alone
        return u.gradient[:, 1] + u.value * u.gradient[:, 0] - NU * u.laplacian


def uniform(n):
    return torch.rand(n, 2) * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.0])


def solution(x, t):
    """By the Cole-Hopf transform: a ratio of integrals over a heat kernel."""
    shift = torch.linspace(-1.5, 1.5, 4001)
    y = math.pi * (x.unsqueeze(-1) - shift)
    weight = (-shift.square() / (4 * NU * t.unsqueeze(-1)) - y.cos() / (2 * math.pi * NU)).softmax(-1)
    return -(y.sin() * weight).sum(-1)


start = torch.stack([torch.linspace(-1, 1, 100), torch.zeros(100)], 1)
ends = torch.cat([torch.stack([torch.full((40,), x), torch.linspace(0, 1, 40)], 1) for x in (-1.0, 1.0)])
known, values = torch.cat([start, ends]), torch.cat([-(math.pi * start[:, :1]).sin(), torch.zeros(80, 1)])
model = Burgers()
opt = natgrad.NaturalGradient(model, nn.MSELoss())
for step in range(STEPS):
    if step % EVERY == 0:
        candidates = uniform(20000)
        with torch.no_grad():
            size = model(candidates, inside=True).abs()[:, 0]
        inside = torch.cat([uniform(UNIFORM), candidates[size.multinomial(DRAWN)]])
    zero = torch.zeros(len(inside), 1)
    loss = opt.loss(model(inside, inside=True), zero) + 10 * opt.loss(model(known, inside=False), values)
    opt.zero_grad()
    loss.backward()
    opt.step()

x, t = torch.meshgrid(torch.linspace(-1, 1, 401), torch.linspace(0.02, 1, 50), indexing="ij")
u, exact = model.u(torch.stack([x, t], -1)).detach()[..., 0], solution(x, t)
plt.style.use(Path(__file__).with_name("gallery.mplstyle"))
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.3))
picture = left.imshow(u, origin="lower", extent=(0.02, 1, -1, 1), aspect="auto", cmap=None)
left.plot(inside[-DRAWN:, 1], inside[-DRAWN:, 0], ",", color="white")
left.set(title="the network's u, and the points drawn last", xlabel="t", ylabel="x")
left.grid(False)
figure.colorbar(picture, ax=left)
right.plot(x[:, -1], exact[:, -1], color="C0", linewidth=4, alpha=0.5, label="exact")
right.plot(x[:, -1], u[:, -1], color="C2", label="network")
right.set(title="t = 1, near the front", xlabel="x", xlim=(-0.1, 0.1))
right.legend()
figure.savefig(FOLDER / "shock.png")
print(f"relative error after {STEPS} steps: {(u - exact).norm() / exact.norm():.1e}")
