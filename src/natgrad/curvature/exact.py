"""The exact block of layers that share parameters, stored as the layers' cases or as the block's columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.capture.cases import Cases
from natgrad.capture.layer import Layer
from natgrad.capture.layers import Rows, joined
from natgrad.curvature.groups import (
    by_case,
    components,
    example_gradients,
    form_of,
    in_own_shapes,
    single_gradients,
    united,
)
from natgrad.curvature.structure import Structure
from natgrad.distributed.world import World
from natgrad.linalg import ColumnBlock, ExactBlock, Operator, Space
from natgrad.linalg.pieces import Piece
from natgrad.linalg.space import Parts


class ExactStructure(Structure):
    """The exact block of every group of layers that share parameters, stored as cases or as columns."""

    def __init__(self) -> None:
        super().__init__()
        self._h: dict[Layer, list[Tensor]] = {}
        self._g: dict[Layer, list[Tensor]] = {}
        self._columns: dict[Layer, list[Tensor]] = {}
        self._shapes: dict[Layer, tuple[tuple[int, ...], ...]] = {}
        self._order: dict[str, None] = {}  # of the parameters, in the order of their use
        self._own: dict[str, tuple[int, ...]] = {}  # shapes of the parameters

    def add(self, cases: Cases) -> None:
        self._add_mass(cases)
        every = list(cases.columns)
        self._own |= cases.shapes
        self._order |= dict.fromkeys(n for layer in cases.h for n in layer.names)
        for layers in components(cases.h, cases.together):
            columns = [column for column in every if layers[0] in column]
            if self._as_cases(cases, layers):
                self._add_cases(cases, layers[0], columns)
            elif columns:
                self._add_columns(cases, layers, columns)

    def _as_cases(self, cases: Cases, layers: Sequence[Layer]) -> bool:
        """Whether to keep inputs and gradients, and not their products. All batches are treated like the first."""
        (first, *others), uses = layers, cases.h[layers[0]]
        if others or first.scale or first.rows or not all(isinstance(use, Rows) for use in uses):
            return False
        if first in self._h or first in self._columns:
            return first in self._h
        n, t, d_in = uses[0].shape
        return n == cases.examples or t <= d_in  # for a case with many rows, the gradient itself is smaller

    def _add_cases(self, cases: Cases, layer: Layer, columns: Sequence[Mapping[Layer, list[Tensor]]]) -> None:
        h = joined(cases.h[layer]).dense()
        g = [by_case(column[layer]) for column in columns]
        self._h.setdefault(layer, []).append(h)
        self._g.setdefault(layer, []).append(
            torch.stack(g, 1) if g else h.new_zeros(len(h), 0, h.shape[1], cases.d_out[layer])
        )

    def _add_columns(
        self, cases: Cases, layers: Sequence[Layer], columns: Sequence[Mapping[Layer, list[Tensor]]]
    ) -> None:
        alone = len(layers) == 1 and layers[0].rows is None
        key = layers[0] if alone else united(layers)
        parts = [single_gradients(cases, key, g) if alone else example_gradients(cases, layers, g) for g in columns]
        self._shapes[key] = tuple(tuple(p.shape[1:]) for p in parts[0])
        flat = [torch.cat([p.flatten(1) for p in its], 1) for its in parts]
        self._columns.setdefault(key, []).append(torch.stack(flat, 1))

    def merge_ranks(self, world: World) -> None:
        self._sum_mass(world)
        own = self._h, self._g, self._columns, self._shapes, self._order, self._own
        every = world.exchanged(own, "the cases")
        self._h, self._g, self._columns = (of_all_ranks(its) for its in list(zip(*every, strict=True))[:3])
        for *_, shapes, order, parameters in every:
            self._shapes, self._order, self._own = self._shapes | shapes, self._order | order, self._own | parameters

    def build(self, is_mean: bool) -> dict[Layer, Operator]:
        scale = self._scale(is_mean)
        blocks: dict[Layer, Operator] = {}
        for layers in components([*self._h, *self._columns]):
            if len(layers) > 1:  # used together with other layers in some batches only
                columns, shapes = self._brought_together(layers)
                blocks[united(layers)] = ColumnBlock.of_batches(columns, shapes, scale=scale)
            elif layers[0] in self._h:
                pieces = [Piece(*its) for its in zip(self._h[layers[0]], self._g[layers[0]], strict=True)]
                blocks[layers[0]] = ExactBlock.of(pieces, bias=bool(layers[0].bias), scale=scale)
            else:
                columns = self._columns[layers[0]]
                blocks[layers[0]] = ColumnBlock.of_batches(columns, self._shapes[layers[0]], scale=scale)
        order = {n: i for i, n in enumerate(self._order)}
        return dict(sorted(blocks.items(), key=lambda item: min(order[n] for n in item[0].names)))

    def _brought_together(self, layers: Sequence[Layer]) -> tuple[list[Tensor], tuple[tuple[int, ...], ...]]:
        """The columns of all batches over the parameters of several layers, each parameter in its own shape."""
        names = united(layers).names
        columns = []
        for layer in layers:
            if layer in self._h:
                its = zip(self._h[layer], self._g[layer], strict=True)
                parts_of = [_gradients_of(layer, h, g) for h, g in its]
            else:
                space = Space(self._shapes[layer])
                parts_of = [space.unflatten(S) for S in self._columns[layer]]
            for parts in parts_of:
                own = in_own_shapes(layer, parts, self._own)
                lead = parts[0].shape[:2]
                zeros = {n: parts[0].new_zeros(*lead, *self._own[n]) for n in names if n not in own}
                columns.append(torch.cat([(own | zeros)[n].flatten(2) for n in names], 2))
        return columns, tuple(form_of(self._own[n]) for n in names)


def _gradients_of(layer: Layer, h: Float[Tensor, "n t i"], g: Float[Tensor, "n k t o"]) -> Parts:
    """The gradients of every case and column in `(W, b)`."""
    weight = (torch.einsum("nkto,nti->nkoi", g, h),) if layer.weight else ()
    return (*weight, *((g.sum(2),) if layer.bias else ()))


def of_all_ranks(every: Sequence[Mapping[Layer, list[Tensor]]]) -> dict[Layer, list[Tensor]]:
    """The batches of all ranks, in the order of the ranks."""
    layers = dict.fromkeys(layer for its in every for layer in its)
    return {layer: [t for its in every for t in its.get(layer, [])] for layer in layers}
