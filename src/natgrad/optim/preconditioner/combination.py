"""The statistics of an objective of several terms, combined into one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from natgrad.capture.layer import Layer
from natgrad.curvature.combination import of_terms
from natgrad.curvature.moments import AffineMoments, DiagonalMoments, Moments, ScaleMoments, merge
from natgrad.optim.preconditioner.sums import Statistics


def combined(parts: Sequence[tuple[float, Statistics]]) -> Statistics:
    """The statistics of `Σ_t ω_t F_t`, from those of each `F_t` with its weight `ω_t`.

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
    every = [layer for _, part in parts for layer in part.layers]
    parts = [(weight, part.settled(every)) for weight, part in parts]
    moments = [(weight, part.moments) for weight, part in parts]
    squares = [(weight, part.squares) for weight, part in parts]
    scales = merge(part.scales for _, part in parts)  # of inputs, whatever the terms count
    elsewhere = tuple(dict.fromkeys(layer for _, part in parts for layer in part.elsewhere))
    return Statistics(_combined(moments), _combined(squares), scales, elsewhere)


def _combined(parts: Sequence[tuple[float, Mapping[Layer, Moments]]]) -> dict[Layer, Moments]:
    mass = max((m.mass for _, moments in parts for m in moments.values()), key=float, default=None)
    if mass is None:
        return {}
    of = Counter(layer for _, moments in parts for layer in moments)
    return of_terms(
        [{layer: _weighted(weight, m, mass, of[layer]) for layer, m in moments.items()} for weight, moments in parts]
    )


def _weighted(weight: float, m: Moments, mass: Tensor, of: int) -> Moments:
    """A term's moments with `ω_t` in their sums of gradients; `of` is the number of terms, each with its own mass."""
    scale = torch.where(m.mass > 0, weight * mass / m.mass, 0.0)
    if isinstance(m, AffineMoments):
        return replace(m, output=scale * m.output, mass=mass / of)
    if isinstance(m, ScaleMoments):
        return replace(m, products=scale * m.products, mass=mass / of)
    assert isinstance(m, DiagonalMoments)
    return DiagonalMoments(tuple(scale * v for v in m.values), mass / of)
