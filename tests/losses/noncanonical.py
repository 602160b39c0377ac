"""Losses whose Fisher information is not their Hessian (Poisson with rates, Gaussian with mean and variance), and that
information by sums over counts and Gauss-Hermite quadrature."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from oracles import f64, meant, net, output_hessian, randn, summed

N, C, D = 4, 3, 2
COUNTS = torch.tensor([[0, 3, 1], [7, 0, 2], [1, 1, 0], [2, 5, 12]], dtype=f64)
KINDS = ("fisher", "gauss_newton")
both_reductions = pytest.mark.parametrize("reduce", [summed, meant])


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
