"""Momentum as in torch's optimizers."""

from __future__ import annotations

import torch

from natgrad.optim.parameters import Parameters
from natgrad.optim.vectors import Vector


def heavy_ball(g: Vector, parameters: Parameters) -> Vector:
    """`v ← μ v + ∇`, with `v = ∇` at first, as in `torch.optim.SGD`."""
    v = dict(g)
    for group, names in parameters.by_group(g):
        if group["momentum"] == 0:
            continue
        states = {n: parameters.state_of(n) for n in names}
        begun = [n for n in names if "momentum_buffer" in states[n]]
        if begun:
            # New tensors, so that the old ones remain if the step is not taken.
            buffers = torch._foreach_mul([states[n]["momentum_buffer"] for n in begun], group["momentum"])
            torch._foreach_add_(buffers, [g[n] for n in begun])
            v |= dict(zip(begun, buffers, strict=True))
        for n, state in states.items():
            if n not in begun:
                v[n] = g[n].clone()
            state["momentum_buffer"] = v[n]
    return v


def nesterov(v: Vector, g: Vector, parameters: Parameters) -> Vector:
    """`(∇ + μ v) / (1 + μ Σ μᵗ)`: Nesterov's momentum as an average, on the scale of a gradient from the start."""
    out = dict(v)
    for group, names in parameters.by_group(g):
        mu = group["momentum"]
        if not mu:
            continue
        shares = []
        for n in names:
            state = parameters.state_of(n)
            state["momentum_weight"] = mu * state.get("momentum_weight", 0.0) + 1
            shares.append(1 / (1 + mu * state["momentum_weight"]))
        ahead = torch._foreach_mul([v[n] for n in names], mu)
        torch._foreach_add_(ahead, [g[n] for n in names])
        torch._foreach_mul_(ahead, shares)
        out |= dict(zip(names, ahead, strict=True))
    return out
