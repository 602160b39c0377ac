"""What a Laplace posterior predicts, loss by loss: from a Gaussian over outputs to probabilities, or moments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Categorical, OneHotCategorical

from natgrad.checks.values import check_choice
from natgrad.losses.base import OutputCurvature
from natgrad.losses.elementwise import Bernoulli, Poisson, SquaredError
from natgrad.losses.gaussian import Gaussian
from natgrad.losses.likelihood import LikelihoodCurvature
from natgrad.losses.margin import SoftMargin
from natgrad.losses.softmax import Softmax
from natgrad.uses.links import bridge, draws, probit

Logistic = (Bernoulli, SoftMargin)
"""Losses whose outputs are log-odds."""
LINKS = {
    "probit": "closed form, from the variances of the outputs",
    "mc": "the mean over draws of the outputs",
    "bridge": "the Laplace bridge to a Dirichlet distribution",
    "bridge_norm": "the same, with normalized variances",
}


@dataclass(frozen=True)
class Prediction:
    """A prediction of numbers, each of the target's shape.

    Args:
        mean: of the target.
        variance: of the target: that of the function, and the noise.
        functional_variance: of the model's output, `diag(J P⁻¹ Jᵀ)`, without the noise.

    Example:
        >>> import torch, natgrad
        >>> data = torch.tensor([[-1.0], [1.0]]), torch.tensor([[-1.0], [1.0]])
        >>> P = natgrad.laplace(torch.nn.Linear(1, 1), torch.nn.MSELoss(), data, sigma_noise=0.5)
        >>> prediction = P.predict(torch.tensor([[0.0], [3.0]]))
        >>> (prediction.variance - prediction.functional_variance).round(decimals=3).tolist()
        [[0.25], [0.25]]
    """

    mean: Tensor
    variance: Tensor
    functional_variance: Tensor


@dataclass(frozen=True)
class Outputs:
    """The Gaussian over a batch's outputs: `mean` as the model gives it, and `J Σ Jᵀ`, `(n, k, k)` or `(n, k)`."""

    mean: Tensor
    covariance: Tensor

    @property
    def variance(self) -> Tensor:
        """In the shape of the outputs."""
        v = self.covariance.diagonal(dim1=1, dim2=2) if self.covariance.ndim == 3 else self.covariance
        return v.reshape(self.mean.shape)

    def draws(self, samples: int, generator: torch.Generator | None) -> Tensor:
        """`(samples, *output)`."""
        flat = draws(self.mean.flatten(1), self.covariance, samples, generator)
        return flat.reshape(samples, *self.mean.shape)


def check_link(curvature: OutputCurvature, link: str | None) -> str:
    """The link that holds: `"probit"` by default. ValueError for one that the loss does not have, TypeError for a loss
    that no distribution of targets belongs to."""
    if not isinstance(curvature, (Softmax, *Logistic, SquaredError, Poisson, Gaussian, LikelihoodCurvature)):
        raise TypeError(
            f"{type(curvature.module).__name__} gives no distribution of targets at the model's outputs, so there is "
            "nothing to predict with; use P.functional_variance(x) and P.sample(x, n), or a posterior of "
            "nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.MSELoss or natgrad.losses.Likelihood"
        )
    if link is None:
        return "mc" if isinstance(curvature, LikelihoodCurvature) else "probit"
    by_loss = ((Softmax, tuple(LINKS)), (Logistic, ("probit", "mc")), (LikelihoodCurvature, ("mc",)))
    known = next((its for kind, its in by_loss if isinstance(curvature, kind)), None)
    if known is None:
        raise ValueError(
            f"link={link!r} is for probabilities, and {type(curvature.module).__name__} predicts a mean and a variance"
            "; leave it out"
        )
    check_choice("link", link, known, meanings=LINKS)
    return link


def needs_covariance(curvature: OutputCurvature, link: str) -> bool:
    """Whether a prediction takes the covariances between an example's outputs, not their variances alone."""
    return link in ("bridge", "bridge_norm") or (link == "mc" and not isinstance(curvature, Logistic))


def predicted(
    curvature: OutputCurvature,
    outputs: Outputs,
    link: str,
    sigma: float,
    samples: int,
    generator: torch.Generator | None,
) -> Tensor | Prediction:
    """The prediction under the Gaussian over outputs."""
    mean, variance = outputs.mean, outputs.variance
    if isinstance(curvature, Softmax):
        if link == "probit":
            return probit(mean, variance).softmax(1)
        if link == "mc":
            return outputs.draws(samples, generator).softmax(2).mean(0)
        if mean.ndim > 2:
            raise ValueError(
                f"link={link!r} takes outputs of shape (examples, classes), and these are {tuple(mean.shape)}; "
                "use 'probit' or 'mc'"
            )
        return bridge(mean, outputs.covariance, normalized=link == "bridge_norm")
    if isinstance(curvature, Logistic):
        if link == "probit":
            return probit(mean, variance).sigmoid()
        z = torch.randn(samples, *mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        return (mean + variance.sqrt() * z).sigmoid().mean(0)
    if isinstance(curvature, SquaredError):
        return Prediction(mean, variance + sigma**2, variance)
    if isinstance(curvature, Poisson):
        if not curvature.module.log_input:
            return Prediction(mean, mean + variance, variance)
        rate = (mean + variance / 2).exp()  # of a log-normal rate: the mean
        return Prediction(rate, rate + rate.square() * variance.expm1(), variance)
    if isinstance(curvature, Gaussian):
        spread = mean[..., 1].clamp_min(curvature.module.eps)
        return Prediction(mean[..., 0], variance[..., 0] + spread, variance[..., 0])
    return moments(curvature, outputs.draws(samples, generator), variance)


def moments(curvature: OutputCurvature, drawn: Tensor, variance: Tensor) -> Tensor | Prediction:
    """Of any likelihood, over draws of the outputs: the law of total variance, or the mean probabilities."""
    own = [curvature.module.distribution(f) for f in drawn]
    if isinstance(own[0], (Categorical, OneHotCategorical)):
        return torch.stack([p.probs for p in own]).mean(0)
    means, variances = (torch.stack([getattr(p, what) for p in own]) for what in ("mean", "variance"))
    return Prediction(means.mean(0), variances.mean(0) + means.var(0, correction=0), variance)


def of_draws(curvature: OutputCurvature, drawn: Tensor, sigma: float) -> Tensor | Prediction:
    """The prediction from draws of the outputs, `(samples, *output)`, of networks with drawn weights."""
    variance = drawn.var(0, correction=0)
    if isinstance(curvature, (Softmax, *Logistic)):
        return probabilities(curvature, drawn).mean(0)
    if isinstance(curvature, SquaredError):
        return Prediction(drawn.mean(0), variance + sigma**2, variance)
    if isinstance(curvature, Poisson):
        rate = drawn.exp() if curvature.module.log_input else drawn
        return Prediction(rate.mean(0), rate.mean(0) + rate.var(0, correction=0), variance)
    if isinstance(curvature, Gaussian):
        mean, spread = drawn[..., 0], drawn[..., 1].clamp_min(curvature.module.eps)
        return Prediction(mean.mean(0), spread.mean(0) + mean.var(0, correction=0), variance[..., 0])
    return moments(curvature, drawn, variance)


def probabilities(curvature: OutputCurvature, drawn: Tensor) -> Tensor:
    """Each draw's probabilities; the outputs as they are where the loss has no classes."""
    if isinstance(curvature, Softmax):
        return drawn.softmax(2)
    return drawn.sigmoid() if isinstance(curvature, Logistic) else drawn
