"""A small network, its losses and options, and one step of KFAC on it."""

import pytest
import torch
from torch import nn

import natgrad
from oracles import f64, net, randn

N, D, C = 24, 5, 3
X, LABELS = randn(N, D), torch.arange(N) % C
FIXED = {"lr": 0.3, "momentum": 0.0, "damping": 0.02, "estimator": "exact"}
FRESH = {"statistics_every": 1, "inverses_every": 1}
ADAPTIVE = {"estimator": "exact", **FRESH, "adapt_every": 2}
BOTH = pytest.mark.parametrize("options", [ADAPTIVE, {**FIXED, "momentum": 0.5}], ids=["adaptive", "fixed"])
WEIGHT = torch.tensor([0.5, 2.0, 1.3], dtype=f64)
LOSSES = {
    "cross-entropy": (nn.CrossEntropyLoss(), LABELS),
    "weighted": (nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1), LABELS),
    "mse": (nn.MSELoss(), randn(N, C, seed=5)),
    "bce": (nn.BCEWithLogitsLoss(), randn(N, C, seed=5).sigmoid().round()),
}
EVERY_LOSS = pytest.mark.parametrize("kind", LOSSES)


def model_of(*widths, seed=0, **options):
    torch.manual_seed(seed)
    return net(*widths, **options)


def made(seed=0, **options):
    model = model_of(D, 4, C, seed=seed)
    return model, natgrad.KFAC(model, nn.CrossEntropyLoss(), **options)


def step(model, opt, x=X, y=LABELS, scale=1.0):
    loss = opt.loss(model(x), y)
    opt.zero_grad()
    (scale * loss).backward()
    opt.step()
    return loss


def gradient(model, loss, x=X, y=LABELS):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss(model(x), y), list(model.parameters()))])


def eye(n):
    return torch.eye(n, dtype=f64)
