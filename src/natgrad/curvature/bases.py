"""The eigenbases of K-FAC's factors, and the second moments of the gradients in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.capture.cases import Cases
from natgrad.capture.layer import Layer
from natgrad.capture.layers import Inputs, Rows, Sparse, joined
from natgrad.curvature.blocks import input_factor
from natgrad.curvature.groups import by_case, has_rival, step_of
from natgrad.curvature.moments import AffineMoments, Moments
from natgrad.distributed.assignment import cost
from natgrad.distributed.world import World
from natgrad.linalg import Centered, Homogeneous, KroneckerEigen, Operator, factor
from natgrad.linalg.centered import matrix_of
from natgrad.linalg.pieces import squares, with_one
from natgrad.linalg.space import Parts

Turn = Callable[[Tensor, factor.Basis, str], factor.Basis]
"""Makes a basis for a factor, from the factor, the previous basis (if there is one) and the factor's name."""


@dataclass(frozen=True)
class Eigenbasis:
    """Orthonormal bases of a layer's two factors. None is the standard basis, or means that there is no such factor.

    `centered`: the layer has a weight and a bias, and the input factor is the covariance.
    """

    layer: Layer
    U_A: Float[Tensor, "i i"] | None
    U_B: Float[Tensor, "o o"] | None
    centered: bool

    @classmethod
    def of(cls, layer: Layer, m: AffineMoments, centered: bool, turn: Turn, before: Eigenbasis | None) -> Eigenbasis:
        """The bases of a layer's factors."""
        apart = bool(centered and layer.weight and layer.bias)
        U_A = None
        if layer.weight:
            A = input_factor(layer, m, centered)
            U_A = turn(A, before.U_A if before else None, f"the input factor of layer {layer.label!r}")
        B = m.B(is_mean=False)
        U_B = turn(B, before.U_B if before else None, f"the output factor of layer {layer.label!r}")
        return cls(layer, U_A, U_B, apart)

    def inputs(self, cases: Cases, m: AffineMoments) -> Inputs:
        """`U_Cᵀ (h − m)`, or `U_Aᵀ x`."""
        x = joined(cases.h[self.layer])
        if not self.layer.weight or isinstance(x, Sparse):
            return x
        h = x.dense()
        if self.centered:
            h = h - m.mean
        elif self.layer.bias:
            h = with_one(h)
        return Rows(h if self.U_A is None else h @ self.U_A)

    def squares(self, z: Inputs, g: Float[Tensor, "n t o"]) -> Parts:
        """`Σ_i (Σ_t p z)²` with `p = U_Bᵀ g`, for the weight's entries and for the bias's."""
        p = g if self.U_B is None else g @ self.U_B
        return example_squares(z, p.unsqueeze(1), bias=self.centered or not self.layer.weight)

    def kronecker_values(self, m: AffineMoments) -> Parts:
        """K-FAC's approximation of the sums of squares: the products of the diagonals of its factors in these bases."""
        f = _in_basis(m.B(is_mean=False), self.U_B)
        if not self.layer.weight:
            return (f,)
        weight = torch.outer(f, _in_basis(input_factor(self.layer, m, self.centered), self.U_A))
        return (weight, f) if self.centered else (weight,)

    def block(self, values: Parts, m: AffineMoments) -> Operator:
        """The operator with these values on the diagonal in the bases."""
        *weight, last = values
        if not self.layer.weight or self.centered:
            bias = matrix_of(last if self.U_B is None else (self.U_B * last) @ self.U_B.mT)
            if not self.layer.weight:
                return bias
            return Centered(KroneckerEigen(self.U_A, self.U_B, weight[0]), bias, m.mean)
        whole = KroneckerEigen(self.U_A, self.U_B, last)
        return Homogeneous(whole) if self.layer.bias else whole


def anew(F: Tensor, before: factor.Basis, what: str) -> factor.Basis:
    """A factor's eigenvectors, independent of the previous basis."""
    return factor.eigen(F, what)[1]


def turned(F: Tensor, before: factor.Basis, what: str) -> factor.Basis:
    """The previous basis after one step of orthogonal iteration: a matrix product and a QR factorization. This follows
    a factor that changes slowly. Without a previous basis, the eigenvectors.

    The columns of the largest eigenvalues are last, and are orthogonalized first. Columns of null vectors contain only
    rounding errors: they must be made orthogonal to the other columns, and not the other way round.
    """
    if before is None or F.ndim == 1:
        return anew(F, before, what)
    return torch.linalg.qr((F @ before).flip(1))[0].flip(1).contiguous()


def bases_of(
    moments: Mapping[Layer, Moments],
    centered: bool,
    turn: Turn = anew,
    before: Mapping[Layer, Eigenbasis] | None = None,
    world: World | None = None,
) -> dict[Layer, Eigenbasis]:
    """The bases of all layers, except scales and weights that are used both as `W` and as `Wᵀ`. Each is computed by one
    of the ranks."""
    before = before or {}

    def bases(layer: Layer, m: AffineMoments) -> dict[str, Any]:
        basis = Eigenbasis.of(layer, m, centered, turn, before.get(layer))
        return {"U_A": basis.U_A, "U_B": basis.U_B, "centered": basis.centered}

    own = {layer: m for layer, m in moments.items() if isinstance(m, AffineMoments) and not has_rival(layer, moments)}
    work = {str(i): partial(bases, layer, m) for i, (layer, m) in enumerate(own.items())}
    costs = {str(i): cost([m.scatter.shape, m.output.shape]) for i, m in enumerate(own.values())}
    found = (world or World()).share(work, costs, "the eigenbases")
    return {layer: Eigenbasis(layer, **found[str(i)]) for i, layer in enumerate(own)}


def squares_in(bases: Mapping[Layer, Eigenbasis], moments: Mapping[Layer, Moments], cases: Cases) -> dict[Layer, Parts]:
    """The sums over a batch's examples and columns of the squared gradients in the bases."""
    values: dict[Layer, Parts] = {}
    with torch.no_grad():
        present = {layer: basis for layer, basis in bases.items() if layer in cases.h and layer in moments}
        z = {layer: basis.inputs(cases, _affine(moments[layer])) for layer, basis in present.items()}
        for g in cases.columns:
            for layer, basis in present.items():
                if layer in g:
                    accumulate(values, layer, basis.squares(z[layer], by_case(g[layer])))
    return values


def example_squares(x: Inputs, g: Float[Tensor, "n k t o"], *, bias: bool) -> Parts:
    """`Σ_ik (Σ_t g_ikt x_it)²` of every entry of `(W, b)`."""
    if isinstance(x, Sparse):
        return (x.squares(g), *([g.sum(2).square().sum((0, 1))] if bias else []))
    step = step_of(x)
    parts = [
        squares(x.part(start, start + step).dense(), its_g, bias=bias)
        for start, its_g in zip(range(0, len(g), step), g.split(step), strict=True)
    ]
    return tuple(torch.stack(column).sum(0) for column in zip(*parts, strict=True))


def accumulate(values: dict[Layer, Parts], layer: Layer, new: Parts) -> None:
    old = values.get(layer)
    values[layer] = new if old is None else tuple(a.add_(b) for a, b in zip(old, new, strict=True))


def _in_basis(F: Tensor, U: factor.Basis) -> Float[Tensor, " d"]:
    """`diag(Uᵀ F U)`."""
    return factor.diagonal(F) if U is None else (U * (F @ U)).sum(0)


def _affine(m: Moments) -> AffineMoments:
    assert isinstance(m, AffineMoments)
    return m
