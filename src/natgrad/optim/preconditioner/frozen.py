"""The statistics that remain of a layer if some of its parameters are frozen."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from natgrad.capture.layer import Layer
from natgrad.curvature.moments import AffineMoments, DiagonalMoments, Moments, ScaleMoments


def without(layer: Layer, frozen: Collection[str]) -> Layer | None:
    """The layer of the remaining parameters; None if there are none."""
    weight = None if layer.weight in frozen else layer.weight
    bias = None if layer.bias in frozen else layer.bias
    return replace(layer, weight=weight, bias=bias) if weight or bias else None


def left_of(moments: Mapping[Layer, Moments], frozen: Collection[str]) -> dict[Layer, Moments]:
    """The remaining moments of each layer. The block of a weight without bias is `E[h hᵀ] ⊗ B`, that of a bias is
    `B`."""
    found: dict[Layer, Moments] = {}
    for layer, m in moments.items():
        left = without(layer, frozen)
        if left is not None:
            found[left] = m if left.names == layer.names else _part(m, 0 if left.weight else -1)
    return found


def _part(m: Moments, which: int) -> Moments:
    """The moments of the first or the last of a layer's two parameters."""
    if isinstance(m, AffineMoments):
        return m
    if isinstance(m, ScaleMoments):
        return replace(m, products=m.products[[which]])
    assert isinstance(m, DiagonalMoments)
    return DiagonalMoments((m.values[which],), m.mass)
