"""Orthogonalized steps: the nearest orthogonal matrix of a direction, and Adam's step where there is no matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg import Block, Operator, Rows
from natgrad.linalg.centered import CenteredInverse
from natgrad.linalg.precision import bfloat16_is_fast, matmul_precision
from natgrad.linalg.space import Parts
from natgrad.optim.vectors import Vector

COEFFICIENTS = (3.4445, -4.775, 2.0315)
STEPS = 5
RMS = 0.2
"""The root mean square of AdamW's steps, to which an orthogonalized one is scaled (Liu et al. 2025)."""
SECOND_MOMENT_DECAY = 0.95
WORTH_BFLOAT16 = 2**22
"""Multiplications of one product in the iteration from which on bfloat16 is faster on a CPU. They are counted for each
matrix alone: the same matrix takes the same step on any number of ranks."""


def newton_schulz(V: Float[Tensor, "*batch o i"]) -> Float[Tensor, "*batch o i"]:
    """`U Wᵀ` of the singular value decomposition `V = U S Wᵀ`, roughly: five steps of an iteration that moves the
    singular values to between 0.7 and 1.2. Products are in bfloat16 where the processor multiplies that faster than
    float32, on CPUs for large matrices alone; a `V` in float64 stays in float64.

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
    steps. Those of one shape are done together."""
    by_shape: dict[torch.Size, list[int]] = {}
    for i, V in enumerate(matrices):
        by_shape.setdefault(V.shape, []).append(i)
    out: list[Tensor] = list(matrices)
    for shape, places in by_shape.items():
        size = RMS * max(shape) ** 0.5
        for i, O in zip(places, newton_schulz(torch.stack([matrices[i] for i in places])), strict=True):
            out[i] = size * O
    return out


StateOf = Callable[[str], dict[str, Any]]
"""A parameter's state, by name."""


def take_in_squares(g: Vector, state_of: StateOf) -> None:
    """The moving averages of the squared gradients, and the weight of what is in them: nothing at first."""
    states = [state_of(n) for n in g]
    for state, gradient in zip(states, g.values(), strict=True):
        if "second_moment" not in state:
            state["second_moment"], state["second_weight"] = torch.zeros_like(gradient), 0.0
        state["second_weight"] += (1 - SECOND_MOMENT_DECAY) * (1 - state["second_weight"])
    if not states:
        return
    # New tensors: a step that is given up has the old ones.
    values = list(g.values())
    seconds = torch._foreach_mul([state["second_moment"] for state in states], SECOND_MOMENT_DECAY)
    torch._foreach_addcmul_(seconds, values, values, 1 - SECOND_MOMENT_DECAY)
    for state, second in zip(states, seconds, strict=True):
        state["second_moment"] = second


def adam(v: Vector, state_of: StateOf, eps: float = 1e-8) -> Vector:
    """Adam's direction for a first moment `v` (Kingma & Ba 2015, arXiv:1412.6980)."""
    if not v:
        return {}
    states = [state_of(n) for n in v]
    roots = torch._foreach_sqrt([state["second_moment"] for state in states])
    torch._foreach_div_(roots, [state["second_weight"] ** 0.5 for state in states])
    torch._foreach_add_(roots, eps)
    return dict(zip(v, torch._foreach_div(list(v.values()), roots), strict=True))


def orthogonal_directions(
    v: Vector, rest: Vector, blocks: Sequence[Block], *, simple: bool, precision: str | None
) -> Vector:
    """The orthogonalized `v C⁻¹` of the blocks' weights; `rest` has the direction of what else is in them, in centered
    blocks as the change of the mean pre-activation `b + W m` (with `simple`, of `b`)."""
    matrices: list[Tensor] = []

    def collect(op: Operator, parts: Parts) -> Parts:
        matrices.append(op.apart(parts)[0])
        return parts

    with matmul_precision(precision):
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
    """Applies to every operator on rows of its own."""
    return op._each(lambda o, p: _through(o, p, apply), parts) if isinstance(op, Rows) else apply(op, parts)
