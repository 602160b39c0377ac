"""Projections on the directions of the lowest or the highest curvature."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.checks.values import check_choice, check_within
from natgrad.linalg.block_diagonal import BlockDiagonal
from natgrad.linalg.centered import CenteredKronecker
from natgrad.linalg.dense import Dense
from natgrad.linalg.diagonal import Diagonal
from natgrad.linalg.eigen import FORMED, eigh
from natgrad.linalg.eigenvalues import holds_tensors
from natgrad.linalg.kronecker import (
    Homogeneous,
    Kronecker,
    KroneckerEigen,
    with_bias_column,
    without_bias_column,
)
from natgrad.linalg.later import later
from natgrad.linalg.operator import Operator
from natgrad.linalg.rows import Rows
from natgrad.linalg.space import Parts

SIDES = {"smallest": "the directions of the lowest curvature", "largest": "those of the highest"}
Multiply = Callable[[Parts, Tensor], Parts]
"""Multiplies a vector's coefficients in the eigenbasis by given numbers."""


@later
def project(operator: Operator, v: Any, keep: float, which: str) -> Any:
    """The part of `v` in the span of the eigenvectors with the given share `keep`."""
    check_within("keep", keep, "[0, 1]")
    check_choice("which", which, SIDES, meanings=SIDES)
    parts, join = operator._read(v, f"{operator._label()}.project(v)")
    e, multiply = eigenbasis(operator)
    count = round(keep * len(e))
    kept = e.argsort(descending=which == "largest", stable=True)[:count]
    return join(multiply(parts, torch.zeros_like(e).index_fill(0, kept, 1.0)))


@singledispatch
def eigenbasis(operator: Operator) -> tuple[Float[Tensor, " size"], Multiply]:
    """The eigenvalues, and the function that multiplies coefficients in the same order.

    Raises:
        TypeError: if the structure has no eigenbasis, and is too large to be formed.
    """
    if operator.space.size > FORMED or not holds_tensors(operator):
        raise TypeError(
            f"{operator._label()} has a structure without a known eigenbasis, and with {operator.space.size} rows it "
            "is too large to form; use structure='kfac', 'diagonal' or 'dense', or 'ekfac' with centered=False"
        )
    return eigenbasis(Dense(operator._dense(), operator.space))


@eigenbasis.register
def _(operator: Dense) -> tuple[Tensor, Multiply]:
    e, U = eigh(operator.matrix, "the matrix")
    space = operator.space
    return e, lambda parts, c: space.unflatten(((space.flatten(parts) @ U) * c) @ U.mT)


@eigenbasis.register
def _(operator: Diagonal) -> tuple[Tensor, Multiply]:
    space = operator.space
    return space.flatten(operator.values), lambda parts, c: space.unflatten(space.flatten(parts) * c)


@eigenbasis.register
def _(operator: KroneckerEigen) -> tuple[Tensor, Multiply]:
    def multiply(parts: Parts, c: Tensor) -> Parts:
        return KroneckerEigen(operator.U_A, operator.U_B, c.view(operator.values.shape))._matmul(parts)

    return operator.values.flatten(), multiply


@eigenbasis.register
def _(operator: Kronecker) -> tuple[Tensor, Multiply]:
    return eigenbasis(operator.eigen())


@eigenbasis.register
def _(operator: Homogeneous) -> tuple[Tensor, Multiply]:
    e, multiply = eigenbasis(operator.stacked)
    return e, lambda parts, c: without_bias_column(multiply(with_bias_column(parts), c))


@eigenbasis.register
def _(operator: CenteredKronecker) -> tuple[Tensor, Multiply]:
    """The eigenbasis of `A ⊗ B`, which is the same matrix."""
    return eigenbasis(Homogeneous(Kronecker(operator.A, operator.B)))


@eigenbasis.register
def _(operator: Rows) -> tuple[Tensor, Multiply]:
    found = [eigenbasis(part) for part in operator.parts]
    sizes = [len(e) for e, _ in found]
    heights = [part.space.shapes[0][0] for part in operator.parts]

    def multiply(parts: Parts, c: Tensor) -> Parts:
        axes = [p.ndim - len(s) for p, s in zip(parts, operator.space.shapes, strict=True)]
        pieces = zip(*(p.split(heights, axis) for p, axis in zip(parts, axes, strict=True)), strict=True)
        out = [its(tuple(piece), own) for (_, its), piece, own in zip(found, pieces, c.split(sizes), strict=True)]
        return tuple(torch.cat(its, axis) for its, axis in zip(zip(*out, strict=True), axes, strict=True))

    return torch.cat([e for e, _ in found]), multiply


@eigenbasis.register
def _(operator: BlockDiagonal) -> tuple[Tensor, Multiply]:
    found = {name: eigenbasis(block.operator) for name, block in operator.layers.items()}
    sizes = [len(e) for e, _ in found.values()]

    def multiply(parts: Parts, c: Tensor) -> Parts:
        v = dict(zip(operator.space.names or (), parts, strict=True))
        out: dict[str, Tensor] = {}
        for (name, (_, its)), own in zip(found.items(), c.split(sizes), strict=True):
            block = operator.layers[name]
            out |= block.named(its(block.parts(v), own))
        return tuple(out[n] for n in operator.space.names or ())

    return torch.cat([e for e, _ in found.values()]), multiply
