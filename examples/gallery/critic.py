"""A critic with a gradient penalty, as in WGAN-GP: how far are two clouds of points from one another?

The critic f maximizes the difference of its means on the two clouds, while a penalty keeps |∇f| close to one between
them. The difference has no curvature in the output: `opt.plus` adds it to the objective. The penalty is a squared
error.

    python examples/gallery/critic.py FOLDER
"""

import math
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from equal_time import Run, adams, best, draw, train
from torch import nn

import natgrad

FOLDER, SECONDS = Path(*sys.argv[1:]), 3.0
FOLDER.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)
turns = math.pi * torch.rand(2, 200)
arc = torch.stack([turns.cos(), turns.sin()], 2) + 0.1 * torch.randn(2, 200, 2)
real, fake = arc[0], torch.tensor([1.0, 0.5]) - arc[1]  # two moons


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        pairs = pairwise((2, 16, 16, 16, 16, 16, 1))
        self.f = nn.Sequential(*[m for pair in pairs for m in (nn.Linear(*pair), nn.Tanh())][:-1])

    def difference(self):
        return (self.f(fake) - self.f(real)).mean()

    def forward(self, real, fake):
        share = torch.rand(len(real), 1)
        between = (share * real + (1 - share) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(self.f(between).sum(), between, create_graph=True)
        return slope.square().sum(1).add(1e-12).sqrt()


one, penalty = torch.ones(200), nn.MSELoss()


def with_natgrad(critic, opt):
    return opt.plus(critic.difference) + 10 * opt.loss(critic(real, fake), one)


def with_adam(critic, opt):
    return critic.difference() + 10 * penalty(critic(real, fake), one)


def make(critic):
    return natgrad.NaturalGradient(critic, penalty)


Run("warm-up", Critic, make, with_natgrad).train(0.5)  # what the first step imports takes no part
own, others = [Run("NaturalGradient", Critic, make, with_natgrad)], adams(Critic, with_adam)
train([*own, *others], SECONDS)
ours, adam = best(own), best(others)
figure, (axes, picture) = plt.subplots(1, 2, figsize=(8, 3.4), width_ratios=(3, 2))
result = draw(axes, ours, adam, "minus the distance, with the penalty")
axes.set(ylim=(-1.4, -1))
grid = torch.cartesian_prod(*[torch.linspace(-1.5, 2.5, 81)] * 2)
picture.contour(*[torch.linspace(-1.5, 2.5, 81)] * 2, ours.model.f(grid).detach().view(81, 81).T, 15, cmap="viridis")
for colour, cloud in (("C2", real), ("C0", fake)):
    picture.plot(*cloud.T, ".", color=colour, markersize=3)
figure.savefig(FOLDER / "critic.png")
print(f"objective after {SECONDS:g} s: NaturalGradient {result}")
