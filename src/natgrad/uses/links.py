"""From a Gaussian over a model's outputs to a prediction."""

from __future__ import annotations

from math import pi

import torch
from jaxtyping import Float
from torch import Tensor


def probit(mean: Float[Tensor, "n ..."], variance: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
    """The outputs whose softmax (or sigmoid) is about its mean: `f / √(1 + π v / 8)` (MacKay 1992)."""
    return mean / (1 + pi / 8 * variance).sqrt()


def bridge(mean: Float[Tensor, "n c"], covariance: Float[Tensor, "n c c"], normalized: bool = False) -> Tensor:
    """The mean of the Dirichlet distribution whose Laplace approximation in softmax coordinates is the given Gaussian.

    The Gaussian is first conditioned on `Σ f = 0`, which changes no probability. `normalized` divides the outputs by
    their mean standard deviation before (Hobbhahn, Kristiadi & Hennig 2022, arXiv:2003.01227).
    """
    C = mean.shape[1]
    towards = covariance.sum(2)  # Σ 1
    total = towards.sum(1)[:, None]
    mean = mean - towards * mean.sum(1, keepdim=True) / total
    variance = covariance.diagonal(dim1=1, dim2=2) - towards.square() / total
    if normalized:
        size = variance.mean(1, keepdim=True) / (C / 2) ** 0.5
        mean, variance = mean / size.sqrt(), variance / size
    # α_c = (1 − 2/C + e^{f_c} Σ_j e^{−f_j} / C²) / v_c, by its logarithm where the exponentials would overflow
    ratio = (mean + torch.logsumexp(-mean, 1, keepdim=True)).exp() / C**2
    alpha = (1 - 2 / C + ratio) / variance
    largest = alpha.amax(1, keepdim=True)
    if not torch.isfinite(largest).all():
        raise ValueError(
            "the Laplace bridge overflows: outputs differ by more than their dtype's exponentials hold; use "
            "link='probit', or a float64 model"
        )
    return alpha / alpha.sum(1, keepdim=True)


def draws(
    mean: Float[Tensor, "n k"], covariance: Float[Tensor, "n k k"], samples: int, generator: torch.Generator | None
) -> Float[Tensor, "s n k"]:
    """From the Gaussian over each example's outputs."""
    e, U = torch.linalg.eigh(covariance.double())
    root = (U * e.clamp_min(0).sqrt().unsqueeze(1)).to(mean.dtype)  # what is below zero is rounding
    z = torch.randn(samples, *mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
    return mean + (root @ z.unsqueeze(-1)).squeeze(-1)
