"""`Likelihood` for the families of `torch.distributions`: its Fisher information against integrals and sums over the
support, at every shape of outputs."""

import numpy as np
import pytest
import torch
import torch.distributions as dist

from families import FAMILIES, N, blocks, every_family, expected_outer, independent, outer, outputs, target_of
from natgrad.losses import Likelihood, output_curvature
from oracles import close, f64, randn


@every_family
def test_the_exact_fisher_is_the_expectation(name):
    fn, support = FAMILIES[name]
    output = outputs(N, 2)
    curvature, target = output_curvature(Likelihood(fn)), target_of(fn, output)
    expected = expected_outer(fn, output, support)
    close(blocks(curvature, output, target), expected, 1e-8)
    S = list(curvature.columns(output, target))
    assert all(s.shape == output.shape for s in S)
    close(outer(S), expected, 1e-8)


@every_family
@pytest.mark.parametrize("samples", [1, 4])
def test_the_expectation_of_mc_is_the_exact_fisher(name, samples):
    fn, _ = FAMILIES[name]
    times, output = 6000 // samples, outputs(2, 2)
    curvature = output_curvature(Likelihood(fn))
    exact = blocks(curvature, output, target_of(fn, output))
    many = output.repeat(times, 1)
    S = curvature.columns(many, target_of(fn, many), "mc", samples, torch.Generator().manual_seed(1))
    draws = outer(S).unflatten(0, (times, 2))
    error, deviation = (draws.mean(0) - exact).abs(), draws.std(0) / times**0.5
    assert (error <= 5 * deviation + 1e-12).all()
    assert deviation.norm() < 0.2 * exact.norm()


def test_the_error_of_mc_falls_as_one_over_the_root_of_samples():
    def fn(f):
        return dist.Normal(f[:, 0], 1 + f[:, 1].square())

    curvature, output, generator = output_curvature(Likelihood(fn)), randn(2000, 2), torch.Generator().manual_seed(0)
    target = torch.zeros(2000, dtype=f64)
    exact = outer(curvature.columns(output, target))

    def error(samples):
        return (outer(curvature.columns(output, target, "mc", samples, generator)) - exact).norm()

    assert 0.9 < error(4) / (4 * error(64)) < 1.1


# Several distributions, or entries, in an example: the output's shape and the number of distributions.
SHAPES = {
    "one for each entry": (lambda f: dist.Normal(f, 2.0), (N, 3), 3 * N),
    "one for each row": (lambda f: independent(dist.Normal(f, 2.0)), (N, 3), N),
    "one entry": (lambda f: dist.Bernoulli(logits=f), (N,), N),
    "positions": (lambda f: dist.Categorical(logits=f), (N, 2, 3), 2 * N),
    "positions in one": (lambda f: independent(dist.Categorical(logits=f)), (N, 2, 3), N),
    "one-hot": (lambda f: dist.OneHotCategorical(logits=f), (N, 3), N),
    "bernoullis in one": (lambda f: independent(dist.Bernoulli(logits=f)), (N, 3), N),
    "binomials of unequal counts": (
        lambda f: dist.Binomial(torch.arange(1.0, 4.0, dtype=f64), logits=f),
        (N, 3),
        3 * N,
    ),
    "dirichlet": (lambda f: dist.Dirichlet(f.exp()), (N, 3), N),
    "laplace of known location": (lambda f: dist.Laplace(torch.zeros((), dtype=f64), f.exp()), (N, 3), 3 * N),
    "pareto of known scale": (lambda f: dist.Pareto(torch.ones((), dtype=f64), f.exp()), (N, 3), 3 * N),
    "full covariance": (
        lambda f: dist.MultivariateNormal(f[:, :2], scale_tril=factor(f)),
        (N, 5),
        N,
    ),
    "low rank": (
        lambda f: dist.LowRankMultivariateNormal(f[:, :2], f[:, 2:4].unsqueeze(2), 0.5 + torch.zeros_like(f[:, :2])),
        (N, 4),
        N,
    ),
}
every_shape = pytest.mark.parametrize("name", SHAPES)


def factor(f):
    """A Cholesky factor from three numbers."""
    log_diagonal, below = f[:, 2:4], f[:, 4]
    L = log_diagonal.exp().diag_embed()
    return L + torch.nn.functional.pad(below.view(-1, 1, 1), (0, 1, 1, 0))


def by_gauss_hermite(fn, output):
    """`E[s sᵀ]` for a normal of two entries, at the nodes `μ + L z`: exact, as the scores are quadratic in `z`."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(6))
    weights = weights / weights.sum()
    total = torch.zeros(len(output), output.shape[1], output.shape[1], dtype=f64)
    for z0, w0 in zip(nodes, weights, strict=True):
        for z1, w1 in zip(nodes, weights, strict=True):
            f = output.clone().requires_grad_()
            p = fn(f)
            L = torch.linalg.cholesky(p.covariance_matrix.detach())
            y = p.mean.detach() + (L @ torch.stack([z0, z1]).unsqueeze(1)).squeeze(2)
            (s,) = torch.autograd.grad(p.log_prob(y).sum(), f)
            total += w0 * w1 * s.unsqueeze(2) * s.unsqueeze(1)
    return total


def closed_form(name, f):
    """`D` of every example."""
    p = f.softmax(-1)
    if name in ("one for each entry", "one for each row"):
        return torch.eye(3, dtype=f64).expand(N, 3, 3) / 4
    if name in ("one entry", "bernoullis in one"):
        q = f.sigmoid().reshape(N, -1)
        return (q * (1 - q)).diag_embed()
    if name == "binomials of unequal counts":
        q = f.sigmoid()
        return (torch.arange(1.0, 4.0, dtype=f64) * q * (1 - q)).diag_embed()
    if name.startswith("positions"):
        each = p.diag_embed() - p.unsqueeze(-1) * p.unsqueeze(-2)
        return torch.stack([torch.block_diag(*example) for example in each])
    if name == "one-hot":
        return p.diag_embed() - p.unsqueeze(-1) * p.unsqueeze(-2)
    if name == "dirichlet":
        a = f.exp()
        D = torch.polygamma(1, a).diag_embed() - torch.polygamma(1, a.sum(1)).view(-1, 1, 1)
        return a.unsqueeze(2) * D * a.unsqueeze(1)
    if name in ("laplace of known location", "pareto of known scale"):
        return torch.eye(3, dtype=f64).expand(N, 3, 3)
    return by_gauss_hermite(SHAPES[name][0], f)


@every_shape
def test_the_exact_fisher_at_every_shape(name):
    fn, shape, _ = SHAPES[name]
    output = outputs(*shape)
    curvature, target = output_curvature(Likelihood(fn)), target_of(fn, output)
    expected = closed_form(name, output)
    close(blocks(curvature, output, target), expected, 1e-8)
    S = list(curvature.columns(output, target))
    assert all(s.shape == output.shape for s in S)
    assert len(S) == torch.linalg.matrix_rank(expected).max()
    close(outer(S), expected, 1e-8)


@every_shape
def test_mc_at_every_shape(name):
    fn, shape, _ = SHAPES[name]
    output = outputs(*shape)
    exact = closed_form(name, output)
    many = output.repeat(3000, *[1] * (len(shape) - 1))
    S = output_curvature(Likelihood(fn)).columns(many, target_of(fn, many), "mc", 1, torch.Generator().manual_seed(2))
    draws = outer(S).unflatten(0, (3000, N))
    error, deviation = (draws.mean(0) - exact).abs(), draws.std(0) / 3000**0.5
    assert (error <= 5 * deviation + 1e-12).all()


@every_shape
def test_the_mean_is_over_distributions(name):
    fn, shape, number = SHAPES[name]
    output = outputs(*shape)
    target, loss = target_of(fn, output), Likelihood(fn)
    log_p = fn(output).log_prob(target)
    assert log_p.numel() == number
    close(loss(output, target), -log_p.sum() / number, 1e-12)
    close(Likelihood(fn, "sum")(output, target), -log_p.sum(), 1e-12)
    assert output_curvature(loss).normalizer(output, target) == number


@every_shape
def test_the_empirical_column_is_the_gradient(name):
    fn, shape, _ = SHAPES[name]
    f = outputs(*shape).requires_grad_()
    target = target_of(fn, f)
    (gradient,) = torch.autograd.grad(-fn(f).log_prob(target).sum(), f)
    for reduction in ("mean", "sum"):
        (column,) = output_curvature(Likelihood(fn, reduction)).columns(f, target, "empirical")
        close(column, gradient, 1e-11)
