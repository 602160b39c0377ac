"""How far the blocks of other structures are from the exact ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from natgrad.capture.layer import Layer
from natgrad.curvature.by_layers import of_layers
from natgrad.curvature.problem import Problem
from natgrad.curvature.structures import Options
from natgrad.linalg import ExactBlock, Operator


def relative_errors(
    problem: Problem, blocks: Mapping[Layer, Operator], structures: Sequence[str], centered: bool, sharing: str
) -> dict[str, dict[str, float]]:
    """`‖G − M‖ / ‖G‖` by layer and structure, for the labels that the problem holds; NaN where `G` is zero."""
    found: dict[str, dict[str, float]] = {layer.name: {} for layer in blocks}
    for name in structures:
        problem.same_labels()
        M = of_layers(problem, name, Options(centered, sharing))
        for layer, block in blocks.items():
            own = M.layers.get(layer.name)
            if own is not None and own.names == layer.names:
                size = float(block.norm())
                found[layer.name][name] = distance(block, own.operator) / size if size > 0 else math.nan
    return found


def distance(block: Operator, M: Operator, budget: int = 1 << 24) -> float:
    """`‖G − M‖` of an exact block, by `‖G‖² − 2 Σ s·M s + ‖M‖²` over its columns `s`, in float64."""
    block, M = block.to(torch.float64), M.to(torch.float64)
    assert isinstance(block, ExactBlock)
    inner = 0.0
    n, k = block.g.shape[:2]
    step = max(1, budget // max(1, k * block.space.size))
    for start in range(0, n, step):
        S = block.space.unflatten(block.part(slice(start, start + step)).columns().mT)
        inner += sum(float((s * Ms).sum()) for s, Ms in zip(S, M._matmul(S), strict=True))
    square = float(block.norm()) ** 2 - 2 * inner + float(M.norm()) ** 2
    return max(square, 0.0) ** 0.5  # below zero only by rounding
