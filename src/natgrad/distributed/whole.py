"""A model whose parameters are whole on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.curvature.products import Duals, duals_in_place
from natgrad.distributed.sharding import Shards
from natgrad.distributed.world import World

Named = Mapping[str, Tensor]


class Whole:
    """Every rank has all parameters, as in `DistributedDataParallel`; or there is only one rank."""

    shards: Shards | None = None

    def __init__(self, model: nn.Module, world: World):
        self.model, self.world = model, world

    def local(self, t: Tensor) -> Tensor:
        """This rank's part of a parameter, or of its gradient: writing to it changes the whole."""
        return t

    def stored(self, p: Tensor, t: Tensor) -> Tensor:
        """A local tensor of a parameter, in the form for a checkpoint."""
        return t

    def total(self, values: list[float]) -> list[float]:
        """Totals over all parts of numbers that are sums over the entries of local parts; the same on all ranks."""
        return self.world.agreed(values, "the scalars that decide about a step")

    def any(self, flag: bool) -> bool:
        """Whether the flag is set for any part."""
        return flag

    def settle(self) -> None:
        """Called after the parameters were written to, or after a forward without a backward.

        Autocast keeps cast parameters as long as its outermost context, and a training loop may be within it.
        """
        torch.clear_autocast_cache()

    def follow(self, seen: Callable[[dict[str, Tensor]], None]) -> list[Any]:
        """Hooks that call `seen` with the parameters that a forward uses, if these are not the model's own tensors."""
        return []

    def duals(self, direction: Named) -> contextlib.AbstractContextManager[Duals]:
        """Within the context, the parameters used by a forward have `direction` as tangents."""
        return duals_in_place(self.model, direction)
