"""Layers that share parameters: the rows of one weight, or one weight in several layouts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.capture.cases import Cases
from natgrad.capture.layer import Layer
from natgrad.capture.layers import Inputs, joined
from natgrad.capture.reading import AUTOGRAD
from natgrad.linalg import Operator, Rows
from natgrad.linalg.layout import PLAIN
from natgrad.linalg.space import Parts


def groups(layers: Iterable[Layer]) -> list[list[Layer]]:
    """Groups the layers by parameters: a single layer, the rows of one weight, or one weight in several layouts."""
    found: dict[tuple[str, ...], list[Layer]] = {}
    for layer in layers:
        found.setdefault(layer.names, []).append(layer)
    return [sorted(group, key=lambda layer: layer.rows or (0, 0)) for group in found.values()]


def components(layers: Iterable[Layer], together: Iterable[tuple[str, ...]] = ()) -> list[list[Layer]]:
    """Groups of layers that share parameters or are used together, directly or through other layers."""
    found: list[tuple[set[str], list[Layer]]] = []
    for names, own in [*((set(names), []) for names in together), *((set(l.names), [l]) for l in layers)]:
        near = [group for group in found if group[0] & names]
        joined_names = names.union(*(group[0] for group in near))
        found = [g for g in found if g not in near] + [(joined_names, [*(l for _, ls in near for l in ls), *own])]
    return [own for _, own in found if own]


def has_rival(layer: Layer, layers: Iterable[Layer]) -> bool:
    """Whether the layer's weight is also used in another way: as `W` and as `Wᵀ`, or in a product and as a scale."""
    own = layer.layout, layer.scale
    return any(other.names == layer.names and (other.layout, other.scale) != own for other in layers)


def is_simple(layers: Sequence[Layer], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a component is one layer, or several layers that use every row of their parameters once."""
    first = layers[0]
    if len(layers) == 1 and first.rows is None:
        return True
    rows = sorted(layer.rows or (0, 0) for layer in layers)
    fits = all((layer.names, layer.layout, layer.scale) == (first.names, first.layout, first.scale) for layer in layers)
    ends = [0, *(stop for _, stop in rows)]
    return fits and [start for start, _ in rows] == ends[:-1] and ends[-1] == _height(first, shapes[first.names[0]])


def _height(layer: Layer, shape: tuple[int, ...]) -> int:
    """How many rows the matrix of a layer's first parameter has."""
    form = layer.layout.form if layer.weight else "plain"
    return {"plain": shape[0], "transposed": shape[-1], "deconvolution": layer.layout.groups * shape[1 % len(shape)]}[
        form
    ]


def united(layers: Sequence[Layer]) -> Layer:
    """The layer of all parameters of a component, each in its own shape."""
    weights = dict.fromkeys(layer.weight for layer in layers if layer.weight)
    names = list(dict.fromkeys([*weights, *(n for layer in layers for n in layer.names)]))
    function = " + ".join(dict.fromkeys(layer.function for layer in layers))
    return Layer(names[0], names[1] if len(names) > 1 else None, more=tuple(names[2:]), function=function)


def whole(layers: Sequence[Layer]) -> Layer:
    """The layer of all the parameters that a group shares.

    Raises:
        NotImplementedError: unless every row is used exactly once.
    """
    first = layers[0]
    function = " + ".join(dict.fromkeys(layer.function for layer in layers))
    layouts = {layer.layout for layer in layers}
    if len(layouts) > 1 and not all(layer.rows is None and layer.layout.groups == 1 for layer in layers):
        raise NotImplementedError(
            f"{first.names[0]!r} is used in several layouts and by some of its rows; use structure='dense' or "
            "'implicit', or leave it out with params="
        )
    if first.rows is not None or len(layers) > len(layouts):
        end = 0
        for layer in layers:
            start, stop = layer.rows or (0, 0)
            if start != end:
                raise NotImplementedError(
                    f"the rows of {first.names[0]!r} that are used are {[layer.rows for layer in layers]}; expected "
                    "them to follow one another without overlap. Use structure='dense' or 'implicit', or leave it "
                    "out with params="
                )
            end = stop
    return replace(first, rows=None, layout=layouts.pop() if len(layouts) == 1 else PLAIN, function=function)


def tiled(operators: Mapping[Layer, Operator]) -> dict[Layer, Operator]:
    """The operators of whole layers, from those of some of the rows, one below the other."""
    return {
        whole(layers): Rows([operators[layer] for layer in layers]) if layers[0].rows else operators[layers[0]]
        for layers in groups(operators)
    }


def example_gradients(cases: Cases, layers: Sequence[Layer], g: Mapping[Layer, list[Tensor]]) -> Parts:
    """The gradient of every case in the parameters of `united(layers)`, `(n, *form_of(shape))` each."""
    total: dict[str, Tensor] = {}
    if len(layers) > 1 and is_simple(layers, cases.shapes):  # rows of one weight, one below the other
        ordered = sorted(layers, key=lambda layer: layer.rows or (0, 0))
        own = [single_gradients(cases, layer, g) for layer in ordered]
        found = [(replace(layers[0], rows=None), tuple(torch.cat(parts, 1) for parts in zip(*own, strict=True)))]
    else:
        found = [(layer, single_gradients(cases, layer, g)) for layer in layers]
    for layer, parts in found:
        for n, part in in_own_shapes(layer, parts, cases.shapes).items():
            total[n] = total[n] + part if n in total else part
    return tuple(total[n].reshape(-1, *form_of(cases.shapes[n])) for n in united(layers).names)


def form_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a parameter in an operator of several layers' parameters: a vector or a matrix."""
    return shape if len(shape) == 1 else (shape[0], prod(shape[1:])) if shape else (1,)


def in_own_shapes(layer: Layer, parts: Parts, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The parts of a layer's vectors in the shapes of its parameters, after any leading axes; zero in other rows."""
    found = {}
    for i, (n, part) in enumerate(zip(layer.names, parts, strict=True)):
        shape, is_weight = shapes[n], i == 0 and layer.weight is not None
        if layer.function == AUTOGRAD:
            found[n] = part.reshape(*part.shape[:-1], *shape)
            continue
        lead = part.ndim - (1 if layer.scale else len(form_of(shape)))
        if layer.rows is not None:
            height = _height(layer, shape) if is_weight else shape[0]
            placed = part.new_zeros(*part.shape[:lead], height, *part.shape[lead + 1 :])
            placed.narrow(lead, layer.rows[0], layer.rows[1] - layer.rows[0]).copy_(part)
            part = placed
        layout = layer.layout if is_weight else PLAIN
        found[n] = layout.to_parameter(part, shape, tuple(part.shape[lead:]))
    return found


def as_vectors(layer: Layer, values: Mapping[str, Tensor]) -> Parts:
    """Undoes `in_own_shapes`, for a layer of all rows."""
    parts = []
    for i, n in enumerate(layer.names):
        v = values[n]
        shape, is_weight = tuple(v.shape), i == 0 and layer.weight is not None
        if layer.scale:
            parts.append(v.flatten())
        elif is_weight and layer.layout.form != "plain":
            height = _height(layer, shape)
            parts.append(layer.layout.to_operator(v, shape, (height, v.numel() // height)))
        else:
            parts.append(v.reshape(form_of(shape)))
    return tuple(parts)


def single_gradients(cases: Cases, layer: Layer, g: Mapping[Layer, list[Tensor]]) -> Parts:
    """The gradient of every case in one layer's parameters, `(n, *shape)` each, in the shapes of its operator."""
    its = by_case(g[layer])
    if layer.scale:
        return coordinates(its.sum(1), layer)
    bias = (its.sum(1),) if layer.bias else ()
    if not layer.weight:
        return bias
    x = joined(cases.h[layer])
    step = step_of(x)
    W = [
        torch.einsum("nto,nti->noi", part, x.part(start, start + step).dense())
        for start, part in zip(range(0, len(its), step), its.split(step), strict=True)
    ]
    return (torch.cat(W), *bias)


def coordinates(values: Float[Tensor, "*n p"], layer: Layer) -> Parts:
    """The parts of a scale layer's coordinates."""
    return tuple(values.chunk(len(layer.names), -1))


def by_case(uses: Sequence[Tensor]) -> Float[Tensor, "n t o"]:
    """The gradients of all uses, concatenated along the positions."""
    return uses[0] if len(uses) == 1 else torch.cat(list(uses), 1)


def step_of(x: Inputs, budget: int = 1 << 25) -> int:
    """The number of examples that are written out at a time."""
    return max(1, budget // max(1, x.shape[1] * x.shape[2]))
