"""A variational autoencoder of digits: an objective of two terms, reconstruction and divergence.

The negative evidence lower bound has two terms. The first is the Bernoulli likelihood of the pixels, which is a loss of
torch. The second is KL(q(z|x) ‖ N(0, I)), which is not: Convex makes a loss from a function for it.

    python examples/gallery/vae.py FOLDER
"""

import sys
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from equal_time import draw, race
from sklearn.datasets import load_digits
from torch import nn

import natgrad

FOLDER, SECONDS, LATENT = Path(*sys.argv[1:]), 4.0, 6
FOLDER.mkdir(parents=True, exist_ok=True)
x = torch.as_tensor(load_digits().images).float().flatten(1) / 16


def mlp(*sizes):
    return nn.Sequential(*[m for pair in pairwise(sizes) for m in (nn.Linear(*pair), nn.Tanh())][:-1])


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode = mlp(64, 60, 60, 60, 2 * LATENT), mlp(LATENT, 60, 60, 60, 64)

    def forward(self, x):
        code = self.encode(x)
        mean, log_variance = code.chunk(2, 1)
        return {"pixels": self.decode(mean + (log_variance / 2).exp() * torch.randn_like(mean)), "code": code}


def divergence(code, _):
    return (code[:, :LATENT].square() + code[:, LATENT:].exp() - 1 - code[:, LATENT:]).sum(1) / 2


terms = {"pixels": nn.BCEWithLogitsLoss(), "code": natgrad.losses.Convex(divergence)}


def minus_bound(model, losses):
    out = model(x)
    return 64 * losses["pixels"](out["pixels"], x) + losses["code"](out["code"], None)


ours, adam = race(VAE, terms, minus_bound, SECONDS)
figure, (axes, picture) = plt.subplots(1, 2, figsize=(8, 3.4), width_ratios=(3, 2))
result = draw(axes, ours, adam, "minus the bound, nats")
axes.set(ylim=(24, 36))
drawn = ours.model.decode(torch.randn(40, LATENT)).sigmoid().detach().view(5, 8, 8, 8)
picture.imshow(drawn.transpose(1, 2).reshape(40, 64), cmap="gray_r")
picture.set(title="drawn by KFAC's", xticks=[], yticks=[])
figure.savefig(FOLDER / "vae.png")
print(f"minus the evidence lower bound after {SECONDS:g} s: KFAC {result} nats")
