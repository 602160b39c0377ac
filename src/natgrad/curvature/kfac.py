"""K-FAC: a Kronecker product for each layer, from the layer's moments."""

from __future__ import annotations

from dataclasses import replace

from natgrad.capture.cases import Cases
from natgrad.capture.layer import Layer
from natgrad.curvature.blocks import kfac_blocks
from natgrad.curvature.combination import of_terms
from natgrad.curvature.moments import MAX_DIM, Moments, layer_moments, merge, reconciled
from natgrad.curvature.structure import Structure
from natgrad.distributed.reduction import summed
from natgrad.distributed.world import World
from natgrad.linalg import Operator


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
