"""`natgrad.laplace`: the Laplace posterior of a trained model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.capture.entry import entry
from natgrad.checks.parameters import Selection
from natgrad.checks.values import check_choice, described
from natgrad.curvature.low_rank import RANK
from natgrad.curvature.matrices import fisher, problem_of
from natgrad.curvature.problem import Forward
from natgrad.curvature.terms import Losses, Terms
from natgrad.linalg import BlockDiagonal, Operator, Space
from natgrad.uses.likelihood import Likelihood
from natgrad.uses.posterior import LaplacePosterior
from natgrad.uses.subset import chosen, warn_in_training

BIASES = {"coupled": "a layer's weight and bias in one block", "apart": "in a block each"}


@entry
def laplace(
    model: nn.Module,
    loss: Losses,
    data: Any,
    structure: str | Mapping[str, str] = "kfac",
    subset: Selection = "all",
    *,
    prior_precision: float | int | Tensor | Mapping[str, float | int | Tensor] = 1.0,
    sigma_noise: float | Mapping[str, float] | None = None,
    weights: Mapping[str, float] | None = None,
    temperature: float = 1.0,
    bias: str = "coupled",
    estimator: str = "exact",
    samples: int = 1,
    centered: bool = False,
    sharing: str = "expand",
    rank: int = RANK,
    forward: Forward | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> LaplacePosterior:
    """The Laplace posterior of a trained model: the Gaussian `N(θ, P⁻¹)` over its weights, with the precision

        P = F / T + diag(δ)

    `F` is the Fisher information of the *sum* over all examples, for every `reduction` of the loss. `δ` is the
    precision of a Gaussian prior with mean zero, and `T` is the temperature. For `nn.MSELoss` the likelihood is a
    Gaussian of standard deviation `sigma_noise` around each entry of the output: `F = JᵀJ / σ²`.

    With several losses `{"class": ..., "box": ...}`, the log-likelihood is the weighted sum of those of the terms: `F =
    Σ_t ω_t F_t`. Each `nn.MSELoss` has its own `σ_t`. Predictions are then dictionaries with the same keys.

    `θ` should be close to a maximum of the posterior, as in a model that was trained with weight decay. Put the model
    in evaluation mode first. Call `fit_prior()` before you predict, because the default prior is arbitrary. With a
    model in `DistributedDataParallel`, every rank gives its own data and gets the posterior of all the data.

    Args:
        model: a trained model; it must keep its weights while the posterior is in use.
        loss: the loss that the model was trained with, any that `natgrad.fisher` takes; or a dictionary of losses, the
            terms of a sum. Outputs and targets are then dictionaries with the same keys.
        data: the training data, as for `natgrad.fisher`; it is read twice (three times for `"ekfac"`), and not kept.
        structure: any of `natgrad.fisher`. With `"implicit"`, determinants are estimated with 20 random vectors and 100
            products for each of them, and weights cannot be sampled.
        subset: `"all"` trainable parameters (for a model with adapters, only the adapters), the `"last_layer"`, names
            of parameters or modules, or a predicate on parameter names. All other weights are held fixed.
        prior_precision: `δ`, a number `> 0`, or a dict with a number for each parameter or layer. A tensor of a
            parameter's shape gives each weight its own precision.
        sigma_noise: the standard deviation of targets under `nn.MSELoss`. None: 1, until `fit_prior` estimates it. With
            several losses: a dictionary with an entry for each term. If an entry is missing, it is the root mean square
            of the term's residuals, and `fit_prior` does not change it.
        weights: `ω`, if there are several losses: the exponent of each loss's likelihood, by name. Default: 1 for each.
        temperature: `T`; below 1 the posterior is sharper.
        bias: `"coupled"` keeps a layer's weight and bias in one block, `"apart"` in separate blocks (K-FAC and EKFAC).
        estimator, samples, centered, sharing, rank, forward, generator, dtype, progress: as for `natgrad.fisher`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `natgrad.fisher` does.
        ValueError: also if a prior precision or a noise is not above zero, or if a name is unknown.

    Example:
        >>> import torch, natgrad
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(50, 2), torch.randint(2, (50,))
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).eval()
        >>> P = natgrad.laplace(model, torch.nn.CrossEntropyLoss(), (x, y)).fit_prior()
        >>> P.predict(x[:3]).shape, P.sample(x[:3], n=5).shape
        (torch.Size([3, 2]), torch.Size([5, 3, 2]))

    Reference: MacKay (1992), "A Practical Bayesian Framework for Backpropagation Networks"; Ritter, Botev & Barber
    (2018); Immer, Korzepa & Bauer (2021), arXiv:2008.08400; Daxberger et al. (2021), arXiv:2106.14806.
    """
    check_choice("bias", bias, BIASES, meanings=BIASES)
    data = list(data) if isinstance(data, Iterator) else data
    selected = chosen(model, loss, data, subset, forward)
    problem = problem_of(model, loss, data, forward, weights, params=selected)
    warn_in_training(model)
    if isinstance(sigma_noise, Mapping) and not isinstance(problem, Terms):
        raise ValueError(f"sigma_noise is {described(sigma_noise)}; with one loss expected a number > 0")
    its = Likelihood.of(problem, sigma_noise)

    def matrix(names: list[str]) -> Operator:
        F = fisher(
            model, its.losses, data, structure, estimator=estimator, samples=samples, centered=centered,
            sharing=sharing, rank=rank, params=names, forward=forward, generator=generator, dtype=dtype,
            progress=progress, weights=its.factors,
        )  # fmt: skip
        return F if its.factor == 1 else its.factor * F

    names = list(problem.parameters)
    biases = [n for n in names if n.rpartition(".")[2].startswith("bias")]
    if bias == "apart" and biases and len(biases) < len(names):
        parts = [matrix(biases), matrix([n for n in names if n not in biases])]
        if not all(isinstance(part, BlockDiagonal) for part in parts):
            raise ValueError(
                f"structure={structure!r} has no blocks to hold biases apart; use 'kfac', or bias='coupled'"
            )
        layers = {
            name: block for part in parts if isinstance(part, BlockDiagonal) for name, block in part.layers.items()
        }
        own = problem.parameters
        M: Operator = BlockDiagonal(layers, Space(tuple(tuple(own[n].shape) for n in names), tuple(names)))
    else:
        M = matrix(names)
    posterior = LaplacePosterior(model, loss, M, its.total, its.entries, forward, its.noises, its.constant)
    posterior.prior_precision = prior_precision
    posterior.temperature = temperature
    if sigma_noise is not None and not isinstance(sigma_noise, Mapping):
        posterior.sigma_noise = sigma_noise
    return posterior
