"""The largest eigenvalues and their vectors, from products."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.checks.values import check_choice, check_count, check_generator, check_number
from natgrad.linalg.eigen import symmetric_part
from natgrad.linalg.later import later
from natgrad.linalg.operator import Operator
from natgrad.linalg.stochastic import product

WHICH = {
    "largest": "from the largest down",
    "smallest": "from the smallest up",
    "magnitude": "by absolute value, from the largest down",
}


class Eigenpairs(NamedTuple):
    """Eigenvalues and orthonormal eigenvectors: the result of `top_eigenvalues`.

    Example:
        >>> import torch
        >>> from natgrad.linalg import Dense
        >>> values, vectors, residuals = Dense(torch.diag(torch.tensor([1.0, 5.0]))).top_eigenvalues(1)
        >>> round(values.item(), 4), vectors.abs().round().tolist()
        (5.0, [[0.0, 1.0]])
    """

    values: Tensor
    """`(k,)`, in the requested order."""
    vectors: Any
    """`k` vectors of the operator, along a leading axis."""
    residuals: Tensor
    """`‖M v − λ v‖` for each."""


@later
def top_eigenvalues(
    operator: Operator,
    k: int,
    which: str,
    tol: float | None,
    max_products: int | None,
    generator: torch.Generator | None,
) -> Eigenpairs:
    """A block Krylov method that restarts from its best vectors (a thick restart).

    The basis `V` is extended by the residuals `M v − λ v` of the Ritz pairs that have not converged. It starts with `k`
    random vectors, so an eigenvalue of multiplicity up to `k` is found with its multiplicity.
    """
    size = operator.space.size
    check_count("k", k, "eigenvalues")
    check_choice("which", which, WHICH, meanings=WHICH)
    check_number("tol", tol, positive=True, optional=True)
    check_generator(generator, operator.device)
    if k > size:
        raise ValueError(f"k={k} is larger than the number of eigenvalues, {size}; expected at most {size}")
    tol = tol or 10 * torch.finfo(operator.dtype).eps ** 0.75
    limit = max_products or 50 * k + 10 * size
    width = min(size, k + 2)  # some extra vectors, which speed up the last eigenvalues
    most = min(size, max(4 * width, 60))
    generator = operator._source(generator)
    start = torch.randn(width, size, dtype=operator.dtype, device=operator.device, generator=generator)
    V = _orthonormal(start, start.new_zeros(0, size))
    W = product(operator, V)
    count = len(V)
    while True:
        e, Q = torch.linalg.eigh(symmetric_part(V @ W.mT))
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
        if not len(new):  # the residuals are at rounding level
            fresh = torch.randn(1, size, dtype=V.dtype, device=V.device, generator=generator)
            new = _orthonormal(fresh, V)
        V, W = torch.cat([V, new]), torch.cat([W, product(operator, new)])
        count += len(new)


def _orthonormal(rows: Float[Tensor, "k d"], against: Float[Tensor, "m d"]) -> Float[Tensor, "j d"]:
    """An orthonormal basis of the components of the rows orthogonal to `against`; dependent rows are dropped."""
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    for _ in range(2):  # a single pass leaves rounding errors that grow
        rows = rows - (rows @ against.mT) @ against
        _, s, Vt = torch.linalg.svd(rows, full_matrices=False)
        rows = Vt[s > 100 * torch.finfo(rows.dtype).eps * len(Vt)]
    return rows


def _order(e: Tensor, which: str) -> Tensor:
    if which == "magnitude":
        return e.abs().argsort(descending=True)
    return e.argsort(descending=which == "largest")
