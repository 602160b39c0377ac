"""The layers of a preconditioner over several ranks: which rank sums, inverts and multiplies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any

from torch import Tensor

from natgrad.capture.layer import Layer
from natgrad.curvature.groups import components
from natgrad.distributed.assignment import assign, cost
from natgrad.distributed.packing import leaves
from natgrad.distributed.reduction import Keep
from natgrad.distributed.sharding import Shards
from natgrad.distributed.whole import Whole
from natgrad.linalg import Block, Operator
from natgrad.linalg.state import dump, restore
from natgrad.optim.preconditioner.base import Sizes
from natgrad.optim.preconditioner.sums import Statistics
from natgrad.optim.tracking.batch import Batch, Sharing
from natgrad.optim.vectors import Vector

Work = Mapping[str, Callable[[], dict[str, Any]]]
Names = set[tuple[str, ...]]
Owners = dict[tuple[str, ...], int]
Own = Callable[[list[Block], Vector, Vector], Vector]
"""Computes the directions of some layers, from their blocks, a vector, and an existing direction."""


class Ranks:
    """One rank, or several ranks that each have all parameters: every rank has the averages and inverses of all layers,
    and the inversions are distributed over the ranks."""

    spread = False
    """Whether each layer's averages and inverse are on one rank only."""

    def __init__(self, place: Whole):
        self.place = place

    def share(self, pending: list[Batch]) -> None:
        """Starts the sums over ranks before the backward pass, so that communication overlaps with it."""
        world = self.place.world
        if world.size == 1:
            return
        fresh = [b for b in pending if b.sharing is None]
        own = [b.statistics for b in fresh if b.statistics is not None]
        ready = len(own) == len(fresh) and len({b.term for b in fresh}) == 1 and not any(b.fault for b in fresh)
        (count,) = world.numbers([float(ready)], "who has statistics")
        result = reduce(Statistics.__add__, own).begun(world) if count == world.size else None
        for b in fresh:
            b.sharing = Sharing(fresh, result)

    def summed(self, batches: list[Batch], own: Statistics, idle: bool) -> list[Statistics]:
        """The statistics of all ranks' batches, for one term."""
        world = self.place.world
        if world.size == 1:
            return [b.statistics for b in batches if b.statistics is not None]
        arrived = self._arrived(batches)
        return [self.reduced(own.completed(world) if idle else own)] if arrived is None else arrived

    def _arrived(self, batches: list[Batch]) -> list[Statistics] | None:
        """The statistics of these batches, if their sums were started on all ranks."""
        world = self.place.world
        sharings = list({id(s): s for b in batches if (s := b.sharing) is not None}.values())
        sent = [id(b) for s in sharings if s.result is not None for b in s.batches]
        (count,) = world.numbers([float(sent == [id(b) for b in batches] != [])], "what was sent")
        if count < world.size:
            return None
        return [s.result() for s in sharings if s.result is not None]

    def reduced(self, own: Statistics) -> Statistics:
        return own.reduced(self.place.world)

    def done(self, work: Work, blocks: Mapping[str, Block]) -> dict[str, Any]:
        """The results of the work that are needed on this rank, one for each layer."""
        costs = {name: cost(t.shape for t in leaves(dump(block.operator), Tensor)) for name, block in blocks.items()}
        return self.place.world.share(work, costs, "the inverses")

    def union(self, layers: set[Layer]) -> set[Layer]:
        """The layers of all ranks, if each rank knows some."""
        return layers

    def means(self, own: list[tuple[float, float]]) -> list[tuple[float, float]]:
        """The means of all ranks, if each rank has some."""
        return own

    def applied(self, of: Own, blocks: list[Block], v: Vector, rest: Vector, usable: Names) -> Vector:
        """Applies `of` to whole layers. Input and result are this rank's parts of the parameters. `usable` are the
        parameters of all layers in use, the same on all ranks."""
        return of(blocks, v, rest)

    def coordinates(self, blocks: list[Block], d: Vector, usable: Names) -> Vector:
        """A vector with the parts of some layers in the coordinates of these layers: this rank's share of it."""
        d = dict(d)
        for block in blocks:
            d |= block.named(block.operator.coordinates(block.parts(d)))
        return d

    def everywhere(self, own: dict[Layer, Operator]) -> dict[Layer, Operator]:
        """The operators of all layers, from those on each rank."""
        return own

    def state(self) -> dict[str, Any]:
        return {"owners": []}

    def load(self, saved: dict[str, Any]) -> None:
        """Loads the result of `state`."""

    def adopt(self, sizes: Sizes) -> tuple[Callable[[str], bool], dict[str, Any]]:
        """Which layers of a checkpoint belong on this rank, and which parts of the state change."""
        return lambda key: True, {"owners": []}


class Spread(Ranks):
    """Ranks with a shard of the parameters each. Every layer has an owner, which has the layer's averages and inverse;
    or only its inverse, if the averages `can` not be on one rank only."""

    def __init__(self, place: Whole, can: bool):
        super().__init__(place)
        assert place.shards is not None
        self.shards: Shards = place.shards
        self.spread = can
        self.owners: Owners = {}

    def share(self, pending: list[Batch]) -> None:
        """Nothing is sent before the backward."""

    def summed(self, batches: list[Batch], own: Statistics, idle: bool) -> list[Statistics]:
        return [self.reduced(own.completed(self.place.world) if idle else own)]

    def reduced(self, own: Statistics) -> Statistics:
        sizes = {layer: cost(t.shape for t in leaves(vars(m), Tensor)) for layer, m in own.moments.items()}
        self.owners = _assigned(sizes, self.shards.size, self.owners)
        if not self.spread:
            return own.reduced(self.place.world)
        return own.reduced(self.place.world, Keep(self.shards.world, self.owners, self.shards.copies))

    def done(self, work: Work, blocks: Mapping[str, Block]) -> dict[str, Any]:
        if not self.spread:
            return super().done(work, blocks)
        return self.shards.world.together(work, "the inverses")

    def union(self, layers: set[Layer]) -> set[Layer]:
        if not self.spread:
            return layers
        return set().union(*self.shards.world.gather(layers, "the layers whose averages were lost"))

    def means(self, own: list[tuple[float, float]]) -> list[tuple[float, float]]:
        if not self.spread:
            return own
        return [mean for its in self.shards.world.gather(own, "the traces of the curvature") for mean in its]

    def applied(self, of: Own, blocks: list[Block], v: Vector, rest: Vector, usable: Names) -> Vector:
        """Computes each layer's direction on the rank that has its inverse."""
        shards, owners = self.shards, self._owners_of(usable)
        shapes = self._shapes(owners)
        among = {n: rank for n, rank in owners.items() if n in rest}
        found = of(self._mine(blocks), shards.gathered(v, owners, shapes), shards.gathered(rest, among, shapes))
        return shards.scattered(found, owners, shapes, next(iter(v.values())))

    def coordinates(self, blocks: list[Block], d: Vector, usable: Names) -> Vector:
        """Owners have all parts of their layers, and other ranks have none."""
        owners = self._owners_of(usable)
        whole = self.shards.gathered(d, owners, self._shapes(owners))
        left = {n: t for n, t in d.items() if n not in owners}
        return super().coordinates(self._mine(blocks), left | whole, usable)

    def _mine(self, blocks: list[Block]) -> list[Block]:
        owner = {n: rank for names, rank in self.owners.items() for n in names}
        return [block for block in blocks if owner[block.names[0]] == self.shards.rank]

    def _owners_of(self, usable: Names) -> dict[str, int]:
        """The owner of each parameter, in an order that is the same on all ranks."""
        wanted = {n for names in usable for n in names}
        return {n: rank for names, rank in self.owners.items() for n in names if n in wanted}

    def _shapes(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        named = dict(self.place.model.named_parameters())
        return {n: tuple(named[n].shape) for n in names}

    def everywhere(self, own: dict[Layer, Operator]) -> dict[Layer, Operator]:
        world = self.shards.world
        layers = world.gather(list(own), "the layers of the curvature")
        operators = world.exchanged([dump(op) for op in own.values()], "the curvature")
        return {
            layer: restore(op)
            for its, ops in zip(layers, operators, strict=True)
            for layer, op in zip(its, ops, strict=True)
        }

    def state(self) -> dict[str, Any]:
        return {"owners": _listed(self.owners)}

    def load(self, saved: dict[str, Any]) -> None:
        self.owners = {tuple(names): rank for names, rank in saved["owners"]}

    def adopt(self, sizes: Sizes) -> tuple[Callable[[str], bool], dict[str, Any]]:
        owners = _assigned({Layer.of_key(key): cost(its) for key, its in sizes.items()}, self.shards.size)
        of = {n: rank for names, rank in owners.items() for n in names}

        def here(key: str) -> bool:
            names = json.loads(key)[1:] if key.startswith("[") else Layer.of_key(key).names
            return not self.spread or of[names[0]] == self.shards.rank

        return here, {"owners": _listed(owners)}


def _assigned(costs: Mapping[Layer, float], ranks: int, known: Owners | None = None) -> Owners:
    """The owner of each layer, the same for layers that share parameters: batches may use a parameter together with
    different others. A layer that shares some with `known` layers has their owner."""
    owners, new = dict(known or {}), dict[tuple[tuple[str, ...], ...], float]()
    for layers in components(costs):
        its = dict.fromkeys(layer.names for layer in layers)
        own = {n for names in its for n in names}
        near = [names for names in owners if not own.isdisjoint(names)]
        if near:
            owners |= dict.fromkeys([*near, *its], owners[near[0]])
        else:
            new[tuple(its)] = sum(costs[layer] for layer in layers)
    for group, rank in assign(new, ranks).items():
        owners |= dict.fromkeys(group, rank)
    return owners


def _listed(owners: Owners) -> list[Any]:
    return [[list(names), rank] for names, rank in owners.items()]
