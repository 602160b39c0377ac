"""Orthogonalized steps: the nearest orthogonal matrix of a direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg import Block, Operator, Rows
from natgrad.linalg.centered import CenteredInverse
from natgrad.linalg.precision import bfloat16_is_fast, matmul_precision
from natgrad.linalg.space import Parts
from natgrad.optim.vectors import Vector

COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Of the odd polynomial of fifth degree that each iteration applies to the singular values."""
STEPS = 5
RMS = 0.2
"""The root mean square of AdamW's steps. An orthogonalized step is scaled to it (Liu et al. 2025)."""
WORTH_BFLOAT16 = 2**22
"""From this number of multiplications in one product on, bfloat16 is faster on a CPU. They are counted for each matrix
separately: the same matrix takes the same step on any number of ranks."""


def newton_schulz(V: Float[Tensor, "*batch o i"]) -> Float[Tensor, "*batch o i"]:
    """Approximately `U Wᵀ` of the singular value decomposition `V = U S Wᵀ`, by five iterations that move the singular
    values to between 0.7 and 1.2.

    Products are in bfloat16 if the processor multiplies it faster than float32 (on CPUs, only for large matrices). A
    `V` in float64 stays in float64.

    Example:
        >>> import torch
        >>> V = torch.diag(torch.tensor([5.0, 1.0, 0.5], dtype=torch.float64))
        >>> ((newton_schulz(V).diagonal() - 1).abs() < 0.35).all().item()
        True

    Reference: Jordan et al. (2024), "Muon: an optimizer for hidden layers in neural networks"; the iteration is
    Kovarik's (1970) and Björck & Bowie's (1971), with Jordan's coefficients.
    """
    a, b, c = COEFFICIENTS
    tiny = torch.finfo(V.dtype).tiny
    X = V / V.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)  # the squares of small entries would vanish
    X = X.to(_working_dtype(V))
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp_min(tiny)
    X = X.reshape(-1, *X.shape[-2:])
    for _ in range(STEPS):
        S = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(S, S, S, beta=b, alpha=c), X, beta=a)
    return (X.mT if tall else X).to(V.dtype).reshape(V.shape)


def _working_dtype(V: Tensor) -> torch.dtype:
    if V.dtype == torch.float64:
        return torch.float64
    small, large = sorted(V.shape[-2:])
    if V.device.type == "cpu" and small * small * large < WORTH_BFLOAT16:
        return torch.float32
    return torch.bfloat16 if bfloat16_is_fast(V.device) else torch.float32


def orthogonalized(matrices: Sequence[Float[Tensor, "_ _"]]) -> list[Tensor]:
    """Each matrix's orthogonal factor times `0.2 √max(d_out, d_in)`, so that its root mean square is that of AdamW's
    steps. Matrices of one shape are computed together."""
    by_shape: dict[torch.Size, list[int]] = {}
    for i, V in enumerate(matrices):
        by_shape.setdefault(V.shape, []).append(i)
    out: list[Tensor] = list(matrices)
    for shape, places in by_shape.items():
        size = RMS * max(shape) ** 0.5
        for i, O in zip(places, newton_schulz(torch.stack([matrices[i] for i in places])), strict=True):
            out[i] = size * O
    return out


def orthogonal_directions(
    v: Vector, rest: Vector, blocks: Sequence[Block], *, simple: bool, precision: str | None
) -> Vector:
    """The orthogonalized `v C⁻¹` of the blocks' weights. `rest` has the directions of the other parts of the blocks: in
    a centered block the change of the mean pre-activation `b + W m`, or (`simple`) of `b`.

    `v C⁻¹` is not in bfloat16, also with the precision `"medium"`: orthogonalization enlarges its small singular
    values, and with inputs of few directions they would be rounding errors.
    """
    matrices: list[Tensor] = []

    def collect(op: Operator, parts: Parts) -> Parts:
        matrices.append(op.apart(parts)[0])
        return parts

    with matmul_precision("high" if precision == "medium" else precision):
        for block in blocks:
            _through(block.operator, block.parts(v), collect)
    found = iter(orthogonalized(matrices))

    def replace(op: Operator, parts: Parts) -> Parts:
        W, rest = next(found), parts[1:]
        if isinstance(op, CenteredInverse) and not simple:
            rest = tuple(c - W @ op.m for c in rest)
        return (W, *rest)

    out: Vector = {}
    for block in blocks:
        out |= block.named(_through(block.operator, block.parts({**v, **rest}), replace))
    return out


def _through(op: Operator, parts: Parts, apply: Callable[[Operator, Parts], Parts]) -> Parts:
    """Applies a function to the operator; or, if it consists of rows of several layers, to the operator of each."""
    return op._each(lambda o, p: _through(o, p, apply), parts) if isinstance(op, Rows) else apply(op, parts)
