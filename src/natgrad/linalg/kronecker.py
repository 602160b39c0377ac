"""Kronecker products `A ⊗ B` that act on matrices."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.checks.values import described
from natgrad.linalg import factor
from natgrad.linalg.arguments import check_damping, check_exponent, check_units
from natgrad.linalg.eigen import positive, semidefinite
from natgrad.linalg.factor import Factor
from natgrad.linalg.fitting import check_axes, check_tensors
from natgrad.linalg.operator import Operator, check_operator
from natgrad.linalg.space import Parts, Space


class Kronecker(Operator):
    """`A ⊗ B`, acting on `(d_out, d_in)` matrices as `V ↦ B V Aᵀ`; `A`, `B` symmetric positive semidefinite.

    A diagonal factor may be given as a vector. `to_dense("vec")` is `kron(A, B)`, and `to_dense("torch")`
    `kron(B, A)`.

    Args:
        A: the input factor, `(d_in, d_in)`, or its diagonal.
        B: the output factor, `(d_out, d_out)`, or its diagonal.

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
        for name, F in (("A", A), ("B", B)):
            if not isinstance(F, Tensor) or not F.is_floating_point():
                came = f"has dtype {F.dtype}" if isinstance(F, Tensor) else f"is {described(F)}"
                raise TypeError(
                    f"{name} {came}; expected a Tensor of a floating dtype: torch.tensor(..., dtype=torch.float32)"
                )
            if F.ndim not in (1, 2) or F.shape[0] != F.shape[-1]:
                raise ValueError(f"{name} has shape {tuple(F.shape)}; expected a square matrix, or its diagonal")
        if A.dtype != B.dtype or A.device != B.device:
            raise ValueError(
                f"A is {A.dtype} on {A.device}, but B is {B.dtype} on {B.device}; expected the same: B.to(A)"
            )
        self.A, self.B = A, B
        self.space = Space(((B.shape[0], A.shape[0]),))
        self.dtype, self.device = A.dtype, A.device
        self._eigen: KroneckerEigen | None = None

    def describe(self) -> str:
        return f"A ⊗ B, {factor.describe('A', self.A)}, {factor.describe('B', self.B)}"

    def _matmul(self, parts: Parts) -> Parts:
        return (factor.between(self.B, parts[0], self.A),)

    def inverse(
        self, damping: float = 0.0, *, damping_style: str = "exact", units: Float[Tensor, " i"] | None = None
    ) -> Kronecker | KroneckerEigen:
        """`(A ⊗ B + damping I)⁻¹` exactly, or `(A + π√λ I)⁻¹ ⊗ (B + √λ/π I)⁻¹` with `damping_style="factored"`.

        `π² = (tr A / d_in) / (tr B / d_out)` (Martens & Grosse 2015, section 6.3). With `units`, the input `j` is
        damped as if it were divided by `units[j]`: `A + π√λ diag(units²)`.

        Raises:
            ValueError: if there are units and the damping is not factored.
        """
        check_damping(damping, damping_style)
        check_units(units, damping_style)
        if damping == 0:
            return Kronecker(
                factor.inverse(self.A, "the factor A", 0.0),
                factor.inverse(self.B, "the factor B", 0.0),
            )
        if damping_style == "factored":
            factors = factored_inverses(self.A, self.B, damping, units)
            return Kronecker(*factors) if units is None else InUnits(*factors, units)
        return self.power(-1.0, damping)

    def power(self, exponent: float, damping: float = 0.0) -> KroneckerEigen:
        return self.eigen().power(exponent, damping)

    def logdet(self, damping: float = 0.0) -> Tensor:
        return self.eigen().logdet(damping)

    def trace(self) -> Tensor:
        """`tr A · tr B`."""
        return factor.diagonal(self.A).sum() * factor.diagonal(self.B).sum()

    def trace_in_coordinates(self, units: Float[Tensor, " i"] | None = None) -> Tensor:
        """`tr A tr B`; with `units`, of the inputs in these units."""
        if units is None:
            return self.trace()
        return (factor.diagonal(self.A) / units.square()).sum() * factor.diagonal(self.B).sum()

    def _norm(self) -> Tensor:
        """`‖A‖ ‖B‖` (Frobenius)."""
        return self.A.norm() * self.B.norm()

    def _diagonal(self) -> Parts:
        return (torch.outer(factor.diagonal(self.B), factor.diagonal(self.A)),)

    def _inverse_factor(self, parts: Parts, damping: float) -> Parts:
        return self.power(-0.5, damping)._matmul(parts)

    def inner(self, m: Float[Tensor, " i"], Q: Factor) -> Tensor:
        """The Frobenius inner product with `m mᵀ ⊗ Q`: `mᵀ A m ⟨B, Q⟩`."""
        return factor.along(self.A, m) * factor.inner(self.B, Q)

    def diagonal_along(self, m: Float[Tensor, " i"]) -> Float[Tensor, " o"]:
        """The diagonal of `(mᵀ ⊗ I)(A ⊗ B)(m ⊗ I) = mᵀ A m B`, which is the matrix of `V m`."""
        return factor.along(self.A, m) * factor.diagonal(self.B)

    def _scaled(self, scale: float) -> Kronecker:
        return Kronecker(self.A, scale * self.B)

    def _dense(self) -> Tensor:
        return torch.kron(factor.full(self.B).contiguous(), factor.full(self.A).contiguous())

    def eigen(self) -> KroneckerEigen:
        """The same matrix in its eigenbasis, computed once."""
        if self._eigen is None:
            (e, U_A), (f, U_B) = factor.eigen(self.A, "the factor A"), factor.eigen(self.B, "the factor B")
            values = torch.outer(semidefinite(f, "the factor B"), semidefinite(e, "the factor A"))
            self._eigen = KroneckerEigen(U_A, U_B, values)
        return self._eigen


class InUnits(Kronecker):
    """The inverse of a Kronecker product that was damped in `units` of the inputs. In the coordinates `V diag(units)`
    the damping is `λ I`."""

    has_coordinates = True

    def __init__(self, A: Tensor, B: Tensor, units: Float[Tensor, " i"]):
        super().__init__(A, B)
        self.units = units

    def coordinates(self, parts: Parts) -> Parts:
        return (parts[0] * self.units,)

    def apart(self, parts: Parts) -> Parts:
        """Without the units, which `from_coordinates` would have to undo."""
        return self._matmul(parts)

    def _scaled(self, scale: float) -> InUnits:
        return InUnits(self.A, scale * self.B, self.units)


class KroneckerEigen(Operator):
    """`(U_A ⊗ U_B) diag(values) (U_A ⊗ U_B)ᵀ`, acting on `(d_out, d_in)` matrices; `values` has their shape.

    K-FAC's block in its eigenbases, or EKFAC's block with corrected eigenvalues. Damping is added to the values,
    exactly.

    Args:
        U_A: an orthogonal matrix `(d_in, d_in)`; None for the identity.
        U_B: an orthogonal matrix `(d_out, d_out)`; None for the identity.
        values: the eigenvalues, `(d_out, d_in)`.

    Raises:
        ValueError: by operations that need it, if a damped eigenvalue is not positive.

    Example:
        >>> import torch
        >>> from natgrad.linalg import KroneckerEigen
        >>> M = KroneckerEigen(torch.eye(2), torch.eye(1), torch.tensor([[1.0, 3.0]]))
        >>> M.solve(torch.ones(1, 2), damping=1.0)
        tensor([[0.5000, 0.2500]])

    Reference: George et al. (2018), arXiv:1806.03884.
    """

    def __init__(
        self, U_A: Float[Tensor, "i i"] | None, U_B: Float[Tensor, "o o"] | None, values: Float[Tensor, "o i"]
    ):
        # Row-major, as in a file: products are then the same to the last bit.
        self.U_A, self.U_B = (None if U is None else U.contiguous() for U in (U_A, U_B))
        check_axes("KroneckerEigen", "values", values, (2,))
        bases = {"U_A": (U_A, [values.shape[1]] * 2), "U_B": (U_B, [values.shape[0]] * 2)}
        own = {name: (U, shape) for name, (U, shape) in bases.items() if U is not None}
        check_tensors("KroneckerEigen", {"values": (values, values.shape), **own})
        self.values = values.contiguous()
        self.space = Space((tuple(values.shape),))
        self.dtype, self.device = values.dtype, values.device

    def describe(self) -> str:
        names = (f"{n} of the identity" for n, U in (("U_A", self.U_A), ("U_B", self.U_B)) if U is None)
        return ", ".join(["(U_A ⊗ U_B) diag (U_A ⊗ U_B)ᵀ", *names])

    def _matmul(self, parts: Parts) -> Parts:
        inside = factor.rotate(parts[0], self.U_B, self.U_A) * self.values
        return (factor.rotate(inside, self.U_B, self.U_A, back=True),)

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> KroneckerEigen:
        check_damping(damping, damping_style)
        return self.power(-1.0, damping)

    def power(self, exponent: float, damping: float = 0.0) -> KroneckerEigen:
        check_exponent(exponent)
        return KroneckerEigen(self.U_A, self.U_B, self._damped(damping) ** exponent)

    def logdet(self, damping: float = 0.0) -> Tensor:
        return self._damped(damping).log().sum()

    def trace(self) -> Tensor:
        return self.values.sum()

    def _norm(self) -> Tensor:
        return self.values.norm()

    def _diagonal(self) -> Parts:
        squared = (None if U is None else U.square() for U in (self.U_B, self.U_A))
        return (factor.rotate(self.values, *squared, back=True),)

    def _inverse_factor(self, parts: Parts, damping: float) -> Parts:
        return self.power(-0.5, damping)._matmul(parts)

    def inner(self, m: Float[Tensor, " i"], Q: Factor) -> Tensor:
        """The Frobenius inner product with `m mᵀ ⊗ Q`, from the diagonals in the eigenbases."""
        p = (m if self.U_A is None else m @ self.U_A).square()
        q = factor.diagonal(Q) if self.U_B is None else (self.U_B * factor.from_left(Q, self.U_B)).sum(0)
        return q @ self.values @ p

    def diagonal_along(self, m: Float[Tensor, " i"]) -> Float[Tensor, " o"]:
        """The diagonal of `(mᵀ ⊗ I) · (m ⊗ I)`: `Σ_ji (U_B)²_oj values_ji (U_Aᵀ m)²_i`."""
        values = self.values @ (m if self.U_A is None else m @ self.U_A).square()
        return values if self.U_B is None else self.U_B.square() @ values

    def _scaled(self, scale: float) -> KroneckerEigen:
        return KroneckerEigen(self.U_A, self.U_B, scale * self.values)

    def _damped(self, damping: float) -> Tensor:
        check_damping(damping)
        return positive(self.values + damping, "the Kronecker product", damping)


class Homogeneous(Operator):
    """A matrix on `V = [W b]`, acting on the pair `(W, b)`: K-FAC's original treatment of the bias, `centered=False`.

    Args:
        stacked: an operator on `(d_out, d_in + 1)` matrices; the last column is the bias.

    Example:
        >>> import torch
        >>> from natgrad.linalg import Homogeneous, Kronecker
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 1.0]])  # E[x xᵀ], x = [h; 1]
        >>> Homogeneous(Kronecker(A, torch.eye(1))) @ (torch.tensor([[1.0]]), torch.tensor([3.0]))
        (tensor([[5.]]), tensor([4.]))

    Reference: Martens & Grosse (2015), arXiv:1503.05671, section 2.
    """

    def __init__(self, stacked: Operator):
        check_operator("Homogeneous", "stacked", stacked)
        if len(stacked.space.shapes) != 1 or len(stacked.space.shapes[0]) != 2 or not stacked.space.shapes[0][1]:
            raise ValueError(
                f"stacked acts on {stacked.space.describe()}; expected matrices (d_out, d_in + 1), the bias last"
            )
        self.stacked = stacked
        d_out, d_in = stacked.space.shapes[0]
        self.space = Space(((d_out, d_in - 1), (d_out,)))
        self.dtype, self.device = stacked.dtype, stacked.device

    def describe(self) -> str:
        return f"{self.stacked.describe()}, homogeneous"

    def _matmul(self, parts: Parts) -> Parts:
        return without_bias_column(self.stacked._matmul(with_bias_column(parts)))

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> Homogeneous:
        return Homogeneous(self.stacked.inverse(damping, damping_style=damping_style))

    def power(self, exponent: float, damping: float = 0.0) -> Homogeneous:
        return Homogeneous(self.stacked.power(exponent, damping))

    def logdet(self, damping: float = 0.0) -> Tensor:
        return self.stacked.logdet(damping)

    def trace(self) -> Tensor:
        return self.stacked.trace()

    def _norm(self) -> Tensor:
        return self.stacked.norm()

    def _diagonal(self) -> Parts:
        return without_bias_column(self.stacked._diagonal())

    def _inverse_factor(self, parts: Parts, damping: float) -> Parts:
        return without_bias_column(self.stacked._inverse_factor(with_bias_column(parts), damping))

    def _scaled(self, factor: float) -> Homogeneous:
        return Homogeneous(self.stacked._scaled(factor))


def factored_inverses(
    A: Tensor, B: Tensor, damping: float, units: Float[Tensor, " i"] | None = None
) -> tuple[Tensor, Tensor]:
    """`(A + π√λ I)⁻¹` and `(B + √λ/π I)⁻¹`, `π² = (tr A / d_in) / (tr B / d_out)`.

    With `units`, the damping is added to the matrix of the inputs in these units, `Ā = A / (units unitsᵀ)`:
    `A + π√λ diag(units²)` with `π² = (tr Ā / d_in) / (tr B / d_out)`.
    """
    diagonal = factor.diagonal(A)
    mean = diagonal.mean() if units is None else (diagonal / units.square()).mean()
    pi = (mean / factor.diagonal(B).mean()).sqrt()
    if not (torch.isfinite(pi) and pi > 0):
        pi = torch.ones_like(pi)  # a zero factor has no scale
    root = damping**0.5
    ridge = pi * root if units is None else pi * root * units.square()
    return (
        factor.inverse(factor.add_to_diagonal(A, ridge), "the factor A", damping),
        factor.inverse(factor.add_to_diagonal(B, root / pi), "the factor B", damping),
    )


def with_bias_column(parts: Parts) -> Parts:
    """`[W b]` from `(W, b)`."""
    W, b = parts
    return (torch.cat([W, b.unsqueeze(-1)], -1),)


def without_bias_column(parts: Parts) -> Parts:
    """`(W, b)` from `[W b]`."""
    return parts[0][..., :-1], parts[0][..., -1]
