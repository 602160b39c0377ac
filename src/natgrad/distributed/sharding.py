"""Shards of parameters, gathered one layer at a time on the rank that has the layer's factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from natgrad.distributed.world import World

Named = Mapping[str, Tensor]
Owners = Mapping[str, int]
"""The rank that works on each named tensor."""
Shapes = Mapping[str, Sequence[int]]


class Shards:
    """Ranks that together hold one copy of the parameters, each some of the rows. `copies` are the ranks that hold the
    same shard of another copy."""

    def __init__(self, world: World, copies: World | None):
        self.world, self.copies = world, copies
        self.size, self.rank = world.size, world.rank

    def whole(self, local: Named, parameters: Named) -> dict[str, Tensor]:
        """Every whole tensor, from the shards of all ranks."""
        from torch.distributed.tensor import DTensor

        out = {}
        for n, t in local.items():
            p = parameters[n]
            if isinstance(p, DTensor):
                d = DTensor.from_local(
                    t, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
                )
                out[n] = d.full_tensor()
        return out

    def gathered(
        self, local: Named, owners: Mapping[str, int], shapes: Mapping[str, Sequence[int]]
    ) -> dict[str, Tensor]:
        """The whole named tensors that this rank works on, from the shards of all ranks."""
        names = self._by_owner(owners)
        if not owners:
            return {}
        values = torch.cat([local[n].flatten() for own in names for n in own])
        to = [sum(local[n].numel() for n in own) for own in names]
        mine = names[self.rank]
        came = [sum(self._entries(shapes[n], r) for n in mine) for r in range(self.size)]
        parts = self.world.handed_over(values, to, came, "the shards of directions")
        split = [part.split([self._entries(shapes[n], r) for n in mine]) for r, part in enumerate(parts)]
        return {n: torch.cat([its[i] for its in split]).view(*shapes[n]) for i, n in enumerate(mine)}

    def scattered(
        self, whole: Named, owners: Mapping[str, int], shapes: Mapping[str, Sequence[int]], like: Tensor
    ) -> dict[str, Tensor]:
        """The inverse of `gathered`: this rank's shards of the named tensors, whose owners have them whole."""
        names = self._by_owner(owners)
        if not owners:
            return {}
        mine = names[self.rank]
        pieces = [piece for r in range(self.size) for n in mine for piece in [self._rows(whole[n], r).flatten()]]
        values = torch.cat(pieces) if pieces else like.new_empty(0)
        to = [sum(self._entries(shapes[n], r) for n in mine) for r in range(self.size)]
        came = [sum(self._entries(shapes[n], self.rank) for n in own) for own in names]
        parts = self.world.handed_over(values, to, came, "the shards of directions")
        out: dict[str, Tensor] = {}
        for own, part in zip(names, parts, strict=True):
            for n, t in zip(own, part.split([self._entries(shapes[n], self.rank) for n in own]), strict=True):
                out[n] = t.view(_share(shapes[n][0], self.rank, self.size)[1], *shapes[n][1:])
        return {n: out[n] for n in owners}

    def _by_owner(self, owners: Owners) -> list[list[str]]:
        return [[n for n, owner in owners.items() if owner == r] for r in range(self.size)]

    def _entries(self, shape: Sequence[int], rank: int) -> int:
        return _share(shape[0], rank, self.size)[1] * prod(shape[1:])

    def _rows(self, t: Tensor, rank: int) -> Tensor:
        return t.narrow(0, *_share(len(t), rank, self.size))


def _share(rows: int, rank: int, ranks: int) -> tuple[int, int]:
    """The first row of a rank and its number of rows, as in `torch.chunk`."""
    most = -(-rows // ranks)
    start = min(rank * most, rows)
    return start, min(most, rows - start)


def offsets_in(name: str, p: Any) -> None:
    """Raises NotImplementedError unless a parameter is sharded by its rows over the last dimension of a mesh."""
    from torch.distributed.tensor import Shard

    *outer, last = p.placements
    if not (isinstance(last, Shard) and last.dim == 0) or not all(o.is_replicate() for o in outer) or len(outer) > 1:
        raise NotImplementedError(
            f"parameter {name!r} has the placements {p.placements}; expected Shard(0) on one dimension of the mesh, "
            "and at most one dimension of copies"
        )
