"""The precisions of a Gaussian prior: one for all weights, or one for each layer, parameter or entry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from natgrad.checks.values import check_choice, described, did_you_mean
from natgrad.linalg import BlockDiagonal, Operator

Precisions = dict[str, Tensor]
"""For each parameter a number, or a number for each of its entries."""
GROUPS = {
    "one": "the same for all weights",
    "layer": "one for each layer",
    "parameter": "one for each named parameter",
    "entry": "one for each single weight",
}


def layers_of(M: Operator) -> dict[str, tuple[str, ...]]:
    """The parameters of each layer: of each block, or of each module where the matrix has no blocks."""
    if isinstance(M, BlockDiagonal):
        return {name: block.names for name, block in M.layers.items()}
    return M.space.groups()


def read_precisions(value: Any, M: Operator) -> Precisions:
    """What a user gave as the prior's precision, for each parameter of a matrix.

    Raises:
        TypeError: if it is neither a number nor a dictionary.
        ValueError: if one is not above zero, or has a shape that does not fit; if a name is unknown or missing.
    """
    names, shapes = M.space.names or (), dict(zip(M.space.names or (), M.space.shapes, strict=True))
    if isinstance(value, Mapping):
        layers = layers_of(M)
        given: dict[str, Any] = {}
        for key, its in value.items():
            if key not in shapes and key not in layers:
                raise ValueError(
                    f"prior_precision names {key!r}; expected parameters or layers, some of "
                    f"{', '.join(list(layers)[:6])}{did_you_mean(key, [*layers, *names])}"
                )
            given |= dict.fromkeys(layers.get(key, ()), its) if key not in shapes else {key: its}
        missing = [n for n in names if n not in given]
        if missing:
            raise ValueError(f"prior_precision lacks {missing[0]!r}; expected a number > 0 for each parameter or layer")
    else:
        given = dict.fromkeys(names, value)
    return {n: _checked(n, given[n], shapes[n], M) for n in names}


def _checked(name: str, value: Any, shape: tuple[int, ...], M: Operator) -> Tensor:
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise TypeError(
            f"prior_precision is {described(value)} for {name!r}; expected a number > 0, a Tensor of shape {shape}, or "
            "a dict of them by parameter or layer"
        )
    delta = torch.as_tensor(value, dtype=M.dtype, device=M.device)
    delta = delta.reshape(()) if delta.numel() == 1 else delta
    if delta.ndim and tuple(delta.shape) != shape:
        raise ValueError(
            f"prior_precision has shape {tuple(delta.shape)} for {name!r}; expected a number, or shape {shape}"
        )
    smallest = float(delta.min())
    if not (smallest > 0 and torch.isfinite(delta).all()):
        raise ValueError(
            f"prior_precision={smallest:g} for {name!r} is not usable: expected a finite number > 0, as a prior of "
            "precision zero is no distribution; use a small one, such as 1e-3"
        )
    return delta


def groups_of(per: str, M: Operator) -> dict[str, tuple[str, ...]]:
    """The parameters that share a precision, by a name of the group."""
    check_choice("per", per, GROUPS, meanings=GROUPS)
    if per == "one":
        return {"all": M.space.names or ()}
    return layers_of(M) if per == "layer" else {n: (n,) for n in M.space.names or ()}
