"""What the tests of Laplace posteriors share: trained models, and the dense algebra by autograd."""

from math import log, pi

import torch
from torch import nn

from oracles import dense_curvature, f64, net, parameter_vector, randn, summed

N = 30


STRUCTURES = ["dense", "block", "kfac", "ekfac", "low_rank", "diagonal"]


CASES = {
    "classes": (nn.CrossEntropyLoss(), lambda: torch.arange(N) % 3),
    "numbers": (nn.MSELoss(), lambda: randn(N, 3, seed=5)),
    "yes or no": (nn.BCEWithLogitsLoss(), lambda: (randn(N, 3, seed=5) > 0).to(f64)),
    "counts": (nn.PoissonNLLLoss(), lambda: randn(N, 3, seed=5).abs().round()),
}


def problem(case="classes"):
    loss, target = CASES[case]
    torch.manual_seed(0)
    return net(4, 5, 3).eval(), loss, (randn(N, 4), target())


def likelihood(model, loss, data, sigma):
    """The curvature of the negative log-likelihood, and the log-likelihood, of the sum over the data."""
    G = dense_curvature(model, summed(loss), [data])
    value = summed(loss)(model(data[0]), data[1]).detach()
    if not isinstance(loss, nn.MSELoss):
        return G, -value
    entries = data[1].numel()
    return G / (2 * sigma**2), -value / (2 * sigma**2) - entries * log(sigma * (2 * pi) ** 0.5)


def evidence(model, loss, data, delta, sigma=1.0):
    """`log p(data)` of the dense posterior, by the formula."""
    G, log_likelihood = likelihood(model, loss, data, sigma)
    theta = parameter_vector(model)
    delta = torch.as_tensor(delta, dtype=f64).expand(len(theta))
    terms = (delta * theta.square()).sum() - delta.log().sum() + torch.logdet(G + delta.diag())
    return log_likelihood - 0.5 * terms
