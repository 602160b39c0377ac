"""`natgrad.laplace`: the Laplace posterior of a trained model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.checks.parameters import Selection
from natgrad.checks.values import check_choice
from natgrad.curvature.low_rank import RANK
from natgrad.curvature.matrices import fisher
from natgrad.curvature.problem import Forward, Problem
from natgrad.linalg import BlockDiagonal, Operator, Space
from natgrad.losses.elementwise import SquaredError
from natgrad.uses.posterior import LaplacePosterior
from natgrad.uses.rows import summed
from natgrad.uses.subset import chosen, warn_in_training

BIASES = {"coupled": "a layer's weight and bias in one block", "apart": "in a block each"}


def laplace(
    model: nn.Module,
    loss: nn.Module,
    data: Any,
    structure: str | Mapping[str, str] = "kfac",
    subset: Selection = "all",
    *,
    prior_precision: float | int | Tensor | Mapping[str, float | int | Tensor] = 1.0,
    sigma_noise: float | None = None,
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

    `F` is the Fisher information of the *sum* over all examples, whatever the loss's `reduction` is, `δ` the precision
    of a Gaussian prior with mean zero, and `T` the temperature. `nn.MSELoss` is read as a Gaussian of standard
    deviation `sigma_noise` about each entry of the output: `F = JᵀJ / σ²`.

    `θ` should be (about) a maximum of the posterior: a model trained with weight decay. Put the model in evaluation
    mode first. Call `fit_prior()` before predictions, as the default prior is arbitrary.

    Args:
        model: a trained model; it must keep its weights while the posterior is in use.
        loss: the loss it was trained with, any that `natgrad.fisher` takes.
        data: the training data, as for `natgrad.fisher`; it is read twice (three times for `"ekfac"`), and not kept.
        structure: any of `natgrad.fisher`. With `"implicit"` determinants are estimates, of 20 random vectors and 100
            products each, and there are no draws of weights.
        subset: `"all"` trainable parameters (of a model with adapters, these alone), the `"last_layer"`, names of
            parameters or modules, or a predicate on parameter names. All other weights are held fixed.
        prior_precision: `δ`, a number `> 0`, or a dict of them by parameter or layer; tensors of a parameter's shape
            give each weight its own.
        sigma_noise: the standard deviation of targets under `nn.MSELoss`. None: 1, until `fit_prior` estimates it.
        temperature: `T`; below 1 the posterior is sharper.
        bias: `"coupled"` holds a layer's weight and bias in one block, `"apart"` in one each (K-FAC and EKFAC).
        estimator, samples, centered, sharing, rank, forward, generator, dtype, progress: as for `natgrad.fisher`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `natgrad.fisher` does.
        ValueError: also for a prior precision or noise that is not above zero, and for unknown names.

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
    problem = Problem(model, loss, data, params=chosen(model, loss, data, subset, forward), forward=forward)
    warn_in_training(problem.model)

    def matrix(names: list[str]) -> Operator:
        F = fisher(
            model, summed(problem.curvature).module, data, structure, estimator=estimator, samples=samples,
            centered=centered, sharing=sharing, rank=rank, params=names, forward=forward, generator=generator,
            dtype=dtype, progress=progress,
        )  # fmt: skip
        return 0.5 * F if isinstance(problem.curvature, SquaredError) else F

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
    total, entries = _loss(problem)
    posterior = LaplacePosterior(model, loss, M, total, entries, forward=forward)
    posterior.prior_precision = prior_precision
    posterior.temperature = temperature
    if sigma_noise is not None:
        posterior.sigma_noise = sigma_noise
    return posterior


def _loss(problem: Problem) -> tuple[float, int]:
    """The summed loss over the data, of a squared error half of it; and how many entries its targets have."""
    curvature = summed(problem.curvature)
    half, entries = (0.5 if isinstance(curvature, SquaredError) else 1.0), 0
    total = torch.zeros((), dtype=torch.float64, device=problem.device)
    for batch in problem:
        output, target = problem.evaluated(batch)
        total += half * curvature.loss(output, target).double()
        entries += output.numel() if isinstance(curvature, SquaredError) else 0
    count = torch.tensor(float(entries), device=problem.device)
    return float(problem.world.sum(total, "the loss")), int(problem.world.sum(count, "the loss"))
