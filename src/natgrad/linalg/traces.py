"""Estimates of a trace with a smaller variance than Hutchinson's: Hutch++ and XTrace."""

from __future__ import annotations

import torch
from torch import Tensor

from natgrad.checks.values import check_count
from natgrad.linalg.later import later
from natgrad.linalg.operator import Operator
from natgrad.linalg.stochastic import Estimate, product, random_signs


@later
def hutch_plus_plus(operator: Operator, samples: int, generator: torch.Generator | None) -> Estimate:
    """A third of the products sketch the range, `Q = orth(M S)`; a third give `tr Qᵀ M Q`; a third give Hutchinson's
    estimate of the remainder, `(I − Q Qᵀ) M (I − Q Qᵀ)` (Meyer, Musco, Musco & Woodruff 2021).
    """
    check_count("samples", samples, "products", least=6)
    size, third = operator.space.size, samples // 3
    generator = operator._source(generator)
    Q = _orthonormal(product(operator, random_signs(operator, (third,), generator)))
    inside = (Q * product(operator, Q)).sum()
    z = random_signs(operator, (third,), generator)
    z = z - (z @ Q.mT) @ Q
    outside = (z * product(operator, z)).sum(1) if len(Q) < size else z.new_zeros(third)
    return Estimate(inside + outside.mean(), outside.std() / third**0.5)


@later
def xtrace(operator: Operator, samples: int, generator: torch.Generator | None) -> Estimate:
    """With `m` vectors, half the products: each vector in turn is left out of the sketch and probes the remainder
    (Epperly, Tropp & Webber 2024, arXiv:2301.07825).

    With `Q R = M Ω` and `s_i` the normalized column `i` of `R⁻ᵀ`, `Q (I − s_i s_iᵀ) Qᵀ` projects on the sketch without
    vector `i`.
    """
    check_count("samples", samples, "products", least=4)
    size = operator.space.size
    m = min(samples // 2, size)
    generator = operator._source(generator)
    omega = torch.randn(m, size, dtype=operator.dtype, device=operator.device, generator=generator)
    Y = product(operator, omega)
    Q, R = torch.linalg.qr(Y.mT)
    tiny = R.diagonal().abs().amax().clamp_min(torch.finfo(R.dtype).tiny) * torch.finfo(R.dtype).eps
    R = R + torch.where(R.diagonal().abs() < tiny, tiny, 0.0).diag()  # a matrix of low rank
    S = torch.linalg.solve_triangular(R.mT, torch.eye(m, dtype=R.dtype, device=R.device), upper=False)
    S = S / S.norm(dim=0)
    Z = product(operator, Q.mT)
    H, W = Q.mT @ Z.mT, Q.mT @ omega.mT
    inside = H.trace() - (S * (H @ S)).sum(0)
    C = W - S * (S * W).sum(0)
    left, Mleft = omega - (Q @ C).mT, Y - C.mT @ Z
    norms = left.square().sum(1).clamp_min(torch.finfo(R.dtype).tiny)
    each = inside + (size - m + 1) * (left * Mleft).sum(1) / norms
    return Estimate(each.mean(), each.std() / m**0.5)


def _orthonormal(rows: Tensor) -> Tensor:
    return torch.linalg.qr(rows.mT)[0].mT
