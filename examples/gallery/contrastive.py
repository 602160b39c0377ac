"""Contrastive training, as in SimCLR: from the encoding of one view of a picture, find that of the other view.

The model returns the similarities of all pairs of views. The loss is the cross-entropy with the right partner.
Afterwards, a linear classifier of the encodings measures how good they are.

    python examples/gallery/contrastive.py FOLDER
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from equal_time import draw, on_fresh_batches, race
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import affine_grid, grid_sample, normalize, one_hot

FOLDER, SECONDS, PAIRS, T = Path(*sys.argv[1:]), 4.0, 250, 0.2
FOLDER.mkdir(parents=True, exist_ok=True)
x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
x, y = x.float() / 16, y
train, test = slice(0, 1400), slice(1400, None)
partner = torch.arange(2 * PAIRS).roll(PAIRS)


def view(x):
    """Turned by up to 26 degrees, scaled, moved, with noise."""
    n = len(x)
    angle, scale, move = 0.9 * torch.rand(n) - 0.45, 0.8 + 0.4 * torch.rand(n), 0.5 * torch.rand(n, 2) - 0.25
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack([cos, -sin, move[:, 0], sin, cos, move[:, 1]], 1).view(n, 2, 3)
    where = affine_grid(rows, (n, 1, 8, 8), align_corners=False)
    return grid_sample(x.view(n, 1, 8, 8), where, align_corners=False).flatten(1) + 0.1 * torch.randn(n, 64)


class SimCLR(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh())
        self.project = nn.Linear(128, 32)

    def forward(self, views):
        z = normalize(self.project(self.encode(views)), dim=1)
        return z @ z.T / T - 1e4 * torch.eye(len(z))  # no view is its own partner


def loss_of(model, loss):
    some = x[torch.randint(1400, (PAIRS,))]
    return loss(model(torch.cat([view(some), view(some)])), partner)


loss_fn, tuned = nn.CrossEntropyLoss(), {"lr": 0.05, "momentum": 0.9, "dampings": (0.003, 0.01, 0.03, 0.1)}
fresh = on_fresh_batches(lambda model: loss_of(model, loss_fn))
ours, adam = race(SimCLR, loss_fn, loss_of, SECONDS, key=fresh, **tuned)
figure, axes = plt.subplots(figsize=(6, 3.6))
result = draw(axes, ours, adam, "contrastive loss", fresh)
figure.savefig(FOLDER / "contrastive.png")
with torch.no_grad():
    h = torch.cat([ours.model.encode(x), torch.ones(len(x), 1)], 1).double()
ridge = h[train].T @ h[train] + 0.1 * torch.eye(h.shape[1])
weights = torch.linalg.solve(ridge, h[train].T @ one_hot(y[train]).double())
accuracy = ((h[test] @ weights).argmax(1) == y[test]).double().mean()
print(f"contrastive loss on new pairs after {SECONDS:g} s: KFAC {result}; ", end="")
print(f"a linear classifier of KFAC's encodings: {accuracy:.3f}")
