"""The largest eigenvalues and their vectors, by products alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.checks.values import check_choice, check_count, check_generator, check_number
from natgrad.linalg.later import later
from natgrad.linalg.operator import Operator
from natgrad.linalg.stochastic import product

WHICH = {
    "largest": "from the largest down",
    "smallest": "from the smallest up",
    "magnitude": "by absolute value, from the largest down",
}


class Eigenpairs(NamedTuple):
    """Eigenvalues and orthonormal eigenvectors: what `top_eigenvalues` returns.

    Example:
        >>> import torch
        >>> from natgrad.linalg import Dense
        >>> values, vectors, residuals = Dense(torch.diag(torch.tensor([1.0, 5.0]))).top_eigenvalues(1)
        >>> round(values.item(), 4), vectors.abs().round().tolist()
        (5.0, [[0.0, 1.0]])
    """

    values: Tensor
    """`(k,)`, in the order asked for."""
    vectors: Any
    """`k` vectors in the form of the operator's, along a leading axis."""
    residuals: Tensor
    """`‖M v − λ v‖` of each."""


@later
def top_eigenvalues(
    operator: Operator,
    k: int,
    which: str,
    tol: float | None,
    max_products: int | None,
    generator: torch.Generator | None,
) -> Eigenpairs:
    """A block Krylov method that is restarted from its best vectors (a thick restart).

    The basis `V` grows by the residuals `M v − λ v` of those Ritz pairs that have not converged. It begins with `k`
    random vectors, so that an eigenvalue with up to `k` equal ones is found as often as it is there.
    """
    size = operator.space.size
    check_count("k", k, "eigenvalues")
    check_choice("which", which, WHICH, meanings=WHICH)
    check_number("tol", tol, positive=True, optional=True)
    check_generator(generator, operator.device)
    if k > size:
        raise ValueError(f"k={k} is more than the {size} eigenvalues that there are; expected at most {size}")
    tol = tol or 10 * torch.finfo(operator.dtype).eps ** 0.75
    limit = max_products or 50 * k + 10 * size
    width = min(size, k + 2)  # some more than asked for, which speeds the last ones up
    most = min(size, max(4 * width, 60))
    generator = operator._source(generator)
    start = torch.randn(width, size, dtype=operator.dtype, device=operator.device, generator=generator)
    V = _orthonormal(start, start.new_zeros(0, size))
    W = product(operator, V)
    count = len(V)
    while True:
        e, Q = torch.linalg.eigh(_symmetric(V @ W.mT))
        order = _order(e, which)
        e, Q = e[order], Q[:, order]
        first = Q[:, :width].mT
        R = first @ W - e[:width, None] * (first @ V)
        residuals, scale = R.norm(dim=1), e.abs().max().clamp_min(torch.finfo(e.dtype).tiny)
        open_ = (residuals > tol * scale).nonzero()[:, 0]
        if not (open_ < k).any() or len(V) == size:
            vectors = operator._form(operator.space.unflatten(first[:k] @ V))
            return Eigenpairs(e[:k], vectors, residuals[:k])
        if count >= limit:
            raise RuntimeError(
                f"{int((open_ < k).sum())} of {k} eigenvalues have not converged after {count} products (residuals up "
                f"to {float(residuals[:k].max() / scale):.2g} of the largest eigenvalue, expected {tol:.2g}); pass a "
                "larger tol or max_products, or a smaller k"
            )
        if len(V) + len(open_) > most and most < size:
            kept = Q[:, : 2 * width].mT
            V, W = kept @ V, kept @ W
        new = _orthonormal(R[open_], V)
        if not len(new):  # the residuals are rounding
            fresh = torch.randn(1, size, dtype=V.dtype, device=V.device, generator=generator)
            new = _orthonormal(fresh, V)
        V, W = torch.cat([V, new]), torch.cat([W, product(operator, new)])
        count += len(new)


def _orthonormal(rows: Float[Tensor, "k d"], against: Float[Tensor, "m d"]) -> Float[Tensor, "j d"]:
    """An orthonormal basis of what the rows have beside those of `against`; dependent rows are left out."""
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    for _ in range(2):  # once leaves rounding that grows
        rows = rows - (rows @ against.mT) @ against
        _, s, Vt = torch.linalg.svd(rows, full_matrices=False)
        rows = Vt[s > 100 * torch.finfo(rows.dtype).eps * len(Vt)]
    return rows


def _symmetric(M: Tensor) -> Tensor:
    return (M + M.mT) / 2


def _order(e: Tensor, which: str) -> Tensor:
    if which == "magnitude":
        return e.abs().argsort(descending=True)
    return e.argsort(descending=which == "largest")
