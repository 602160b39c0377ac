"""Matrices of models under losses whose Fisher information is not their Hessian, beside some where it is, against
autograd and the expectation."""

import pytest
import torch
from torch import nn

import natgrad
from noncanonical import COUNTS, C, Joined, MeanAndVariance, both_reductions, expected_outer
from oracles import close, dense_curvature, jacobian, meant, net, numel, output_hessian, parameter_vector, randn


def joined(model):
    """The same model with one output."""

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            mean, var = self.model(x)
            var = var.unsqueeze(-1) if var.ndim < mean.ndim else var
            return torch.stack([mean, var.expand_as(mean)], -1)

    return One()


def problem(name):
    """Loss, model, its single-output form and a batch."""
    if name.startswith("gaussian"):
        loss, model = nn.GaussianNLLLoss(), MeanAndVariance(name.removeprefix("gaussian").strip(", ") or None)
        target = randn(5, seed=3) if "one entry" in name else randn(5, C, seed=3)
        return loss, model, joined(model), (randn(5, 3, seed=2), target)
    model = net(3, 4, C)
    if name == "rates":
        model = nn.Sequential(model, nn.Softplus())
    return nn.PoissonNLLLoss(log_input=name != "rates"), model, model, (randn(5, 3, seed=2), COUNTS[[0, 1, 2, 3, 0]])


PROBLEMS = ["log rates", "rates", "gaussian", "gaussian, entries", "gaussian, entries, without axis"]
PROBLEMS += ["gaussian, one entry"]


def assert_blocks(op, expected):
    """The blocks are those along the diagonal of a matrix, and there are no others."""
    start = 0
    for block in op.blocks.values():
        M = block.to_dense()
        close(M, expected[start : start + len(M), start : start + len(M)], 1e-9)
        start += len(M)
    assert start == len(expected)


@pytest.mark.parametrize("name", PROBLEMS)
@both_reductions
class TestMatrices:
    def test_gauss_newton_is_that_of_autograd(self, name, reduce):
        loss, model, single, batch = problem(name)
        loss = reduce(loss)
        expected = dense_curvature(single, Joined(loss), [batch])
        close(natgrad.gauss_newton(model, loss, batch, "dense").to_dense(), expected, 1e-9)
        implicit, v = natgrad.gauss_newton(model, loss, batch, "implicit"), randn(numel(model))
        close(implicit @ v, expected @ v, 1e-9)

    def test_fisher_is_that_of_the_expectation(self, name, reduce):
        loss, model, single, (x, y) = problem(name)
        J, output = jacobian(single, x, [n for n, _ in single.named_parameters()])
        D = (output_hessian if name == "log rates" else expected_outer)(loss, output.view(single(x).shape), y)
        expected = J.mT @ D @ J / (y.numel() if reduce is meant else 1)
        loss = reduce(loss)
        close(natgrad.fisher(model, loss, (x, y), "dense").to_dense(), expected, 1e-9)
        close(natgrad.fisher(model, loss, (x, y), "implicit").to_dense(), expected, 1e-9)
        assert_blocks(natgrad.fisher(model, loss, (x, y), "block"), expected)

    def test_they_coincide_for_the_canonical_link_alone(self, name, reduce):
        loss, model, _, batch = problem(name)
        fisher, gauss_newton = (
            f(model, reduce(loss), batch, "dense").to_dense() for f in (natgrad.fisher, natgrad.gauss_newton)
        )
        if name == "log rates":
            close(fisher, gauss_newton, 1e-12)
        else:
            assert (fisher - gauss_newton).norm() > 0.05 * fisher.norm()

    def test_hessian_is_that_of_autograd(self, name, reduce):
        loss, model, single, (x, y) = problem(name)
        loss = reduce(loss)
        shapes = [p.shape for p in single.parameters()]

        def objective(flat):
            pieces = flat.split([s.numel() for s in shapes])
            values = {n: p.view(s) for (n, _), p, s in zip(single.named_parameters(), pieces, shapes, strict=True)}
            return Joined(loss)(torch.func.functional_call(single, values, (x,)), y)

        expected = torch.autograd.functional.hessian(objective, parameter_vector(single))
        close(natgrad.hessian(model, loss, (x, y), "dense").to_dense(), expected, 1e-9)
        v = randn(numel(model))
        close(natgrad.hessian(model, loss, (x, y), "implicit") @ v, expected @ v, 1e-9)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "block", "diagonal"])
def test_an_indefinite_gauss_newton_has_no_factors(structure):
    loss, model, _, batch = problem("gaussian")
    with pytest.raises(ValueError, match=r"GaussianNLLLoss is indefinite.*natgrad\.fisher.*structure='dense'"):
        natgrad.gauss_newton(model, loss, batch, structure)
    dense = natgrad.gauss_newton(model, loss, batch, "dense")
    assert torch.linalg.eigvalsh(dense.to_dense())[0] < -1e-3


@both_reductions
def test_a_semidefinite_gauss_newton_has_them(reduce):
    loss, model, _, batch = problem("rates")
    loss = reduce(loss)
    expected = dense_curvature(model, loss, [batch])
    assert_blocks(natgrad.gauss_newton(model, loss, batch, "block"), expected)
    diagonal = natgrad.gauss_newton(model, loss, batch, "diagonal").to_dense()
    close(diagonal, expected.diagonal().diag(), 1e-9)


@pytest.mark.parametrize("estimator", ["mc", "empirical"])
def test_an_estimator_is_refused_before_the_data_is_read(estimator):
    def data():
        raise AssertionError
        yield

    with pytest.raises(ValueError, match=r"GaussianNLLLoss.*natgrad\.fisher"):
        natgrad.gauss_newton(MeanAndVariance(), nn.GaussianNLLLoss(), data(), "dense", estimator=estimator)


def test_kfac_trains_on_counts():
    torch.manual_seed(0)
    x = randn(200, 3)
    y = torch.poisson((x.sum(1, keepdim=True) / 2).exp())
    model, loss = net(3, 8, 1), nn.PoissonNLLLoss(full=True)
    opt, start = natgrad.KFAC(model, loss), loss(model(x), y).item()
    for _ in range(30):
        value = opt.loss(model(x), y)
        opt.zero_grad()
        value.backward()
        opt.step()
    truth = loss((x.sum(1, keepdim=True) / 2), y).item()
    assert loss(model(x), y).item() < truth < start - 0.1


def test_kfac_refuses_a_model_with_two_outputs():
    with pytest.raises(TypeError, match=r"KFAC.*one tensor.*GaussianNLLLoss takes two.*Likelihood"):
        natgrad.KFAC(MeanAndVariance(), nn.GaussianNLLLoss())
