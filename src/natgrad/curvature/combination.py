"""The moments of an objective of several terms, combined into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce

import torch

from natgrad.capture.layer import Layer
from natgrad.curvature.moments import AffineMoments, Moments, merge
from natgrad.linalg import factor


def of_terms(parts: Sequence[Mapping[Layer, Moments]]) -> dict[Layer, Moments]:
    """The moments of `Σ_t F_t`, from those of each `F_t`. The sums of gradients of each term contain its weight.

    For a layer with factors `A_t ⊗ B_t`, the result is the product with the same partial traces,
    `(Σ_t tr B_t A_t) / (Σ_t tr B_t) ⊗ Σ_t B_t`.
    """
    total: dict[Layer, Moments] = {}
    for layer in dict.fromkeys(layer for part in parts for layer in part):
        own = [part[layer] for part in parts if layer in part]
        affine = [m for m in own if isinstance(m, AffineMoments)]
        if len(affine) == len(own) > 1:
            own = _with_shares(affine)
        total[layer] = reduce(lambda a, b: merge([{layer: a}, {layer: b}])[layer], own)
    return total


def _with_shares(parts: Sequence[AffineMoments]) -> list[Moments]:
    """With counts in proportion to the traces of the output factors; their sum stays."""
    traces = torch.stack([factor.diagonal(m.output).sum() for m in parts])
    count = torch.stack([m.count for m in parts])
    total = traces.sum()
    shares = torch.where(total > 0, traces / total, count / count.sum().clamp_min(1))
    out: list[Moments] = []
    for m, share in zip(parts, shares, strict=True):
        n = share * count.sum()
        scatter = torch.where(m.count > 0, m.scatter * (n / m.count), m.scatter)
        out.append(replace(m, count=n, scatter=scatter))
    return out
