"""The likelihood of the data at a model's weights, of one loss or of several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log, pi
from typing import Any

import torch

from natgrad.checks.values import check_number, described
from natgrad.curvature.problem import Problem, check_output
from natgrad.curvature.terms import Losses, Terms
from natgrad.losses.elementwise import SquaredError
from natgrad.uses.rows import summed


@dataclass(frozen=True)
class Likelihood:
    """What a posterior takes from the data beside the matrix.

    Args:
        losses: the losses whose matrices are summed, each over all examples.
        factors: of several, what each matrix is multiplied by; of `nn.MSELoss` `ω / (2σ²)`.
        factor: of one loss, what its matrix is multiplied by: of `nn.MSELoss` ½.
        total: `−log p(data)` but for constants; of one `nn.MSELoss`, half of the summed loss.
        entries: of one `nn.MSELoss`, how many entries its targets have.
        noises: of several losses, `σ` of each that is `nn.MSELoss`.
        constant: of several losses, `Σ ω entries log(σ √2π)`.
    """

    losses: Losses
    factors: dict[str, float] | None
    factor: float
    total: float
    entries: int
    noises: dict[str, float]
    constant: float

    @classmethod
    def of(cls, problem: Problem | Terms, sigma_noise: Any) -> Likelihood:
        """Reads the data once.

        Raises:
            ValueError: if a noise does not fit to the losses, or cannot be estimated.
        """
        if isinstance(problem, Terms):
            return cls._of_terms(problem, sigma_noise)
        total, entries = _fit(problem)
        factor = 0.5 if isinstance(problem.curvature, SquaredError) else 1.0
        return cls(summed(problem.curvature).module, None, factor, total, entries, {}, 0.0)

    @classmethod
    def _of_terms(cls, terms: Terms, given: Any) -> Likelihood:
        squared = [t for t, one in terms.problems.items() if isinstance(one.curvature, SquaredError)]
        _check_noises(given, squared)
        total, constant, factors, noises = 0.0, 0.0, dict(terms.weights), dict[str, float]()
        for term, problem in terms.problems.items():
            loss, entries = _fit(problem)
            if term in squared:
                sigma = noises[term] = _noise(term, given, loss, entries)
                factors[term] /= 2 * sigma**2
                loss /= sigma**2
                constant += terms.weights[term] * entries * log(sigma * (2 * pi) ** 0.5)
            total += terms.weights[term] * loss
        losses = {t: summed(one.curvature).module for t, one in terms.problems.items()}
        return cls(losses, factors, 1.0, total, 0, noises, constant)


def _noise(term: str, given: Any, total: float, entries: int) -> float:
    """The standard deviation of a term's targets: the given one, or that of its residuals."""
    if given is not None and term in given:
        check_number(f"sigma_noise[{term!r}]", given[term], positive=True)
        return float(given[term])
    if not total > 0:
        raise ValueError(
            f"the model fits all targets of {term!r} exactly, so the noise has no estimate; give "
            f"sigma_noise={{{term!r}: ...}}"
        )
    return (2 * total / entries) ** 0.5


def _check_noises(given: Any, squared: list[str]) -> None:
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"sigma_noise is {described(given)}; with several losses expected a dictionary by term")
    for term in given or ():
        if term not in squared:
            raise ValueError(
                f"sigma_noise has {term!r}, which is no term with nn.MSELoss; expected some of "
                f"{', '.join(map(repr, squared)) or 'none'}"
            )


def _fit(problem: Problem) -> tuple[float, int]:
    """The summed loss over the data, of a squared error half of it; and how many entries its targets have."""
    curvature = summed(problem.curvature)
    half, entries = (0.5 if isinstance(curvature, SquaredError) else 1.0), 0
    total = torch.zeros((), dtype=torch.float64, device=problem.device)
    with torch.no_grad():
        for batch in problem:
            output, target = problem.run(problem.model, batch)
            check_output(output)
            total += half * curvature.loss(output, target).double()
            entries += output.numel() if isinstance(curvature, SquaredError) else 0
    if not torch.isfinite(total):
        raise ValueError(
            f"the loss over the data is {float(total):g}; look for NaN or inf in the targets, or in the loss's weights"
        )
    count = torch.tensor(float(entries), device=problem.device)
    return float(problem.world.sum(total, "the loss")), int(problem.world.sum(count, "the loss"))
