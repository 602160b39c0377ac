"""From cases to operators: each structure sums what it needs of every batch, then builds the matrix of all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from natgrad.cases import Cases, Layer
from natgrad.linalg import (
    Block,
    BlockDiagonal,
    Centered,
    CenteredKronecker,
    Dense,
    Diagonal,
    ExactBlock,
    Homogeneous,
    Kronecker,
    KroneckerEigen,
    Operator,
    Space,
)
from natgrad.linalg.eigen import eigh
from natgrad.linalg.exact import squares
from natgrad.linalg.space import Parts
from natgrad.moments import AffineMoments, layer_moments, merge


class Structure(ABC):
    """What a block-diagonal matrix sums over batches. `passes` over the data are needed."""

    passes = 1

    def __init__(self) -> None:
        self.mass: Tensor | None = None

    @abstractmethod
    def add(self, cases: Cases) -> None:
        """Takes in one batch of the current pass."""

    def next_pass(self) -> None:  # noqa: B027
        """What is to be done between two passes."""

    @abstractmethod
    def build(self, is_mean: bool) -> dict[Layer, Operator]:
        """Every layer's operator: of the objective's mean, or of its sum."""

    def _add_mass(self, cases: Cases) -> None:
        self.mass = cases.mass if self.mass is None else self.mass + cases.mass

    def _scale(self, is_mean: bool) -> Tensor | float:
        assert self.mass is not None
        return 1 / self.mass if is_mean else 1.0


class KfacStructure(Structure):
    """`A ⊗ B` from the layers' moments."""

    def __init__(self, centered: bool, sharing: str):
        super().__init__()
        self.centered, self.sharing = centered, sharing
        self.moments: dict[Layer, AffineMoments] = {}

    def add(self, cases: Cases) -> None:
        self._add_mass(cases)
        self.moments = merge([self.moments, layer_moments(cases, self.sharing)])

    def build(self, is_mean: bool) -> dict[Layer, Operator]:
        return {layer: kfac_block(layer, m, is_mean, self.centered) for layer, m in self.moments.items()}


class EkfacStructure(KfacStructure):
    """K-FAC's eigenbases, with the second moments of the gradients in them (George et al. 2018, arXiv:1806.03884).

    The first pass is K-FAC's. In the second, with `z = U_Cᵀ (h − m)` and `p = U_Bᵀ g`, the values are
    `E[Σ_k (Σ_t p z)²]`, over the positions `t` of an example whatever the sharing: the best in this basis.
    """

    passes = 2

    def next_pass(self) -> None:
        self._bases: dict[Layer, tuple[Tensor, Tensor]] = {}
        self._values: dict[Layer, Parts] = {}
        for layer, m in self.moments.items():
            inputs = m.C if self._is_centered(layer) else homogeneous(m) if layer.bias and layer.weight else m.A
            U_A = eigh(inputs, f"the input factor of layer {layer.name!r}")[1] if layer.weight else inputs
            self._bases[layer] = U_A, eigh(m.B(is_mean=False), f"the output factor of layer {layer.name!r}")[1]

    def _is_centered(self, layer: Layer) -> bool:
        return bool(self.centered and layer.weight and layer.bias)

    def add(self, cases: Cases) -> None:
        if not hasattr(self, "_bases"):
            super().add(cases)
            return
        z = {layer: self._inputs(layer, cases.by_example(layer, h)) for layer, h in cases.h.items()}
        for g in cases.columns:
            for layer, uses in g.items():
                p = cases.by_example(layer, uses) @ self._bases[layer][1]
                both = self._is_centered(layer) or not layer.weight
                new = squares(z[layer], p.unsqueeze(1), bias=both)
                old = self._values.get(layer)
                self._values[layer] = new if old is None else tuple(a.add_(b) for a, b in zip(old, new, strict=True))

    def _inputs(self, layer: Layer, h: Tensor) -> Tensor:
        if not layer.weight:
            return h
        if self._is_centered(layer):
            h = h - self.moments[layer].mean
        elif layer.bias:
            h = torch.cat([h, h.new_ones(*h.shape[:-1], 1)], -1)
        return h @ self._bases[layer][0]

    def build(self, is_mean: bool) -> dict[Layer, Operator]:
        return {layer: self._block(layer, self._scale(is_mean)) for layer in self.moments}

    def _block(self, layer: Layer, scale: Tensor | float) -> Operator:
        U_A, U_B = self._bases[layer]
        *weight, last = (v * scale for v in self._values[layer])
        if not layer.weight:
            return Dense((U_B * last) @ U_B.mT)
        if self._is_centered(layer):
            return Centered(KroneckerEigen(U_A, U_B, weight[0]), Dense((U_B * last) @ U_B.mT), self.moments[layer].mean)
        whole = KroneckerEigen(U_A, U_B, last)
        return Homogeneous(whole) if layer.bias else whole


class DiagonalStructure(Structure):
    """The diagonal of the exact matrix: `E[Σ_k (Σ_t g x)²]`."""

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[Layer, Parts] = {}

    def add(self, cases: Cases) -> None:
        self._add_mass(cases)
        h = {layer: cases.by_example(layer, uses) for layer, uses in cases.h.items()}
        for g in cases.columns:
            for layer, uses in g.items():
                new = squares(h[layer], cases.by_example(layer, uses).unsqueeze(1), bias=layer.bias is not None)
                old = self._values.get(layer)
                self._values[layer] = new if old is None else tuple(a.add_(b) for a, b in zip(old, new, strict=True))

    def build(self, is_mean: bool) -> dict[Layer, Operator]:
        scale = self._scale(is_mean)
        return {layer: Diagonal(tuple(v * scale for v in values)) for layer, values in self._values.items()}


class ExactStructure(Structure):
    """The exact block of every layer, held as its cases."""

    def __init__(self) -> None:
        super().__init__()
        self._h: dict[Layer, list[Tensor]] = {}
        self._g: dict[Layer, list[Tensor]] = {}

    def add(self, cases: Cases) -> None:
        self._add_mass(cases)
        columns = list(cases.columns)
        for layer, uses in cases.h.items():
            h = cases.by_example(layer, uses)
            g = [cases.by_example(layer, column[layer]) for column in columns]
            self._h.setdefault(layer, []).append(h)
            self._g.setdefault(layer, []).append(
                torch.stack(g, 1) if g else h.new_zeros(len(h), 0, h.shape[1], cases.d_out[layer])
            )

    def build(self, is_mean: bool) -> dict[Layer, Operator]:
        scale = self._scale(is_mean)
        return {
            layer: ExactBlock(_stacked(self._h[layer]), _stacked(self._g[layer]), bias=bool(layer.bias), scale=scale)
            for layer in self._h
        }


STRUCTURES: dict[str, Callable[[bool, str], Structure]] = {
    "block": lambda centered, sharing: ExactStructure(),
    "kfac": KfacStructure,
    "ekfac": EkfacStructure,
    "diagonal": lambda centered, sharing: DiagonalStructure(),
}


def assemble(layers: Mapping[Layer, Operator], parameters: Mapping[str, Tensor]) -> BlockDiagonal:
    """The matrix of all layers, over the parameters that they have, in the parameters' order."""
    blocks = {layer.name: Block(op, layer.names, layer.transposed) for layer, op in layers.items()}
    names = tuple(n for n in parameters if any(n in layer.names for layer in layers))
    return BlockDiagonal(blocks, Space(tuple(tuple(parameters[n].shape) for n in names), names))


def kfac_block(layer: Layer, moments: AffineMoments, is_mean: bool, centered: bool) -> Operator:
    """`A ⊗ B` of one layer."""
    B = moments.B(is_mean)
    if layer.weight is None:
        return Dense(B)
    if layer.bias is None:
        return Kronecker(moments.A, B)
    if centered:
        return CenteredKronecker(covariance=moments.C, mean=moments.mean, output=B)
    return Homogeneous(Kronecker(homogeneous(moments), B))


def homogeneous(moments: AffineMoments) -> Tensor:
    """`A = E[x xᵀ]` for `x = [h; 1]`."""
    x = torch.cat([moments.mean, moments.mean.new_ones(1)])
    return torch.block_diag(moments.C, x.new_zeros(1, 1)) + torch.outer(x, x)


def _stacked(parts: list[Tensor]) -> Tensor:
    """The batches' cases one after the other; fewer positions or columns than others have are filled with zeros,
    which add nothing."""
    sizes = [max(sizes) for sizes in zip(*(p.shape[1:] for p in parts), strict=True)]
    padded = []
    for p in parts:
        whole = p.new_zeros(len(p), *sizes)
        whole[tuple(slice(n) for n in p.shape)] = p
        padded.append(p if p.shape == whole.shape else whole)
    return torch.cat(padded)
