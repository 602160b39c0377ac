"""The output-space curvature of losses whose Fisher information is not their Hessian, against the expectation and
autograd."""

import pytest
import torch
from torch import nn

import natgrad
from families import outer
from natgrad.losses import output_curvature
from noncanonical import (
    KINDS,
    OTHERS,
    C,
    Joined,
    MeanAndVariance,
    N,
    both_reductions,
    dense_of,
    every_other,
    expected_outer,
    rates,
    reference,
)
from oracles import close, normalizer, randn, summed


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
