"""From recorded uses and an output to the cases of every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge

from natgrad.capture.cases import Cases, Gradients, Present
from natgrad.capture.layer import Layer, layers_of
from natgrad.capture.layers import Inputs, Kind, Rows, Scale
from natgrad.capture.layers.affine import Affine
from natgrad.capture.order import Grouping, Order
from natgrad.capture.separation import Separation
from natgrad.capture.use import Use

MOST_PASSES = 20_000
"""The largest number of backward passes for one batch whose rows depend on one another."""
AUTOGRAD = "autograd"
"""The function of a layer that stands for one parameter, whose gradients are flat rows."""
AT_ONCE = 1 << 24
"""The approximate number of gradient entries that are computed at once."""


@dataclass(frozen=True)
class _Reading:
    """One use of a layer, and which of its rows make up a case."""

    use: Use
    kind: Kind
    order: Order

    @classmethod
    def of(cls, layer: Layer, use: Use, order: Order) -> _Reading:
        return cls(use, use.kind.kept(use.weight in layer.names, use.bias in layer.names), order)

    def inputs(self, layer: Layer) -> Inputs:
        if layer.weight and not layer.scale:
            return self.kind.inputs(self.use.h).arranged(self.order)
        positions = 1 if layer.scale else self.order.rows * self.kind.positions(self.use.a)
        return Rows(self.use.h.new_zeros(self.order.cases, positions, 0, dtype=self.use.a.dtype))

    def gradients(self, layer: Layer, g: Tensor | None) -> Tensor:
        g = torch.zeros_like(self.use.a) if g is None else g.reshape(self.use.a.shape)
        g = self.order.of(self.kind.gradients(self.use.h, g)).flatten(1, 2)
        return self.kind.placed(g.sum(1, keepdim=True)) if isinstance(self.kind, Scale) else g

    def present(self, layer: Layer) -> Present | None:
        there, own = self.order.present(reduced=False), self.order.present(reduced=True)
        if layer.scale or there is None or own is None:
            return None
        positions = self.kind.positions(self.use.a)
        return there.repeat_interleave(positions, 1), own.repeat_interleave(positions, 1)


def read_cases(
    uses: Sequence[Use],
    output: Tensor,
    columns: Callable[[], Iterable[Tensor]],
    mass: Tensor,
    dtype: torch.dtype | None = None,
    *,
    separation: Separation,
    ignored: Tensor | None = None,
    sampled: bool = True,
) -> Cases:
    """The cases of every layer on one batch. Each column takes one backward pass to the layers' outputs, or one for
    each of the output's rows in a case.

    No weight gradient is computed. The graph behind `output` is kept.

    Args:
        uses: the uses recorded in the forward pass.
        output: the output of the forward pass.
        columns: returns the columns of a square root of `D`, at each call.
        mass: the divisor of the loss's mean.
        dtype: the dtype of the inputs and gradients. None: unchanged.
        separation: which rows of the uses, in their order, and of the output make up a case.
        ignored: which targets are ignored.
        sampled: whether the columns of different rows of the output are independent and have mean zero. Then one pass
            can take all of them at once.

    Raises:
        RuntimeError: if an input was changed in place after its use.
        ValueError: if an input has no axis of examples, or there are too many passes to take.
    """
    uses = separation.chosen(uses)
    place = {id(use): i for i, use in enumerate(uses)}
    layers: dict[Layer, list[_Reading]] = {}
    groups: dict[Layer, Grouping] = {}
    for layer, its_uses in layers_of(uses).items():
        numbers = [place[id(use)] for use in its_uses]
        groups[layer] = separation.groupings[numbers[0]]
        layers[layer] = [_Reading.of(layer, uses[i], separation.orders[i]) for i in numbers]
    h: dict[Layer, list[Inputs]] = {}
    with torch.no_grad():
        for layer, its in layers.items():
            for reading in its:
                reading.use.check_input()
                _check_examples(reading.use, output)
            h[layer] = [reading.inputs(layer).to(dtype or reading.use.a.dtype) for reading in its]
    present = {layer: found for layer, its in layers.items() if any(found := [r.present(layer) for r in its])}
    mixed = {id(use) for use, mixed in zip(uses, separation.mixed, strict=True) if mixed}
    return Cases(
        h,
        _gradients(layers, groups, output, columns, dtype, sampled),
        {layer: its[0].kind.width(its[0].use.a) for layer, its in layers.items()},
        mass.to(dtype or mass.dtype),
        len(output),
        {} if ignored is None else {layer: group.of(ignored).flatten(1) for layer, group in groups.items()},
        present,
        {n: shape for use in uses for n, shape in use.shapes.items()},
        tuple(dict.fromkeys(use.names for use in uses)),
        tuple(layer for layer, its in layers.items() if any(id(r.use) in mixed for r in its)),
        frozenset(layer for layer, its in layers.items() if all(r.use.is_of_data for r in its)),
    )


def example_gradients(
    output: Tensor, column: Tensor, parameters: Mapping[str, Tensor]
) -> Iterator[tuple[Float[Tensor, "examples ..."], ...]]:
    """`Jᵀ s` for every example separately, in the parameters' shapes, some examples at a time, by autograd.

    An example whose entries in the column are zero needs no pass.
    """
    leaves, n = list(parameters.values()), len(output)
    step = max(1, AT_ONCE // max(1, sum(p.numel() for p in leaves)))
    rows = backward_passes(output, leaves, Grouping(1, n).parts(column), step)
    for alive in column.reshape(n, -1).ne(0).any(1).split(step):
        some = tuple(p.new_zeros(len(alive), *p.shape) for p in leaves)
        if taken := list(islice(rows, int(alive.sum()))):
            for whole, p, its in zip(some, leaves, zip(*taken, strict=True), strict=True):
                whole[alive] = torch.stack([torch.zeros_like(p) if g is None else g for g in its])
        yield some


def by_autograd(
    output: Tensor,
    columns: Iterable[Tensor],
    parameters: Mapping[str, Tensor],
    mass: Tensor,
    dtype: torch.dtype,
) -> Cases:
    """The cases of a model whose layers cannot be recorded, for example because its forward pass takes derivatives.

    Each parameter is a separate layer without inputs, whose gradients are the rows of `Jᵀ s`. The graph behind
    `output` is kept.

    Args:
        output: with its graph.
        columns: the columns of a square root of `D`.
        parameters: the parameters by name.
        mass: the divisor of the loss's mean.
        dtype: the dtype of the gradients.
    """
    layers = [Layer(None, n, function=AUTOGRAD) for n in parameters]
    found = []
    for column in columns:
        every = zip(*example_gradients(output, column, parameters), strict=True)
        whole = [torch.cat(some) for some in every]
        rows = (g.to(dtype).reshape(len(output), 1, -1) for g in whole)
        found.append({layer: [g] for layer, g in zip(layers, rows, strict=True)})
    h: dict[Layer, list[Inputs]] = {layer: [Rows(mass.new_zeros(len(output), 1, 0, dtype=dtype))] for layer in layers}
    widths = {layer: p.numel() for layer, p in zip(layers, parameters.values(), strict=True)}
    shapes = {n: tuple(p.shape) for n, p in parameters.items()}
    return Cases(h, found, widths, mass.to(dtype), len(output), shapes=shapes)


def with_zeros(cases: Cases, parameters: Mapping[str, Tensor]) -> Cases:
    """The same cases, with rows of zeros for the parameters that no layer has: the output does not depend on them."""
    have = {n for layer in cases.h for n in layer.names}
    rest = {Layer(None, n, function=AUTOGRAD): p for n, p in parameters.items() if n not in have}
    if not rest:
        return cases
    rows, mass = next(iter(cases.h.values()))[0].shape[0], cases.mass
    zeros = {layer: [mass.new_zeros(()).expand(rows, 1, p.numel())] for layer, p in rest.items()}
    none: dict[Layer, list[Inputs]] = {layer: [Rows(mass.new_zeros(rows, 1, 0))] for layer in rest}
    return replace(
        cases,
        h=cases.h | none,
        columns=[{**column, **zeros} for column in cases.columns],
        d_out=cases.d_out | {layer: p.numel() for layer, p in rest.items()},
        shapes={**cases.shapes, **{layer.names[0]: tuple(p.shape) for layer, p in rest.items()}},
    )


def read_inputs(layer: Layer, uses: Sequence[Use], dtype: torch.dtype) -> list[Inputs]:
    """Only the inputs of a layer's uses. Each row is a case.

    Raises:
        RuntimeError: if an input was changed in place after its use.
    """
    for use in uses:
        use.check_input()
    return [use.kind.kept(True, layer.bias is not None).inputs(use.h).to(dtype) for use in uses]


def _gradients(
    layers: Mapping[Layer, Sequence[_Reading]],
    groups: Mapping[Layer, Grouping],
    output: Tensor,
    columns: Callable[[], Iterable[Tensor]],
    dtype: torch.dtype | None,
    sampled: bool,
) -> Iterator[Mapping[Layer, list[Tensor]]]:
    """The gradients, column by column. If rows need separate passes, the layers of each grouping come in turn."""
    if sampled:
        yield from _passes(layers, output, columns(), dtype)
        return
    for grouping in dict.fromkeys(groups.values()):
        its = {layer: readings for layer, readings in layers.items() if groups[layer] == grouping}
        if grouping.members == 1:
            yield from _passes(its, output, columns(), dtype)
            continue
        _check_passes(grouping, columns(), next(iter(its)))
        yield from _passes(its, output, (part for c in columns() for part in grouping.parts(c)), dtype, many=True)


def _passes(
    layers: Mapping[Layer, Sequence[_Reading]],
    output: Tensor,
    columns: Iterable[Tensor],
    dtype: torch.dtype | None,
    many: bool = False,
) -> Iterator[Mapping[Layer, list[Tensor]]]:
    """The gradients of some layers, with a backward pass for each column, or one for `many` small columns at once."""
    readings = [reading for its in layers.values() for reading in its]
    # The groups of a convolution share an edge.
    edges = {(r.use.edge.node, r.use.edge.output_nr): r.use.edge for r in readings}
    if not edges:
        return
    places = {key: i for i, key in enumerate(edges)}
    size = sum({(r.use.edge.node, r.use.edge.output_nr): r.use.a.numel() for r in readings}.values())
    step = max(1, min(64, AT_ONCE // max(1, size))) if many else 1
    for gradients in backward_passes(output, list(edges.values()), columns, step):
        by_layer = {}
        for layer, its in layers.items():
            found = (gradients[places[r.use.edge.node, r.use.edge.output_nr]] for r in its)
            by_layer[layer] = [r.gradients(layer, g) for r, g in zip(its, found, strict=True)]
        del gradients
        yield Gradients(by_layer, dtype)
        del by_layer


def backward_passes(
    output: Tensor, inputs: Sequence[GradientEdge] | Sequence[Tensor], columns: Iterable[Tensor], step: int
) -> Iterator[Sequence[Tensor | None]]:
    """The gradients of every column, `step` columns at a time if all functions allow it."""
    it = iter(columns)
    while waiting := [column.to(output.dtype) for column in islice(it, step)]:
        together = None
        if len(waiting) > 1:
            try:
                together = torch.autograd.grad(
                    output, inputs, torch.stack(waiting), retain_graph=True, allow_unused=True, is_grads_batched=True
                )
            except (RuntimeError, NotImplementedError):  # a function without a vmap rule
                step = 1
        for i, column in enumerate(waiting):
            if together is not None:
                yield [None if g is None else g[i] for g in together]
            else:
                yield torch.autograd.grad(output, inputs, column, retain_graph=True, allow_unused=True)


def _check_passes(grouping: Grouping, columns: Iterable[Tensor], layer: Layer) -> None:
    count = 0
    for column in columns:
        own = grouping.of(column)
        count += int(own.reshape(*own.shape[:2], -1).ne(0).any(2).any(0).sum())
        if count > MOST_PASSES:
            raise ValueError(
                f"the rows of the batch see one another in layer {layer.name!r} (for example through a graph, "
                "logits within a batch or averages over the batch), so each of the output's "
                f"{grouping.cases * grouping.members} rows needs its own backward passes, more than "
                f"{MOST_PASSES} in all; use estimator='mc', which needs one for each sample, or smaller batches"
            )


def _check_examples(use: Use, output: Tensor) -> None:
    if isinstance(use.kind, Affine) and use.a.ndim < 2 and output.ndim == 1 and len(output) != 1:
        raise ValueError(
            f"the input of {use.weight or use.bias!r} has shape {tuple(use.h.shape)}, and the output "
            f"{tuple(output.shape)} counts {len(output)} examples; expected an axis of examples first, in both: "
            "model(x.unsqueeze(0)) for a single one"
        )
