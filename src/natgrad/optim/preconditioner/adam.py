"""Adam's step, for parameters without a factor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from natgrad.optim.vectors import Vector

SECOND_MOMENT_DECAY = 0.95
"""The weight of the past in the moving averages of the squared gradients."""
StateOf = Callable[[str], dict[str, Any]]
"""A parameter's state, by name."""


def take_in_squares(g: Vector, state_of: StateOf) -> None:
    """Updates the moving averages of the squared gradients, and the total weight in each, which is zero at first."""
    states = [state_of(n) for n in g]
    for state, gradient in zip(states, g.values(), strict=True):
        if "second_moment" not in state:
            state["second_moment"], state["second_weight"] = torch.zeros_like(gradient), 0.0
        state["second_weight"] += (1 - SECOND_MOMENT_DECAY) * (1 - state["second_weight"])
    if not states:
        return
    # New tensors, so that the old ones remain if the step is not taken.
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
