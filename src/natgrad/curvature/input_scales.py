"""The scales of inputs that come from outside, such as raw features with different units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.capture.cases import Cases
from natgrad.capture.layer import Layer
from natgrad.capture.layers import Inputs, Rows
from natgrad.capture.layers.convolution import Patches
from natgrad.curvature.central_moments import CentralMoments
from natgrad.curvature.groups import has_rival

RAREST = 20.0
"""An input with a larger kurtosis has no scale of its own. That of one that is nonzero in a share `q` of the cases is
about `1/q`, that of a normal variable 3. A pixel at the border of an image varies little because it is rarely used,
not because it has another unit."""
ROUNDING = 16 * torch.finfo(torch.float32).eps
"""An input that varies by less than this, in units of its mean, counts as constant."""
SPAN = 10.0
"""Scales count as equal if the largest is at most so many times the smallest."""


def moments_of_data(cases: Cases) -> dict[Layer, CentralMoments]:
    """The central moments of the inputs of every linear layer and convolution of data whose parameters are used in no
    other way. Those of a convolution are the moments of the channels, for each entry of a patch."""
    found: dict[Layer, CentralMoments] = {}
    with torch.no_grad():
        for layer, uses in cases.h.items():
            own = layer in cases.data and bool(layer.weight) and layer.rows is None and not layer.scale
            if not own or has_rival(layer, cases.h):
                continue
            if all(isinstance(use, Rows) for use in uses):
                present = cases.present_in(layer, reduced=False)
                found[layer] = CentralMoments.of(torch.cat(_rows(uses, present)))
            elif all(isinstance(use, Patches) for use in uses):
                images = [use for use in uses if isinstance(use, Patches)]
                found[layer] = CentralMoments.of(torch.cat([use.pixels() for use in images])).repeated(images[0].area)
    return found


def _rows(uses: Sequence[Inputs], present: Sequence[Tensor] | None) -> list[Float[Tensor, "_ i"]]:
    if present is None:
        return [use.dense().flatten(0, 1) for use in uses]
    return [use.dense()[there] for use, there in zip(uses, present, strict=True)]


def relative_scales(moments: Mapping[Layer, CentralMoments]) -> dict[tuple[str, ...], Float[Tensor, " i"]]:
    """The scale of each input in units of the layer's largest, `√(E[d⁴] / E[d²])` with `d = h − m`, by the names of the
    layer's parameters. Without a bias nothing takes the mean's place, and `d = h`. An input that is constant or rarely
    used has 1. Layers whose inputs all have about the same scale are left out.

    For an input that is 0 or `v` the scale is about `|v|`, however rarely it is `v`; for a normal variable it is `√3`
    standard deviations.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 1e3], [-1.0, -1e3]])
        >>> relative_scales({Layer("weight", "bias"): CentralMoments.of(x)})["weight", "bias"].tolist()
        [0.001, 1.0]
    """
    found = {}
    for layer, m in moments.items():
        if layer.bias is None:
            m = m.around(torch.zeros_like(m.mean))
        second, fourth = m.second / m.count, m.fourth / m.count
        varies = second > (ROUNDING * m.mean).square()
        own = varies & (fourth <= RAREST * second.square())
        squares = torch.where(own, fourth / second, 0.0)
        scales = torch.where(own, (squares / squares.max()).sqrt(), 1.0)
        if bool(own.any()) and float(scales.min()) * SPAN < 1:
            found[layer.names] = scales
    return found


def share_of_smallest(scales: Float[Tensor, " i"], weight: Float[Tensor, "o i"]) -> float:
    """How much the layer's outputs depend on the input that counts least, in units of the one that counts most. An
    input counts as much as its column of the weight times its scale, `‖W_j‖ s_j`.

    Example:
        >>> import torch
        >>> share_of_smallest(torch.tensor([0.001, 1.0]), torch.ones(3, 2))
        0.0010000000474974513
    """
    sizes = weight.norm(dim=0) * scales
    largest = sizes.max()
    return float(sizes.min() / largest) if largest > 0 else 1.0
