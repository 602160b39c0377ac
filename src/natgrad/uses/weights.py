"""The parameters of a model that a matrix is of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from natgrad.checks.values import described
from natgrad.checks.warning import warn
from natgrad.linalg import Operator
from natgrad.uses.subset import moved


def parameters_of(model: nn.Module, F: Any, name: str = "F", as_then: bool = True) -> dict[str, nn.Parameter]:
    """The model's parameters in the order of the matrix's vectors. A RuntimeWarning says if they have changed since the
    matrix was computed, unless they need not be `as_then`.

    Raises:
        TypeError: if it is no matrix of named parameters, or the model no module.
        ValueError: if it is of another model, or in another dtype or on another device; or if the model has weights
            that are not finite, unless they need not be `as_then`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {described(model)}; expected an instance of torch.nn.Module")
    if not isinstance(F, Operator):
        raise TypeError(f"{name} is {described(F)}; expected a matrix, such as natgrad.fisher(model, loss, data)")
    if F.space.names is None:
        raise TypeError(f"{name} has no parameter names; expected the matrix of a whole model, as natgrad.fisher's")
    own = dict(model.named_parameters())
    for n, shape in zip(F.space.names, F.space.shapes, strict=True):
        if n not in own or tuple(own[n].shape) != shape:
            has = f"shape {tuple(own[n].shape)}" if n in own else "no parameter of that name"
            raise ValueError(
                f"{name} is of another model: {n!r} has shape {shape} there, and this model has {has}; give the matrix "
                "of this model"
            )
        wanted = torch.promote_types(own[n].dtype, torch.float32)  # of parameters in half precision: float32
        if wanted != F.dtype or own[n].device != F.device:
            raise ValueError(
                f"{name} is {F.dtype} on {F.device}, and {n!r} is {own[n].dtype} on {own[n].device}; expected "
                f"{name}.to({str(own[n].device)!r}, {wanted})"
            )
    if as_then and (bad := next((n for n in F.space.names if not torch.isfinite(own[n]).all()), None)):
        raise ValueError(f"{bad!r} of the model has entries that are not finite; look for a training that diverged")
    if as_then and (other := moved(F, own)):
        warn(
            f"{name} was computed at other weights: {other!r} has changed since; compute it again at "
            "the present weights"
        )
    return {n: own[n] for n in F.space.names}


def flat(F: Operator, parameters: dict[str, nn.Parameter]) -> Tensor:
    """Their values as one vector."""
    return F.space.flatten(tuple(p.detach().to(F.dtype) for p in parameters.values()))
