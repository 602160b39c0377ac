"""Layers that share parameters: the rows of one weight, or one weight in several layouts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.capture.cases import Cases
from natgrad.capture.layer import Layer
from natgrad.capture.layers import Inputs, joined
from natgrad.linalg import Operator, Rows
from natgrad.linalg.layout import PLAIN
from natgrad.linalg.space import Parts


def groups(layers: Iterable[Layer]) -> list[list[Layer]]:
    """The layers by their parameters: one, or the rows of one weight, or one weight in several layouts."""
    found: dict[tuple[str, ...], list[Layer]] = {}
    for layer in layers:
        found.setdefault(layer.names, []).append(layer)
    return [sorted(group, key=lambda layer: layer.rows or (0, 0)) for group in found.values()]


def has_rival(layer: Layer, layers: Iterable[Layer]) -> bool:
    """Whether the layer's weight is used in another layout too: as `W` and as `Wᵀ`."""
    return any(other.names == layer.names and other.layout != layer.layout for other in layers)


def whole(layers: Sequence[Layer]) -> Layer:
    """The layer of all the parameters that a group shares.

    Raises:
        NotImplementedError: if the rows in use are not all, each once.
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
    """The operators of whole layers: those of some rows each, one below the other."""
    return {
        whole(layers): Rows([operators[layer] for layer in layers]) if layers[0].rows else operators[layers[0]]
        for layers in groups(operators)
    }


def example_gradients(cases: Cases, layers: Sequence[Layer], g: Mapping[Layer, list[Tensor]]) -> Parts:
    """The gradient of every example in the parameters of a group, `(n, *shape)` each, as the whole layer has them."""
    parts = [_example_gradient(cases, layer, g[layer]) for layer in layers]
    if len(layers) == 1:
        return parts[0]
    if layers[0].rows is not None:
        return tuple(torch.cat(column, 1) for column in zip(*parts, strict=True))
    plain = [W.mT if layer.layout.form == "transposed" else W for layer, (W, *_) in zip(layers, parts, strict=True)]
    return (torch.stack(plain).sum(0),)


def _example_gradient(cases: Cases, layer: Layer, uses: list[Tensor]) -> Parts:
    g = by_case(uses)
    if layer.scale:
        return coordinates(g.sum(1), layer)
    bias = (g.sum(1),) if layer.bias else ()
    if not layer.weight:
        return bias
    x = joined(cases.h[layer])
    step = step_of(x)
    W = [
        torch.einsum("nto,nti->noi", its_g, x.part(start, start + step).dense())
        for start, its_g in zip(range(0, len(g), step), g.split(step), strict=True)
    ]
    return (torch.cat(W), *bias)


def coordinates(values: Float[Tensor, "*n p"], layer: Layer) -> Parts:
    """The parts of a scale layer's coordinates."""
    return tuple(values.chunk(len(layer.names), -1))


def by_case(uses: Sequence[Tensor]) -> Float[Tensor, "n t o"]:
    """Gradients of all uses, one after the other along the positions."""
    return uses[0] if len(uses) == 1 else torch.cat(list(uses), 1)


def step_of(x: Inputs, budget: int = 1 << 25) -> int:
    """How many examples are written out at a time."""
    return max(1, budget // max(1, x.shape[1] * x.shape[2]))
