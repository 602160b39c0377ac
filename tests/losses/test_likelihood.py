"""`Likelihood` for the families of `torch.distributions`: its value, its Fisher information against integrals and sums
over the support, its Hessian against autograd's."""

import math

import numpy as np
import pytest
import torch
import torch.distributions as dist
from torch import nn
from torch.distributions.transforms import AffineTransform, ExpTransform

import natgrad
from natgrad.losses import Likelihood, output_curvature
from oracles import close, dense_curvature, f64, jacobian, meant, net, numel, output_hessian, randn, summed

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
    S = torch.stack([s.flatten(1) if s.ndim > 1 else s.unsqueeze(1) for s in columns], -1)
    return S @ S.mT


def target_of(fn, output):
    with torch.no_grad():
        return fn(output).sample()


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


# Gauss-Newton -------------------------------------------------------------------------------------------

ROBUST = {
    "student": lambda f: dist.StudentT(3.0, f[:, 0], f[:, 1].exp()),
    "student's location": lambda f: dist.StudentT(3.0, f),
    "laplace": lambda f: dist.Laplace(f[:, 0], f[:, 1].exp()),
    "von Mises": lambda f: dist.VonMises(f[:, 0], f[:, 1].exp()),
    "mixture": lambda f: dist.MixtureSameFamily(
        dist.Categorical(logits=torch.zeros_like(f)), dist.Normal(f, torch.ones_like(f))
    ),
}


@pytest.mark.parametrize("name", [*FAMILIES, *ROBUST])
def test_gauss_newton_is_the_hessian(name):
    fn = ROBUST[name] if name in ROBUST else FAMILIES[name][0]
    output = outputs(N, 2)
    loss, target = Likelihood(fn), target_of(fn, output)
    curvature, expected = output_curvature(loss, "gauss_newton"), output_hessian(loss, output, target)
    close(torch.block_diag(*blocks(curvature, output, target)), expected, 1e-10)
    total = torch.zeros(N, 2, 2, dtype=f64)
    for sign, s in curvature.signed_columns(output, target):
        total += sign * outer([s])
    close(torch.block_diag(*total), expected, 1e-10)


@pytest.mark.parametrize("name", [*FAMILIES, *ROBUST])
def test_a_gauss_newton_has_a_factor_where_it_is_semidefinite(name):
    fn = ROBUST[name] if name in ROBUST else FAMILIES[name][0]
    output = outputs(N, 2)
    loss, target = Likelihood(fn), target_of(fn, output)
    curvature, expected = output_curvature(loss, "gauss_newton"), output_hessian(loss, output, target)
    if torch.linalg.eigvalsh(expected)[0] < -1e-6:
        with pytest.raises(ValueError, match=r"Likelihood is indefinite.*natgrad\.fisher.*structure='dense'"):
            next(curvature.columns(output, target))
    else:
        close(torch.block_diag(*outer(curvature.columns(output, target))), expected, 1e-10)


def test_both_cases_of_the_above_are_there():
    signs = set()
    for fn in [*ROBUST.values(), *(fn for fn, _ in FAMILIES.values())]:
        output = outputs(N, 2)
        torch.manual_seed(0)
        H = output_hessian(Likelihood(fn), output, target_of(fn, output))
        signs.add(bool(torch.linalg.eigvalsh(H)[0] < -1e-6))
    assert signs == {True, False}


@pytest.mark.parametrize("estimator", ["mc", "empirical"])
def test_gauss_newton_has_no_estimator(estimator):
    loss = Likelihood(lambda f: dist.Categorical(logits=f))
    data = randn(N, 3), torch.zeros(N).long()
    with pytest.raises(ValueError, match=rf"estimator='{estimator}'.*Gauss-Newton matrix of Likelihood.*fisher"):
        natgrad.gauss_newton(nn.Linear(3, 2, dtype=f64), loss, data, "dense", estimator=estimator)


# The same as torch's losses -----------------------------------------------------------------------------

BINARY = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 1, 0], [0, 0, 1]], dtype=f64)
COUNTS = torch.tensor([[0, 3, 1], [7, 0, 2], [1, 1, 0], [2, 5, 12]], dtype=f64)
TWINS = {
    "cross-entropy": (nn.CrossEntropyLoss(), lambda f: dist.Categorical(logits=f), torch.tensor([2, 1, 0, 1])),
    "squared error": (nn.MSELoss(), lambda f: dist.Normal(f, 0.5**0.5), randn(N, 3, seed=5)),
    "logistic": (nn.BCEWithLogitsLoss(), lambda f: dist.Bernoulli(logits=f), BINARY),
    "log rates": (nn.PoissonNLLLoss(), lambda f: dist.Poisson(f.exp()), COUNTS),
    "rates": (nn.PoissonNLLLoss(log_input=False, eps=0.1), lambda f: dist.Poisson(f + 0.1), COUNTS),
    "gaussian": (nn.GaussianNLLLoss(), lambda f: dist.Normal(f[..., 0], f[..., 1].sqrt()), randn(N, 3, seed=5)),
}


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("kind", ["fisher", "gauss_newton"])
@pytest.mark.parametrize("reduce", [summed, meant])
def test_it_has_the_curvature_of_torchs_loss(name, kind, reduce):
    loss, fn, target = TWINS[name]
    output = outputs(N, 3, 2) if name == "gaussian" else outputs(N, 3)
    output = output.exp() if name in ("gaussian", "rates") else output
    a, b = (output_curvature(reduce(c), kind) for c in (loss, Likelihood(fn)))
    close(blocks(a, output, target), blocks(b, output, target), 1e-10)
    assert a.normalizer(output, target) == b.normalizer(output, target)
    f = output.clone().requires_grad_()
    gradients = [torch.autograd.grad(c.loss(f, target), f)[0] for c in (a, b)]
    close(*gradients, 1e-10)


# Matrices of a model ------------------------------------------------------------------------------------

STUDENT = Likelihood(lambda f: dist.StudentT(3.0, f[:, 0], 0.5))
SCALE = Likelihood(lambda f: dist.Normal(f[:, 0], f[:, 1].exp()))
CLASSES = Likelihood(lambda f: dist.Categorical(logits=f))
X = randn(5, 3, seed=2)


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


# Edges --------------------------------------------------------------------------------------------------


class TestGenerator:
    def draw(self, generator=None):
        curvature = output_curvature(CLASSES)
        return torch.stack(list(curvature.columns(randn(9, 2), torch.zeros(9).long(), "mc", 3, generator)))

    def test_a_seed_makes_mc_reproducible(self):
        first = self.draw(torch.Generator().manual_seed(3))
        torch.rand(5)
        assert torch.equal(self.draw(torch.Generator().manual_seed(3)), first)
        assert not torch.equal(self.draw(torch.Generator().manual_seed(4)), first)

    def test_it_moves_on(self):
        generator = torch.Generator().manual_seed(3)
        first = self.draw(generator)
        assert not torch.equal(self.draw(generator), first)
        assert not torch.equal(*first[:2])

    def test_a_generator_leaves_the_global_one_alone(self):
        before = torch.get_rng_state()
        self.draw(torch.Generator().manual_seed(3))
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("generator", [None, torch.default_generator])
    def test_the_global_seed_counts(self, generator):
        torch.manual_seed(5)
        first = self.draw(generator)
        assert not torch.equal(self.draw(generator), first)
        torch.manual_seed(5)
        assert torch.equal(self.draw(generator), first)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
@pytest.mark.parametrize("kind", ["fisher", "gauss_newton"])
def test_saturated_outputs_stay_finite(dtype, kind):
    output, target = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [0.1, 0.2]], dtype=dtype), torch.tensor([0, 1, 1])
    curvature = output_curvature(CLASSES, kind)
    p = output.softmax(1)
    close(outer(curvature.columns(output, target)), p.diag_embed() - p.unsqueeze(1) * p.unsqueeze(2), 1e-6)


def test_classes_that_cannot_be():
    """Masked by a probability of zero, as for actions that are not allowed."""
    mask = torch.tensor([False, True, False])
    loss = Likelihood(lambda f: dist.Categorical(logits=f.masked_fill(mask, -math.inf)))
    output, target = randn(N, 3), torch.tensor([0, 2, 2, 0])
    p = output.masked_fill(mask, -math.inf).softmax(1)
    for kind in ("fisher", "gauss_newton"):
        D = blocks(output_curvature(loss, kind), output, target)
        close(D, p.diag_embed() - p.unsqueeze(1) * p.unsqueeze(2), 1e-12)


@pytest.mark.parametrize("estimator", ["exact", "mc", "empirical"])
def test_the_output_and_its_graph_are_left_alone(estimator):
    f = randn(N, 2).requires_grad_() * 1.0
    with torch.no_grad():
        columns = list(output_curvature(SCALE).columns(f, randn(N), estimator))
    assert not any(c.requires_grad for c in columns)
    assert f.requires_grad


def test_no_curvature_is_one_column_of_zeros():
    loss = Likelihood(lambda f: dist.Laplace(f, torch.ones((), dtype=f64)))
    (column,) = output_curvature(loss, "gauss_newton").columns(randn(N, 2), randn(N, 2, seed=1))
    assert torch.equal(column, torch.zeros(N, 2, dtype=f64))


class TestBadInput:
    @pytest.mark.parametrize(
        ("name", "fn"),
        [
            ("StudentT", lambda f: dist.StudentT(3.0, f)),
            ("Independent of a StudentT", lambda f: independent(dist.StudentT(3.0, f))),
            ("VonMises", lambda f: dist.VonMises(f, 1.0)),
            ("NegativeBinomial", lambda f: dist.NegativeBinomial(3.0, logits=f)),
            # Their divergences are not twice differentiable where the two distributions are one.
            ("Laplace", lambda f: dist.Laplace(f, 1.0)),
            ("Independent of a Laplace", lambda f: independent(dist.Laplace(f, 1.0))),
            ("TransformedDistribution", lambda f: dist.TransformedDistribution(dist.Laplace(f, 1.0), ExpTransform())),
            ("Uniform", lambda f: dist.Uniform(f, f + 1)),
            ("Pareto", lambda f: dist.Pareto(f.exp(), torch.ones((), dtype=f64))),
            # Torch's divergence is one of the base distributions, as if the transforms were fixed.
            ("Weibull", lambda f: dist.Weibull(f.exp(), torch.ones((), dtype=f64))),
            (
                "TransformedDistribution",
                lambda f: dist.TransformedDistribution(
                    dist.Normal(torch.zeros_like(f), 1.0), [ExpTransform(), AffineTransform(f, 1.0)]
                ),
            ),
        ],
    )
    @pytest.mark.filterwarnings("ignore")
    def test_a_family_whose_fisher_is_not_known(self, name, fn):
        output = outputs(N, 3)
        target, curvature = target_of(fn, output), output_curvature(Likelihood(fn))
        with pytest.raises(ValueError, match=REFUSED.format(name)):
            curvature.product(output, target, output)
        with pytest.raises(ValueError, match=REFUSED.format(name)):
            next(curvature.columns(output, target))

    @pytest.mark.parametrize(("returned", "came"), [(lambda f: f, "a Tensor of shape .*"), (lambda f: None, "None")])
    def test_a_function_that_returns_no_distribution(self, returned, came):
        with pytest.raises(TypeError, match=rf"fn returned {came}; expected a torch.distributions.Distribution"):
            Likelihood(returned)(randn(N), randn(N))

    @pytest.mark.parametrize(
        ("fn", "output", "target", "expected"),
        [
            (lambda f: dist.Normal(f, 1.0), (4, 1), (4,), r"\(4, 1\)"),
            (lambda f: dist.Normal(f, 1.0), (4,), (4, 1), r"\(4,\)"),
            (lambda f: independent(dist.Normal(f, 1.0)), (4, 3), (4,), r"\(4, 3\)"),
            (lambda f: dist.Categorical(logits=f), (4, 3), (4, 3), r"\(4,\)"),
        ],
    )
    def test_a_target_of_another_shape(self, fn, output, target, expected):
        output, target = torch.zeros(output), torch.zeros(target)
        loss = Likelihood(fn)
        for call in (loss, output_curvature(loss).check):
            with pytest.raises(ValueError, match=rf"batch_shape.*expected {expected} \(reshape the target"):
                call(output, target)

    @pytest.mark.parametrize(
        ("fn", "output", "target"),
        [
            (lambda f: dist.MultivariateNormal(f, torch.eye(4)), (4,), (4,)),
            (lambda f: dist.Normal(f.mT, 1.0), (4, 3), (3, 4)),
            (lambda f: dist.Normal(f, 1.0), (), ()),
        ],
    )
    def test_distributions_that_are_not_of_the_examples(self, fn, output, target):
        with pytest.raises(ValueError, match=r"batch_shape.*expected both to start with the examples"):
            output_curvature(Likelihood(fn)).check(torch.zeros(output), torch.zeros(target))

    @pytest.mark.parametrize("reduction", ["none", "batchmean"])
    def test_a_reduction_that_is_unknown(self, reduction):
        with pytest.raises(ValueError, match=rf"reduction='{reduction}'.*'mean', 'sum'"):
            Likelihood(lambda f: dist.Normal(f, 1.0), reduction)

    @pytest.mark.parametrize("estimator", ["exact", "mc"])
    def test_a_distribution_that_does_not_depend_on_the_output(self, estimator):
        loss = Likelihood(lambda f: dist.Normal(f.detach(), 1.0))
        with pytest.raises(ValueError, match=r"does not depend on its argument.*detach"):
            next(output_curvature(loss).columns(randn(N), randn(N), estimator))

    def test_a_curvature_that_is_not_finite(self):
        loss = Likelihood(lambda f: dist.Normal(f[:, 0], f[:, 1].abs().sqrt(), validate_args=False))
        output = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=f64)
        with pytest.raises(ValueError, match=r"not finite.*scale of zero"):
            next(output_curvature(loss).columns(output, torch.zeros(2, dtype=f64)))
