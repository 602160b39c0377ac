"""A model whose parameters are whole on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from natgrad.curvature.products import Duals, duals_in_place
from natgrad.distributed.sharding import Shards
from natgrad.distributed.world import World

Named = Mapping[str, Tensor]


class Whole:
    """Every rank has all parameters, as within `DistributedDataParallel`; or there is one rank."""

    shards: Shards | None = None

    def __init__(self, model: nn.Module, world: World):
        self.model, self.world = model, world

    def local(self, t: Tensor) -> Tensor:
        """This rank's part of a parameter, or of its gradient: writing to it changes the whole."""
        return t

    def stored(self, p: Tensor, t: Tensor) -> Tensor:
        """A local tensor of a parameter as a checkpoint is to have it."""
        return t

    def total(self, values: list[float]) -> list[float]:
        """Numbers that are sums over the entries of local parts, over all parts: the same on all ranks."""
        return self.world.agreed(values, "the numbers that a step is decided by")

    def any(self, flag: bool) -> bool:
        """Whether it is so for one of the parts."""
        return flag

    def settle(self) -> None:
        """After the parameters have been written to, or a forward has been run without a backward."""

    def follow(self, seen: Callable[[dict[str, Tensor]], None]) -> list[Any]:
        """Hooks by which `seen` is called with the parameters that a forward uses, where they are not the model's."""
        return []

    def duals(self, direction: Named) -> contextlib.AbstractContextManager[Duals]:
        """Within, the parameters that a forward of the model uses have the direction for tangents."""
        return duals_in_place(self.model, direction)
