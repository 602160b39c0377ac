"""Which rank computes what: pieces of work are assigned to ranks so that the last rank finishes early."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

import torch

K = TypeVar("K", bound=Hashable)


def assign(costs: Mapping[K, float], ranks: int) -> dict[K, int]:
    """The rank of every piece of work. The longest pieces come first, each for the rank with the least work (Graham
    1969). Then pieces are exchanged between the busiest rank and the others, as long as that helps.

    Every rank computes the same result if the costs are in the same order.

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
    """Moves a piece away from the busiest rank, or swaps it for a smaller one, if both ranks are then less busy than
    the busiest was. Returns whether there was such a piece."""
    busiest = load.index(max(load))
    least = 1e-9 * load[busiest]  # sums in different orders differ by rounding
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
    """The cost of inverting factors of these shapes, or of finding their eigenvectors, up to a constant: the cube of
    the side of a matrix, the length of a diagonal."""
    return float(sum(shape[0] ** 3 if len(shape) == 2 else shape.numel() for shape in shapes))
