"""Averages of the iterates. With noisy gradients they are better than the last iterate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

RECENCY = 9
"""With a larger number, the first iterates are forgotten faster."""


def take_in(parameters: Mapping[str, Tensor], state_of: Callable[[str], dict[str, Any]], decay: float) -> None:
    """Moves the averages towards the parameters: at the `t`-th update by the larger of `10 / (9 + t)` and `1 − decay`.

    Reference: Shamir & Zhang (2013), "Stochastic Gradient Descent for Non-smooth Optimization", section 4.
    """
    by_weight: dict[float, list[str]] = {}
    for n, p in parameters.items():
        state = state_of(n)
        if "average" not in state:
            state["average"], state["averaged"] = p.detach().clone(), 0
        state["averaged"] += 1
        weight = max(1 - decay, (RECENCY + 1) / (RECENCY + state["averaged"]))
        by_weight.setdefault(weight, []).append(n)
    for weight, names in by_weight.items():
        torch._foreach_lerp_([state_of(n)["average"] for n in names], [parameters[n] for n in names], weight)


@contextlib.contextmanager
def swapped(parameters: Mapping[str, Tensor], state_of: Callable[[str], dict[str, Any]]) -> Iterator[None]:
    """Within this context, the parameters are their averages. Afterwards they are restored."""
    averaged = {n: p for n, p in parameters.items() if "average" in state_of(n)}
    before = {n: p.detach().clone() for n, p in averaged.items()}
    try:
        with torch.no_grad():
            for n, p in averaged.items():
                p.copy_(state_of(n)["average"])
        yield
    finally:
        with torch.no_grad():
            for n, p in averaged.items():
                p.copy_(before[n])
