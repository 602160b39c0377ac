"""From cases to operators: each structure sums what it needs over the batches, and then builds the matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from natgrad.capture.cases import Cases
from natgrad.capture.layer import Layer
from natgrad.curvature.bases import accumulate, bases_of, squares_in
from natgrad.curvature.blocks import kfac_blocks, nearest_block
from natgrad.curvature.combination import of_terms
from natgrad.curvature.diagonal import DiagonalStructure, summed_squares
from natgrad.curvature.exact import ExactStructure
from natgrad.curvature.groups import tiled
from natgrad.curvature.low_rank import RANK, LowRankStructure
from natgrad.curvature.moments import (
    MAX_DIM,
    AffineMoments,
    Moments,
    layer_moments,
    merge,
    reconciled,
)
from natgrad.curvature.structure import Structure
from natgrad.distributed.reduction import summed
from natgrad.distributed.world import World
from natgrad.linalg import ExactBlock, Operator
from natgrad.linalg.space import Parts


class KfacStructure(Structure):
    """`A ⊗ B` from the layers' moments."""

    def __init__(self, centered: bool = True, sharing: str = "expand", max_dim: int = MAX_DIM):
        super().__init__()
        self.centered, self.sharing, self.max_dim = centered, sharing, max_dim
        self._of_term: dict[str, dict[Layer, Moments]] = {}

    def add(self, cases: Cases) -> None:
        self._add_mass(cases)
        own = self._of_term.get(cases.term, {})
        self._of_term[cases.term] = merge([own, layer_moments(cases, self.sharing, self.max_dim)])

    def merge_ranks(self, world: World) -> None:
        self._sum_mass(world)
        if world.size == 1:
            return
        terms = sorted({term for own in world.gather(list(self._of_term), "the terms") for term in own})
        self._of_term = {term: summed(self._of_term.get(term, {}), world, "the moments") for term in terms}

    @property
    def moments(self) -> dict[Layer, Moments]:
        """The moments of the whole objective."""
        return of_terms([reconciled(own) for own in self._of_term.values()])

    def build(self, is_mean: bool) -> dict[Layer, Operator]:
        return kfac_blocks(self._of_all_data(), is_mean, self.centered)

    def _of_all_data(self) -> dict[Layer, Moments]:
        """The moments per unit of the whole mass, because a layer may have been used in some batches only."""
        assert self.mass is not None
        return {layer: replace(m, mass=self.mass) for layer, m in reconciled(self.moments).items()}


class EkfacStructure(KfacStructure):
    """K-FAC's eigenbases, with the second moments of the gradients in them (George et al. 2018, arXiv:1806.03884).

    The first pass is K-FAC's. In the second, with `z = U_Cᵀ (h − m)` and `p = U_Bᵀ g`, the values are `E[Σ_k (Σ_t p
    z)²]`. The sum is over the positions `t` of an example for both kinds of `sharing`: this is the best diagonal in the
    basis. Scales, and weights that are used both as W and as Wᵀ, keep K-FAC's blocks.
    """

    passes = 2

    def next_pass(self) -> None:
        self._known = reconciled(self.moments)
        self._bases = bases_of(self._known, self.centered)
        self._values: dict[Layer, Parts] = {}

    def add(self, cases: Cases) -> None:
        if not hasattr(self, "_bases"):
            super().add(cases)
            return
        cases = cases.parted(self._known)
        for layer, values in squares_in(self._bases, self._known, cases).items():
            accumulate(self._values, layer, values)

    def merge_ranks(self, world: World) -> None:
        if hasattr(self, "_bases"):
            self._values = summed_squares(self._values, world)
        else:
            super().merge_ranks(world)

    def build(self, is_mean: bool) -> dict[Layer, Operator]:
        rest = {layer: m for layer, m in self._of_all_data().items() if layer not in self._bases}
        scale = self._scale(is_mean)
        own = {}
        for layer, basis in self._bases.items():
            m = self._known[layer]
            assert isinstance(m, AffineMoments)
            own[layer] = basis.block(tuple(v * scale for v in self._values[layer]), m)
        return tiled(own) | kfac_blocks(rest, is_mean, self.centered)


class KfocStructure(KfacStructure):
    """The Kronecker product nearest to each layer's exact block, in the Frobenius norm (Koroko et al. 2022; Schnaus et
    al. 2021). It is computed from the cases, which are kept in memory.

    With `centered=True` it is the nearest to the weight's block in centered coordinates, and the bias has its exact
    block. Scales, embeddings, factors that are diagonals, and weights of which several layers use a part or a
    transpose, keep K-FAC's blocks.
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
        blocks, moments = super().build(is_mean), self._of_all_data()
        for layer, exact in self._exact.build(is_mean).items():
            m = moments.get(layer)
            if layer in blocks and isinstance(m, AffineMoments) and layer.weight and not m.diagonals:
                assert isinstance(exact, ExactBlock)
                blocks[layer] = nearest_block(layer, exact, m, self.centered)
        return blocks


class _MatricesAlone(ExactStructure):
    """The exact blocks of the layers for which a nearest Kronecker product is computed."""

    def _add_columns(
        self, cases: Cases, layers: Sequence[Layer], columns: Sequence[Mapping[Layer, list[Tensor]]]
    ) -> None:
        (first, *others) = layers
        plain = first.weight and not others and not first.scale and not first.rows
        if plain and not any(h.diagonal for h in cases.h[first]):
            super()._add_columns(cases, layers, columns)


@dataclass(frozen=True)
class Options:
    """The options of all structures; `natgrad.fisher` describes them."""

    centered: bool = True
    sharing: str = "expand"
    max_dim: int = MAX_DIM
    rank: int = RANK


STRUCTURES: dict[str, Callable[[Options], Structure]] = {
    "block": lambda o: ExactStructure(),
    "kfac": lambda o: KfacStructure(o.centered, o.sharing, o.max_dim),
    "ekfac": lambda o: EkfacStructure(o.centered, o.sharing, o.max_dim),
    "kfoc": lambda o: KfocStructure(o.centered, o.sharing, o.max_dim),
    "low_rank": lambda o: LowRankStructure(o.rank),
    "diagonal": lambda o: DiagonalStructure(),
}
