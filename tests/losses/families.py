"""Families of `torch.distributions` with their supports, and the blocks of a curvature."""

import math

import pytest
import torch
import torch.distributions as dist
from torch.distributions.transforms import AffineTransform

from natgrad.losses import Likelihood
from oracles import f64, randn

N = 4
REFUSED = r"exact Fisher information of an? {}.*estimator='mc'.*natgrad\.gauss_newton"


def independent(p):
    return dist.Independent(p, 1)


# Support, step: counts are summed over, the others integrated by the double-exponential rule (Takahasi & Mori 1974).
def counts():
    return torch.arange(400, dtype=f64), torch.ones(400, dtype=f64)


def real_line():
    t = torch.linspace(-4.2, 4.2, 1201, dtype=f64)
    u = math.pi / 2 * t.sinh()
    return u.sinh(), (t[1] - t[0]) * math.pi / 2 * t.cosh() * u.cosh()


def half_line():
    t = torch.linspace(-4.2, 4.2, 1201, dtype=f64)
    y = (math.pi / 2 * t.sinh()).exp()
    return y, (t[1] - t[0]) * math.pi / 2 * t.cosh() * y


def unit_interval():
    t = torch.linspace(-2.9, 2.9, 801, dtype=f64)
    y = (math.pi * t.sinh()).sigmoid()
    return y, (t[1] - t[0]) * math.pi * t.cosh() * y * (1 - y)


def up_to(n):
    return lambda: (torch.arange(n + 1, dtype=f64), torch.ones(n + 1, dtype=f64))


# One distribution for every example with f of two entries: the family and its support.
FAMILIES = {
    "categorical": (lambda f: dist.Categorical(logits=f), up_to(1)),
    "categorical of probabilities": (lambda f: dist.Categorical(probs=f.exp()), up_to(1)),
    "categorical of three": (lambda f: dist.Categorical(logits=torch.cat([f, f[:, :1] * f[:, 1:]], 1)), up_to(2)),
    "bernoulli": (lambda f: dist.Bernoulli(logits=f[:, 0] * f[:, 1].exp()), up_to(1)),
    "binomial": (lambda f: dist.Binomial(5, logits=f[:, 0] - f[:, 1].exp()), up_to(5)),
    "geometric": (lambda f: dist.Geometric(logits=f[:, 0] + f[:, 1].tanh()), counts),
    "poisson": (lambda f: dist.Poisson(f[:, 0].exp() + f[:, 1].square()), counts),
    "normal": (lambda f: dist.Normal(f[:, 0], f[:, 1].exp()), real_line),
    "normal nonlinear": (lambda f: dist.Normal(f.prod(1), f[:, 1].square() + 0.5), real_line),
    "half-normal": (lambda f: dist.HalfNormal(f.exp().sum(1)), half_line),
    "log-normal": (lambda f: dist.LogNormal(f[:, 0], f[:, 1].exp()), half_line),
    "exponential": (lambda f: dist.Exponential(f.exp().sum(1)), half_line),
    "gamma": (lambda f: dist.Gamma(1 + f[:, 0].exp(), f[:, 1].exp()), half_line),
    "inverse gamma": (lambda f: dist.InverseGamma(1 + f[:, 0].exp(), f[:, 1].exp()), half_line),
    "beta": (lambda f: dist.Beta(1 + f[:, 0].exp(), 1 + f[:, 1].exp()), unit_interval),
    "cauchy": (lambda f: dist.Cauchy(f[:, 0], f[:, 1].exp()), real_line),
    "gumbel": (lambda f: dist.Gumbel(f[:, 0], f[:, 1].exp()), real_line),
    "affine transform that stands still": (
        lambda f: dist.TransformedDistribution(dist.Normal(f[:, 0], f[:, 1].exp()), AffineTransform(1.0, 2.0)),
        real_line,
    ),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def outputs(*shape, seed=0):
    return 0.7 * randn(*shape, seed=seed)


def expected_outer(fn, output, support):
    """`E[s sᵀ]` of every example, `(examples, size, size)`: the score by autograd, the expectation node by node."""
    y, step = support()
    f = output.repeat_interleave(len(y), 0).requires_grad_()
    log_p = fn(f).log_prob(y.repeat(len(output)))
    (s,) = torch.autograd.grad(log_p.sum(), f)
    p = log_p.detach().exp().view(len(output), -1) * step
    assert torch.allclose(p.sum(1), torch.ones(len(output), dtype=f64), atol=1e-10, rtol=0)
    s = s.view(len(output), len(y), -1).where(p.unsqueeze(2) > 0, 0.0)
    return torch.einsum("ny,nyi,nyj->nij", p, s, s)


def blocks(curvature, output, target):
    """`D` of every example, from its products."""
    size = output[0].numel()
    unit = torch.eye(size, dtype=output.dtype)
    rows = [curvature.product(output, target, e.expand(len(output), size).reshape(output.shape)) for e in unit]
    return torch.stack([r.reshape(len(output), size) for r in rows], 1)


def outer(columns):
    """`Σ_k s_k s_kᵀ` of every example."""
    S = torch.stack([s.flatten(1) if s.ndim > 1 else s.unsqueeze(1) for s in columns], -1)
    return S @ S.mT


def target_of(fn, output):
    with torch.no_grad():
        return fn(output).sample()


STUDENT = Likelihood(lambda f: dist.StudentT(3.0, f[:, 0], 0.5))
SCALE = Likelihood(lambda f: dist.Normal(f[:, 0], f[:, 1].exp()))
CLASSES = Likelihood(lambda f: dist.Categorical(logits=f))
X = randn(5, 3, seed=2)
