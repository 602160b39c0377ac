"""Elastic weight consolidation: a penalty on changes of weights that earlier data need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from natgrad.checks.values import check_number
from natgrad.linalg.eigenvalues import holds_tensors
from natgrad.uses.weights import flat, parameters_of


def ewc(model: nn.Module, F: Any, strength: float = 1.0) -> EWC:
    """The penalty `½ strength (θ − θ*)ᵀ F (θ − θ*)`, where `θ*` are the present weights. Add it to the loss of new
    data.

    Args:
        model: the model, trained on the earlier data.
        F: its Fisher information there: `natgrad.fisher(model, loss, earlier)`, of any structure.
        strength: a factor. If both losses are means over equally many examples, 1 gives both data sets the same weight.

    Returns:
        An object that you call without arguments, or with another model that has the same parameters.

    Raises:
        TypeError, ValueError: if `F` is not a matrix of this model, if `F` is implicit (it would change with the
            model's weights), or if the strength is not a number `>= 0`.

    Example:
        >>> import torch, natgrad
        >>> model, loss = torch.nn.Linear(2, 1), torch.nn.MSELoss()
        >>> earlier = torch.randn(20, 2), torch.randn(20, 1)
        >>> penalty = natgrad.ewc(model, natgrad.fisher(model, loss, earlier), strength=10.0)
        >>> x, y = torch.randn(20, 2), torch.randn(20, 1)
        >>> (loss(model(x), y) + penalty()).backward()

    Reference: Kirkpatrick et al. (2017), arXiv:1612.00796; Ritter, Botev & Barber (2018), arXiv:1805.07810, for K-FAC.
    """
    return EWC(model, F, strength)


class EWC:
    """What `natgrad.ewc` returns: a quadratic penalty on the distance from a model's weights.

    Args:
        model: as for `natgrad.ewc`.
        F: as for `natgrad.ewc`.
        strength: as for `natgrad.ewc`.

    Example:
        >>> import torch, natgrad
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> F = natgrad.fisher(model, torch.nn.MSELoss(), (torch.ones(4, 1), torch.zeros(4, 1)))  # it is 2
        >>> penalty = natgrad.ewc(model, F, strength=3.0)
        >>> _ = torch.nn.init.constant_(model.weight, model.weight.item() + 2.0)
        >>> round(penalty().item(), 3)
        12.0
    """

    def __init__(self, model: nn.Module, F: Any, strength: float = 1.0):
        check_number("strength", strength)
        self.anchor = flat(F, parameters_of(model, F)).clone()
        if not holds_tensors(F):
            raise TypeError(
                "F is implicit, so it would change with the model's weights; expected a fixed matrix: use "
                "structure='kfac', 'ekfac', 'block', 'diagonal' or 'dense'"
            )
        self.model, self.F, self.strength = model, F, strength

    def __call__(self, model: nn.Module | None = None) -> Tensor:
        """The penalty, a scalar with the gradient `strength F (θ − θ*)`. It has no second derivative.

        Raises:
            ValueError: if `F` is indefinite, and its curvature is negative in the direction in which the weights have
                moved.
        """
        F = self.F
        parameters = parameters_of(model or self.model, F, as_then=False)
        d = F.space.flatten(tuple(p.to(F.dtype) for p in parameters.values())) - self.anchor
        with torch.no_grad():
            Fd = F @ d.detach()
            if d @ Fd < -(torch.finfo(F.dtype).eps ** 0.5) * d.norm() * Fd.norm():
                raise ValueError(
                    f"F is indefinite: its curvature is {float(d @ Fd / d.square().sum()):.3g} in the direction in "
                    "which the weights have moved, so the penalty would be negative; use the Fisher information, "
                    "natgrad.fisher"
                )
        # F d is held constant, so that the gradient is F d, and not half of it.
        return self.strength * (d @ Fd - 0.5 * (d.detach() @ Fd))
