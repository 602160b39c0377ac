"""The little algebra of vectors held as named tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Vector = dict[str, Tensor]


def dot(u: Vector, v: Vector) -> float:
    """`uᵀ v`."""
    return float(torch.stack([torch.dot(u[n].flatten(), v[n].flatten()) for n in u]).sum())


def gram(directions: list[Vector]) -> Tensor:
    """The matrix of `d_iᵀ d_j`, in float64."""
    return torch.tensor([[dot(u, v) for v in directions] for u in directions], dtype=torch.float64)


def combine(coefficients: list[float], directions: list[Vector]) -> Vector:
    """`Σ c_i d_i`."""
    names = list(directions[0])
    total = list(torch._foreach_mul([directions[0][n] for n in names], coefficients[0]))
    for c, d in zip(coefficients[1:], directions[1:], strict=True):
        torch._foreach_add_(total, [d[n] for n in names], alpha=c)
    return dict(zip(names, total, strict=True))


def finite(v: Vector) -> bool:
    """Whether no entry is NaN or infinite."""
    # The square is cheap, but can overflow where no entry does.
    return math.isfinite(dot(v, v)) or all(bool(torch.isfinite(x).all()) for x in v.values())


def check_dense(gradients: Vector) -> None:
    """Raises ValueError if one is sparse, as those of `nn.Embedding(sparse=True)` are."""
    for n, g in gradients.items():
        if g.layout != torch.strided:
            raise ValueError(f"the gradient of {n!r} is sparse; expected a dense one: make its layer with sparse=False")


def copied(value: Any, device: torch.device) -> Any:
    """A copy of nested dictionaries, lists and tuples, with its tensors on `device`."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {k: copied(v, device) for k, v in value.items()}
    return type(value)(copied(v, device) for v in value) if isinstance(value, (list, tuple)) else value
