"""How strongly a layer's inputs and output curvature depend on each other: HSIC, from kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

FEW_COLUMNS = 4
"""The matrices are formed if they have at most this many times as many rows as columns that they are made of."""
SMALLEST_CHUNK = 8
"""Cases are split evenly. With this size, every part has the 4 cases that the unbiased estimate needs."""


class Kernel:
    """`k(i, j) = ⟨Z_i, Z_j⟩ = Σ_kq (z_ik·z_jq)²` of the matrices `Z_i = Σ_k z_ik z_ikᵀ`, which are formed only if they
    take little more memory than the `z_ik`.

    With the mean `M` of the `Z_i` the kernel is centered in closed form, one block at a time:
    `⟨Z_i − M, Z_j − M⟩ = k(i, j) − r(i) − r(j) + ‖M‖²`, where `r(i) = Σ_k z_ikᵀ M z_ik` is the mean of row i.
    """

    def __init__(self, z: Float[Tensor, "n k d"], mean: Float[Tensor, "d d"], chunk: int):
        self.z, self.mean = z, mean.double()
        self.row_means = torch.cat([self._row_means(part.double()) for part in z.split(chunk)])
        self.norm = torch.linalg.matrix_norm(self.mean)

    def _row_means(self, z: Float[Tensor, "a k d"]) -> Float[Tensor, " a"]:
        return ((z @ self.mean) * z).sum((1, 2))

    def block(self, a: Tensor, b: Tensor) -> Float[Tensor, "a b"]:
        """The kernel between the cases of two index sets, in float64."""
        za, zb = self.z[a].double(), self.z[b].double()
        if za.shape[2] <= FEW_COLUMNS * za.shape[1]:
            return _formed(za) @ _formed(zb).mT
        products = ((za[:, k] @ zb[:, q].mT).square_() for k in range(za.shape[1]) for q in range(zb.shape[1]))
        return reduce(Tensor.add_, products)

    def centered(self, block: Float[Tensor, "a b"], a: Tensor, b: Tensor) -> Float[Tensor, "a b"]:
        return block - self.row_means[a, None] - self.row_means[b] + self.norm.square()


def _formed(z: Float[Tensor, "a k d"]) -> Float[Tensor, "a dd"]:
    """The matrices `Z_i`."""
    return (z.mT @ z).flatten(1)


@dataclass(frozen=True)
class Dependence:
    """Figures of the dependence of X and Y, from n pairs of positive semidefinite matrices `(X_i, Y_i)`."""

    second_moment: float
    """`‖E[X ⊗ Y]‖`."""
    covariance: float
    """`‖E[(X − E X) ⊗ (Y − E Y)]‖`, whose square is the biased HSIC."""
    unbiased: float
    """The unbiased estimate of the square of `covariance` in the population (Song et al. 2012)."""
    x_spread: float
    """`E[‖X − E X‖²]^½`."""
    y_spread: float
    cka: float
    """HSIC over the geometric mean of HSIC(X, X) and HSIC(Y, Y)."""
    p_value: float
    """The p-value of the permutation test of independence."""


def dependence(
    x: Kernel, y: Kernel, *, chunk: int, permutations: int, generator: torch.Generator | None = None
) -> Dependence:
    """HSIC and related figures of `n` cases, with `chunk` x `chunk` kernel values at a time.

    More than `chunk` cases are split at random. The unbiased estimate is then the mean of the estimates of the parts,
    weighted by size, and the test uses the first part. Undefined figures are NaN: the unbiased estimate
    of fewer than 4 cases, CKA if a spread is zero up to rounding, and the p-value of no permutations.
    """
    n = len(x.z)
    cases = permutation(n, generator, x.z.device) if n > chunk else torch.arange(n, device=x.z.device)
    parts = cases.tensor_split(math.ceil(n / chunk))
    moment, xy, xx, yy = torch.zeros(4, dtype=torch.float64, device=cases.device)
    diagonals = torch.zeros(4, dtype=torch.float64, device=cases.device)
    unbiased, p_value = 0.0, math.nan
    for i, a in enumerate(parts):
        for b in parts[i:]:
            K_raw, L_raw = x.block(a, b), y.block(a, b)
            K, L = x.centered(K_raw, a, b), y.centered(L_raw, a, b)
            times = 1 if a is b else 2  # the block below the diagonal is the transpose
            moment += times * inner(K_raw, L_raw)
            xy += times * inner(K, L)
            xx += times * inner(K, K)
            yy += times * inner(L, L)
            if a is b:
                diagonals += torch.stack([M.diagonal().sum() for M in (K, L, K_raw, L_raw)])
                unbiased += unbiased_hsic(K, L) * len(a) / n
                if i == 0 and permutations:
                    rounding = torch.finfo(K.dtype).eps * (K_raw.norm() * L.norm() + K.norm() * L_raw.norm())
                    p_value = permutation_p_value(K, L, permutations, float(rounding), generator)
    x_spread, y_spread = _spread(diagonals[0], diagonals[2], n), _spread(diagonals[1], diagonals[3], n)
    return Dependence(
        second_moment=float(moment.sqrt()) / n,
        covariance=float(xy.clamp_min(0).sqrt()) / n,  # a sum of squares: below zero only by rounding
        unbiased=unbiased,
        x_spread=x_spread,
        y_spread=y_spread,
        cka=float(xy / (xx * yy).sqrt()) if x_spread and y_spread else math.nan,
        p_value=p_value,
    )


def unbiased_hsic(K: Float[Tensor, "m m"], L: Float[Tensor, "m m"]) -> float:
    """The unbiased HSIC, from kernels whose diagonals are left out; NaN for fewer than 4 cases.

        (tr K L + 1ᵀK1 1ᵀL1 / ((m − 1)(m − 2)) − 2/(m − 2) 1ᵀK L1) / (m (m − 3))

    It is a U-statistic, and does not depend on the point around which the kernels are centered. Centering around the
    mean causes the least cancellation.

    Reference: Song, Smola, Gretton, Bedo & Borgwardt (2012), "Feature Selection via Dependence Maximization", eq. 5.
    """
    m = len(K)
    if m < 4:
        return math.nan
    K, L = (M - torch.diag(M.diagonal()) for M in (K, L))
    k, l = K.sum(1), L.sum(1)
    total = inner(K, L) + k.sum() * l.sum() / ((m - 1) * (m - 2)) - 2 / (m - 2) * (k @ l)
    return float(total / (m * (m - 3)))


def permutation_p_value(
    K: Float[Tensor, "m m"],
    L: Float[Tensor, "m m"],
    permutations: int,
    rounding: float = 0.0,
    generator: torch.Generator | None = None,
) -> float:
    """The share of permutations of the second kernel's cases (including the identity) whose HSIC is at least the
    observed one, up to `rounding`: `(1 + #) / (1 + permutations)`.

    Reference: Gretton et al. (2008), "A Kernel Statistical Test of Independence"; Phipson & Smyth (2010),
    arXiv:1603.05766, for the 1 added.
    """
    K, L = (M - M.mean(0) - M.mean(1, keepdim=True) + M.mean() for M in (K, L))
    observed = inner(K, L)
    reached = 0
    for _ in range(permutations):
        order = permutation(len(L), generator, L.device)
        reached += int(inner(K, L[order][:, order]) >= observed - rounding)
    return (1 + reached) / (1 + permutations)


def permutation(n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """A random order of `n` cases, drawn on the generator's device."""
    return torch.randperm(n, generator=generator, device=generator.device if generator else device).to(device)


def inner(K: Tensor, L: Tensor) -> Tensor:
    """The Frobenius inner product, without a temporary matrix."""
    return K.flatten() @ L.flatten()


def _spread(centered: Tensor, raw: Tensor, n: int) -> float:
    """`(Σ_i ‖Z_i − M‖² / n)^½`; zero if it is within the rounding of `Σ_i ‖Z_i‖²`."""
    return float((centered / n).sqrt()) if centered > 64 * torch.finfo(raw.dtype).eps * raw else 0.0
