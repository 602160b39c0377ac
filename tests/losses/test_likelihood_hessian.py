"""`Likelihood`: its Gauss-Newton blocks against autograd's Hessian, and the twins among torch's losses."""

import pytest
import torch
import torch.distributions as dist
from torch import nn

import natgrad
from families import FAMILIES, N, blocks, outer, outputs, target_of
from natgrad.losses import Likelihood, output_curvature
from oracles import close, f64, meant, output_hessian, randn, summed

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
