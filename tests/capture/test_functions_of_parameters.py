"""Functions of a parameter's entries: a number that is added, `exp(w)`, `2 W`. Other functions of it are refused."""

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
    "less itself": lambda w: w - 0.5 * w.detach(),
    "1 - w": lambda w: 1 - w,
    "w times a number": lambda w: 2 * w,
    "exp": lambda w: (1 + w).exp(),
    "exp, clamped": lambda w: w.exp().clamp(max=1.5),
    "softplus": lambda w: nn.functional.softplus(w, beta=2),
    "a gate": lambda w: 1 - torch.sigmoid(3 * w),
    "a view of an exponential": lambda w: w.exp().flip(0)[None],
    "an exponential of a view": lambda w: -torch.exp(w[[2, 0, 0]]),
    "a reciprocal": lambda w: 1 / (2 + w**2),
    "twice in two forms": lambda w: w.exp() + w.tanh(),
    "a product of two forms": lambda w: w.exp() * torch.ones(3, dtype=f64),
}
# Uses of a vector and an input.
CALLS = {
    "difference": lambda x, w: x - w,
    "difference the other way": lambda x, w: torch.sub(w, x),
    "quotient": lambda x, w: x / w,
    "quotient the other way": lambda x, w: w.exp() / (2 + x**2),
    "scale and shift of other shapes": lambda x, w: x * w.unsqueeze(0) + w,
    "a gated sum": lambda x, w: x * w.sigmoid() + (1 - w.sigmoid()) * x.roll(1, 1),
}
# Matrices in forms that a cast or a number leaves as they are.
MATRICES = {
    "a transpose less a number": lambda w: w.t() - 0.5,
    "a copy of a transpose": lambda w: w.t().contiguous(),
    "a cast transpose": lambda w: w.T.to(f64),
    "transposed twice": lambda w: (w.t() + 1).t().clone(),
    "a multiple": lambda w: 3 * w,
    "a negative transpose": lambda w: -w.t() / 2,
    "1 - W": lambda w: 1 - w,
}
REFUSED = {
    "a softmax": lambda w: w.softmax(0),
    "a sum": lambda w: w.sum() + w,
    "times itself": lambda w: w.exp() * w,
    "a norm": lambda w: nn.functional.normalize(w, dim=0),
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


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("structure", ["block", "diagonal"])
def test_of_calls(name, structure):
    class Used(Scaled):
        def forward(self, x):
            return self.out(CALLS[name](x, self.w).tanh())

    model, data = Used(None), (randn(20, 3), randn(20, 2))
    dense, F = (natgrad.fisher(model, LOSS, data, s)["w"].to_dense() for s in ("dense", structure))
    close(F, dense if structure == "block" else dense.diagonal().diag(), 1e-10)


def test_scale_and_shift_share_a_block():
    """Leading axes of length 1 do not matter."""

    class Affine1d(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b, self.out = nn.Parameter(randn(3)), nn.Parameter(randn(3)), nn.Linear(3, 2, dtype=f64)

        def forward(self, x):
            return self.out((x * self.w.unsqueeze(0) + self.b).tanh())

    model, data = Affine1d(), (randn(20, 3), randn(20, 2))
    dense, F = (natgrad.fisher(model, LOSS, data, s)[["w", "b"]].to_dense() for s in ("dense", "block"))
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


class Equalized(nn.Module):
    """Weights and biases that are multiplied by a number when they are used, and a temperature."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear, self.temperature = nn.Conv2d(1, 2, 2), nn.Linear(2, 3), nn.Parameter(randn(()))
        self.act = nn.PReLU(2)
        self.to(f64)

    def forward(self, x):
        h = nn.functional.conv2d(x, self.conv.weight * 0.5, self.conv.bias * 3)
        h = self.act(h).sum((2, 3))
        return self.temperature.exp() * nn.functional.linear(h, 2 * self.linear.weight, self.linear.bias * 0.1)


@pytest.mark.parametrize("structure", ["block", "diagonal", "kfac"])
def test_multiples_of_weights_and_biases(structure):
    model, data, loss = Equalized(), (randn(20, 1, 4, 4), torch.randint(3, (20,))), nn.CrossEntropyLoss()
    dense, F = (natgrad.fisher(model, loss, data, s) for s in ("dense", structure))
    assert sorted(F.space.names) == sorted(dense.space.names)
    for n in F.space.names:
        exact, own = dense[n].to_dense(), F[n].to_dense()
        if structure == "block":
            close(own, exact, 1e-10)
        elif structure == "diagonal":
            close(own.diagonal(), exact.diagonal(), 1e-10)
    scales = [n for n in F.space.names if "weight" not in n or n == "act.weight"]
    for n in scales if structure == "kfac" else []:
        close(F[n].to_dense().diagonal(), dense[n].to_dense().diagonal(), 1e-10)


def test_KFAC_trains_functions_of_parameters():
    model, data = Equalized(), (randn(20, 1, 4, 4), torch.randint(3, (20,)))
    losses = fit(natgrad.KFAC(model, nn.CrossEntropyLoss()), model, *data, 20)
    assert losses[-1] < 0.7 * losses[0]
