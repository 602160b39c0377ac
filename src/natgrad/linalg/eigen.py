"""Eigenvalues and Cholesky factors, with one clear error if a matrix has none."""

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg.arguments import singular

FORMED = 2_000
"""If its structure gives no eigenvalues or powers, a matrix with at most this many rows is formed."""
WELL_CONDITIONED = 1e-4
"""The smallest ratio of two pivots for which float32 keeps about three digits of an inverse."""


def eigh(M: Float[Tensor, "d d"], what: str) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Ascending eigenvalues and eigenvectors of a symmetric matrix, in row-major memory.

    On matrices with many equal eigenvalues the float32 solver can fail, or silently return NaN. Then float64 is used.
    """
    if not torch.isfinite(M).all():
        raise ValueError(f"{what} has entries that are not finite; look for NaN or inf in the data or the model")
    try:
        e, U = torch.linalg.eigh(M)
        if torch.isfinite(U).all():
            return e, U.contiguous()
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        pass
    e, U = torch.linalg.eigh(M.double())
    return e.to(M.dtype), U.to(M.dtype).contiguous()


def semidefinite(e: Float[Tensor, " d"], what: str) -> Float[Tensor, " d"]:
    """The eigenvalues of a matrix that is positive semidefinite up to rounding. Values that are negative by rounding
    become zero. Raises ValueError if a value is below that."""
    if e.min() < -_rounding(e, 0.0):
        raise ValueError(
            f"{what} is indefinite: its smallest eigenvalue is {float(e.min()):.3g}, its largest {float(e.max()):.3g}; "
            "expected a positive semidefinite matrix"
        )
    return e.clamp_min(0)


def positive(values: Tensor, what: str, damping: float) -> Tensor:
    """The eigenvalues, after a check that they are positive, and above rounding if there is no damping. Nothing is
    clamped."""
    smallest = values.min()
    if not smallest > _rounding(values, damping):
        raise singular(what, damping, float(smallest))
    return values


def inverse_from_cholesky(M: Float[Tensor, "d d"], what: str, damping: float) -> Float[Tensor, "d d"]:
    """The inverse of a positive definite matrix; ValueError if it is not (numerically) positive definite.

    Float32 matrices are inverted in float64, in twice the time, unless the ratio of their pivots is above
    `WELL_CONDITIONED`. They are scaled first: factors of layers with vanishing gradients contain many denormal numbers,
    which slow the processor down a hundredfold. The inverse, which is symmetric, is stored in row-major order, like one
    from a checkpoint: products with it are then the same to the last bit.
    """
    scale = M.diagonal().mean()
    if M.dtype == torch.float32 and scale > 0:
        L, info = torch.linalg.cholesky_ex(M / scale)
        pivots = L.diagonal().square()
        if not info.item() and pivots.min() > WELL_CONDITIONED * pivots.max():
            return torch.cholesky_inverse(L).mT / scale
    L, info = torch.linalg.cholesky_ex(M.double())
    if info.item() or not torch.isfinite(L).all():
        raise singular(what, damping, float(torch.linalg.eigvalsh(torch.nan_to_num(M).double())[0]))
    # diag(L)² spans less than the eigenvalues do, so a ratio at rounding level means a singular M.
    pivots = L.diagonal().square()
    if not pivots.min() > _rounding(pivots.to(M.dtype), damping):
        raise singular(what, damping, float(pivots.min()))
    return torch.cholesky_inverse(L).mT.to(M.dtype)


def symmetric_part(M: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The matrix without its antisymmetric part, which is rounding."""
    return (M + M.mT) / 2


def _rounding(values: Tensor, damping: float) -> Tensor:
    """Without damping, an eigenvalue below this cannot be distinguished from zero."""
    if damping > 0:
        return values.new_zeros(())
    return values.abs().max() * torch.finfo(values.dtype).eps * max(values.shape)
