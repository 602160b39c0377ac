"""Solving with a matrix that is only known by its products."""

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


def conjugate_gradient(product: Product, b: Tensor, *, tol: float, max_iter: int) -> Tensor:
    """`x` with `‖M x − b‖ ≤ tol ‖b‖`, for a positive definite `M` (Hestenes & Stiefel 1952).

    Raises:
        RuntimeError: if that is not reached within `max_iter` products, or `M` is not positive definite.
    """
    x, r = torch.zeros_like(b), b.clone()
    p, rr, target = r.clone(), r @ r, (tol * b.norm()) ** 2
    for _ in range(max_iter):
        if rr <= target:
            return x
        Mp = product(p)
        curvature = p @ Mp
        if not curvature > 0:
            raise RuntimeError(
                f"conjugate gradients met a direction of curvature {float(curvature):.3g}: the matrix is not "
                "positive definite; pass a larger damping"
            )
        step = rr / curvature
        x, r = x + step * p, r - step * Mp
        rr, previous = r @ r, rr
        p = r + (rr / previous) * p
    if rr <= target:
        return x
    raise RuntimeError(
        f"conjugate gradients reached a relative residual of {float(rr.sqrt() / b.norm()):.2g} in {max_iter} "
        f"products, expected {tol:g}; pass a larger damping, or use structure='dense' or 'kfac'"
    )
