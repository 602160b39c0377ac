"""Muon's momentum, for the parameters of an optimizer that takes another step elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def momentum(
    gradients: Mapping[str, Tensor], states: Mapping[str, dict[str, Any]], mu: float, nesterov: bool
) -> dict[str, Tensor]:
    """The averages `M ← μ M + (1 − μ) ∇` in `states`, after they were updated; with Nesterov, `μ M + (1 − μ) ∇`."""
    if not gradients:
        return {}
    new = list(gradients.values())
    for n, g in gradients.items():
        if "momentum_buffer" not in states[n]:
            states[n]["momentum_buffer"] = torch.zeros_like(g)
    buffers = [states[n]["momentum_buffer"] for n in gradients]
    torch._foreach_lerp_(buffers, new, 1 - mu)
    ahead = torch._foreach_lerp(new, buffers, mu) if nesterov else buffers
    return dict(zip(gradients, ahead, strict=True))
