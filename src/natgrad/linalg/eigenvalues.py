"""All eigenvalues of a matrix, from its structure."""

from __future__ import annotations

from functools import singledispatch

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg import factor
from natgrad.linalg.arguments import check_damping
from natgrad.linalg.block_diagonal import BlockDiagonal
from natgrad.linalg.centered import CenteredKronecker
from natgrad.linalg.combination import Scaled
from natgrad.linalg.coordinates import CoordinateBlocks
from natgrad.linalg.dense import Dense
from natgrad.linalg.diagonal import Diagonal
from natgrad.linalg.eigen import FORMED as FORMED
from natgrad.linalg.eigen import eigh, positive
from natgrad.linalg.exact import ExactBlock
from natgrad.linalg.kronecker import Homogeneous, Kronecker, KroneckerEigen
from natgrad.linalg.later import later
from natgrad.linalg.operator import Operator
from natgrad.linalg.rows import Rows
from natgrad.linalg.state import dump


@later
def eigenvalues(operator: Operator) -> Float[Tensor, " size"]:
    """All eigenvalues of an operator, in no particular order.

    Raises:
        TypeError: if its structure gives none, and it is too large to be formed.
    """
    return _of(operator)


@later
def spectral_norm(operator: Operator) -> Tensor:
    """The largest absolute eigenvalue."""
    try:
        return eigenvalues(operator).abs().max()
    except TypeError:
        return operator.top_eigenvalues(1, which="magnitude").values[0].abs()


@later
def condition(operator: Operator, damping: float) -> Tensor:
    """The largest over the smallest eigenvalue of the damped matrix."""
    check_damping(damping)
    try:
        e = eigenvalues(operator)
    except TypeError:
        e = torch.cat([operator.top_eigenvalues(1, which=which).values for which in ("largest", "smallest")])
    e = positive(e + damping, operator._label(), damping)
    return e.max() / e.min()


@singledispatch
def _of(operator: Operator) -> Tensor:
    if operator.space.size > FORMED or not holds_tensors(operator):
        raise TypeError(
            f"{operator._label()} has a structure without known eigenvalues, and with {operator.space.size} rows it "
            "is too large to form; use top_eigenvalues(k) or spectral_density(), which need only products"
        )
    return eigh(operator._dense(), operator._label())[0]


def holds_tensors(operator: Operator) -> bool:
    """Whether an operator consists of tensors, not of a model and data."""
    try:
        dump(operator)
    except TypeError:
        return False
    return True


@_of.register
def _(operator: Dense) -> Tensor:
    return eigh(operator.matrix, "the matrix")[0]


@_of.register
def _(operator: Diagonal) -> Tensor:
    return operator.space.flatten(operator.values)


@_of.register
def _(operator: KroneckerEigen) -> Tensor:
    return operator.values.flatten()


@_of.register
def _(operator: Kronecker) -> Tensor:
    return _products(operator.A, operator.B)


@_of.register
def _(operator: CenteredKronecker) -> Tensor:
    """The eigenvalues of `A ⊗ B`."""
    return _products(operator.A, operator.B)


def _products(A: Tensor, B: Tensor) -> Float[Tensor, " size"]:
    """The eigenvalues of `A ⊗ B`; factor eigenvalues at rounding level count as zero."""
    found = []
    for F, name in ((B, "the factor B"), (A, "the factor A")):
        e = factor.eigen(F, name)[0]
        found.append(torch.where(e.abs() > torch.finfo(e.dtype).eps * len(e) * e.abs().max(), e, 0.0))
    return torch.outer(*found).flatten()


@_of.register
def _(operator: Homogeneous) -> Tensor:
    return _of(operator.stacked)


@_of.register
def _(operator: ExactBlock) -> Tensor:
    e = operator.spectrum()
    return torch.cat([e, e.new_zeros(max(0, operator.space.size - len(e)))])


@_of.register
def _(operator: CoordinateBlocks) -> Tensor:
    """The eigenvalues of `[[p, q], [q, s]]`: `(p + s)/2 ± √((p − s)²/4 + q²)`."""
    p, q, s = operator.products()
    half, root = (p + s) / 2, torch.hypot((p - s) / 2, q)
    return torch.cat([half - root, half + root])


@_of.register
def _(operator: Rows) -> Tensor:
    return torch.cat([_of(part) for part in operator.parts])


@_of.register
def _(operator: Scaled) -> Tensor:
    return operator.factor * _of(operator.operator)


@_of.register
def _(operator: BlockDiagonal) -> Tensor:
    return torch.cat([_of(op) for op in operator.operators])
