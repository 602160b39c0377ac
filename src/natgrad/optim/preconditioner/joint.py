"""The exact matrix of one step's batches, from their cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from natgrad.capture.cases import Cases
from natgrad.capture.layer import Layer
from natgrad.capture.layers import Inputs, Rows
from natgrad.curvature.blocks import assemble
from natgrad.curvature.exact import ExactStructure
from natgrad.linalg.gram import MEMORY
from natgrad.linalg.joint import Joint
from natgrad.linalg.layout import PLAIN

Form = tuple[Inputs, int]
"""A layer's inputs in one of the batches, and the width of its gradients."""


def from_cases(
    every: Sequence[Cases], shares: Sequence[float], parameters: Mapping[str, Tensor], memory: int = MEMORY
) -> Joint:
    """`F` over the given parameters, from the cases of every batch.

    Args:
        every: the cases of the batches.
        shares: the factor of each batch's sum over cases.
        parameters: the parameters by name.
        memory: the number of bytes for columns that are written out at a time.

    Raises:
        NotImplementedError: if a parameter is in no layer.
        ValueError: if a batch has a negative factor.
    """
    parts = _parts(every, parameters)
    _check_covered(parts, parameters)
    shapes = {n: tuple(p.shape) for n, p in parameters.items()}
    structure = ExactStructure()
    for share, cases in zip(shares, every, strict=True):
        if share < 0:
            raise ValueError(
                f"a batch counts {share:.3g} times in the objective: the Fisher matrix of a loss with a negative "
                "factor is not positive semidefinite; expected positive factors"
            )
        structure.add(replace(_weighted(cases, share**0.5, parts), shapes=shapes))
    return Joint(assemble(structure.build(is_mean=False), parameters), memory)


def _parts(every: Sequence[Cases], parameters: Mapping[str, Tensor]) -> dict[Layer, Form]:
    """The parts of the layers with the given parameters, and their form in one of the batches.

    A weight and a bias are one part if they are used together in all batches, else two.
    """
    layers: dict[Layer, Form] = {}
    for cases in every:
        layers |= {layer: (h[0], cases.d_out[layer]) for layer, h in cases.h.items()}
    partners: dict[str, set[tuple[str, ...]]] = {}
    for layer in layers:
        for n in layer.names:
            partners.setdefault(n, set()).add(layer.names)
    divided = {n for n, its in partners.items() if len(its) > 1}
    parts: dict[Layer, Form] = {}
    for layer, (inputs, width) in layers.items():
        whole = all(n in parameters and n not in divided for n in layer.names)
        for names in [layer.names] if whole else [(n,) for n in layer.names if n in parameters]:
            part = _part(layer, names)
            parts[part] = inputs, width * len(names) // len(layer.names) if layer.scale else width
    return parts


def _part(layer: Layer, names: Sequence[str]) -> Layer:
    """The layer with only some of its parameters."""
    weight, bias = (n if n in names else None for n in (layer.weight, layer.bias))
    return replace(layer, weight=weight, bias=bias, layout=layer.layout if weight else PLAIN)


def _check_covered(parts: Mapping[Layer, Form], parameters: Mapping[str, Tensor]) -> None:
    covered = {n for part in parts for n in part.names}
    for n in parameters:
        if n not in covered:
            raise NotImplementedError(
                f"{n!r} has a gradient but was not used in any forward that opt.loss followed; expected gradients "
                "from opt.loss alone. Freeze it with requires_grad_(False)"
            )


def _weighted(cases: Cases, factor: float, parts: Mapping[Layer, Form]) -> Cases:
    """The cases of the parts, with `factor` times the gradients; zeros where a part was not used."""
    scaled = [{layer: [factor * g for g in column[layer]] for layer in column} for column in cases.columns]
    number = next(iter(cases.h.values()))[0].shape[0]  # of cases, the same in all layers
    h: dict[Layer, list[Inputs]] = {}
    g: list[dict[Layer, list[Tensor]]] = [{} for _ in scaled]
    for part, (template, width) in parts.items():
        layer = next((layer for layer in cases.h if _has(layer, part)), None)
        uses = [template.blank(number)] if layer is None else cases.h[layer]
        h[part] = uses if part.weight else [Rows(cases.mass.new_zeros(*use.shape[:2], 0)) for use in uses]
        for its, column in zip(g, scaled, strict=True):
            if layer is None:
                its[part] = [cases.mass.new_zeros(*use.shape[:2], width) for use in uses]
            else:
                its[part] = [_coordinates(part, layer, use) for use in column[layer]]
    return Cases(h, g, {part: width for part, (_, width) in parts.items()}, cases.mass, cases.examples)


def _has(layer: Layer, part: Layer) -> bool:
    return set(part.names) <= set(layer.names) and _part(layer, part.names) == part


def _coordinates(part: Layer, layer: Layer, g: Tensor) -> Tensor:
    """The gradients of a part. For a scale layer's coordinates: those of the scale or of the shift."""
    if not layer.scale or part.names == layer.names:
        return g
    return g.chunk(2, -1)[0 if part.weight else 1]
