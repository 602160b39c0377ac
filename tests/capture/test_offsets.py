"""A number added to a parameter leaves its derivatives as they are; other functions of it do not, and are refused."""

import pytest
import torch
from torch import nn

import natgrad
from oracles import close, f64, fit, randn

LOSS = nn.MSELoss()


class Scaled(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make, self.w, self.out = make, nn.Parameter(randn(3)), nn.Linear(3, 2)
        self.to(f64)

    def forward(self, x):
        return self.out(x * self.make(self.w))


TAKEN = {
    "1 + w": lambda w: 1 + w,
    "w - 0.5": lambda w: w - 0.5,
    "add": lambda w: torch.add(w, 1.0),
    "cast, then add": lambda w: 1.0 + w.double(),
    "add, then cast": lambda w: w.add(1).to(f64),
    "twice": lambda w: (w + 1) - 3,
    "itself": lambda w: w + w,
    "and a buffer": lambda w: w + torch.ones(3, dtype=f64),
    "a view of it": lambda w: 1 + w.view(1, 3),
}
# Matrices in forms that a cast or a number leaves as they are.
MATRICES = {
    "a transpose less a number": lambda w: w.t() - 0.5,
    "a copy of a transpose": lambda w: w.t().contiguous(),
    "a cast transpose": lambda w: w.T.to(f64),
    "transposed twice": lambda w: (w.t() + 1).t().clone(),
}
REFUSED = {
    "1 - w": lambda w: 1 - w,
    "w times a number": lambda w: 2 * w,
    "exp": lambda w: (1 + w).exp(),
    "less itself": lambda w: w - 0.5 * w.detach(),
}


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("structure", ["block", "diagonal", "kfac"])
def test_offsets(name, structure):
    model, data = Scaled(TAKEN[name]), (randn(20, 3), randn(20, 2))
    dense = natgrad.fisher(model, LOSS, data, "dense")["w"].to_dense()
    F = natgrad.fisher(model, LOSS, data, structure)["w"].to_dense()
    close(F.diagonal(), dense.diagonal(), 1e-10)
    if structure == "block":
        close(F, dense, 1e-10)


@pytest.mark.parametrize("name", MATRICES)
def test_of_matrices(name):
    class Map(Scaled):
        def __init__(self):
            super().__init__(MATRICES[name])
            self.w = nn.Parameter(randn(3, 3))
            self.out = nn.Linear(len(self.make(self.w)), 2, dtype=f64)

        def forward(self, x):
            return self.out(nn.functional.linear(x, self.make(self.w)).tanh())

    model, data = Map(), (randn(20, 3), randn(20, 2))
    dense = natgrad.fisher(model, LOSS, data, "dense")["w"].to_dense()
    close(natgrad.fisher(model, LOSS, data, "block")["w"].to_dense(), dense, 1e-10)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("structure", ["block", "kfac"])
def test_what_is_none(name, structure):
    """Right, or refused by name."""
    model, data = Scaled(REFUSED[name]), (randn(20, 3), randn(20, 2))
    with pytest.raises(NotImplementedError, match="no layer kind covers 'w'"):
        natgrad.fisher(model, LOSS, data, structure)


def test_an_optimizer_trains_it():
    model, x, y = Scaled(TAKEN["1 + w"]), randn(20, 3), randn(20, 2)
    losses = fit(natgrad.KFAC(model, LOSS), model, x, y, 10)
    assert losses[-1] < 0.9 * losses[0]
