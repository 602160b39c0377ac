"""Conjugate gradients with a preconditioner, against dense solves, and how many products they take."""

import functools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import natgrad
from natgrad.linalg import Dense, Diagonal, IterativeInverse, LowRank, nystrom
from natgrad.linalg.krylov import conjugate_gradient
from oracles import close, f64, randn, spd


def generator():
    return torch.Generator().manual_seed(0)


def trained(model, loss, x, y, steps=60):
    """A few steps: curvature at random weights is no hard case."""
    opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        opt.zero_grad()
        loss(model(x), y).backward()
        opt.step()
    return model, loss, (x, y)


def perceptron():
    torch.manual_seed(0)
    x, y = randn(500, 12) * torch.logspace(-1, 1, 12, dtype=f64), torch.arange(500) % 4
    return trained(nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4)).double(), nn.CrossEntropyLoss(), x, y)


def autoencoder():
    torch.manual_seed(1)
    x = (randn(150, 3) @ randn(3, 14, seed=1)).sigmoid()
    layers = [nn.Linear(14, 8), nn.Tanh(), nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 14)]
    return trained(nn.Sequential(*layers).double(), nn.BCEWithLogitsLoss(), x, x)


def convolutional():
    torch.manual_seed(2)
    x, y = randn(60, 1, 8, 8), torch.arange(60) % 3
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    return trained(nn.Sequential(*layers).double(), nn.CrossEntropyLoss(), x, y)


def regression():
    torch.manual_seed(3)
    x = torch.linspace(-2, 2, 100, dtype=f64).unsqueeze(1)
    layers = [nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 10), nn.Tanh(), nn.Linear(10, 1)]
    return trained(nn.Sequential(*layers).double(), nn.MSELoss(), x, (3 * x).sin())


class Residual(nn.Module):
    """`Δu` of a tanh network."""

    def __init__(self):
        super().__init__()
        last = nn.Linear(8, 1, bias=False)  # a last bias has no part in it
        self.net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), last).double()

    def forward(self, x):
        return natgrad.pde.derivatives(self.net, x).laplacian


def residual():
    torch.manual_seed(4)
    x = natgrad.pde.uniform(120, 2, generator=generator(), dtype=f64)
    return trained(Residual(), nn.MSELoss(), x, torch.ones(120, 1, dtype=f64))


PROBLEMS = [perceptron, autoencoder, convolutional, regression, residual]
TOLERANCE = 1e-6


@dataclass
class Setting:
    """A Gauss-Newton matrix, the gradient, a damping, and preconditioners."""

    F: Dense
    v: torch.Tensor
    damping: float
    kinds: dict

    def products(self, kind):
        K = self.kinds[kind]
        inverse = IterativeInverse(self.F, self.damping, TOLERANCE, preconditioner=K and K.inverse(self.damping))
        _ = inverse @ self.v
        return inverse.solutions[0].products


@functools.cache
def setting(make):
    model, loss, data = make()
    F = Dense(natgrad.gauss_newton(model, loss, data, structure="dense").to_dense())
    K = Dense(natgrad.gauss_newton(model, loss, data, structure="kfac").to_dense())
    v = torch.cat([p.flatten() for p in torch.autograd.grad(loss(model(data[0]), data[1]), list(model.parameters()))])
    kinds = {"none": None, "jacobi": Diagonal((F.diagonal(),)), "nystrom": nystrom(F, 40, generator()), "kfac": K}
    return Setting(F, v, 1e-3 * float(F.trace()) / len(v), kinds)


@pytest.mark.parametrize("kind", ["jacobi", "nystrom", "kfac"])
@pytest.mark.parametrize("make", PROBLEMS)
def test_the_solution_is_that_of_the_dense_matrix(make, kind):
    s = setting(make)
    expected = torch.linalg.solve(s.F.matrix + s.damping * torch.eye(len(s.v), dtype=f64), s.v)
    found = s.F.solve(s.v, s.damping, preconditioner=s.kinds[kind], tol=1e-12)
    assert float((found - expected).norm()) < 1e-7 * float(expected.norm())


@pytest.mark.parametrize("make", PROBLEMS)
def test_nystrom_takes_fewer_products_than_none(make):
    s = setting(make)
    assert s.products("nystrom") < 0.7 * s.products("none")


def test_kfac_takes_fewer_products_where_there_are_many_cases_and_unlike_inputs():
    s = setting(perceptron)
    assert s.products("kfac") < 0.6 * s.products("none")
    assert s.products("jacobi") < s.products("none")


def test_the_matrix_itself_as_preconditioner_takes_one_product():
    M = Dense(spd(20, 3))
    inverse = IterativeInverse(M, 0.1, preconditioner=M.inverse(0.1))
    v = randn(20, seed=1)
    close(inverse @ v, torch.linalg.solve(M.matrix + 0.1 * torch.eye(20, dtype=f64), v), 1e-11)
    assert inverse.solutions[0].products <= 2


def test_a_solution_as_start_takes_one_product_and_several_vectors_go_at_once():
    M, V = Dense(spd(9, 5)), randn(2, 3, 9)
    exact = M.solve(V, damping=0.2)
    close(M.solve(V, damping=0.2, tol=1e-12), exact, 1e-10)
    inverse = IterativeInverse(M, 0.2, tol=1e-10)
    close(inverse.space.unflatten(inverse.solve_from((V,), (exact,))[0])[0], exact, 1e-12)
    assert [s.products for s in inverse.solutions] == [1] * 6
    close(M.solve(V[0, 0], 0.2, x0=exact[0, 0]), exact[0, 0], 1e-12)
    assert torch.equal(M.solve(torch.zeros(9, dtype=f64), 0.2, x0=V[0, 0]), torch.zeros(9, dtype=f64))


def test_the_form_of_the_answer_is_that_of_the_vector():
    model, loss, data = perceptron()
    F = natgrad.fisher(model, loss, data, structure="implicit")
    K = natgrad.fisher(model, loss, data, structure="kfac")
    v = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    found = F.solve(v, 1e-2, preconditioner=K, tol=1e-8)
    assert {n: p.shape for n, p in found.items()} == {n: p.shape for n, p in v.items()}
    residual = F.space.flatten(tuple((F @ found)[n] + 1e-2 * found[n] - v[n] for n in v))
    assert float(residual.norm()) < 1e-6


def test_nystrom_of_full_rank_is_the_matrix_and_lies_below_it_else():
    M = spd(12, 2)
    close(nystrom(Dense(M), 12, generator()).to_dense(), M, 1e-9)
    part = nystrom(Dense(M), 5, generator())
    assert isinstance(part, LowRank)
    below = M - (part.U * part.values) @ part.U.mT
    assert float(torch.linalg.eigvalsh(below)[0]) > -1e-9
    close(part.U.mT @ part.U, torch.eye(5, dtype=f64), 1e-12)


def test_nystrom_of_a_matrix_of_low_rank():
    S = randn(30, 4)
    close(nystrom(Dense(S @ S.mT), 10, generator()).to_dense(), S @ S.mT, 1e-8)


ERRORS = {
    "not a matrix": ({"preconditioner": torch.eye(4)}, TypeError, "preconditioner is a Tensor"),
    "other vectors": ({"preconditioner": Dense(spd(5, 1))}, ValueError, "expected the same parameters"),
    "other dtype": ({"preconditioner": Dense(spd(4, 1).float())}, ValueError, "compute both with the same dtype"),
    "negative": ({"preconditioner": Dense(-spd(4, 1), None)}, (ValueError, RuntimeError), "definite"),
    "tol": ({"tol": 2.0}, ValueError, "tol=2.0"),
    "too few": ({"tol": 1e-14, "max_iter": 1}, RuntimeError, "in 1 products"),
    "max_iter": ({"max_iter": 0}, ValueError, "max_iter=0"),
    "style": ({"tol": 0.1, "damping_style": "factored"}, TypeError, "use damping_style='exact'"),
    "start": ({"x0": torch.ones(3, dtype=f64)}, ValueError, "x0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    options, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        Dense(spd(4, 1)).solve(torch.ones(4, dtype=f64), 0.1, **options)


def test_a_preconditioner_that_is_not_definite_is_told():
    with pytest.raises(RuntimeError, match="the preconditioner"):
        conjugate_gradient(lambda v: v, torch.ones(2), tol=1e-3, max_iter=9, precondition=lambda v: -v)


def test_it_is_saved_and_loaded(tmp_path):
    M = Dense(spd(4, 1))
    inverse = IterativeInverse(M, 0.1, preconditioner=Diagonal((M.diagonal(),)).inverse(0.1))
    inverse.save(tmp_path / "m.safetensors")
    loaded = natgrad.load(tmp_path / "m.safetensors")
    v = torch.ones(4, dtype=f64)
    assert torch.equal(loaded @ v, inverse @ v)
    assert math.isclose(loaded.preconditioner.trace(), inverse.preconditioner.trace())
