"""The centered Kronecker product: weight and bias are separate, and the input factor is a covariance."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.checks.values import described
from natgrad.linalg import factor
from natgrad.linalg.arguments import check_damping, check_exponent, check_units
from natgrad.linalg.centered_power import CenteredPower, CenteredRows
from natgrad.linalg.dense import Dense
from natgrad.linalg.diagonal import Diagonal
from natgrad.linalg.eigen import inverse_from_cholesky, semidefinite
from natgrad.linalg.fitting import check_axes, check_tensors
from natgrad.linalg.kronecker import Homogeneous, Kronecker, KroneckerEigen
from natgrad.linalg.operator import DENSE_LIMIT, Operator, check_operator
from natgrad.linalg.space import Parts, Space


class CenteredKronecker(Operator):
    """`A ⊗ B` for `A = [[C + m mᵀ, m], [mᵀ, 1]]`, held as `Tᵀ blockdiag(C ⊗ B, B) T`.

    It acts on the pair `(W, b)`. `T: (W, b) ↦ (W, b + W m)` has determinant 1, so inverse, determinant and samples
    follow from `C` and `B` alone. Plain damping uses the eigenbases of `A` and `B`. `damping_style="centered"` adds the
    damping in the centered coordinates `(W, b + W m)`: then the damped solve, as a change of the layer's function, does
    not depend on a shift of the layer's inputs.

    Args:
        covariance: `C = cov(h)`, `(d_in, d_in)`, or its diagonal.
        mean: `m = E[h]`, `(d_in,)`.
        output: `B`, `(d_out, d_out)`, or its diagonal.

    Raises:
        ValueError: if the shapes do not match.

    Example:
        >>> import torch
        >>> Z = CenteredKronecker(covariance=torch.eye(2), mean=torch.tensor([1.0, 0.0]), output=torch.eye(1))
        >>> W, b = Z.solve((torch.tensor([[3.0, 1.0]]), torch.tensor([2.0])))
        >>> W, b      # W = ∇_W − ∇_b mᵀ, b = ∇_b − W m
        (tensor([[1., 1.]]), tensor([1.]))
    """

    has_coordinates = True

    def __init__(self, *, covariance: Tensor, mean: Tensor, output: Tensor):
        check_axes("CenteredKronecker", "mean", mean, (1,))
        check_axes("CenteredKronecker", "covariance", covariance, (1, 2))
        if mean.ndim != 1 or covariance.shape not in ((len(mean), len(mean)), (len(mean),)):
            raise ValueError(
                f"covariance has shape {tuple(covariance.shape)} and mean {tuple(mean.shape)}; "
                "expected (d_in, d_in), or a diagonal of (d_in,), and (d_in,)"
            )
        self.C, self.m, self.B = covariance, mean, output
        self._weight = Kronecker(covariance, output)
        self._centered = Centered(self._weight, matrix_of(output), mean)
        self.space, self.dtype, self.device = self._centered.space, self._weight.dtype, self._weight.device
        self._homogeneous: Homogeneous | None = None

    def describe(self) -> str:
        return f"C ⊗ B and B, centered, {factor.describe('C', self.C)}, {factor.describe('B', self.B)}"

    def _matmul(self, parts: Parts) -> Parts:
        return self._centered._matmul(parts)

    def inverse(
        self, damping: float = 0.0, *, damping_style: str = "exact", units: Float[Tensor, " i"] | None = None
    ) -> Operator:
        """`(A ⊗ B + λ I)⁻¹`; with `damping_style="centered"` `T⁻¹ blockdiag(C ⊗ B + λ I, B + λ I)⁻¹ T⁻ᵀ`.

        `damping_style="factored"` replaces that first block by `(C + π√λ I) ⊗ (B + √λ/π I)`. The bias keeps `B + λ I`:
        its input factor is 1, so the π of the weight does not apply to it. With `units`, the input `j` is damped as if
        it were divided by `units[j]`: `C + π√λ diag(units²)`.

        Raises:
            ValueError: if there are units and the damping is not factored.
        """
        check_damping(damping, damping_style)
        check_units(units, damping_style)
        if damping == 0 or damping_style == "centered":
            return self._centered.inverse(damping, damping_style="centered")
        if damping_style == "exact":
            return self._plain().inverse(damping)
        weight = self._weight.inverse(damping, damping_style=damping_style, units=units)
        return CenteredInverse(weight, matrix_of(self.B).inverse(damping), self.m)

    def power(self, exponent: float, damping: float = 0.0) -> Operator:
        """`(A ⊗ B + λ I)^exponent`."""
        check_damping(damping)
        return self.inverse(damping) if exponent == -1 else self._plain().power(exponent, damping)

    def logdet(self, damping: float = 0.0) -> Tensor:
        """`log det (A ⊗ B + λ I)`; without damping `d_out logdet C + (d_in + 1) logdet B`."""
        check_damping(damping)
        return self._centered.logdet() if damping == 0 else self._plain().logdet(damping)

    def _plain(self) -> Homogeneous | Centered:
        """The same matrix in a form to which `λ I` can be added: in the eigenbases of `A` and `B`. The eigenvalues of
        `A` are computed in float64: a large mean leaves few significant digits for the covariance.

        If `C` is a diagonal and `A` would take too much memory, the rows of the centered form are used instead.
        """
        if self.C.ndim == 1:
            return self._centered
        if self._homogeneous is None:
            x = torch.cat([self.m, self.m.new_ones(1)]).double()
            A = torch.outer(x, x)
            A[:-1, :-1] += self.C
            e, U_A = factor.eigen(A, "the factor A")
            f, U_B = factor.eigen(self.B, "the factor B")
            e = semidefinite(e.to(self.dtype), "the factor A")
            values = torch.outer(semidefinite(f, "the factor B"), e)
            U_A = None if U_A is None else U_A.to(self.dtype)
            self._homogeneous = Homogeneous(KroneckerEigen(U_A, U_B, values))
        return self._homogeneous

    def trace(self) -> Tensor:
        return self._centered.trace()

    def _norm(self) -> Tensor:
        return self._centered.norm()

    def coordinates(self, parts: Parts) -> Parts:
        return self._centered.coordinates(parts)

    def trace_in_coordinates(self, units: Float[Tensor, " i"] | None = None) -> Tensor:
        """`tr C tr B + tr B`; with `units`, of the inputs in these units."""
        return self._weight.trace_in_coordinates(units) + factor.diagonal(self.B).sum()

    def _diagonal(self) -> Parts:
        return self._centered._diagonal()

    def _inverse_factor(self, parts: Parts, damping: float) -> Parts:
        return (self._centered if damping == 0 else self._plain())._inverse_factor(parts, damping)

    def _scaled(self, scale: float) -> CenteredKronecker:
        return CenteredKronecker(covariance=self.C, mean=self.m, output=scale * self.B)

    @property
    def A(self) -> Tensor:
        """The homogeneous second moment `E[x xᵀ]`, `x = [h; 1]`."""
        m = torch.cat([self.m, self.m.new_ones(1)])
        return torch.block_diag(factor.full(self.C), self.m.new_zeros(1, 1)) + torch.outer(m, m)


class Centered(Operator):
    """`Tᵀ blockdiag(weight, bias) T` with `T: (W, b) ↦ (W, b + W m)`: centered EKFAC's block, and any other block whose
    weight and bias are independent in centered coordinates. It acts on the pair `(W, b)`.

    Plain damping works on the rows in the weight's output basis, where the rows are independent.
    `damping_style="centered"` adds the damping to both blocks.

    Args:
        weight: on `W`, `(d_out, d_in)`.
        bias: on the mean pre-activation `b + W m`, `(d_out,)`. If it is not diagonal in the weight's output basis,
            plain damping uses the dense matrix.
        mean: `m = E[h]`, `(d_in,)`.

    Example:
        >>> import torch
        >>> from natgrad.linalg import Centered, Diagonal, Kronecker
        >>> weight, bias = Kronecker(torch.eye(2), torch.eye(1)), Diagonal((torch.ones(1),))
        >>> Centered(weight, bias, torch.tensor([1.0, 0.0])) @ (torch.tensor([[3.0, 1.0]]), torch.tensor([2.0]))
        (tensor([[8., 1.]]), tensor([5.]))
    """

    has_coordinates = True

    def __init__(self, weight: Kronecker | KroneckerEigen, bias: Operator, mean: Float[Tensor, " i"]):
        self.weight, self.bias, self.m = weight, bias, mean
        self.space = _space_of(weight, bias, mean)
        self.dtype, self.device = weight.dtype, weight.device

    def describe(self) -> str:
        return f"{self.weight.describe()} and {self.bias.describe()}, centered"

    def _matmul(self, parts: Parts) -> Parts:
        W, c = self.coordinates(parts)
        (V,), (c,) = self.weight._matmul((W,)), self.bias._matmul((c,))
        return V + c.unsqueeze(-1) * self.m, c

    def coordinates(self, parts: Parts) -> Parts:
        """`(W, b + W m)`."""
        W, b = parts
        return W, b + W @ self.m

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> Operator:
        """`(M + λ I)⁻¹`. With `damping_style="centered"`, and also `"factored"` because there are no factors to damp:
        `T⁻¹ blockdiag(weight + λ I, bias + λ I)⁻¹ T⁻ᵀ`."""
        check_damping(damping, damping_style)
        if damping == 0 or damping_style != "exact":
            return CenteredInverse(self.weight.inverse(damping), self.bias.inverse(damping), self.m)
        return self._damped(damping).inverse()

    def power(self, exponent: float, damping: float = 0.0) -> Operator:
        check_exponent(exponent)
        check_damping(damping)
        return self.inverse(damping) if exponent == -1 else self._damped(damping).power(exponent)

    def logdet(self, damping: float = 0.0) -> Tensor:
        check_damping(damping)
        return self._damped(damping).logdet() if damping else self.weight.logdet() + self.bias.logdet()

    def _damped(self, damping: float) -> CenteredPower | Dense:
        """`M + λ I`, by rows, or dense."""
        rows = self._rows()
        if rows is not None:
            return CenteredPower(rows, 1.0, damping)
        if self.space.size > DENSE_LIMIT:
            raise TypeError(
                f"a centered block of {self.space.size} rows, whose bias's part is not diagonal in the weight's output "
                "basis (as KFOC's is not), is damped by way of the dense matrix, which is too large; use "
                "centered=False, or damping_style='centered'"
            )
        eye = torch.eye(self.space.size, dtype=self.dtype, device=self.device)
        return Dense(self.to_dense() + damping * eye, self.space)

    def _rows(self) -> CenteredRows | None:
        """The block in the bases of its inputs and outputs; None if the bias's part is not diagonal there."""
        weight = self.weight.eigen() if isinstance(self.weight, Kronecker) else self.weight
        U_A, U_B = weight.U_A, weight.U_B
        Q = factor_of(self.bias)
        P = Q if U_B is None else U_B.mT @ factor.from_left(Q, U_B)
        beta = factor.diagonal(P)
        rounding = 64 * torch.finfo(self.dtype).eps * len(beta) ** 0.5 * P.norm()
        if P.ndim == 2 and (P - beta.diag()).norm() > rounding:
            return None
        # Rounding may make the values of a bias without gradient negative.
        beta = torch.where(beta.abs() <= rounding, beta.clamp_min(0), beta)
        return CenteredRows(U_A, U_B, weight.values, beta, self.m if U_A is None else self.m @ U_A)

    def trace(self) -> Tensor:
        """`tr weight + (1 + ‖m‖²) tr bias`."""
        return self.weight.trace() + (1 + self.m @ self.m) * self.bias.trace()

    def trace_in_coordinates(self) -> Tensor:
        return self.weight.trace() + self.bias.trace()

    def _norm(self) -> Tensor:
        """`‖·‖² = ‖weight‖² + 2 ⟨weight, m mᵀ ⊗ bias⟩ + (1 + ‖m‖²)² ‖bias‖²`."""
        inner = self.weight.inner(self.m, factor_of(self.bias))
        scale = 1 + self.m @ self.m
        return (self.weight.norm().square() + 2 * inner + (scale * self.bias.norm()).square()).sqrt()

    def _diagonal(self) -> Parts:
        (W,), (b,) = self.weight._diagonal(), self.bias._diagonal()
        return W + torch.outer(b, self.m.square()), b

    def _inverse_factor(self, parts: Parts, damping: float) -> Parts:
        if damping != 0:
            return self._damped(damping)._inverse_factor(parts, 0.0)
        (W,), (c,) = self.weight._inverse_factor(parts[:1], 0.0), self.bias._inverse_factor(parts[1:], 0.0)
        return W, c - W @ self.m

    def _scaled(self, factor: float) -> Centered:
        return Centered(self.weight._scaled(factor), self.bias._scaled(factor), self.m)


class CenteredInverse(Operator):
    """`T⁻¹ blockdiag(weight, bias) T⁻ᵀ`: the update `ΔW = weight(∇_W − ∇_b mᵀ)`, `Δb = bias(∇_b) − ΔW m`."""

    has_coordinates = True

    def __init__(self, weight: Kronecker | KroneckerEigen, bias: Operator, mean: Float[Tensor, " i"]):
        self.weight, self.bias, self.m = weight, bias, mean
        self.space = _space_of(weight, bias, mean)
        self.dtype, self.device = weight.dtype, weight.device

    def _matmul(self, parts: Parts) -> Parts:
        return self.from_coordinates(self.apart(parts))

    def apart(self, parts: Parts) -> Parts:
        """`ΔW` and `Δb + ΔW m = bias(∇_b)`, the change of the mean pre-activation."""
        grad_W, grad_b = parts
        (W,) = self.weight._matmul((torch.addcmul(grad_W, grad_b.unsqueeze(-1), self.m, value=-1),))
        (c,) = self.bias._matmul((grad_b,))
        return W, c

    def coordinates(self, parts: Parts) -> Parts:
        """`(W, b + W m)`, in which the damping is `λ I`; `(W diag(units), b + W m)` if the weight is in units."""
        W, b = parts
        c = torch.addmv(b, W, self.m) if W.ndim == 2 else b + W @ self.m
        return *self.weight.coordinates((W,)), c

    def from_coordinates(self, parts: Parts) -> Parts:
        """`(W, b)` from `(W, b + W m)`."""
        W, c = parts
        return W, torch.addmv(c, W, self.m, alpha=-1) if W.ndim == 2 else c - W @ self.m

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> Centered:
        if damping != 0:
            raise self._cannot("damped inverse")
        return Centered(self.weight.inverse(), self.bias.inverse(), self.m)

    def logdet(self, damping: float = 0.0) -> Tensor:
        if damping != 0:
            raise self._cannot("damped logdet")
        return self.weight.logdet() + self.bias.logdet()

    def trace(self) -> Tensor:
        return self.weight.trace() + self.weight.diagonal_along(self.m).sum() + self.bias.trace()

    def _diagonal(self) -> Parts:
        """`b = c − W m`, so its variance is that of `c` plus that of `W m`, which are independent."""
        (W,), (c,) = self.weight._diagonal(), self.bias._diagonal()
        return W, c + self.weight.diagonal_along(self.m)

    def _scaled(self, factor: float) -> CenteredInverse:
        return CenteredInverse(self.weight._scaled(factor), self.bias._scaled(factor), self.m)


def _space_of(weight: Kronecker | KroneckerEigen, bias: Operator, mean: Tensor) -> Space:
    """The vectors `(W, b)` of the operators of weight and bias. Raises if these do not match."""
    if not isinstance(weight, (Kronecker, KroneckerEigen)):
        raise TypeError(f"weight is {described(weight)}; expected a Kronecker or a KroneckerEigen")
    check_operator("a centered block", "bias", bias)
    d_out, d_in = weight.space.shapes[0]
    if bias.space.shapes != ((d_out,),):
        raise ValueError(
            f"bias acts on {bias.space.describe()}; expected vectors of {d_out}, one entry for each row of weight"
        )
    check_tensors("a centered block", {"mean": (mean, (d_in,))})
    return Space(((d_out, d_in), (d_out,)))


def matrix_of(F: Tensor) -> Dense | Diagonal:
    """A factor as an operator on vectors."""
    return Diagonal((F,)) if F.ndim == 1 else Dense(F)


def factor_of(operator: Operator) -> Tensor:
    """The inverse of `matrix_of`."""
    return operator.values[0] if isinstance(operator, Diagonal) else operator._dense()


def homogeneous_inverse(C: Float[Tensor, "d d"], m: Float[Tensor, " d"]) -> Float[Tensor, "d+1 d+1"]:
    """The inverse of `A = E[x xᵀ]`, `x = [h; 1]`, from covariance and mean, dense, `(d_in + 1, d_in + 1)`:

        A⁻¹ = [[C⁻¹, −C⁻¹ m], [−mᵀ C⁻¹, 1 + mᵀ C⁻¹ m]]

    Args:
        C: the covariance of `h`, `(d_in, d_in)`.
        m: the mean of `h`, `(d_in,)`.

    Raises:
        ValueError: if `C` is singular, or the shapes do not match.

    Example:
        >>> import torch
        >>> homogeneous_inverse(torch.tensor([[0.5]]), torch.tensor([3.0])).round(decimals=3).tolist()
        [[2.0, -6.0], [-6.0, 19.0]]
    """
    if C.shape != (len(m), len(m)):
        raise ValueError(f"C has shape {tuple(C.shape)} and m {tuple(m.shape)}; expected (d, d) and (d,)")
    C_inv = inverse_from_cholesky(C, "the covariance C", 0.0)
    c = -(C_inv @ m)
    top = torch.cat([C_inv, c.unsqueeze(1)], 1)
    return torch.cat([top, torch.cat([c, (1 - m @ c).reshape(1)]).unsqueeze(0)], 0)
