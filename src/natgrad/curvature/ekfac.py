"""EKFAC: the eigenbases of K-FAC's factors, with corrected eigenvalues."""

from __future__ import annotations

from natgrad.capture.cases import Cases
from natgrad.capture.layer import Layer
from natgrad.curvature.bases import Eigenbasis, accumulate, bases_of, squares_in
from natgrad.curvature.blocks import kfac_blocks
from natgrad.curvature.diagonal import summed_squares
from natgrad.curvature.groups import tiled
from natgrad.curvature.kfac import KfacStructure
from natgrad.curvature.moments import MAX_DIM, AffineMoments, Moments, reconciled
from natgrad.distributed.world import World
from natgrad.linalg import Operator
from natgrad.linalg.space import Parts


class EkfacStructure(KfacStructure):
    """K-FAC's eigenbases, with the second moments of the gradients in them (George et al. 2018, arXiv:1806.03884).

    The first pass is K-FAC's. In the second, with `z = U_Cᵀ (h − m)` and `p = U_Bᵀ g`, the values are `E[Σ_k (Σ_t p
    z)²]`. The sum is over the positions `t` of an example for both kinds of `sharing`: this is the best diagonal in the
    basis. Scales, and weights that are used both as W and as Wᵀ, keep K-FAC's blocks.
    """

    passes = 2

    def __init__(self, centered: bool = True, sharing: str = "expand", max_dim: int = MAX_DIM):
        super().__init__(centered, sharing, max_dim)
        self._is_second_pass = False
        self._known: dict[Layer, Moments] = {}
        self._bases: dict[Layer, Eigenbasis] = {}
        self._values: dict[Layer, Parts] = {}

    def next_pass(self) -> None:
        self._is_second_pass = True
        self._known = reconciled(self.moments)
        self._bases = bases_of(self._known, self.centered)

    def add(self, cases: Cases) -> None:
        if not self._is_second_pass:
            super().add(cases)
            return
        cases = cases.parted(self._known)
        for layer, values in squares_in(self._bases, self._known, cases).items():
            accumulate(self._values, layer, values)

    def merge_ranks(self, world: World) -> None:
        if self._is_second_pass:
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
