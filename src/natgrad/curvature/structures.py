"""From cases to operators: each structure sums what it needs of every batch, then builds the matrix of all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from natgrad.capture.cases import Cases, Layer
from natgrad.capture.layers import Rows
from natgrad.curvature.bases import accumulate, bases_of, example_squares, squares_in
from natgrad.curvature.blocks import kfac_blocks, nearest_block
from natgrad.curvature.groups import coordinates, example_gradients, groups, has_rival, joined_examples, tiled, whole
from natgrad.curvature.moments import MAX_DIM, AffineMoments, DiagonalMoments, Moments, layer_moments, merge
from natgrad.distributed.reduction import summed
from natgrad.distributed.world import World
from natgrad.linalg import ColumnBlock, Diagonal, ExactBlock, Operator
from natgrad.linalg.space import Parts


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
    def merge_ranks(self, world: World) -> None:
        """Takes in what the other ranks have summed in the current pass."""

    @abstractmethod
    def build(self, is_mean: bool) -> dict[Layer, Operator]:
        """Every layer's operator: of the objective's mean, or of its sum."""

    def _add_mass(self, cases: Cases) -> None:
        self.mass = cases.mass if self.mass is None else self.mass + cases.mass

    def _sum_mass(self, world: World) -> None:
        own = torch.zeros((), device=world.device) if self.mass is None else self.mass
        dtypes = [dtype for dtype in world.gather(None if self.mass is None else own.dtype, "the mass") if dtype]
        if not dtypes:
            raise ValueError("data is empty on all ranks: expected at least one (input, target) batch on one of them")
        self.mass = world.sum(own.to(dtypes[0]).clone(), "the mass")

    def _scale(self, is_mean: bool) -> Tensor | float:
        assert self.mass is not None
        return 1 / self.mass if is_mean else 1.0


class KfacStructure(Structure):
    """`A ⊗ B` from the layers' moments."""

    def __init__(self, centered: bool = True, sharing: str = "expand", max_dim: int = MAX_DIM):
        super().__init__()
        self.centered, self.sharing, self.max_dim = centered, sharing, max_dim
        self.moments: dict[Layer, Moments] = {}

    def add(self, cases: Cases) -> None:
        self._add_mass(cases)
        self.moments = merge([self.moments, layer_moments(cases, self.sharing, self.max_dim)])

    def merge_ranks(self, world: World) -> None:
        self._sum_mass(world)
        self.moments = summed(self.moments, world, "the moments")

    def build(self, is_mean: bool) -> dict[Layer, Operator]:
        return kfac_blocks(self.moments, is_mean, self.centered)


class EkfacStructure(KfacStructure):
    """K-FAC's eigenbases, with the second moments of the gradients in them (George et al. 2018, arXiv:1806.03884).

    The first pass is K-FAC's. In the second, with `z = U_Cᵀ (h − m)` and `p = U_Bᵀ g`, the values are
    `E[Σ_k (Σ_t p z)²]`, over the positions `t` of an example whatever the sharing: the best in this basis. Scales, and
    weights that are used both as W and as Wᵀ, keep K-FAC's blocks.
    """

    passes = 2

    def next_pass(self) -> None:
        self._bases = bases_of(self.moments, self.centered)
        self._values: dict[Layer, Parts] = {}

    def add(self, cases: Cases) -> None:
        if not hasattr(self, "_bases"):
            super().add(cases)
            return
        for layer, values in squares_in(self._bases, self.moments, cases).items():
            accumulate(self._values, layer, values)

    def merge_ranks(self, world: World) -> None:
        if hasattr(self, "_bases"):
            self._values = _summed_squares(self._values, world)
        else:
            super().merge_ranks(world)

    def build(self, is_mean: bool) -> dict[Layer, Operator]:
        rest = {layer: m for layer, m in self.moments.items() if layer not in self._bases}
        scale = self._scale(is_mean)
        own = {}
        for layer, basis in self._bases.items():
            m = self.moments[layer]
            assert isinstance(m, AffineMoments)
            own[layer] = basis.block(tuple(v * scale for v in self._values[layer]), m)
        return tiled(own) | kfac_blocks(rest, is_mean, self.centered)


class DiagonalStructure(Structure):
    """The diagonal of the exact matrix: `E[Σ_k (Σ_t g x)²]`."""

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[Layer, Parts] = {}

    def add(self, cases: Cases) -> None:
        self._add_mass(cases)
        for layer, values in diagonal_squares(cases).items():
            accumulate(self._values, layer, values)

    def merge_ranks(self, world: World) -> None:
        self._sum_mass(world)
        self._values = _summed_squares(self._values, world)

    def build(self, is_mean: bool) -> dict[Layer, Operator]:
        scale = self._scale(is_mean)
        return tiled({layer: Diagonal(tuple(v * scale for v in values)) for layer, values in self._values.items()})


class ExactStructure(Structure):
    """The exact block of every group of layers that share parameters, held as its cases or as its columns."""

    def __init__(self) -> None:
        super().__init__()
        self._h: dict[Layer, list[Tensor]] = {}
        self._g: dict[Layer, list[Tensor]] = {}
        self._columns: dict[Layer, list[Tensor]] = {}
        self._shapes: dict[Layer, tuple[tuple[int, ...], ...]] = {}

    def add(self, cases: Cases) -> None:
        self._add_mass(cases)
        columns = list(cases.columns)
        for layers in groups(cases.h):
            (first, *others), uses = layers, cases.h[layers[0]]
            if not others and not first.scale and all(isinstance(use, Rows) for use in uses):
                self._add_cases(cases, first, columns)
            elif columns:
                self._add_columns(cases, layers, columns)

    def _add_cases(self, cases: Cases, layer: Layer, columns: Sequence[Mapping[Layer, list[Tensor]]]) -> None:
        h = joined_examples(cases, layer).dense()
        g = [cases.by_example(layer, column[layer]) for column in columns]
        self._h.setdefault(layer, []).append(h)
        self._g.setdefault(layer, []).append(
            torch.stack(g, 1) if g else h.new_zeros(len(h), 0, h.shape[1], cases.d_out[layer])
        )

    def _add_columns(
        self, cases: Cases, layers: Sequence[Layer], columns: Sequence[Mapping[Layer, list[Tensor]]]
    ) -> None:
        key = whole(layers)
        parts = [example_gradients(cases, layers, g) for g in columns]
        self._shapes[key] = tuple(tuple(p.shape[1:]) for p in parts[0])
        flat = [torch.cat([p.flatten(1) for p in its], 1) for its in parts]
        self._columns.setdefault(key, []).append(torch.stack(flat, 1))

    def merge_ranks(self, world: World) -> None:
        self._sum_mass(world)
        every = world.exchanged((self._h, self._g, self._columns, self._shapes), "the cases")
        self._h, self._g, self._columns = (joined(its) for its in list(zip(*every, strict=True))[:3])
        self._shapes = {layer: shapes for *_, its in every for layer, shapes in its.items()}

    def build(self, is_mean: bool) -> dict[Layer, Operator]:
        scale = self._scale(is_mean)
        blocks: dict[Layer, Operator] = {}
        for layer, h in self._h.items():
            g = _stacked(self._g[layer])
            blocks[layer] = ExactBlock(_stacked(h), g, bias=bool(layer.bias), scale=scale)
        for layer, columns in self._columns.items():
            blocks[layer] = ColumnBlock(_stacked(columns), self._shapes[layer], scale=scale)
        return blocks


class KfocStructure(KfacStructure):
    """The Kronecker product nearest to each layer's exact block, in Frobenius norm (Koroko et al. 2022; Schnaus et al.
    2021), found on the cases, which are held.

    Centered, it is the nearest to the weight's block in centered coordinates, beside the bias's exact one. Scales,
    embeddings, factors that are diagonals, and weights of which several layers use a part or a transpose, keep K-FAC's
    blocks.
    """

    def __init__(self, centered: bool = True, sharing: str = "expand", max_dim: int = MAX_DIM):
        super().__init__(centered, sharing, max_dim)
        self._exact = _MatricesAlone()

    def add(self, cases: Cases) -> None:
        cases.kept()
        super().add(cases)
        self._exact.add(cases)

    def merge_ranks(self, world: World) -> None:
        super().merge_ranks(world)
        self._exact.merge_ranks(world)

    def build(self, is_mean: bool) -> dict[Layer, Operator]:
        blocks = super().build(is_mean)
        for layer, exact in self._exact.build(is_mean).items():
            m = self.moments[layer]
            if isinstance(exact, ExactBlock) and isinstance(m, AffineMoments) and layer.weight and not m.diagonals:
                blocks[layer] = nearest_block(layer, exact, m, self.centered)
        return blocks


class _MatricesAlone(ExactStructure):
    """The exact blocks of those layers that a Kronecker product is to be near to."""

    def _add_columns(
        self, cases: Cases, layers: Sequence[Layer], columns: Sequence[Mapping[Layer, list[Tensor]]]
    ) -> None:
        (first, *others) = layers
        if first.weight and not others and not first.scale and not any(h.diagonal for h in cases.h[first]):
            super()._add_columns(cases, layers, columns)


STRUCTURES: dict[str, Callable[[bool, str, int], Structure]] = {
    "block": lambda centered, sharing, max_dim: ExactStructure(),
    "kfac": KfacStructure,
    "ekfac": EkfacStructure,
    "kfoc": KfocStructure,
    "diagonal": lambda centered, sharing, max_dim: DiagonalStructure(),
}


def joined(every: Sequence[Mapping[Layer, list[Tensor]]]) -> dict[Layer, list[Tensor]]:
    """The batches of all ranks, in the order of the ranks."""
    layers = dict.fromkeys(layer for its in every for layer in its)
    return {layer: [t for its in every for t in its.get(layer, [])] for layer in layers}


def _summed_squares(values: Mapping[Layer, Parts], world: World) -> dict[Layer, Parts]:
    moments = {layer: DiagonalMoments(v, v[0].new_zeros(())) for layer, v in values.items()}
    found = summed(moments, world, "the squares")
    return {layer: m.values for layer, m in found.items() if isinstance(m, DiagonalMoments)}


def diagonal_squares(cases: Cases) -> dict[Layer, Parts]:
    """The sums over a batch's examples and columns of the squared gradients, `Σ_k (Σ_t g x)²`."""
    sums: dict[Layer, Parts] = {}
    h = {layer: joined_examples(cases, layer) for layer in cases.h}
    for g in cases.columns:
        for layers in groups(cases.h):
            if any(has_rival(layer, cases.h) for layer in layers):
                parts = example_gradients(cases, layers, g)
                accumulate(sums, whole(layers), tuple(p.square().sum(0) for p in parts))
                continue
            for layer in layers:
                its_g = cases.by_example(layer, g[layer]).unsqueeze(1)
                new = example_squares(h[layer], its_g, bias=layer.scale or layer.bias is not None)
                accumulate(sums, layer, coordinates(new[0], layer) if layer.scale else new)
    return sums


def _stacked(parts: list[Tensor]) -> Tensor:
    """The batches' cases one after the other; fewer positions or columns than others have are filled with zeros,
    which add nothing."""
    sizes = [max(sizes) for sizes in zip(*(p.shape[1:] for p in parts), strict=True)]
    padded = []
    for p in parts:
        filled = p.new_zeros(len(p), *sizes)
        filled[tuple(slice(n) for n in p.shape)] = p
        padded.append(p if p.shape == filled.shape else filled)
    return torch.cat(padded)
