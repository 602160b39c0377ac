"""KFOC: the Kronecker product that is nearest to each layer's exact block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from natgrad.capture.cases import Cases
from natgrad.capture.layer import Layer
from natgrad.curvature.blocks import nearest_block
from natgrad.curvature.exact import ExactStructure
from natgrad.curvature.kfac import KfacStructure
from natgrad.curvature.moments import MAX_DIM, AffineMoments
from natgrad.distributed.world import World
from natgrad.linalg import ExactBlock, Operator


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
