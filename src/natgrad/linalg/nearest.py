"""The Kronecker product that is nearest to a layer's exact block, in Frobenius norm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg.eigen import symmetric_part

STEPS = 500
"""The largest number of iterations."""
BUDGET = 1 << 25
"""The approximate number of entries that are held at a time."""
Side = Callable[[Tensor], Tensor]


def nearest_kronecker(
    output_side: Side, input_side: Side, A: Float[Tensor, "i i"], outputs: int
) -> tuple[Float[Tensor, "i i"], Float[Tensor, "o o"]]:
    """`A`, `B` with the smallest `‖G − A ⊗ B‖`, for `G = Σ s sᵀ`, where each `s` stacks the columns of a matrix `S`,
    `(o, i)`.

    They are the first singular pair of the rearranged `G` (Van Loan & Pitsianis 1993), by power iteration on the cases:

        B ← Σ S A Sᵀ / ‖A‖²,    A ← Σ Sᵀ B S / ‖B‖²

    Each step finds the best `B` for the current `A`, or the reverse, and keeps both positive semidefinite. The
    iteration ends when `‖A‖ ‖B‖`, the singular value, no longer grows beyond rounding.

    Args:
        output_side: computes `Σ S A Sᵀ` from `A`.
        input_side: computes `Σ Sᵀ B S` from `B`.
        A: the start, positive semidefinite; K-FAC's input factor. The returned `A` has the same norm.
        outputs: the number of rows of `B`.
    """
    size = A.norm()
    B = A.new_zeros(outputs, outputs)
    if not size > 0:
        return A, B
    before = 0.0
    for _ in range(STEPS):
        B = output_side(A) / A.norm().square()
        if not B.norm() > 0:
            return A, B
        A = input_side(B) / B.norm().square()
        value = float(A.norm() * B.norm())
        if value <= before * (1 + 4 * torch.finfo(A.dtype).eps):
            break
        before = value
    scale = size / A.norm()
    return scale * A, B / scale


def nearest_of_cases(
    h: Float[Tensor, "n t i"], g: Float[Tensor, "n k t o"], A: Float[Tensor, "i i"]
) -> tuple[Float[Tensor, "i i"], Float[Tensor, "o o"]]:
    """The nearest Kronecker product for `S_ik = Σ_t g_ikt h_itᵀ`."""
    return nearest_kronecker(partial(_output_side, h, g), partial(_input_side, h, g), A, g.shape[-1])


def nearest_of_columns(
    S: Float[Tensor, "m o i"], A: Float[Tensor, "i i"]
) -> tuple[Float[Tensor, "i i"], Float[Tensor, "o o"]]:
    """The nearest Kronecker product for explicit matrices."""

    def output_side(A: Tensor) -> Tensor:
        return torch.stack([torch.tensordot(s @ A, s, ([0, 2], [0, 2])) for s in S.split(step)]).sum(0)

    def input_side(B: Tensor) -> Tensor:
        return torch.stack([torch.tensordot(B @ s, s, ([0, 1], [0, 1])) for s in S.split(step)]).sum(0)

    step = max(1, BUDGET // max(1, S.shape[1] * S.shape[2]))
    return nearest_kronecker(
        lambda A: symmetric_part(output_side(A)), lambda B: symmetric_part(input_side(B)), A, S.shape[1]
    )


def _output_side(
    h: Float[Tensor, "n t i"], g: Float[Tensor, "n k t o"], A: Float[Tensor, "i i"]
) -> Float[Tensor, "o o"]:
    """`Σ_ik S A Sᵀ = Σ_ik Σ_tu (h_tᵀ A h_u) g_t g_uᵀ`."""
    B = g.new_zeros(g.shape[-1], g.shape[-1])
    for x, y in _parts(h, g):
        inner = (x @ A) @ x.mT  # (n, t, t)
        weighted = (inner.unsqueeze(1) @ y).flatten(0, 2)
        B.addmm_(y.flatten(0, 2).mT, weighted)
    return symmetric_part(B)


def _input_side(
    h: Float[Tensor, "n t i"], g: Float[Tensor, "n k t o"], B: Float[Tensor, "o o"]
) -> Float[Tensor, "i i"]:
    """`Σ_ik Sᵀ B S = Σ_i Σ_tu (Σ_k g_tᵀ B g_u) h_t h_uᵀ`."""
    A = h.new_zeros(h.shape[-1], h.shape[-1])
    for x, y in _parts(h, g):
        inner = ((y @ B) @ y.mT).sum(1)
        A.addmm_(x.flatten(0, 1).mT, (inner @ x).flatten(0, 1))
    return symmetric_part(A)


def _parts(h: Tensor, g: Tensor) -> zip[tuple[Tensor, Tensor]]:
    """Chunks of examples."""
    _, k, t, o = g.shape
    step = max(1, BUDGET // max(1, k * t * (t + o) + t * h.shape[-1]))
    return zip(h.split(step), g.split(step), strict=True)
