"""The little algebra of vectors held as named tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

Vector = dict[str, Tensor]


def dot(u: Vector, v: Vector) -> float:
    """`uᵀ v`."""
    return dots([(u, v)])[0]


def dots(pairs: Iterable[tuple[Vector, Vector]]) -> list[float]:
    """`uᵀ v` of every pair; a GPU is waited for once. Vectors may be empty, as where a rank has no layer."""
    found = list(pairs)
    full = [i for i, (u, _) in enumerate(found) if u]
    sums = []
    for u, v in (found[i] for i in full):
        sums.append(torch.stack([torch.dot(u[n].flatten(), v[n].flatten()) for n in u]).sum())
    out = [0.0] * len(found)
    for i, value in zip(full, torch.stack(sums).tolist() if sums else [], strict=True):
        out[i] = value
    return out


def gram(directions: list[Vector]) -> Tensor:
    """The matrix of `d_iᵀ d_j`, in float64."""
    return symmetric(dots((u, directions[j]) for i, u in enumerate(directions) for j in range(i + 1)), len(directions))


def symmetric(lower: list[float], n: int) -> Tensor:
    """The matrix with these entries on and below its diagonal, row by row, in float64."""
    Q = torch.zeros(n, n, dtype=torch.float64)
    rows, columns = torch.tril_indices(n, n)
    Q[rows, columns] = Q[columns, rows] = torch.tensor(lower, dtype=Q.dtype)
    return Q


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
