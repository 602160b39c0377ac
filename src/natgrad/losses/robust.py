"""Losses that grow linearly far from the target: absolute error, Huber loss, smooth absolute error."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from natgrad.losses.elementwise import Elementwise


class Robust(Elementwise):
    """`ρ(f − y)` for an even, convex `ρ` with bounded slope.

    The Hessian in the output is zero far from the target, where most of the gradient comes from, so it is not a useful
    metric. The Fisher information of the density `p(y) ∝ exp(−ρ(f − y))` is the same for all outputs,

        D = i I,    i = E[ρ'(r)²] = E[ρ''(r)],

    positive, and at most the largest curvature of `ρ`. `kind="gauss_newton"` is the Hessian itself.
    """

    canonical = False
    nonnegative = True

    def _information(self) -> float:
        """`i`."""
        raise NotImplementedError

    def _hessian(self, r: Tensor) -> Tensor:
        """`ρ''(r)`."""
        raise NotImplementedError

    def second_derivative(self, output: Tensor, target: Tensor) -> Tensor:
        if self.kind == "gauss_newton":
            return self._hessian((output - target).detach())
        return torch.full_like(output, self._information())

    def sampled_column(self, output: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
        signs = torch.randint(2, output.shape, generator=generator, device=output.device).to(output.dtype)
        return (2 * signs - 1) * math.sqrt(self._information())


class AbsoluteError(Robust):
    """`nn.L1Loss`: `ρ(r) = |r|`, with the Laplace density. `i = 1`, and the Hessian is zero."""

    def _information(self) -> float:
        return 1.0

    def _hessian(self, r: Tensor) -> Tensor:
        return torch.zeros_like(r)


class Huber(Robust):
    """`nn.HuberLoss`: `ρ(r) = r²/2` for `|r| < δ`, else `δ (|r| − δ/2)`. `i` is the probability of `|r| < δ`,

        i = a / (a + (2/δ) exp(−δ²/2)),    a = √(2π) erf(δ/√2).

    Reference: Huber (1964), "Robust Estimation of a Location Parameter".
    """

    def _information(self) -> float:
        delta = float(self.module.delta)
        inside = math.sqrt(2 * math.pi) * math.erf(delta / math.sqrt(2))
        return inside / (inside + 2 / delta * math.exp(-(delta**2) / 2))

    def _hessian(self, r: Tensor) -> Tensor:
        return (r.abs() < self.module.delta).to(r.dtype)


class SmoothAbsoluteError(Robust):
    """`nn.SmoothL1Loss`: `ρ(r) = r²/(2β)` for `|r| < β`, else `|r| − β/2`. `i` is the probability of `|r| < β`, divided
    by β,

        i = a / (β (a + 2 exp(−β/2))),    a = √(2πβ) erf(√(β/2)),

    and 1 for `β = 0`, where the loss is the absolute error.
    """

    def _information(self) -> float:
        beta = float(self.module.beta)
        if beta == 0:
            return 1.0
        inside = math.sqrt(2 * math.pi * beta) * math.erf(math.sqrt(beta / 2))
        return inside / (beta * (inside + 2 * math.exp(-beta / 2)))

    def _hessian(self, r: Tensor) -> Tensor:
        beta = float(self.module.beta)
        return torch.zeros_like(r) if beta == 0 else (r.abs() < beta).to(r.dtype) / beta
