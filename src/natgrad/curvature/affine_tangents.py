"""Tangents of affine maps, from those of their inputs and parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.linalg.precision import is_full, linear


def tangent_of_linear(
    h: Tensor, h_dot: Tensor | None, W: Tensor, W_dot: Tensor | None, b_dot: Tensor | None
) -> Tensor | None:
    """`Ẇ h + W ḣ + ḃ`, computed as `Ẇ (h − m) + W ḣ + (ḃ + Ẇ m)` with the first case as `m`. In low precision, inputs
    far from zero would otherwise lose all digits of the result."""
    if is_full(h):
        if W_dot is None:
            return b_dot if h_dot is None else F.linear(h_dot, W, b_dot)
        a_dot = F.linear(h, W_dot, b_dot)
        if h_dot is not None:
            a_dot.view(-1, len(W)).addmm_(h_dot.reshape(-1, h_dot.shape[-1]), W.mT)
        return a_dot
    terms = []
    if W_dot is not None:
        m = h.reshape(-1, h.shape[-1])[:1].sum(0)
        c = torch.linalg.vecdot(W_dot, m)
        b_dot = c if b_dot is None else c + b_dot
        terms.append((h - m, W_dot))
    if h_dot is not None:
        terms.append((h_dot, W))
    return linear(terms, b_dot) if terms else b_dot


def tangent_of_convolution(
    convolve: Callable[..., Tensor],
    h: Tensor,
    h_dot: Tensor | None,
    W: Tensor,
    W_dot: Tensor | None,
    b_dot: Tensor | None,
    *how: Any,
) -> Tensor | None:
    """`Ẇ ∗ h + W ∗ ḣ + ḃ`."""
    a_dot: Tensor | None = None
    if W_dot is not None:
        a_dot = convolve(h, W_dot, b_dot, *how)
    elif b_dot is not None:
        a_dot = b_dot.view(-1, *[1] * (W.ndim - 2))
    if h_dot is None:
        return a_dot
    through = convolve(h_dot, W, None, *how)
    return through if a_dot is None else through.add_(a_dot)
