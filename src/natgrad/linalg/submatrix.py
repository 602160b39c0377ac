"""A part of a matrix: the rows and columns of some named parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from natgrad.checks.values import described, did_you_mean
from natgrad.linalg.block_diagonal import BlockDiagonal
from natgrad.linalg.dense import Dense
from natgrad.linalg.diagonal import Diagonal
from natgrad.linalg.later import later
from natgrad.linalg.operator import Operator
from natgrad.linalg.restriction import Restriction
from natgrad.linalg.space import Space


@later
def submatrix(operator: Operator, names: Any) -> Operator:
    """The rows and columns of some named parameters, in the order of the matrix."""
    wanted = _parameters(operator, names)
    own = operator.space
    space = Space(tuple(s for n, s in zip(own.names or (), own.shapes, strict=True) if n in wanted), tuple(wanted))
    if isinstance(operator, Dense):
        parts = operator.space.unflatten(torch.arange(own.size, device=operator.device))
        index = torch.cat([p.flatten() for n, p in zip(own.names or (), parts, strict=True) if n in wanted])
        return Dense(operator.matrix[index[:, None], index], space)
    if isinstance(operator, Diagonal):
        values = zip(own.names or (), operator.values, strict=True)
        return Diagonal(tuple(v for n, v in values if n in wanted), space)
    if isinstance(operator, BlockDiagonal):
        touched = {name: block for name, block in operator.layers.items() if set(block.names) & set(wanted)}
        if all(set(block.names) <= set(wanted) for block in touched.values()):
            return BlockDiagonal(touched, space)
    return Restriction(operator, tuple(wanted))


def _parameters(operator: Operator, names: Any) -> list[str]:
    own = operator.space.names
    if own is None:
        raise TypeError(f"{operator._label()} has no named parameters; take a part of the whole model's matrix")
    if not isinstance(names, str) and not (isinstance(names, Iterable) and all(isinstance(n, str) for n in names)):
        raise TypeError(f"{operator._label()} is indexed by {described(names)}; expected a name, or a list of names")
    chosen: set[str] = set()
    for n in [names] if isinstance(names, str) else list(names):
        inside = {o for o in own if o == n or o.startswith(f"{n}.")}
        if not inside:
            raise KeyError(
                f"no parameter or module has the name {n!r}; expected some of "
                f"{', '.join(own[:6])}{did_you_mean(n, own)}"
            )
        chosen |= inside
    if not chosen:
        raise ValueError("the list of names is empty; expected at least one parameter")
    return [o for o in own if o in chosen]
