"""Kronecker products: `A ⊗ B` acting on matrices."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg.eigen import eigh, inverse_from_cholesky, positive, semidefinite
from natgrad.linalg.operator import Operator, check_damping
from natgrad.linalg.space import Parts, Space


class Kronecker(Operator):
    """`A ⊗ B`, acting on `(d_out, d_in)` matrices as `V ↦ B V Aᵀ`; `A`, `B` symmetric positive semidefinite.

    `to_dense("vec")` is `kron(A, B)`; `to_dense("torch")` is `kron(B, A)`.

    Raises:
        ValueError: if a factor is not square.

    Example:
        >>> import torch
        >>> K = Kronecker(2 * torch.eye(3), 5 * torch.eye(2))
        >>> round(K.solve(torch.ones(2, 3))[0, 0].item(), 4), K.trace().item()
        (0.1, 60.0)

    Reference: Martens & Grosse (2015), "Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature", section 3.
    """

    def __init__(self, A: Tensor, B: Tensor):
        for name, factor in (("A", A), ("B", B)):
            if factor.ndim != 2 or factor.shape[0] != factor.shape[1]:
                raise ValueError(f"{name} has shape {tuple(factor.shape)}, expected a square matrix")
        self.A, self.B = A, B
        self.space = Space(((B.shape[0], A.shape[0]),))
        self.dtype, self.device = A.dtype, A.device
        self._eigen: KroneckerEigen | None = None

    def _matmul(self, parts: Parts) -> Parts:
        return (self.B @ parts[0] @ self.A.mT,)

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> Kronecker | KroneckerEigen:
        """`(A ⊗ B + damping I)⁻¹` exactly, or `(A + π√λ I)⁻¹ ⊗ (B + √λ/π I)⁻¹` with `damping_style="factored"`.

        `π² = (tr A / d_in) / (tr B / d_out)` (Martens & Grosse 2015, section 6.3).
        """
        check_damping(damping, damping_style)
        if damping == 0:
            return Kronecker(
                inverse_from_cholesky(self.A, "the factor A", 0.0),
                inverse_from_cholesky(self.B, "the factor B", 0.0),
            )
        if damping_style == "factored":
            return Kronecker(*factored_inverses(self.A, self.B, damping))
        return self.power(-1.0, damping)

    def power(self, exponent: float, damping: float = 0.0) -> KroneckerEigen:
        return self.eigen().power(exponent, damping)

    def logdet(self, damping: float = 0.0) -> Tensor:
        return self.eigen().logdet(damping)

    def trace(self) -> Tensor:
        """`tr A · tr B`."""
        return self.A.trace() * self.B.trace()

    def norm(self) -> Tensor:
        """`‖A‖ ‖B‖` (Frobenius)."""
        return torch.linalg.matrix_norm(self.A) * torch.linalg.matrix_norm(self.B)

    def _diagonal(self) -> Parts:
        return (torch.outer(self.B.diagonal(), self.A.diagonal()),)

    def _inverse_factor(self, parts: Parts, damping: float) -> Parts:
        return self.power(-0.5, damping)._matmul(parts)

    def inner(self, P: Tensor, Q: Tensor) -> Tensor:
        """The Frobenius inner product with `P ⊗ Q`, `P` and `Q` symmetric: `⟨A, P⟩ ⟨B, Q⟩`."""
        return (self.A * P).sum() * (self.B * Q).sum()

    def _scaled(self, factor: float) -> Kronecker:
        return Kronecker(self.A, factor * self.B)

    def _dense(self) -> Tensor:
        return torch.kron(self.B, self.A)

    def eigen(self) -> KroneckerEigen:
        """The same matrix in its eigenbasis, computed once."""
        if self._eigen is None:
            (e, U_A), (f, U_B) = eigh(self.A, "the factor A"), eigh(self.B, "the factor B")
            values = torch.outer(semidefinite(f, "the factor B"), semidefinite(e, "the factor A"))
            self._eigen = KroneckerEigen(U_A, U_B, values)
        return self._eigen


class KroneckerEigen(Operator):
    """`(U_A ⊗ U_B) diag(values) (U_A ⊗ U_B)ᵀ`, acting on `(d_out, d_in)` matrices; `values` has their shape."""

    def __init__(self, U_A: Float[Tensor, "i i"], U_B: Float[Tensor, "o o"], values: Float[Tensor, "o i"]):
        self.U_A, self.U_B, self.values = U_A, U_B, values
        self.space = Space((tuple(values.shape),))
        self.dtype, self.device = values.dtype, values.device

    def _matmul(self, parts: Parts) -> Parts:
        return (self.U_B @ ((self.U_B.mT @ parts[0] @ self.U_A) * self.values) @ self.U_A.mT,)

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> KroneckerEigen:
        check_damping(damping, damping_style)
        return self.power(-1.0, damping)

    def power(self, exponent: float, damping: float = 0.0) -> KroneckerEigen:
        return KroneckerEigen(self.U_A, self.U_B, self._damped(damping) ** exponent)

    def logdet(self, damping: float = 0.0) -> Tensor:
        return self._damped(damping).log().sum()

    def trace(self) -> Tensor:
        return self.values.sum()

    def norm(self) -> Tensor:
        return self.values.norm()

    def _diagonal(self) -> Parts:
        return (self.U_B.square() @ self.values @ self.U_A.square().mT,)

    def _inverse_factor(self, parts: Parts, damping: float) -> Parts:
        return self.power(-0.5, damping)._matmul(parts)

    def inner(self, P: Tensor, Q: Tensor) -> Tensor:
        """The Frobenius inner product with `P ⊗ Q`, `P` and `Q` symmetric, by their diagonals in the eigenbases."""
        p, q = ((U * (M @ U)).sum(0) for U, M in ((self.U_A, P), (self.U_B, Q)))
        return q @ self.values @ p

    def _scaled(self, factor: float) -> KroneckerEigen:
        return KroneckerEigen(self.U_A, self.U_B, factor * self.values)

    def _damped(self, damping: float) -> Tensor:
        check_damping(damping)
        return positive(self.values + damping, "the Kronecker product", damping)


class Homogeneous(Operator):
    """A matrix on `V = [W b]`, acting on the pair `(W, b)`: K-FAC's original treatment of the bias."""

    def __init__(self, stacked: Operator):
        self.stacked = stacked
        d_out, d_in = stacked.space.shapes[0]
        self.space = Space(((d_out, d_in - 1), (d_out,)))
        self.dtype, self.device = stacked.dtype, stacked.device

    def _matmul(self, parts: Parts) -> Parts:
        return _unstack(self.stacked._matmul(_stack(parts)))

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> Homogeneous:
        return Homogeneous(self.stacked.inverse(damping, damping_style=damping_style))

    def power(self, exponent: float, damping: float = 0.0) -> Homogeneous:
        return Homogeneous(self.stacked.power(exponent, damping))

    def logdet(self, damping: float = 0.0) -> Tensor:
        return self.stacked.logdet(damping)

    def trace(self) -> Tensor:
        return self.stacked.trace()

    def norm(self) -> Tensor:
        return self.stacked.norm()

    def _diagonal(self) -> Parts:
        return _unstack(self.stacked._diagonal())

    def _inverse_factor(self, parts: Parts, damping: float) -> Parts:
        return _unstack(self.stacked._inverse_factor(_stack(parts), damping))

    def _scaled(self, factor: float) -> Homogeneous:
        return Homogeneous(self.stacked._scaled(factor))


def factored_inverses(A: Tensor, B: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """`(A + π√λ I)⁻¹` and `(B + √λ/π I)⁻¹`, `π² = (tr A / d_in) / (tr B / d_out)`."""
    pi = (A.diagonal().mean() / B.diagonal().mean()).sqrt()
    if not (torch.isfinite(pi) and pi > 0):
        pi = torch.ones_like(pi)  # a factor that is zero has no scale to share
    root = damping**0.5
    return (
        inverse_from_cholesky(A + torch.diag_embed((pi * root).expand(len(A))), "the factor A", damping),
        inverse_from_cholesky(B + torch.diag_embed((root / pi).expand(len(B))), "the factor B", damping),
    )


def _stack(parts: Parts) -> Parts:
    W, b = parts
    return (torch.cat([W, b.unsqueeze(-1)], -1),)


def _unstack(parts: Parts) -> Parts:
    return parts[0][..., :-1], parts[0][..., -1]
