"""The model, its data and its placement, which the tests of several ranks share."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

D, C, N = 5, 3, 48


def batch(step: int, n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(n, D, generator=generator, dtype=torch.float64)
    return x, (x[:, 0] + x[:, 1] > 0).long() + (x[:, 2] > 1).long()


def network(few: bool | str = False) -> nn.Module:
    torch.manual_seed(0)
    if few == "no bias":
        first = nn.Linear(D, 7, bias=False)
        return nn.Sequential(first, nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, C)).double()
    if few:  # layers than some of four ranks have none of
        return nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, C)).double()
    return nn.Sequential(
        nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, 7, bias=False), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, C)
    ).double()


def placed(model: nn.Module, group: Any, sharded: str) -> nn.Module:
    """The model on a group's ranks: `""` by DistributedDataParallel, `"fsdp"` or `"hsdp"` by fully_shard; as it is
    without a group."""
    if group is None:
        return model
    if not sharded:
        return DistributedDataParallel(model, process_group=group)
    if sharded == "fsdp":
        mesh = DeviceMesh.from_group(group, "cpu")
    else:
        mesh = DeviceMesh("cpu", torch.arange(dist.get_world_size()).view(2, -1), mesh_dim_names=("copy", "shard"))
    for part in list(model.modules())[1:]:
        if any(True for _ in part.parameters(recurse=False)) and not isinstance(part, nn.LayerNorm):
            fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(p: Tensor) -> Tensor:
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()


def share_of(n: int, rank: int, size: int, uneven: bool | str) -> slice:
    """A rank's part of a batch of `n`; with `"none"` the last rank has none of it."""
    if uneven == "none" and size > 1:
        return slice(n, n) if rank == size - 1 else share_of(n, rank, size - 1, False)
    if not uneven:
        return slice(rank * n // size, (rank + 1) * n // size)
    cuts = [0, *(n * (r + 1) ** 2 // size**2 for r in range(size))]
    return slice(cuts[rank], cuts[rank + 1])
