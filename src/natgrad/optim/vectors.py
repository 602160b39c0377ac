"""Algebra of vectors that are dictionaries of named tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

Vector = dict[str, Tensor]
FEW = 2**17
"""A vector with at most this many entries is copied into one tensor: for small vectors, calls take most of the time."""


def dot(u: Vector, v: Vector) -> float:
    """`uᵀ v`."""
    return dots([(u, v)])[0]


def dots(pairs: Iterable[tuple[Vector, Vector]]) -> list[float]:
    """`uᵀ v` of every pair, with a single wait for the GPU. Vectors may be empty, as on a rank without layers."""
    found = list(pairs)
    full = [i for i, (u, _) in enumerate(found) if u]
    flat: dict[tuple[int, int], Tensor | None] = {}
    sums = []
    for u, v in (found[i] for i in full):
        a, b = _flat(u, u, flat), _flat(v, u, flat)
        if a is None or b is None or a.dtype != b.dtype:
            sums.append(torch.stack([torch.dot(u[n].flatten(), v[n].flatten()) for n in u]).sum())
        else:
            sums.append(torch.dot(a, b))
    out = [0.0] * len(found)
    for i, value in zip(full, torch.stack(sums).tolist() if len(sums) > 1 else [s.item() for s in sums], strict=True):
        out[i] = value
    return out


def _flat(v: Vector, names: Vector, known: dict[tuple[int, int], Tensor | None]) -> Tensor | None:
    """The entries with these names in one tensor, which saves calls; None for a large vector. `known` contains earlier
    results, by the vector and the order of its names."""
    key = id(v), id(v) if list(v) == list(names) else id(names)
    if key not in known:
        tensors = [v[n] for n in names]
        few = sum(t.numel() for t in tensors) <= FEW and all(t.dtype == tensors[0].dtype for t in tensors)
        known[key] = torch._C._nn.flatten_dense_tensors(tensors) if few else None
    return known[key]


def gram(directions: list[Vector]) -> Tensor:
    """The matrix of `d_iᵀ d_j`, in float64."""
    return symmetric(dots((u, directions[j]) for i, u in enumerate(directions) for j in range(i + 1)), len(directions))


def symmetric(lower: list[float], n: int) -> Tensor:
    """The matrix with these entries on and below its diagonal, row by row, in float64."""
    rows = [[lower[max(i, j) * (max(i, j) + 1) // 2 + min(i, j)] for j in range(n)] for i in range(n)]
    return torch.tensor(rows, dtype=torch.float64).view(n, n)


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
