"""A matrix of low rank plus a multiple of the identity, and the approximation of any matrix by one."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.checks.values import check_count, check_generator
from natgrad.linalg.arguments import check_damping, check_exponent
from natgrad.linalg.eigen import positive, semidefinite, symmetric_part
from natgrad.linalg.operator import Operator
from natgrad.linalg.space import Parts, Space


class LowRank(Operator):
    """`U diag(e) Uᵀ + c (I − U Uᵀ)` with orthonormal columns of `U`.

    Args:
        U: `(size, rank)`.
        values: `e`, the eigenvalues along the columns.
        rest: `c`, the eigenvalue of all other directions.
        space: the form of its vectors. None: tensors of shape `(size,)`.

    Raises:
        ValueError: if the shapes do not match.

    Example:
        >>> import torch
        >>> U = torch.tensor([[1.0], [0.0]])
        >>> LowRank(U, torch.tensor([3.0]), 1.0).solve(torch.ones(2), damping=1.0)
        tensor([0.2500, 0.5000])
    """

    def __init__(
        self,
        U: Float[Tensor, "size rank"],
        values: Float[Tensor, " rank"],
        rest: float | Tensor = 0.0,
        space: Space | None = None,
    ):
        self.space = space or Space(((len(U),),))
        if U.ndim != 2 or len(U) != self.space.size or values.shape != U.shape[1:]:
            raise ValueError(
                f"U has shape {tuple(U.shape)} and values {tuple(values.shape)}; expected ({self.space.size}, rank) "
                "and (rank,)"
            )
        self.U, self.values, self.rest = U.contiguous(), values, float(rest)
        self.dtype, self.device = U.dtype, U.device

    def describe(self) -> str:
        return f"rank {len(self.values)} and a multiple of the identity"

    def _matmul(self, parts: Parts) -> Parts:
        v = self.space.flatten(parts)
        return self.space.unflatten(self.rest * v + ((v @ self.U) * (self.values - self.rest)) @ self.U.mT)

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> LowRank:
        check_damping(damping, damping_style)
        return self.power(-1.0, damping)

    def power(self, exponent: float, damping: float = 0.0) -> LowRank:
        check_exponent(exponent)
        e, c = self._damped(damping)
        return LowRank(self.U, e**exponent, c**exponent, self.space)

    def logdet(self, damping: float = 0.0) -> Tensor:
        e, c = self._damped(damping)
        return e.log().sum() + self._others * c.log()

    def trace(self) -> Tensor:
        return self.values.sum() + self._others * self.rest

    def _norm(self) -> Tensor:
        return (self.values.square().sum() + self._others * self.rest**2).sqrt()

    def _diagonal(self) -> Parts:
        return self.space.unflatten(self.rest + self.U.square() @ (self.values - self.rest))

    def _inverse_factor(self, parts: Parts, damping: float) -> Parts:
        return self.power(-0.5, damping)._matmul(parts)

    def _scaled(self, factor: float) -> LowRank:
        return LowRank(self.U, factor * self.values, factor * self.rest, self.space)

    @property
    def _others(self) -> int:
        """The dimension of the space orthogonal to all columns."""
        return self.space.size - len(self.values)

    def _damped(self, damping: float) -> tuple[Tensor, Tensor]:
        """The eigenvalues of the damped matrix: along the columns, and in all other directions."""
        check_damping(damping)
        every = torch.cat([self.values, self.values.new_tensor([self.rest] * bool(self._others))]) + damping
        every = positive(every, self._label(), damping)
        count = len(self.values)
        return every[:count], every[count] if self._others else every.new_ones(())


def nystrom(matrix: Operator, rank: int, generator: torch.Generator | None = None) -> LowRank:
    """An approximation of a positive semidefinite matrix by `rank` products: randomized Nyström.

        M̂ = (M Ω) (Ωᵀ M Ω)⁻¹ (M Ω)ᵀ = U diag(e) Uᵀ,    and the smallest of e for all other directions

    with an orthonormal random `Ω`. `M − M̂` is positive semidefinite, and small if the eigenvalues of `M` decay fast.
    Use it as `F.solve(v, damping, preconditioner=nystrom(F, 50))`.

    Args:
        matrix: `M`; only products with it are needed.
        rank: the number of columns of `Ω`, at most the size.
        generator: the source of random numbers. Default: torch's own.

    Raises:
        ValueError: if the rank is not between 1 and the size, or the matrix has a negative eigenvalue.

    Example:
        >>> import torch
        >>> from natgrad.linalg import Dense, nystrom
        >>> M = Dense(torch.diag(torch.tensor([100.0, 50.0, 1e-3, 1e-3], dtype=torch.float64)))
        >>> nystrom(M, 3, torch.Generator().manual_seed(0)).values.round().tolist()
        [0.0, 50.0, 100.0]

    Reference: Frangella, Tropp & Udell (2023), "Randomized Nyström Preconditioning", arXiv:2110.02820.
    """
    check_count("rank", rank, "products")
    check_generator(generator, matrix.device)
    size = matrix.space.size
    if rank > size:
        raise ValueError(f"rank={rank} is larger than the matrix, which has {size} rows; expected at most {size}")
    Ω = torch.randn(size, rank, dtype=matrix.dtype, device=matrix.device, generator=generator)
    Ω = torch.linalg.qr(Ω).Q
    Y = matrix.space.flatten(matrix._matmul(matrix.space.unflatten(Ω.mT.contiguous()))).mT
    # A small shift keeps the Cholesky factor real despite rounding; it is subtracted from the eigenvalues again.
    shift = torch.finfo(matrix.dtype).eps * size**0.5 * float(torch.linalg.matrix_norm(Y))
    Y = Y + shift * Ω
    core = Ω.mT @ Y
    e, Q = torch.linalg.eigh(symmetric_part(core))
    e = semidefinite(e, matrix._label())
    kept = e > shift / 2
    B = (Y @ Q[:, kept]) * e[kept].rsqrt()
    U, s, _ = torch.linalg.svd(B, full_matrices=False)
    values = (s.square() - shift).clamp_min(0.0)
    return LowRank(U.flip(1), values.flip(0), values[-1] if len(values) else 0.0, matrix.space)
