"""`Likelihood`: the matrices of a model."""

import pytest
import torch
from torch import nn

import natgrad
from families import CLASSES, SCALE, STUDENT, X, expected_outer, real_line
from oracles import close, dense_curvature, f64, jacobian, meant, net, numel, randn, summed


@pytest.mark.parametrize(
    ("loss", "y"), [(STUDENT, 2 * randn(5)), (SCALE, 2 * randn(5)), (CLASSES, torch.tensor([0, 1, 1, 0, 1]))]
)
@pytest.mark.parametrize("reduce", [summed, meant])
class TestMatrices:
    def test_gauss_newton_is_that_of_autograd(self, loss, y, reduce):
        model, loss = net(3, 4, 2), reduce(loss)
        expected = dense_curvature(model, loss, [(X[:2], y[:2]), (X[2:], y[2:])])
        data = [(X[:2], y[:2]), (X[2:], y[2:])]
        close(natgrad.gauss_newton(model, loss, data, "dense").to_dense(), expected, 1e-9)
        v = randn(numel(model))
        close(natgrad.gauss_newton(model, loss, data, "implicit") @ v, expected @ v, 1e-9)

    def test_hessian_is_that_of_autograd(self, loss, y, reduce):
        model, loss = net(3, 4, 2), reduce(loss)
        values = [p.detach() for p in model.parameters()]
        names = [n for n, _ in model.named_parameters()]

        def objective(*values):
            return loss(torch.func.functional_call(model, dict(zip(names, values, strict=True)), (X,)), y)

        rows = torch.autograd.functional.hessian(objective, tuple(values))
        expected = torch.cat(
            [torch.cat([b.reshape(p.numel(), -1) for b in row], 1) for row, p in zip(rows, values, strict=True)]
        )
        close(natgrad.hessian(model, loss, (X, y), "dense").to_dense(), expected, 1e-9)


@pytest.mark.parametrize("structure", ["dense", "implicit"])
def test_fisher_is_that_of_the_expectation(structure):
    model, y = net(3, 4, 2), 2 * randn(5)
    J, output = jacobian(model, X, [n for n, _ in model.named_parameters()])
    D = torch.block_diag(*expected_outer(SCALE.fn, output.view(5, 2), real_line))
    F = natgrad.fisher(model, SCALE, (X, y), structure).to_dense()
    close(F, J.mT @ D @ J / 5, 1e-8)
    G = natgrad.gauss_newton(model, SCALE, (X, y), structure).to_dense()
    assert (F - G).norm() > 0.1 * F.norm()


def test_mc_of_a_family_without_a_closed_form():
    """The information of a Student t's location is `(ν + 1)/((ν + 3) σ²)`."""
    model, x, y = net(3, 1), randn(10_000, 3), torch.zeros(10_000, dtype=f64)
    x1 = torch.cat([x, torch.ones(10_000, 1, dtype=f64)], 1)
    expected = x1.mT @ x1 / 10_000 * (4 / 6 / 0.25)
    generator = torch.Generator().manual_seed(0)
    for structure in ("block", "kfac"):
        F = natgrad.fisher(model, STUDENT, (x, y), structure, estimator="mc", samples=4, generator=generator)
        assert (F.to_dense() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "block", "diagonal"])
def test_an_indefinite_gauss_newton_has_no_factors(structure):
    data = X, 5 * randn(5)
    with pytest.raises(ValueError, match=r"Likelihood is indefinite.*natgrad\.fisher.*structure='dense'"):
        natgrad.gauss_newton(net(3, 1), STUDENT, data, structure)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "block", "diagonal"])
def test_a_semidefinite_one_has(structure):
    data, model = (X, torch.tensor([0, 1, 1, 0, 1])), net(3, 4, 2)
    expected = natgrad.fisher(model, nn.CrossEntropyLoss(), data, structure).to_dense()
    close(natgrad.gauss_newton(model, CLASSES, data, structure).to_dense(), expected, 1e-9)
    close(natgrad.fisher(model, CLASSES, data, structure).to_dense(), expected, 1e-9)


def test_kfac_learns_a_scale():
    x = randn(300, 2)
    y = x[:, 0] + (0.5 * x[:, 1]).exp() * randn(300, seed=1)
    model = net(2, 8, 2)
    opt = natgrad.KFAC(model, SCALE)
    for _ in range(40):
        loss = opt.loss(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
    truth = SCALE(torch.stack([x[:, 0], 0.5 * x[:, 1]], 1), y)
    assert SCALE(model(x), y) < truth + 0.02
