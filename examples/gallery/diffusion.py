"""Denoising diffusion of points in the plane: a network predicts the noise in x_t = cos(πt/2) x + sin(πt/2) ε.

The loss is the squared error of ε, at random times. Then points are drawn from noise, step by step back to t = 0.

    python examples/gallery/diffusion.py FOLDER
"""

import math
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from equal_time import draw, on_fresh_batches, race
from torch import nn

FOLDER, SECONDS, BATCH = Path(*sys.argv[1:]), 5.0, 2000
FOLDER.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)
angle = 1 + 3 * math.pi * torch.rand(20000, 1).sqrt()
data = torch.cat([angle * angle.cos(), angle * angle.sin()], 1) / 5 + 0.03 * torch.randn(20000, 2)


class Denoiser(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        hidden = [nn.Linear(10, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)]
        self.net = nn.Sequential(*hidden, nn.Tanh(), nn.Linear(width, 2))

    def forward(self, x, t):
        waves = t * torch.tensor([1.0, 2.0, 4.0, 8.0]) * math.pi / 2
        return self.net(torch.cat([x, waves.sin(), waves.cos()], 1))


def signal_and_noise(t):
    return (math.pi / 2 * t).cos(), (math.pi / 2 * t).sin()


def loss_of(model, loss):
    x, t, noise = data[torch.randint(len(data), (BATCH,))], torch.rand(BATCH, 1), torch.randn(BATCH, 2)
    signal, share = signal_and_noise(t)
    return loss(model(signal * x + share * noise, t), noise)


@torch.no_grad()
def sample(model, n, steps=100):
    """Without new noise on the way (DDIM, arXiv:2010.02502)."""
    x, times = torch.randn(n, 2), torch.linspace(0.98, 0, steps + 1)
    for t, after in pairwise(times):
        (a, s), (a_after, s_after) = signal_and_noise(t), signal_and_noise(after)
        noise = model(x, t.expand(n, 1))
        x = a_after * (x - s * noise) / a + s_after * noise
    return x


loss_fn, tuned = nn.MSELoss(), {"lr": 0.05, "momentum": 0.9, "dampings": (0.003, 0.01, 0.03, 0.1)}
fresh = on_fresh_batches(lambda model: loss_of(model, loss_fn))
ours, adam = race(Denoiser, loss_fn, loss_of, SECONDS, key=fresh, **tuned)
figure, (axes, picture) = plt.subplots(1, 2, figsize=(8, 3.4), width_ratios=(3, 2))
result = draw(axes, ours, adam, "squared error of the noise", fresh)
axes.set(ylim=(0.35, 0.6))
picture.plot(*data[:1000].T, ".", color="C0", markersize=2, label="data")
picture.plot(*sample(ours.model, 1000).T, ".", color="C2", markersize=2, label="drawn")
picture.legend()
figure.savefig(FOLDER / "diffusion.png")
print(f"squared error on new points after {SECONDS:g} s: KFAC {result}")
