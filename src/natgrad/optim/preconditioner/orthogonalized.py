"""One-sided blocks whose directions are orthogonalized, and Adam steps for all other parameters."""

from __future__ import annotations

from natgrad.linalg import Block
from natgrad.optim.preconditioner.adam import adam, take_in_squares
from natgrad.optim.preconditioner.layers import LayerBlocks
from natgrad.optim.preconditioner.orthogonal import orthogonal_directions
from natgrad.optim.preconditioner.ranks import Names
from natgrad.optim.vectors import Vector


class Orthogonalized(LayerBlocks):
    """Every `ΔW = (∇_W − ∇_b mᵀ)(C + εI)⁻¹` is replaced by the nearest orthogonal matrix, scaled to the length of an
    AdamW step. Parameters without an input factor get Adam steps."""

    nesterov = True

    def see_gradient(self, g: Vector) -> None:
        matrices = {layer.names[0] for layer in self.running.layers} & self._chosen_in(g)
        take_in_squares({n: t for n, t in g.items() if n not in matrices}, self.parameters.state_of)

    def _chosen_in(self, v: Vector) -> set[str]:
        return {n for group, names in self.parameters.by_group(v) if group["orthogonalize"] for n in names}

    def _usable(self, v: Vector) -> Names:
        chosen = self._chosen_in(v)
        return {names for names in super()._usable(v) if names[0] in chosen}

    def _rest(self, v: Vector, usable: Names) -> Vector:
        weights = {names[0] for names in usable}
        return adam({n: d for n, d in v.items() if n not in weights}, self.parameters.state_of)

    def _also(self, rest: Vector) -> Vector:
        return rest

    def _by_block(self, blocks: list[Block], v: Vector, rest: Vector) -> Vector:
        simple = self.options.bias_update == "simple"
        return orthogonal_directions(v, rest, blocks, simple=simple, precision=self.options.matmul_precision)
