"""AdamW's direction, for the parameters of an optimizer that takes another step elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from natgrad.optim.vectors import Vector


def adamw(g: Vector, states: Mapping[str, dict[str, Any]], betas: tuple[float, float], eps: float) -> Vector:
    """`m̂ / (√v̂ + ε)` with the bias-corrected averages of the gradients and of their squares, which are kept in the
    states as `torch.optim.AdamW` names them.

    Reference: Loshchilov & Hutter (2019), "Decoupled Weight Decay Regularization", arXiv:1711.05101.
    """
    if not g:
        return {}
    for n, gradient in g.items():
        if "exp_avg" not in states[n]:
            states[n] |= {"step": 0, "exp_avg": torch.zeros_like(gradient), "exp_avg_sq": torch.zeros_like(gradient)}
        states[n]["step"] += 1
    gradients = list(g.values())
    first, second = ([states[n][key] for n in g] for key in ("exp_avg", "exp_avg_sq"))
    torch._foreach_lerp_(first, gradients, 1 - betas[0])
    torch._foreach_mul_(second, betas[1])
    torch._foreach_addcmul_(second, gradients, gradients, 1 - betas[1])
    ages = [states[n]["step"] for n in g]
    roots = torch._foreach_sqrt(second)
    torch._foreach_div_(roots, [(1 - betas[1] ** t) ** 0.5 for t in ages])
    torch._foreach_add_(roots, eps)
    torch._foreach_mul_(roots, [1 - betas[0] ** t for t in ages])
    return dict(zip(g, torch._foreach_div(first, roots), strict=True))


def decayed_(parameters: list[Tensor], directions: list[Tensor], share: float, cautious: bool) -> None:
    """Multiplies parameters by `1 − share`; where it is `cautious`, only the entries that the step moves to zero.

    Reference: Chen et al. (2025), "Cautious Weight Decay", arXiv:2510.12402.
    """
    if share == 0:
        return
    if not cautious:
        torch._foreach_mul_(parameters, 1 - share)
        return
    for p, d in zip(parameters, directions, strict=True):
        p.sub_(p * (p * d > 0), alpha=share)
