"""Statistics of several terms of an objective as those of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from natgrad.capture.layer import Layer
from natgrad.curvature.moments import AffineMoments, DiagonalMoments, Moments, ScaleMoments, merge
from natgrad.linalg import factor
from natgrad.optim.preconditioner.running import Statistics


def combined(parts: Sequence[tuple[float, Statistics]]) -> Statistics:
    """The statistics of `Σ_t ω_t F_t`, from those of each `F_t` with its weight `ω_t`.

    Of a layer with factors `A_t ⊗ B_t` it is the product with the same partial traces,
    `(Σ_t ω_t tr B_t A_t) / (Σ_t ω_t tr B_t) ⊗ Σ_t ω_t B_t`.

    Raises:
        ValueError: for a negative weight.
    """
    for weight, _ in parts:
        if weight < 0:
            raise ValueError(
                f"a term of the objective counts {weight:.3g} times: with a negative factor its curvature is not "
                "positive semidefinite; expected positive factors. Give opt.plus(lambda: ...) the term's value in its "
                "place"
            )
    moments = [(weight, part.moments) for weight, part in parts]
    squares = [(weight, part.squares) for weight, part in parts]
    return Statistics(_combined(moments), _combined(squares))


def _combined(parts: Sequence[tuple[float, Mapping[Layer, Moments]]]) -> dict[Layer, Moments]:
    layers = dict.fromkeys(layer for _, moments in parts for layer in moments)
    mass = max((m.mass for _, moments in parts for m in moments.values()), key=float, default=None)
    if mass is None:
        return {}
    total: dict[Layer, Moments] = {}
    for layer in layers:
        own = [(weight, moments[layer]) for weight, moments in parts if layer in moments]
        weighted = [_weighted(weight, m, mass, len(own)) for weight, m in own]
        if all(isinstance(m, AffineMoments) for m in weighted):
            weighted = _with_shares([m for m in weighted if isinstance(m, AffineMoments)])
        total[layer] = reduce(lambda a, b: merge([{layer: a}, {layer: b}])[layer], weighted)
    return total


def _weighted(weight: float, m: Moments, mass: Tensor, of: int) -> Moments:
    """A term's moments with `ω_t` in their sums of gradients, as one of so many with a mass of their own in all."""
    scale = torch.where(m.mass > 0, weight * mass / m.mass, 0.0)
    if isinstance(m, AffineMoments):
        return replace(m, output=scale * m.output, mass=mass / of)
    if isinstance(m, ScaleMoments):
        return replace(m, products=scale * m.products, mass=mass / of)
    return DiagonalMoments(tuple(scale * v for v in m.values), mass / of)


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
