"""Layers that get no row of a batch, as experts that are not chosen."""

import pytest
import torch
from torch import nn

import natgrad
from natgrad.linalg import ExactBlock
from oracles import close, f64, fit, randn

LOSS, D, H, C = nn.CrossEntropyLoss(), 3, 4, 2


class Model(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(D, H), nn.Linear(H, C)
        for name, part in parts.items():
            setattr(self, name, part())
        self.double()

    def forward(self, x):
        h = self.first(x).tanh()
        return self.last((h + self.chosen(x, h)).tanh())


class Experts(Model):
    """The third is never chosen."""

    def chosen(self, x, h):
        which, out = (x[:, 0] > 0).long(), torch.zeros_like(h)
        for i, expert in enumerate((self.a, self.b, self.c)):
            rows = (which == i).nonzero()[:, 0]
            out = out.index_add(0, rows, expert(h[rows]))
        return out


class Again(Model):
    """A layer of all rows, used once more on none."""

    def chosen(self, x, h):
        return torch.zeros_like(h).index_add(0, torch.arange(0), self.a(self.a(h)[:0])) + self.a(h)


class Tokens(Model):
    """An embedding of no tokens, normalized."""

    def chosen(self, x, h):
        none = torch.arange(0)
        return h.index_add(0, none, self.b(self.a(none)))


class Lines(Model):
    """A convolution and its normalization on no line."""

    def chosen(self, x, h):
        lines = self.b(self.a(h[:0].unsqueeze(1)))
        return h.index_add(0, torch.arange(0), lines.flatten(1))


MODELS = {
    "experts": lambda: Experts(**dict.fromkeys("abc", lambda: nn.Linear(H, H))),
    "used again": lambda: Again(a=lambda: nn.Linear(H, H)),
    "tokens": lambda: Tokens(a=lambda: nn.Embedding(5, H), b=lambda: nn.LayerNorm(H)),
    "lines": lambda: Lines(a=lambda: nn.Conv1d(1, 1, 3, padding=1), b=lambda: nn.GroupNorm(1, 1)),
}
every_model = pytest.mark.parametrize("name", MODELS)


def batch(n):
    return randn(n, D), torch.arange(n) % C


@every_model
@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_the_matrices(name, n, sharing):
    model, data = MODELS[name](), batch(n)
    exact = natgrad.fisher(model, LOSS, data, "dense").to_dense()
    for structure in ("block", "diagonal", "implicit", "kfac", "ekfac"):
        F = natgrad.fisher(model, LOSS, data, structure, sharing=sharing)
        M = F @ torch.eye(len(exact), dtype=f64)
        assert torch.isfinite(M).all()
        close(F.solve(M[0], 0.1), torch.linalg.solve(M + 0.1 * torch.eye(len(M), dtype=f64), M[0]), 1e-6)
        if structure == "implicit":
            continue
        close(F.norm(), M.norm(), 1e-10)
        if structure in ("block", "diagonal"):
            close(M.diagonal(), exact.diagonal(), 1e-10)


@every_model
@pytest.mark.parametrize(
    "make",
    [
        lambda m: natgrad.KFAC(m, LOSS),
        lambda m: natgrad.KFAC(m, LOSS, structure="ekfac", sharing="reduce"),
        lambda m: natgrad.KFAC(m, LOSS, structure="diagonal", estimator="exact"),
        lambda m: natgrad.KFAC(m, LOSS, structure="input"),
        lambda m: natgrad.NaturalGradient(m, LOSS),
    ],
    ids=["K-FAC", "EKFAC", "diagonal", "input factors", "exact"],
)
def test_steps(name, make):
    model = MODELS[name]()
    without = {"experts": ("c.",), "tokens": ("a.", "b."), "lines": ("a.", "b.")}.get(name, ())
    idle = {n: p.detach().clone() for n, p in model.named_parameters() if without and n.startswith(without)}
    opt = make(model)
    losses = fit(opt, model, *batch(12), 8)
    assert losses[-1] < losses[0]
    assert opt.diagnostics["faults"].get("rejected", 0) < 8
    for n, p in idle.items():
        close(model.get_parameter(n).detach(), p, 0)


@pytest.mark.parametrize("bias", [True, False])
def test_columns_of_no_position(bias):
    block = ExactBlock(torch.zeros(3, 0, 2, dtype=f64), torch.zeros(3, 2, 0, 4, dtype=f64), bias=bias)
    close(block.gram(), torch.zeros(6, 6, dtype=f64), 0)
    close(block.norm(), torch.zeros((), dtype=f64), 0)
    close(block.to_dense(), torch.zeros(block.space.size, block.space.size, dtype=f64), 0)
