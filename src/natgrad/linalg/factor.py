"""A symmetric factor of a Kronecker product: a matrix `(d, d)`, or a diagonal stored as a vector `(d,)`."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg.eigen import eigh, inverse_from_cholesky, positive
from natgrad.linalg.precision import matmul

Factor = Float[Tensor, "d *d"]
Basis = Float[Tensor, "d d"] | None
"""Orthonormal columns; None for the identity."""


def describe(name: str, F: Tensor) -> str:
    """`A 768`, or `A 50257 (diagonal)`."""
    return f"{name} {len(F)}" + (" (diagonal)" if F.ndim == 1 else "")


def from_left(F: Tensor, V: Tensor) -> Tensor:
    """`F V`."""
    return F.unsqueeze(-1) * V if F.ndim == 1 else matmul(F, V)


def from_right(V: Tensor, F: Tensor) -> Tensor:
    """`V F`."""
    return V * F if F.ndim == 1 else matmul(V, F)


def between(B: Tensor, V: Tensor, A: Tensor) -> Tensor:
    """`B V A`."""
    return matmul(B, V, A) if B.ndim == A.ndim == 2 else from_right(from_left(B, V), A)


def rotate(V: Tensor, U_B: Tensor | None, U_A: Tensor | None, *, back: bool = False) -> Tensor:
    """`U_Bᵀ V U_A`, or `back`: `U_B V U_Aᵀ`."""
    left = None if U_B is None else U_B if back else U_B.mT
    right = None if U_A is None else U_A.mT if back else U_A
    factors = [F for F in (left, V, right) if F is not None]
    return matmul(*factors) if len(factors) > 1 else V


def diagonal(F: Tensor) -> Float[Tensor, " d"]:
    return F if F.ndim == 1 else F.diagonal()


def full(F: Tensor) -> Float[Tensor, "d d"]:
    """The factor as a matrix."""
    return F.diag() if F.ndim == 1 else F


def add_to_diagonal(F: Tensor, value: Tensor | float) -> Tensor:
    """`F + value I`."""
    if F.ndim == 1:
        return F + value
    return F + torch.diag_embed(torch.as_tensor(value, dtype=F.dtype, device=F.device).expand(len(F)))


def add(F: Tensor, G: Tensor) -> Tensor:
    """`F + G`; a matrix if either is one."""
    return F + G if F.ndim == G.ndim else full(F) + full(G)


def inverse(F: Tensor, what: str, damping: float) -> Tensor:
    """`F⁻¹`. Raises ValueError if `F` is not (numerically) positive definite."""
    return 1 / positive(F, what, damping) if F.ndim == 1 else inverse_from_cholesky(F, what, damping)


def eigen(F: Tensor, what: str) -> tuple[Float[Tensor, " d"], Basis]:
    """Eigenvalues and basis."""
    return (F, None) if F.ndim == 1 else eigh(F, what)


def inner(F: Tensor, G: Tensor) -> Tensor:
    """`⟨F, G⟩ = tr F G`."""
    if F.ndim == G.ndim:
        return (F * G).sum()
    return (diagonal(F) * diagonal(G)).sum()


def along(F: Tensor, m: Tensor) -> Tensor:
    """`mᵀ F m`."""
    return m @ (F * m if F.ndim == 1 else F @ m)
