"""A variational autoencoder of digits: an objective of two terms, reconstruction and divergence.

The evidence lower bound is a Bernoulli log-likelihood for each pixel, which torch has, less KL(q(z|x) ‖ N(0, I)), which
it has not: a function of the encoder's output (μ, log σ²) is enough. Adam has the best of a few learning rates, and
each run the same processor time.

    python examples/gallery/vae.py FOLDER
"""

import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import natgrad

FOLDER, SECONDS, RATES, LATENT = Path(*sys.argv[1:]), 3.0, (1e-3, 3e-3, 1e-2, 3e-2), 8
FOLDER.mkdir(parents=True, exist_ok=True)
x = torch.as_tensor(load_digits().images).float().flatten(1) / 16
x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
train, test = x[:1500], x[1500:]


class VAE(nn.Module):
    def __init__(self, width=128):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, width), nn.Tanh(), nn.Linear(width, 64))

    def forward(self, x):
        code = self.encoder(x)
        mean, log_variance = code.chunk(2, 1)
        return self.decoder(mean + (log_variance / 2).exp() * torch.randn_like(mean)), code


def divergence(code, _):
    mean, log_variance = code.chunk(2, 1)
    return (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2


terms = {"pixels": nn.BCEWithLogitsLoss(), "divergence": natgrad.losses.Convex(divergence)}


def bound(model, losses, x):
    """Minus the evidence lower bound, in nats for a digit."""
    logits, code = model(x)
    return 64 * losses["pixels"](logits, x) + losses["divergence"](code, None)


def run(make):
    """The model, and (seconds, loss on the test digits) along the way."""
    torch.manual_seed(0)
    model = VAE()
    opt, spent, curve = make(model), 0.0, []
    losses = opt.loss if isinstance(opt, natgrad.KFAC) else terms
    while spent < SECONDS:
        start = time.process_time()
        loss = bound(model, losses, train[torch.randint(len(train), (250,))])
        opt.zero_grad()
        loss.backward()
        opt.step()
        spent += time.process_time() - start
        with torch.no_grad(), torch.random.fork_rng():
            curve.append((spent, bound(model, terms, test).item()))
    return model, curve


kfac = run(lambda model: natgrad.KFAC(model, terms))
for name, (model, curve) in {"KFAC": kfac, **{f"{lr:g}": run(lambda model, lr=lr: torch.optim.Adam(model.parameters(), lr=lr)) for lr in RATES}}.items():
    n = len(curve)
    print(name, n, [f"{curve[int(n*k)][1]:.2f}" for k in (0, .05, .1, .2, .3, .5, .7, .9, .999)])
