"""Two optimizers for comparison in the studies, as short as their formulas: NorMuon and SOAP-Muon."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from natgrad.checks.values import check_count, check_number, check_within
from natgrad.optim.preconditioner.orthogonal import RMS, newton_schulz

EPS = 1e-8


class Orthogonal(torch.optim.Optimizer):
    """Momentum on matrices, a direction that the subclass computes, and decoupled weight decay."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]):
        for name in ("lr", "weight_decay"):
            check_number(name, defaults[name])
        for name in ("momentum", "beta2"):
            check_within(name, defaults[name], "[0, 1)")
        super().__init__(params, defaults)

    def direction(self, v: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """The direction from Nesterov's momentum `v` and the gradient `g`."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, mu = self.state[p], group["momentum"]
                m = state.setdefault("momentum_buffer", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - mu)
                state["step"] = state.get("step", 0) + 1
                d = self.direction(p.grad.lerp(m, mu), p.grad, state, group)
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(d, alpha=-group["lr"])
        return value


class NorMuon(Orthogonal):
    """Muon with each row divided by its root mean square over the steps; the total length is that of AdamW's steps.

    Reference: Li et al. (2025), "NorMuon: Making Muon more efficient and scalable", arXiv:2510.05491.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        beta2: float = 0.95,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "beta2": beta2, "weight_decay": weight_decay})

    def direction(self, v: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        O = newton_schulz(v)
        rows = O.square().mean(1, keepdim=True)
        second = state.setdefault("second_moment", torch.zeros_like(rows))
        second.lerp_(rows, 1 - group["beta2"])
        O = O / (second.sqrt() + EPS)
        return RMS * O.numel() ** 0.5 * O / O.norm().clamp_min(EPS)


class SOAPMuon(Orthogonal):
    """Adam's second moments in the eigenbases of `E[∇ ∇ᵀ]` and `E[∇ᵀ ∇]`, as in SOAP; the resulting direction is
    orthogonalized. A step of orthogonal iteration updates the bases every `refresh_every` steps.

    Reference: Vyas et al. (2024), "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv:2409.11321. The speedruns
    of modded-nanogpt found that orthogonalization helps.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        beta2: float = 0.95,
        weight_decay: float = 0.0,
        refresh_every: int = 10,
    ):
        check_count("refresh_every", refresh_every, "steps")
        defaults = {"lr": lr, "momentum": momentum, "beta2": beta2, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"refresh_every": refresh_every})

    def direction(self, v: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        beta = min(1 - 1 / state["step"], group["beta2"])  # at first a plain mean
        for side, own in (("left", g @ g.mT), ("right", g.mT @ g)):
            state[side] = own if beta == 0 else beta * state[side] + (1 - beta) * own
            if state["step"] == 1:
                state[f"{side}_basis"] = torch.linalg.eigh(own)[1]
            elif state["step"] % group["refresh_every"] == 0 or state["step"] <= group["refresh_every"]:
                state[f"{side}_basis"] = torch.linalg.qr(state[side] @ state[f"{side}_basis"])[0]
        L, R = state["left_basis"], state["right_basis"]
        square = (L.mT @ g @ R).square()
        state["second_moment"] = square if beta == 0 else beta * state["second_moment"] + (1 - beta) * square
        root = state["second_moment"].sqrt()
        d = L @ ((L.mT @ v @ R) / (root + EPS * root.mean())) @ R.mT
        return RMS * max(d.shape) ** 0.5 * newton_schulz(d)
