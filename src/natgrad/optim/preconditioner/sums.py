"""The sums of batches, over the layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from natgrad.capture.layer import Layer, parted
from natgrad.curvature.central_moments import CentralMoments
from natgrad.curvature.moments import Moments, merge, reconciled
from natgrad.distributed.reduction import Keep, Reduction, completed, reduced
from natgrad.distributed.world import World

KINDS = "the moments", "the squares", "the scales"
"""The kinds of sums, for messages between ranks."""


@dataclass
class Statistics:
    """The sums of some batches: each layer's moments, the squares of the gradients in eigenbases, and the central
    moments of data, which give the scales of inputs. `elsewhere` are layers whose moments and squares are on other
    ranks."""

    moments: dict[Layer, Moments] = field(default_factory=dict)
    squares: dict[Layer, Moments] = field(default_factory=dict)
    scales: dict[Layer, CentralMoments] = field(default_factory=dict)
    elsewhere: tuple[Layer, ...] = ()

    def __add__(self, other: Statistics) -> Statistics:
        """A weight and its bias are apart if the two used one of them together with different others. A layer that only
        one of the two has counts in both: in the mean over all cases, its gradients are zero in the other's."""
        if self.moments and other.moments and self.moments.keys() != other.moments.keys():
            every = [*self.layers, *other.layers]
            self, other = self.settled(every), other.settled(every)
            return self._sum(other)._with_mass(self._mass + other._mass)
        return self._sum(other)

    def _sum(self, other: Statistics) -> Statistics:
        sums = (merge(pair) for pair in zip(self._each(), other._each(), strict=True))
        return self.of(sums, [*self.elsewhere, *other.elsewhere])

    @property
    def _mass(self) -> Tensor:
        """The mass of the cases, the same for all layers."""
        return next(iter(self.moments.values())).mass

    def _with_mass(self, mass: Tensor) -> Statistics:
        moments = {layer: replace(m, mass=mass) for layer, m in self.moments.items()}
        squares = {layer: replace(m, mass=mass) for layer, m in self.squares.items()}
        return replace(self, moments=moments, squares=squares)

    @classmethod
    def of(cls, sums: Iterable[dict[Layer, Any]], elsewhere: Iterable[Layer] = ()) -> Statistics:
        moments, squares, scales = sums
        return cls(moments, squares, scales, tuple(dict.fromkeys(elsewhere)))

    def _each(self) -> Sequence[dict[Layer, Any]]:
        return self.moments, self.squares, self.scales

    @property
    def layers(self) -> list[Layer]:
        """The layers of all ranks."""
        return [*self.moments, *self.elsewhere]

    def settled(self, among: Sequence[Layer]) -> Statistics:
        """Those of the weight and of the bias apart, where one of them is also used together with different others.
        `among`: all layers that are used."""
        apart = parted(among)
        if not apart:
            return self
        moments = reconciled(self.moments, apart)
        scales = merge({layer.apart()[0] if layer in apart else layer: m} for layer, m in self.scales.items())
        squares = {layer: m for layer, m in self.squares.items() if layer in moments}
        elsewhere = [its for layer in self.elsewhere for its in (layer.apart() if layer in apart else (layer,))]
        return self.of((moments, squares, scales), elsewhere)

    def completed(self, world: World) -> Statistics:
        """Adds zeros for layers that only other ranks have statistics of."""
        return self.of(completed(sums, world) for sums in self._each())

    def reduced(self, world: World, keep: Keep | None = None) -> Statistics:
        """The statistics summed over all ranks; with `keep`, moments and squares only for the layers of this rank."""
        keeps = keep, keep, None  # every rank has the few numbers of the scales
        sums = [reduced(s, world, what, k) for s, what, k in zip(self._each(), KINDS, keeps, strict=True)]
        return self.of(sums, (layer for layer in self.moments if layer not in sums[0]))

    def begun(self, world: World) -> Callable[[], Statistics]:
        """Starts `reduced`. The returned function waits for its result."""
        kinds = zip(self._each(), KINDS, strict=True)
        begun = [Reduction(s, world, what) if s or s is self.moments else None for s, what in kinds]
        return lambda: self.of({} if each is None else each.result() for each in begun)

    def finite(self) -> bool:
        every = [m for sums in self._each() for m in sums.values()]
        return not every or bool(torch.stack([m.is_finite() for m in every]).all())

    def decayed(self, decay: float, new: Statistics) -> Statistics:
        """The moving average, updated with a new batch. Layers that are not in the batch do not change."""
        sums = (_decayed(past, decay, its) for past, its in zip(self._each(), new._each(), strict=True))
        return self.of(sums, [*self.elsewhere, *new.elsewhere])

    def spoiled(self) -> set[Layer]:
        """The layers with sums that are not finite."""
        return {layer for sums in self._each() for layer, m in sums.items() if not bool(m.is_finite())}

    def without(self, gone: Collection[Layer]) -> Statistics:
        """The statistics of the other layers."""
        sums = ({layer: m for layer, m in s.items() if layer not in gone} for s in self._each())
        return self.of(sums, (layer for layer in self.elsewhere if layer not in gone))


def _decayed(past: Mapping[Layer, Any], decay: float, new: Mapping[Layer, Any]) -> dict[Layer, Any]:
    joined = {layer: decay * past[layer] + m if layer in past else m for layer, m in new.items()}
    return {**past, **joined}
