"""Bilinear maps within a network: what their two inputs come from, and what may happen to them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import natgrad
from oracles import close, dense_curvature, f64, fit, randn

N, CLASSES = 6, 3
X, Y = randn(N, 4), torch.arange(N) % CLASSES
LOSS = nn.CrossEntropyLoss()


class Network(nn.Module):
    """`uᵀ W v + b` of two layers' outputs, and a readout."""

    def __init__(self, spoil=False):
        super().__init__()
        self.u, self.v = nn.Linear(4, 3), nn.Linear(4, 2)
        self.map, self.out = nn.Bilinear(3, 2, 5), nn.Linear(5, CLASSES)
        self.spoil = spoil

    def forward(self, x):
        u, v = self.u(x).tanh(), self.v(x)
        if not self.spoil:
            return self.out(self.map(u, v).tanh())
        u, v = u.detach(), v.detach()
        a = self.map(u, v)
        v.zero_()
        return self.out(a.tanh())


def made(spoil=False):
    torch.manual_seed(0)
    return Network(spoil).to(f64)


def test_every_exact_block_is_autograds():
    model = made()
    whole, blocks = dense_curvature(model, LOSS, [(X, Y)]), natgrad.fisher(model, LOSS, (X, Y), "block")
    places = dict(zip(blocks.space.names, blocks.space.unflatten(torch.arange(len(whole))), strict=True))
    assert list(places) == [n for n, _ in model.named_parameters()]
    for layer, block in blocks.layers.items():
        own = torch.cat([places[n].flatten() for n in block.names])
        close(blocks.blocks[layer].to_dense(), whole[own[:, None], own], 1e-12)


def test_coverage_says_what_it_is():
    shown = str(natgrad.fisher(made(), LOSS, (X, Y)).coverage())
    assert "map.weight  5 x 3 x 2  bilinear  C ⊗ B and B, centered, C 6, B 5" in shown


def test_inputs_may_be_overwritten_afterwards():
    names = ["map.weight", "map.bias"]
    whole, spoiled = (natgrad.fisher(made(s), LOSS, (X, Y), "block", params=names).to_dense() for s in (False, True))
    close(spoiled, whole, 1e-12)


def test_an_input_that_is_a_parameter_is_named():
    model = made()
    model.given = nn.Parameter(randn(N, 2))
    model.forward = lambda x: model.out(F.bilinear(model.u(x), model.given, model.map.weight))
    with pytest.raises(NotImplementedError, match=r"'given' \(used by bilinear\)"):
        natgrad.fisher(model, LOSS, (X, Y), "block", params=["given", "map.weight"])


def test_the_adaptive_step_goes_through_it():
    model = made()
    losses = fit(natgrad.KFAC(model, LOSS), model, X, Y, 20)
    assert losses[-1] < 0.2 * losses[0]
