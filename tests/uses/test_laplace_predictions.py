"""What a Laplace posterior predicts, for each kind of loss, against draws."""

from math import pi

import pytest
import torch
from torch import nn
from torch.func import functional_call

import natgrad
from natgrad.uses.links import bridge
from oracles import close, f64, net, randn
from posteriors import N, problem


def test_probabilities_are_near_their_mean_over_draws():
    model, loss, data = problem()
    P, x = natgrad.laplace(model, loss, data, "dense", prior_precision=10.0), randn(6, 4, seed=3)
    draws = P.sample(x, 20000, generator=torch.Generator().manual_seed(0))
    close(draws.sum(2), torch.ones(20000, 6, dtype=f64))
    mean = draws.mean(0)
    close(P.predict(x, link="mc", samples=20000, generator=torch.Generator().manual_seed(1)), mean, 0.01)
    close(P.predict(x, link="probit"), mean, 0.05)
    for link in ("probit", "bridge", "bridge_norm"):
        close(P.predict(x, link=link).sum(1), torch.ones(6, dtype=f64))


def test_the_bridge_undoes_the_laplace_approximation_of_a_dirichlet():
    """In softmax coordinates that has the mean log α − mean log α, and the covariance below (MacKay 1998)."""
    alpha = randn(4, 5).exp() + 1
    K, r = 5, 1 / alpha
    mean = alpha.log() - alpha.log().mean(1, keepdim=True)
    covariance = torch.diag_embed(r) - (r[:, :, None] + r[:, None, :] - r.sum(1)[:, None, None] / K) / K
    # shifted and spread along (1, ..., 1), which no probability sees
    close(bridge(mean + 3.0, covariance + 0.7), alpha / alpha.sum(1, keepdim=True))


def test_without_uncertainty_the_prediction_is_the_models():
    model, loss, data = problem()
    P, x = natgrad.laplace(model, loss, data, prior_precision=1e12), randn(6, 4, seed=3)
    for link in ("probit", "mc"):
        close(P.predict(x, link=link), model(x).softmax(1), 1e-4)
    close(P.predict(x, linearized=False, samples=3), model(x).softmax(1), 1e-4)


@pytest.mark.parametrize("case", ["numbers", "counts"])
def test_predicted_numbers_are_the_moments_of_draws(case):
    model, loss, data = problem(case)
    P, x = natgrad.laplace(model, loss, data, "dense", prior_precision=20.0), randn(6, 4, seed=3)
    found = P.predict(x)
    f = P.sample(x, 100000, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    y = f + torch.randn(f.shape, dtype=f64, generator=g) if case == "numbers" else torch.poisson(f.exp(), g)
    close(found.mean, y.mean(0), 0.03)
    close(found.variance, y.var(0), 0.06)
    close(found.functional_variance, f.var(0), 0.03)


def test_a_learned_noise_and_any_likelihood():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net(4, 5, 2)

        def forward(self, x):
            mean, spread = self.body(x).chunk(2, 1)
            return mean, nn.functional.softplus(spread) + 0.1

    torch.manual_seed(0)
    model, data, x = Two().eval(), (randn(N, 4), randn(N, 1, seed=2)), randn(5, 4, seed=3)
    found = natgrad.laplace(model, nn.GaussianNLLLoss(), data, "dense", prior_precision=30.0).predict(x)
    mean, spread = model(x)
    close(found.mean, mean.detach())
    assert (found.variance > spread).all()
    close(found.variance - found.functional_variance, spread.detach())

    one = net(4, 5, 1).eval()
    normal = natgrad.losses.Likelihood(lambda f: torch.distributions.Normal(f, 0.7))
    own = natgrad.laplace(one, normal, data, "dense", prior_precision=2.0)
    squared = natgrad.laplace(one, nn.MSELoss(), data, "dense", prior_precision=2.0, sigma_noise=0.7)
    close(own.log_marginal_likelihood(), squared.log_marginal_likelihood(), 1e-9)
    drawn = own.predict(x, samples=50000, generator=torch.Generator().manual_seed(0))
    close(drawn.mean, squared.predict(x).mean, 0.01)
    close(drawn.variance, squared.predict(x).variance, 0.02)


def test_draws_of_networks_are_networks_at_drawn_weights():
    model, loss, data = problem()
    P, x = natgrad.laplace(model, loss, data), randn(5, 4, seed=3)
    weights = P.sample_weights(4, torch.Generator().manual_seed(3))
    found = P.sample(x, 4, linearized=False, generator=torch.Generator().manual_seed(3))
    for i in range(4):
        close(found[i], functional_call(model, {n: w[i] for n, w in weights.items()}, x).softmax(1).detach())


def own_probabilities(P, x):
    """By the probit approximation, from the outputs and their variances."""
    f, v = P.model(x).detach(), P.functional_variance(x, diagonal=True)
    return f / (1 + pi / 8 * v).sqrt()


@pytest.mark.parametrize("loss", [nn.SoftMarginLoss(), nn.MultiLabelSoftMarginLoss()])
def test_other_logistic_losses_predict_probabilities(loss):
    model, _, (x, y) = problem("yes or no")
    P = natgrad.laplace(model, loss, (x, 2 * y - 1 if isinstance(loss, nn.SoftMarginLoss) else y), "dense")
    close(P.predict(x), own_probabilities(P, x).sigmoid())
    close(P.predict(x, link="mc", samples=20000), P.predict(x), 0.02)
    assert 0 < P.predict(x, linearized=False).min() < P.sample(x, 3).max() < 1


def test_log_probabilities_have_all_links():
    model, _, (x, y) = problem()
    P = natgrad.laplace(nn.Sequential(*model, nn.LogSoftmax(1)), nn.NLLLoss(), (x, y), "dense")
    close(P.predict(x), own_probabilities(P, x).softmax(1))
    for link in ("mc", "bridge", "bridge_norm"):
        close(P.predict(x, link=link).sum(1), torch.ones(N, dtype=f64))


WITHOUT_DISTRIBUTION = {
    "L1Loss": (nn.L1Loss(), nn.Identity(), "numbers"),
    "HuberLoss": (nn.HuberLoss(), nn.Identity(), "numbers"),
    "SmoothL1Loss": (nn.SmoothL1Loss(), nn.Identity(), "numbers"),
    "Convex": (natgrad.losses.Convex(lambda f, y: (f - y).pow(4).sum(1)), nn.Identity(), "numbers"),
    "BCELoss": (nn.BCELoss(), nn.Sigmoid(), "yes or no"),
}


@pytest.mark.parametrize("name", WITHOUT_DISTRIBUTION)
def test_a_loss_without_a_distribution_of_targets_is_named(name):
    loss, last, case = WITHOUT_DISTRIBUTION[name]
    model, _, data = problem(case)
    P = natgrad.laplace(nn.Sequential(*model, last), loss, data).fit_prior()
    for linearized in (True, False):
        with pytest.raises(TypeError, match=rf"{name} gives no distribution of targets.*P.functional_variance\(x\)"):
            P.predict(data[0], linearized=linearized)
    assert P.functional_variance(data[0]).shape == (N, 3, 3)
    assert P.sample(data[0], 2).shape == (2, N, 3)
