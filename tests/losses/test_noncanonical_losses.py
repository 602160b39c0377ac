"""Losses whose Fisher information is not their Hessian (Poisson with rates, Gaussian with mean and variance), beside
some where it is.

The Fisher information is compared with sums over counts and Gauss-Hermite quadrature, the Hessian with autograd's.
"""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import natgrad
from natgrad.losses import output_curvature
from oracles import close, dense_curvature, f64, jacobian, meant, net, normalizer, numel, output_hessian, randn, summed

N, C, D = 4, 3, 2
COUNTS = torch.tensor([[0, 3, 1], [7, 0, 2], [1, 1, 0], [2, 5, 12]], dtype=f64)
KINDS = ("fisher", "gauss_newton")
both_reductions = pytest.mark.parametrize("reduce", [summed, meant])


def outer(columns):
    """`Σ_k s_k s_kᵀ` of every example."""
    S = torch.stack(list(columns), -1)
    S = S.reshape(len(S), -1, S.shape[-1])
    return S @ S.mT


def rates(*shape, seed=0):
    return randn(*shape, seed=seed).exp()


def with_variance(*shape, seed=0):
    return torch.stack([randn(*shape, seed=seed), rates(*shape, seed=seed + 1)], -1)


# Each with a joined output and a target.
OTHERS = {
    "rates": (nn.PoissonNLLLoss(log_input=False), rates(N, C), COUNTS),
    "rates eps": (nn.PoissonNLLLoss(log_input=False, eps=0.3), rates(N, C), COUNTS),
    "rates full": (nn.PoissonNLLLoss(log_input=False, full=True), rates(N, C), COUNTS),
    "rates 1-d": (nn.PoissonNLLLoss(log_input=False), rates(N), COUNTS[:, 1]),
    "rates positions": (nn.PoissonNLLLoss(log_input=False), rates(N, D, C), COUNTS.unsqueeze(1).expand(N, D, C)),
    "gaussian": (nn.GaussianNLLLoss(), with_variance(N, C), randn(N, C, seed=5)),
    "gaussian full": (nn.GaussianNLLLoss(full=True), with_variance(N, C), randn(N, C, seed=5)),
    "gaussian eps": (nn.GaussianNLLLoss(eps=0.9), with_variance(N, C), randn(N, C, seed=5)),
    "gaussian 1-d": (nn.GaussianNLLLoss(), with_variance(N), randn(N, seed=5)),
    "gaussian positions": (nn.GaussianNLLLoss(), with_variance(N, D, C), randn(N, D, C, seed=5)),
}
every_other = pytest.mark.parametrize("name", OTHERS)


class Joined(nn.Module):
    """A loss as a function of the joined output."""

    def __init__(self, loss):
        super().__init__()
        self.loss, self.reduction = loss, loss.reduction

    def forward(self, output, target):
        loss = copy.deepcopy(self.loss)
        loss.reduction = self.reduction
        if isinstance(loss, nn.GaussianNLLLoss):
            return loss(output[..., 0], target, output[..., 1])
        return loss(output, target)


def expected_outer(loss, output, target):
    """`E[s sᵀ]` over the entries' own distributions, `(numel, numel)`: a sum over counts, or Gauss-Hermite nodes,
    which are exact for polynomials."""
    if isinstance(loss, nn.PoissonNLLLoss):
        rate = (output + loss.eps).unsqueeze(0)
        y = torch.arange(100, dtype=f64).view(-1, *[1] * output.ndim).expand(100, *output.shape)
        p = (y * rate.log() - rate - torch.lgamma(y + 1)).exp()
    else:
        nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(9))
        mean, var = output[..., 0], output[..., 1].clamp_min(loss.eps)
        shape = (-1, *[1] * mean.ndim)
        y = mean + var.sqrt() * nodes.view(shape)
        p = (weights / weights.sum()).view(shape).expand(y.shape)
    f = output.expand(len(y), *output.shape).clone().requires_grad_()
    (s,) = torch.autograd.grad(Joined(summed(loss))(f, y), f)
    s = s.reshape(len(y), target.numel(), -1)
    blocks = (p.reshape(len(y), -1, 1, 1) * s.unsqueeze(-1) * s.unsqueeze(-2)).sum(0)
    return torch.block_diag(*blocks)


def dense_of(curvature, output, target):
    """`D`, product by product."""
    unit = torch.eye(output.numel(), dtype=f64)
    return torch.stack([curvature.product(output, target, e.view_as(output)).flatten() for e in unit], 1)


def reference(name, kind):
    loss, output, target = OTHERS[name]
    if kind == "fisher":
        return expected_outer(loss, output, target)
    return output_hessian(Joined(loss), output, target)


@every_other
@pytest.mark.parametrize("kind", KINDS)
@both_reductions
def test_product_and_signed_columns_are_the_expectation_or_the_hessian(name, kind, reduce):
    loss, output, target = OTHERS[name]
    curvature, expected = output_curvature(reduce(loss), kind), reference(name, kind)
    close(dense_of(curvature, output, target), expected, 1e-10)
    signs, S = zip(*curvature.signed_columns(output, target), strict=True)
    assert all(s.shape == output.shape for s in S)
    total = sum(sign * outer([s]) for sign, s in zip(signs, S, strict=True))
    close(torch.block_diag(*total), expected, 1e-10)


@every_other
def test_fisher_and_hessian_differ(name):
    assert (reference(name, "fisher") - reference(name, "gauss_newton")).norm() > 0.1


@every_other
@both_reductions
def test_normalizer_and_value_are_those_of_the_loss(name, reduce):
    loss, output, target = OTHERS[name]
    curvature = output_curvature(reduce(loss))
    close(curvature.normalizer(output, target), normalizer(Joined(loss), output, target), 1e-11)
    close(curvature.loss(output, target), Joined(reduce(loss))(output, target), 1e-14)


@every_other
def test_exact_columns_are_a_factor_of_the_fisher(name):
    loss, output, target = OTHERS[name]
    S = list(output_curvature(loss).columns(output, target))
    close(torch.block_diag(*outer(S)), expected_outer(loss, output, target), 1e-10)


@every_other
def test_a_factor_of_the_hessian_where_it_has_one(name):
    loss, output, target = OTHERS[name]
    curvature = output_curvature(loss, "gauss_newton")
    if isinstance(loss, nn.PoissonNLLLoss):
        close(torch.block_diag(*outer(curvature.columns(output, target))), reference(name, "gauss_newton"), 1e-10)
    else:
        with pytest.raises(ValueError, match=r"GaussianNLLLoss is indefinite.*natgrad\.fisher.*structure='dense'"):
            next(curvature.columns(output, target))


@every_other
@pytest.mark.parametrize("samples", [1, 4])
def test_the_expectation_of_mc_columns_is_the_fisher(name, samples):
    loss, output, target = OTHERS[name]
    times = 4000 // samples
    repeated = (t.repeat(times, *[1] * (t.ndim - 1)) for t in (output, target))
    S = output_curvature(loss).columns(*repeated, "mc", samples, torch.Generator().manual_seed(1))
    draws = outer(S).unflatten(0, (times, N))
    D = expected_outer(loss, output, target)
    expected = torch.stack([rows.chunk(N, 1)[i] for i, rows in enumerate(D.chunk(N))])
    error, deviation = (draws.mean(0) - expected).abs(), draws.std(0) / times**0.5
    assert (error <= 5 * deviation + 1e-12).all()
    assert deviation.norm() < 0.1 * expected.norm()


@every_other
@both_reductions
def test_the_empirical_column_is_the_gradient(name, reduce):
    loss, output, target = OTHERS[name]
    f = output.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(Joined(summed(loss))(f, target), f)
    (column,) = output_curvature(reduce(loss)).columns(output, target, "empirical")
    close(column, gradient, 1e-11)


@pytest.mark.parametrize(
    ("loss", "output", "target"),
    [
        (nn.PoissonNLLLoss(), randn(2000, C), torch.zeros(2000, C)),
        (nn.PoissonNLLLoss(log_input=False), 1 + rates(2000, C), torch.zeros(2000, C)),
        (nn.GaussianNLLLoss(), 1 + rates(2000, C, 2), torch.zeros(2000, C)),
        (nn.CrossEntropyLoss(), randn(2000, C), torch.zeros(2000).long()),
    ],
    ids=["log rates", "rates", "gaussian", "ce"],
)
def test_the_error_of_mc_falls_as_one_over_the_root_of_samples(loss, output, target):
    curvature, generator = output_curvature(loss), torch.Generator().manual_seed(0)
    exact = outer(curvature.columns(output, target))

    def error(samples):
        return (outer(curvature.columns(output, target, "mc", samples, generator)) - exact).norm()

    assert 0.9 < error(4) / (4 * error(64)) < 1.1


@pytest.mark.parametrize("estimator", ["mc", "empirical"])
@every_other
def test_gauss_newton_has_no_estimator(name, estimator):
    loss, output, target = OTHERS[name]
    match = rf"estimator='{estimator}'.*Gauss-Newton matrix of {type(loss).__name__}.*natgrad\.fisher"
    with pytest.raises(ValueError, match=match):
        next(output_curvature(loss, "gauss_newton").columns(output, target, estimator))


@pytest.mark.parametrize("name", ["rates 1-d", "gaussian"])
def test_a_seed_makes_mc_of_others_reproducible(name):
    loss, output, target = OTHERS[name]
    draws = [
        torch.stack(list(output_curvature(loss).columns(output, target, "mc", 3, torch.Generator().manual_seed(s))))
        for s in (3, 3, 4)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


class MeanAndVariance(nn.Module):
    """A network with two outputs, the second of which may be shared along an axis."""

    def __init__(self, shared=None):
        super().__init__()
        self.body, self.shared = net(3, 4, 2 * C), shared

    def forward(self, x):
        mean, log_var = self.body(x).chunk(2, -1)
        var = log_var.exp()
        if self.shared == "entries":
            return mean, var[:, :1]
        if self.shared == "entries, without axis":
            return mean, var[:, 0]
        return (mean[:, 0], var[:, 0]) if self.shared == "one entry" else (mean, var)


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

        flat = torch.cat([p.detach().flatten() for p in single.parameters()])
        expected = torch.autograd.functional.hessian(objective, flat)
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


class TestBadInput:
    def test_negative_counts(self):
        with pytest.raises(ValueError, match=r"PoissonNLLLoss: target.*-2; expected counts >= 0"):
            output_curvature(nn.PoissonNLLLoss()).check(torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [-2.0, 0.0]]))

    @pytest.mark.parametrize("estimator", ["exact", "mc"])
    def test_rates_that_are_none(self, estimator):
        output, target = torch.tensor([0.5, -0.25]), torch.ones(2)
        with pytest.raises(ValueError, match=r"log_input=False.*-0\.25; expected rates > 0.*softplus"):
            next(output_curvature(nn.PoissonNLLLoss(log_input=False)).columns(output, target, estimator))
        with pytest.raises(ValueError, match=r"overflows at 1000; expected log rates.*log_input=False"):
            next(output_curvature(nn.PoissonNLLLoss()).columns(1e3 * target, target, estimator))

    @pytest.mark.parametrize(
        ("output", "match"),
        [
            (torch.zeros(4, 3), "a Tensor of shape .*; expected two tensors"),
            ((torch.zeros(4, 3),), "a tuple of 1; expected two tensors"),
            ((torch.zeros(4, 3), 1.0), "a tuple of 2; expected two tensors"),
            ((torch.zeros(4, 3), torch.ones(3)), r"\(4, 3\) and var \(3,\); expected the same shape"),
            ((torch.zeros(4, 3), torch.ones(4, 2)), r"\(4, 3\) and var \(4, 2\); expected the same shape"),
        ],
    )
    def test_outputs_that_are_no_mean_and_variance(self, output, match):
        with pytest.raises(ValueError, match=match):
            output_curvature(nn.GaussianNLLLoss()).join(output)

    def test_two_outputs_for_a_loss_of_one(self):
        data = randn(4, 3), randn(4, 3)
        with pytest.raises(ValueError, match="returned a tuple of 2; expected a tensor"):
            natgrad.fisher(MeanAndVariance(), nn.MSELoss(), data)

    def test_negative_variances(self):
        output = torch.stack([torch.zeros(4), torch.tensor([1.0, -0.5, 2.0, 0.0])], -1)
        with pytest.raises(ValueError, match=r"var has the entry -0\.5; expected variances >= 0.*softplus"):
            output_curvature(nn.GaussianNLLLoss()).check(output, torch.zeros(4))
