"""Where a model's parameters are: whole on every rank, or a shard on each."""

from __future__ import annotations

import sys

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from natgrad.checks.parameters import check_model
from natgrad.distributed.whole import Whole
from natgrad.distributed.world import CPU, World


def placed(model: nn.Module) -> Whole:
    """Where the parameters of a model are that may be wrapped by `DistributedDataParallel`, or sharded by
    `fully_shard`.

    Raises:
        TypeError: if it is no module.
        NotImplementedError: if some parameters are sharded in another way.
    """
    check_model(model)
    device = next((p.device for p in model.parameters()), CPU)
    if isinstance(model, DistributedDataParallel):
        return Whole(model.module, World(model.process_group, device))
    # The classes of sharded parameters take longer to import than all else here: where there are some, they are.
    if "torch.distributed.tensor" in sys.modules:
        from natgrad.distributed.sharded import sharded

        return sharded(model, device) or Whole(model, World())
    return Whole(model, World())


def placed_within(around: DistributedDataParallel, model: nn.Module) -> Whole:
    """Where the parameters are of a model that is a part of what is in `DistributedDataParallel`."""
    device = next((p.device for p in model.parameters()), CPU)
    return Whole(model, World(around.process_group, device))


def unwrapped(model: nn.Module) -> tuple[nn.Module, World]:
    """The module within `DistributedDataParallel`, and the ranks it is on; any other module, alone.

    Raises:
        NotImplementedError: if parameters are sharded.
    """
    place = placed(model)
    if place.shards is not None:
        raise NotImplementedError(
            "the model's parameters are sharded over ranks (fully_shard); expected whole parameters, and "
            "torch.nn.parallel.DistributedDataParallel for several ranks"
        )
    return place.model, place.world


def refuse_ranks(optimizer: str, place: Whole) -> None:
    """Raises NotImplementedError for an optimizer of one rank where there are several."""
    if place.world.size > 1 or place.shards:
        raise NotImplementedError(
            f"{optimizer} sees the batches of its own rank alone, and the model is on {place.world.size} ranks; use "
            "natgrad.KFAC"
        )
