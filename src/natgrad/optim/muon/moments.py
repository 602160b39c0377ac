"""The second moments of the inputs of matrices, from what forwards have recorded."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from natgrad.capture.layer import Layer
from natgrad.capture.layers import Inputs
from natgrad.capture.reading import read_inputs
from natgrad.capture.use import Use
from natgrad.curvature.moments import AffineMoments
from natgrad.linalg.precision import matmul_precision
from natgrad.optim.muon.routing import unit_of

FEWEST = 4096
"""A sample of a batch has at least so many rows."""


class InputMoments:
    """Finds the moments of the inputs of every matrix that was used in a forward. Inputs that several matrices share,
    as those of query, key and value do, are summed once: their moments are one object.

    Args:
        max_dim: the second moments of wider inputs are kept as their diagonals.
        rows_per_input: so many rows for each input, and at least `FEWEST`, are drawn from the rows of a batch, and
            stand for all. None: all rows.
        seed: of the sample.
    """

    def __init__(self, max_dim: int, rows_per_input: int | None, seed: int):
        self._max_dim, self._rows_per_input = max_dim, rows_per_input
        self._source = torch.Generator().manual_seed(seed)
        self._orders: dict[int, Tensor] = {}

    def of(self, uses: Sequence[Use]) -> tuple[dict[Layer, AffineMoments], list[Layer]]:
        """The moments by matrix; and the matrices of which an input was changed in place after its use, and is not
        counted."""
        by_unit: dict[Layer, list[Use]] = {}
        spoiled: dict[Layer, None] = {}
        for use in uses:
            unit = unit_of(use)
            if unit is not None:
                if use.is_intact:
                    by_unit.setdefault(unit, []).append(use)
                else:
                    spoiled[unit] = None
        found: dict[Layer, AffineMoments] = {}
        known: dict[Any, tuple[list[Inputs], AffineMoments]] = {}
        for unit, its in by_unit.items():
            dtype = torch.promote_types(its[0].h.dtype, torch.float32)
            inputs = [i for i in read_inputs(unit, its, dtype) if i.shape[0] * i.shape[1] > 0]
            if not inputs:
                continue
            places = tuple(i.place() for i in inputs)
            key = places if all(places) else id(inputs)
            if key not in known:  # with the inputs kept, so that no others can come to lie in their place
                known[key] = inputs, self._sum(inputs)
            found[unit] = known[key][1]
        return found, list(spoiled)

    def _sum(self, inputs: Sequence[Inputs]) -> AffineMoments:
        with matmul_precision("high"):
            return reduce(operator.add, map(self._moments, inputs))

    def _moments(self, inputs: Inputs) -> AffineMoments:
        """Of one use. A sample counts as much as all rows."""
        examples, positions, width = inputs.shape
        rows = examples * positions
        wanted = rows if self._rows_per_input is None else max(FEWEST, self._rows_per_input * width)
        its = inputs.sample(wanted, self._order(rows)) if wanted < rows else inputs
        like = its.part(0, 1).dense()
        moments = AffineMoments.empty(width, 0, like.new_zeros(()), diagonal=(width > self._max_dim, False))
        moments.add_inputs(its)
        counted = its.shape[0] * its.shape[1]
        return moments if counted == rows else (rows / counted) * moments

    def _order(self, rows: int) -> Tensor:
        """A random order of the rows, one for all inputs with so many. A regular one could meet a pattern in the rows,
        such as positions in time, points of a grid, or pairs."""
        if rows not in self._orders:
            self._orders[rows] = torch.randperm(rows, generator=self._source)
        return self._orders[rows]


def added(past: Mapping[Layer, AffineMoments], new: Mapping[Layer, AffineMoments], decay: float) -> dict[Layer, Any]:
    """`decay · past + new`, matrix by matrix; what has nothing new stays. Shared moments stay shared."""
    merged: dict[tuple[int, int], AffineMoments] = {}
    out = dict(past)
    for unit, m in new.items():
        before = past.get(unit)
        key = id(before), id(m)
        if key not in merged:
            merged[key] = m if before is None else decay * before + m
        out[unit] = merged[key]
    return out
