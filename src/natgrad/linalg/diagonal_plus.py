"""A diagonal plus a matrix of low rank."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg.arguments import check_damping, check_exponent
from natgrad.linalg.dense import Dense
from natgrad.linalg.eigen import FORMED, eigh, positive
from natgrad.linalg.exact import ExactBlock
from natgrad.linalg.operator import Operator
from natgrad.linalg.space import Parts, Space


class DiagonalPlusLowRank(Operator):
    """`M = diag(d) + U diag(e) Uᵀ`.

    With `D = diag(d + λ)` and the eigenvectors `Z` of `D^-½ U diag(e) Uᵀ D^-½ = Z diag(w) Zᵀ`

        M + λ I = D^½ (I + Z diag(w) Zᵀ) D^½,    (M + λ I)⁻¹ = D⁻¹ − (D^-½ Z) diag(w / (1 + w)) (D^-½ Z)ᵀ

    so inverses, determinants and samples take `size rank²` operations (Woodbury's identity). Other powers have no such
    form: for up to 2,000 rows, they are computed from the dense matrix.

    Args:
        d: the diagonal, `(size,)`, in torch order.
        U: `(size, rank)`.
        values: `e`, of any sign.
        space: the form of its vectors. None: tensors of shape `(size,)`.

    Raises:
        ValueError: if the shapes do not match.

    Example:
        >>> import torch
        >>> from natgrad.linalg import DiagonalPlusLowRank
        >>> M = DiagonalPlusLowRank(torch.ones(2), torch.tensor([[1.0], [1.0]]), torch.tensor([3.0]))
        >>> M.to_dense().tolist(), M.solve(torch.ones(2), damping=1.0)
        ([[4.0, 3.0], [3.0, 4.0]], tensor([0.1250, 0.1250]))
    """

    def __init__(
        self,
        d: Float[Tensor, " size"],
        U: Float[Tensor, "size rank"],
        values: Float[Tensor, " rank"],
        space: Space | None = None,
    ):
        self.space = space or Space(((len(d),),))
        if d.shape != (self.space.size,) or U.shape != (len(d), *values.shape) or values.ndim != 1:
            raise ValueError(
                f"d has shape {tuple(d.shape)}, U {tuple(U.shape)} and values {tuple(values.shape)}; expected "
                f"({self.space.size},), ({self.space.size}, rank) and (rank,)"
            )
        self.d, self.U, self.values = d, U.contiguous(), values
        self.dtype, self.device = d.dtype, d.device

    def describe(self) -> str:
        return f"diagonal plus rank {len(self.values)}"

    def _matmul(self, parts: Parts) -> Parts:
        v = self.space.flatten(parts)
        return self.space.unflatten(self.d * v + ((v @ self.U) * self.values) @ self.U.mT)

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> DiagonalPlusLowRank:
        check_damping(damping, damping_style)  # without factors or centered coordinates, every style adds `damping I`
        root, Z, w = self._whitened(damping)
        return DiagonalPlusLowRank(root.square().reciprocal(), Z / root.unsqueeze(1), -w / (1 + w), self.space)

    def power(self, exponent: float, damping: float = 0.0) -> Operator:
        check_damping(damping)
        check_exponent(exponent)
        if exponent == -1:
            return self.inverse(damping)
        if self.space.size > FORMED:
            raise TypeError(
                f"{self._label()} has no power {exponent} of its own, and with {self.space.size} rows it is too large "
                "to form; use structure='kfac' or 'diagonal', or 'dense' for a small model"
            )
        return Dense(self._dense(), self.space).power(exponent, damping)

    def logdet(self, damping: float = 0.0) -> Tensor:
        root, _, w = self._whitened(damping)
        return 2 * root.log().sum() + w.log1p().sum()

    def trace(self) -> Tensor:
        return self.d.sum() + (self.U.square() @ self.values).sum()

    def _norm(self) -> Tensor:
        inner = (self.U.mT @ self.U) * self.values
        own = self.d.square().sum() + 2 * self.d @ (self.U.square() @ self.values)
        return (own + (inner * inner.mT).sum()).clamp_min(0).sqrt()

    def _diagonal(self) -> Parts:
        return self.space.unflatten(self.d + self.U.square() @ self.values)

    def _inverse_factor(self, parts: Parts, damping: float) -> Parts:
        """`D^-½ (I + Z diag((1 + w)^-½ − 1) Zᵀ) z`."""
        root, Z, w = self._whitened(damping)
        z = self.space.flatten(parts)
        return self.space.unflatten((z + ((z @ Z) * ((1 + w).rsqrt() - 1)) @ Z.mT) / root)

    def _scaled(self, factor: float) -> DiagonalPlusLowRank:
        return DiagonalPlusLowRank(factor * self.d, self.U, factor * self.values, self.space)

    def _whitened(self, damping: float) -> tuple[Tensor, Tensor, Tensor]:
        """`D^½`, `Z` and `w`.

        Raises:
            ValueError: if the damped matrix, or its diagonal part, is not positive definite.
        """
        check_damping(damping)
        root = positive(self.d + damping, "the diagonal", damping).sqrt()
        if not len(self.values):
            return root, self.U, self.values
        Q, R = torch.linalg.qr(self.U / root.unsqueeze(1))
        w, P = eigh((R * self.values) @ R.mT, self._label())
        return root, Q @ P, positive(1 + w, self._label(), damping) - 1


def nearest_low_rank(block: ExactBlock, rank: int) -> DiagonalPlusLowRank:
    """The `rank` largest eigenvalues of an exact block with their eigenvectors, plus the diagonal that makes the
    result's diagonal exact.

    Eigenvalues equal to the last one are kept too, as they occur with squared error: their eigenvectors are not unique,
    so a part of them would be arbitrary. (If the block and its Gram matrix have more than 2,000 rows, they are not
    known.)
    """
    space, count = block.space, min(block.space.size, block.rank_bound, rank)
    if count == 0:  # a layer without cases
        zeros = torch.zeros(space.size, dtype=block.dtype, device=block.device)
        return DiagonalPlusLowRank(zeros, zeros[:, None][:, :0], zeros[:0], space)
    if min(block.space.size, block.rank_bound) > FORMED:
        generator = torch.Generator(block.device).manual_seed(0)  # the same on all ranks
        e, vectors, _ = block.top_eigenvalues(count, generator=generator)
        parts = vectors if isinstance(vectors, tuple) else (vectors,)
        U = space.flatten(parts).mT
    else:
        every, Q = block._eigen()
        eps = torch.finfo(every.dtype).eps
        kept = (every >= every[-count] - eps**0.5 * every[-1]) & (every > every[-1] * eps * len(every))
        e, Q = every[kept], Q[:, kept]
        if not block._is_small():  # from the eigenvectors q of SᵀS, those of S Sᵀ are S q / √e
            Q = torch.cat([p.flatten(1) for p in block._outer(Q.mT)], 1).mT * (block.scale / e).sqrt()
        U = Q
    rest = space.flatten(block._diagonal()) - U.square() @ e
    return DiagonalPlusLowRank(rest.clamp_min(0), U, e, space)  # negative values are rounding errors
