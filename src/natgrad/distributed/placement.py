"""Whether a model's parameters are whole on every rank, or sharded."""

from __future__ import annotations

import sys

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from natgrad.checks.parameters import check_model
from natgrad.distributed.whole import Whole
from natgrad.distributed.world import CPU, World


def placed(model: nn.Module) -> Whole:
    """The placement of a model's parameters. The model may be wrapped by `DistributedDataParallel`, or sharded by
    `fully_shard`.

    Raises:
        TypeError: if it is not a module.
        NotImplementedError: if some parameters are sharded in another way.
    """
    check_model(model)
    device = next((p.device for p in model.parameters()), CPU)
    if isinstance(model, DistributedDataParallel):
        return Whole(model.module, World(model.process_group, device))
    # The import of sharded parameters' classes takes longer than everything else here, so it happens only if needed.
    if "torch.distributed.tensor" in sys.modules:
        from natgrad.distributed.sharded import sharded

        return sharded(model, device) or Whole(model, World())
    return Whole(model, World())


def placed_within(around: DistributedDataParallel, model: nn.Module) -> Whole:
    """The placement of the parameters of a model that is part of a module in `DistributedDataParallel`."""
    device = next((p.device for p in model.parameters()), CPU)
    return Whole(model, World(around.process_group, device))


def unwrapped(model: nn.Module) -> tuple[nn.Module, World]:
    """The module inside `DistributedDataParallel` with its ranks; any other module with a single rank.

    Raises:
        NotImplementedError: if parameters are sharded.
    """
    place = placed(model)
    if place.shards is not None:
        raise NotImplementedError(
            "the model's parameters are sharded over ranks (fully_shard); expected whole parameters: for "
            "several ranks, use torch.nn.parallel.DistributedDataParallel"
        )
    return place.model, place.world


def refuse_ranks(optimizer: str, place: Whole) -> None:
    """Raises NotImplementedError if there are several ranks, for an optimizer that supports one."""
    if place.world.size > 1 or place.shards:
        raise NotImplementedError(
            f"{optimizer} sees only the batches of its own rank, but the model is on {place.world.size} ranks; use "
            "natgrad.KFAC"
        )
