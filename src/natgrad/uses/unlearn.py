"""Unlearning: a few steps up the loss of some data, as far as the other data allow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.capture.entry import entry
from natgrad.checks.values import check_count, check_number
from natgrad.curvature.matrices import problem_of
from natgrad.curvature.problem import Forward, Problem, check_mass
from natgrad.curvature.terms import Losses
from natgrad.linalg import Operator
from natgrad.linalg.arguments import check_damping
from natgrad.uses.objective import Objective
from natgrad.uses.subset import warn_in_training
from natgrad.uses.weights import flat, parameters_of


@dataclass(frozen=True)
class Unlearned:
    """What `natgrad.unlearn` returns.

    Args:
        losses: on the data to forget, before the first step and after each.
        increase: the increase of the objective on the other data that the quadratic model predicts, `½ δᵀ F δ`.

    Example:
        >>> import torch, natgrad
        >>> model, loss = torch.nn.Linear(3, 1), torch.nn.MSELoss()
        >>> x, y = torch.randn(40, 3), torch.randn(40, 1)
        >>> F = natgrad.fisher(model, loss, (x[8:], y[8:]))
        >>> found = natgrad.unlearn(model, loss, (x[:8], y[:8]), F, steps=2)
        >>> len(found.losses), found.losses[-1] > found.losses[0], found.increase < 0.011
        (3, True, True)
    """

    losses: tuple[float, ...]
    increase: float


@entry
def unlearn(
    model: nn.Module,
    loss: Losses,
    forget: Any,
    F: Operator,
    *,
    steps: int = 4,
    increase: float = 0.01,
    step_size: float | None = None,
    damping: float = 1e-3,
    forward: Forward | None = None,
    weights: Mapping[str, float] | None = None,
) -> Unlearned:
    """Raises a model's loss on the data to forget, and changes its outputs on all other data as little as possible. It
    takes a few uphill Gauss-Newton steps,

        θ ← θ + α (F + λ I)⁻¹ ∇L_forget(θ)

    `F` is the Gauss-Newton matrix of the data to be retained. `½ δᵀ F δ` predicts by how much a change `δ` of the
    weights raises the loss on these data, or the KL divergence of the outputs on them. Of all `δ` with the same
    predicted increase, the step is the one that raises the loss on `forget` most.

    For a linear model with squared error, one step without damping and with the step size `len(forget) / len(retained)`
    gives exactly the weights of a model trained on the retained data alone.

    Args:
        model: a trained model, which is changed in place. Put it in evaluation mode first.
        loss: its loss, any that `natgrad.fisher` takes, or a dictionary of several losses.
        forget: the data to forget, as for `natgrad.fisher`.
        F: the matrix of the data to be retained, at the model's weights: `natgrad.fisher(model, loss, retained)`, with
            any structure. Only the parameters in `F` are changed.
        steps: the number of steps. Each computes the gradient again, but uses the same `F`.
        increase: the increase of the objective on the retained data that the quadratic model predicts for all steps
            together. All steps have the same length in the norm of `F + λ I`. Start with the default, a hundredth of a
            nat.
        step_size: `α`. If it is given, `increase` is not used.
        damping: `λ`.
        forward, weights: as for `natgrad.fisher`.

    Returns:
        The losses on `forget`, and the predicted increase of the loss on the retained data.

    Raises:
        TypeError, ValueError: if `F` is not a matrix of this model, or if the data have no gradient; ValueError also if
            `F + λ I` is not positive definite, or if a step leads to a loss that is not finite. The model is then
            unchanged.

    Example:
        >>> import torch, natgrad
        >>> loss = torch.nn.MSELoss()
        >>> x, y = torch.randn(50, 3, dtype=torch.float64), torch.randn(50, 1, dtype=torch.float64)
        >>> def fitted(x, y):
        ...     model = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
        ...     model.weight.data = torch.linalg.lstsq(x, y).solution.mT
        ...     return model
        >>> model = fitted(x, y)
        >>> F = natgrad.fisher(model, loss, (x[10:], y[10:]), "dense")
        >>> _ = natgrad.unlearn(model, loss, (x[:10], y[:10]), F, steps=1, step_size=10 / 40, damping=0.0)
        >>> torch.allclose(model.weight, fitted(x[10:], y[10:]).weight)
        True

    Reference: McKinney et al. (2026), arXiv:2602.10568 (K-FADE, with K-FAC).
    """
    check_count("steps", steps, "steps")
    check_number("increase", increase, positive=True)
    check_number("step_size", step_size, positive=True, optional=True)
    check_damping(damping)
    own = parameters_of(model, F)
    objective = Objective(problem_of(model, loss, forget, forward, weights, params=list(own)))
    warn_in_training(objective.model)
    before, start = {n: p.detach().clone() for n, p in own.items()}, flat(F, own)
    inverse = F.inverse(damping)
    losses: list[float] = []
    try:
        for _ in range(steps):
            value, gradient = _objective(objective, own, F)
            losses.append(value)
            direction = inverse @ gradient
            rise = float(gradient @ direction)
            if not rise > 0:
                raise ValueError(_why(gradient, damping))
            alpha = step_size if step_size is not None else (2 * increase / rise) ** 0.5 / steps
            with torch.no_grad():
                for p, d in zip(own.values(), F.space.unflatten(direction), strict=True):
                    p.add_(alpha * d)
        losses.append(_objective(objective, own, F)[0])
    except BaseException:
        with torch.no_grad():
            for n, p in own.items():
                p.copy_(before[n])
        raise
    change = flat(F, own) - start
    return Unlearned(tuple(losses), float(0.5 * (change @ (F @ change))))


def _objective(objective: Objective, own: dict[str, nn.Parameter], F: Operator) -> tuple[float, Tensor]:
    """The objective over the data and its gradient, a flat vector of `F`.

    Raises:
        ValueError: if they are not finite.
    """
    total, gradient = 0.0, torch.zeros(F.space.size, dtype=F.dtype, device=F.device)
    for weight, problem in zip(objective.weights, objective.terms.values(), strict=True):
        value, slope = _loss(problem, own, F)
        total += weight * float(value)
        gradient += weight * slope
    if not (isfinite(total) and torch.isfinite(gradient).all()):
        raise ValueError(
            f"the loss on the data to forget is {total:g}, or its gradient is not finite; look for NaN in the data, or "
            "pass a smaller increase or step_size"
        )
    return total, gradient


def _loss(problem: Problem, own: dict[str, nn.Parameter], F: Operator) -> tuple[Tensor, Tensor]:
    """The value and the gradient of one loss."""
    curvature, leaves = problem.curvature, list(own.values())
    total, mass = torch.zeros((), dtype=F.dtype, device=F.device), torch.zeros((), dtype=F.dtype, device=F.device)
    gradient = torch.zeros(F.space.size, dtype=F.dtype, device=F.device)
    for batch in problem:
        with torch.enable_grad():
            output, target = problem.run(problem.model, batch)
            value = curvature.loss(output, target)
        weight = curvature.normalizer(output, target).to(F.dtype) if problem.is_mean else mass.new_ones(())
        if problem.is_mean and not weight > 0:
            continue  # all of its targets are ignored
        total += weight * value.detach()
        mass += weight
        if value.requires_grad:  # a term may depend on other parameters alone
            found = torch.autograd.grad(value, leaves, allow_unused=True)
            every = zip(leaves, found, strict=True)
            gradient += weight * F.space.flatten(
                tuple((torch.zeros_like(p) if g is None else g).to(F.dtype) for p, g in every)
            )
    if problem.is_mean:
        check_mass(mass, True)
        total, gradient = total / mass, gradient / mass
    return total, gradient


def _why(gradient: Tensor, damping: float) -> str:
    if not gradient.any():
        return (
            "the data to forget have no gradient: their loss does not depend on the parameters of F; nothing to unlearn"
        )
    return f"F with damping={damping} is indefinite; pass a larger damping, or the Fisher information"
