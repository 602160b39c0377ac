"""The diagonal of the exact matrix: squared gradients, summed over examples and columns."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from natgrad.capture.cases import Cases
from natgrad.capture.layer import Layer
from natgrad.capture.layers import joined
from natgrad.curvature.bases import accumulate, example_squares
from natgrad.curvature.groups import (
    as_vectors,
    by_case,
    components,
    coordinates,
    example_gradients,
    in_own_shapes,
    is_simple,
    united,
)
from natgrad.curvature.moments import DiagonalMoments
from natgrad.curvature.structure import Structure
from natgrad.distributed.reduction import summed
from natgrad.distributed.world import World
from natgrad.linalg import Diagonal, Operator
from natgrad.linalg.space import Parts


class DiagonalStructure(Structure):
    """The diagonal of the exact matrix: `E[Σ_k (Σ_t g x)²]`, parameter by parameter."""

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[Layer, Tensor] = {}  # of each parameter separately
        self._layers: dict[Layer, None] = {}

    def add(self, cases: Cases) -> None:
        self._add_mass(cases)
        self._layers |= dict.fromkeys(cases.h)
        for layer, values in diagonal_squares(cases).items():
            for name, value in in_own_shapes(layer, values, cases.shapes).items():
                key = Layer(name, None)
                self._values[key] = self._values[key] + value if key in self._values else value

    def merge_ranks(self, world: World) -> None:
        self._sum_mass(world)
        found = summed_squares({key: (value,) for key, value in self._values.items()}, world)
        self._values = {key: value for key, (value,) in found.items()}
        self._layers = dict.fromkeys(layer for own in world.gather(list(self._layers), "the layers") for layer in own)

    def build(self, is_mean: bool) -> dict[Layer, Operator]:
        scale = self._scale(is_mean)
        blocks: dict[Layer, Operator] = {}
        for layers in components(self._layers):
            layer = layers[0] if len(layers) == 1 and layers[0].rows is None else united(layers)
            blocks[layer] = Diagonal(as_vectors(layer, {n: scale * self._values[Layer(n, None)] for n in layer.names}))
        return blocks


def diagonal_squares(cases: Cases) -> dict[Layer, Parts]:
    """The sums over a batch's examples and columns of the squared gradients, `Σ_k (Σ_t g x)²`."""
    sums: dict[Layer, Parts] = {}
    h = {layer: joined(uses) for layer, uses in cases.h.items()}
    for g in cases.columns:
        for layers in components(g):
            if not is_simple(layers, cases.shapes):
                parts = example_gradients(cases, layers, g)
                accumulate(sums, united(layers), tuple(p.square().sum(0) for p in parts))
                continue
            for layer in layers:
                its_g = by_case(g[layer]).unsqueeze(1)
                new = example_squares(h[layer], its_g, bias=layer.scale or layer.bias is not None)
                accumulate(sums, layer, coordinates(new[0], layer) if layer.scale else new)
    return sums


def summed_squares(values: Mapping[Layer, Parts], world: World) -> dict[Layer, Parts]:
    """The sums over all ranks."""
    moments = {layer: DiagonalMoments(v, v[0].new_zeros(())) for layer, v in values.items()}
    found = summed(moments, world, "the squares")
    return {layer: m.values for layer, m in found.items() if isinstance(m, DiagonalMoments)}
