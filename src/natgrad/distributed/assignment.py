"""Who computes what: pieces of work spread over ranks, so that the last to finish is early."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

import torch

K = TypeVar("K", bound=Hashable)


def assign(costs: Mapping[K, float], ranks: int) -> dict[K, int]:
    """The rank of every piece of work: the longest first, each to the rank that has least to do (Graham 1969), and
    then exchanged between the busiest rank and the others for as long as that helps.

    Every rank comes to the same result, if the costs are in the same order.

    Example:
        >>> assign({"a": 4.0, "b": 3.0, "c": 3.0, "d": 2.0, "e": 2.0, "f": 2.0}, 2)
        {'a': 0, 'b': 1, 'c': 1, 'd': 0, 'e': 0, 'f': 1}
    """
    own: list[list[K]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for key in sorted(costs, key=lambda k: -costs[k]):
        rank = load.index(min(load))
        own[rank].append(key)
        load[rank] += costs[key]
    while _improve(own, load, costs):
        pass
    place = {key: rank for rank, keys in enumerate(own) for key in keys}
    return {key: place[key] for key in costs}


def _improve(own: list[list[K]], load: list[float], costs: Mapping[K, float]) -> bool:
    """Moves a piece away from the busiest rank, or swaps it for a smaller one, if both are then less busy than it was.
    Whether there was one."""
    busiest = load.index(max(load))
    least = 1e-9 * load[busiest]  # sums in another order differ by rounding
    for rank in sorted(range(len(load)), key=load.__getitem__):
        for mine in own[busiest] if rank != busiest else ():
            for theirs in (None, *own[rank]):
                saved = costs[mine] - (0.0 if theirs is None else costs[theirs])
                if saved > least and load[rank] + saved < load[busiest] - least:
                    own[busiest].remove(mine)
                    own[rank].append(mine)
                    if theirs is not None:
                        own[rank].remove(theirs)
                        own[busiest].append(theirs)
                    load[busiest] -= saved
                    load[rank] += saved
                    return True
    return False


def cost(shapes: Iterable[torch.Size]) -> float:
    """What it takes to invert factors of these shapes, or to find their eigenvectors, up to a factor: the cubes of the
    sides of matrices, and the lengths of diagonals."""
    return float(sum(shape[0] ** 3 if len(shape) == 2 else shape.numel() for shape in shapes))
