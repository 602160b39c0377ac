"""Damping is `λ I`: every structure and operation against the dense matrix, on every kind of layer."""

import pytest
import torch
from torch import nn

import natgrad
from networks import CLASSES, NETWORKS, make
from oracles import close, f64, randn

LOSS = nn.CrossEntropyLoss()
DAMPINGS = [1e-4, 1e-2, 3.0]
STRUCTURES = ["kfac", "ekfac", "diagonal", "block", "dense"]


class Tied(nn.Module):
    """An embedding that is the head too, a norm with a bias, a convolution over positions and two tied layers."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(6, 4), nn.LayerNorm(4)
        self.conv, self.one, self.two = nn.Conv1d(4, 4, 3, padding=1), nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight, self.two.bias = self.one.weight, self.one.bias
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        h = self.norm(self.embedding(x))
        h = h + self.conv(h.mT).mT
        return self.head(self.two(torch.tanh(self.one(h)))).mean(1)


def tied():
    torch.manual_seed(1)
    return Tied().to(f64), torch.randint(6, (5, 4)), torch.arange(5) % CLASSES


def identity(n):
    return torch.eye(n, dtype=f64)


def matrix_power(M, exponent):
    e, U = torch.linalg.eigh(M)
    return (U * e**exponent) @ U.mT


def check(F, damping, tol=1e-7):
    dense, v = F.to_dense(), randn(F.space.size)
    damped = dense + damping * identity(len(dense))
    inverse = torch.linalg.inv(damped)
    scale = 1 / damping  # the inverse's largest entries
    close(damping * F.solve(v, damping), damping * inverse @ v, tol)
    close(F.inverse(damping).to_dense() / scale, inverse / scale, tol)
    close(F.logdet(damping), torch.logdet(damped), tol)
    close(F.inverse(damping).inverse().to_dense(), damped, tol)
    parts = F.inverse(damping).diagonal().values()
    close(torch.cat([p.flatten() for p in parts]) / scale, inverse.diagonal() / scale, tol)
    for exponent in (-0.5, 0.5, -1.0):
        close(damping * F.power(exponent, damping).to_dense(), damping * matrix_power(damped, exponent), tol)
    draws = F.sample(4000, damping, torch.Generator().manual_seed(0)).values()
    white = torch.cat([t.reshape(4000, -1) for t in draws], 1) @ matrix_power(damped, 0.5)
    assert (white.square().mean(0) - 1).abs().max() < 7 * (2 / 4000) ** 0.5


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", NETWORKS)
def test_of_every_kind_of_layer(name, structure):
    model, x, y = make(name)
    check(natgrad.fisher(model, LOSS, (x, y), structure), 1e-2)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", ["linear", "conv2d", "attention", "layer norm", "scale of channels", "LSTM"])
def test_of_every_size(name, structure, damping, centered):
    model, x, y = make(name)
    check(natgrad.gauss_newton(model, LOSS, (x, y), structure, centered=centered), damping)


@pytest.mark.parametrize("max_dim", [1, 3, 100])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_of_tied_weights_embeddings_and_diagonal_factors(structure, max_dim):
    check(natgrad.fisher(tied()[0], LOSS, tied()[1:], structure, max_dim=max_dim), 1e-2)


@pytest.mark.parametrize("max_dim", [1, 3])
@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", ["linear", "conv2d", "attention", "LSTM"])
def test_of_diagonal_factors(name, structure, max_dim):
    model, x, y = make(name)
    check(natgrad.fisher(model, LOSS, (x, y), structure, max_dim=max_dim), 1e-2)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_of_multiples_and_blocks(structure):
    F = natgrad.fisher(tied()[0], LOSS, tied()[1:], structure)
    check(7.0 * F, 1e-2)
    for block in F.blocks.values():
        dense, v = block.to_dense(), randn(block.space.size)
        damped = dense + 0.1 * identity(len(dense))
        close(block.solve(v, 0.1), torch.linalg.solve(damped, v), 1e-7)
        close(block.logdet(0.1), torch.logdet(damped), 1e-7)


@pytest.mark.parametrize("structure", [*STRUCTURES, "implicit"])
def test_of_sums_restrictions_and_matrix_free_ones(structure):
    model, x, y = tied()
    F = natgrad.fisher(model, LOSS, (x, y), structure)
    whole = F + 2 * natgrad.fisher(model, LOSS, (x.flip(0), y), structure)
    for op in (F, whole, *whole.blocks.values()):
        dense, v = op.to_dense(), randn(op.space.size)
        expected = torch.linalg.solve(dense + 0.1 * identity(len(dense)), v)
        close(op.solve(v, 0.1), expected, 1e-7)
        close(op.inverse(0.1) @ v, expected, 1e-7)


@pytest.mark.parametrize("structure", ["dense", "block", "implicit"])
def test_of_a_hessian(structure):
    model, x, y = make("linear")
    H = natgrad.hessian(model, LOSS, (x, y), structure)
    dense, v = H.to_dense(), randn(H.space.size)
    damping = 1 - 2 * min(0.0, torch.linalg.eigvalsh(dense)[0].item())
    close(H.solve(v, damping), torch.linalg.solve(dense + damping * identity(len(dense)), v), 1e-7)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal"])
@pytest.mark.parametrize("mean", [0.0, 30.0, 1000.0])
def test_an_inverse_in_float32_is_no_longer_than_one_over_the_damping(structure, mean):
    """Whatever the mean of the inputs is."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(40, 6) + mean
    with torch.no_grad():
        model[0].bias -= model[0].weight.sum(1) * mean
    F = natgrad.fisher(model, LOSS, (x, torch.arange(40) % 3), structure)
    v = torch.randn(F.space.size)
    for damping in (1e-3, 1.0):
        assert F.solve(v, damping).norm() <= 1.001 / damping * v.norm()
